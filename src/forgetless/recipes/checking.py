"""What the values of a recipe refer to, looked at before any weight is loaded."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forgetless.adapters.foreign import require_within
from forgetless.adapters.ranks import layer_ranks, narrowed
from forgetless.adapters.settings import AdapterSettings, OPLoRA, Ties
from forgetless.core.errors import RecipeError, UserError, first_line
from forgetless.core.files import load_yaml
from forgetless.core.settings import with_overrides
from forgetless.data.examples import ChatTemplate, as_kind, load_examples, require_kind
from forgetless.data.held import require_two_parts
from forgetless.data.modality import load_processor, modality_of, new_classes
from forgetless.data.settings import DATA
from forgetless.data.texts import SELF, read_examples
from forgetless.methods import find, known
from forgetless.models.heads import add_head, new_modules
from forgetless.models.load import config_of, device_of, head_of, is_stored_packed, meta_model
from forgetless.models.quantised import unavailable
from forgetless.models.state import require_checkpointing
from forgetless.models.targets import target_layers
from forgetless.models.weights import weight_shape
from forgetless.recipes.measuring import probed, tasked
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.moments import is_statistics
from forgetless.tasks import Task, make_tasks
from forgetless.tasks.accuracy import ClassTask
from forgetless.training.forgetting import from_settings
from forgetless.training.launch import Launch, this_launch
from forgetless.training.model import compile_problems
from forgetless.training.optimizers import optimizer_problems
from forgetless.training.penalties import make_penalty
from forgetless.training.penalties.penalty import HeldTexts
from forgetless.training.settings import ProbeSettings
from forgetless.training.trackers import tracker_problems


class Checker:
    """Checks recipes; whatever several of them share is looked at once.

    Args:
        launch: which they are for; None for that of this process.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self._launch = launch or this_launch()
        self._seen: dict[str, tuple[Any, str | None]] = {}

    def check(self, recipe: Recipe) -> list[str]:
        """The problems of one recipe, see `check`."""
        found = [
            *self.adapter(recipe.base, recipe.adapter),
            *self._loading(recipe),
            *self._head(recipe),
            *_loraplus(recipe),
            *self._checkpointing(recipe),
            *optimizer_problems(recipe.training),
            *compile_problems(recipe.training),
            *tracker_problems(recipe.training),
            *self._data(recipe),
            *self._preference(recipe),
            *self._calibration(recipe),
            *self._penalties(recipe),
            *self._probes(recipe),
            *self._launch.obstacles(
                recipe.training,
                penalties=bool(recipe.penalties),
                probes=recipe.probes != ProbeSettings(),
            ),
            *_sequence(recipe, self._launch),
            *self._aftercare(recipe),
            *self._tasks(recipe),
        ]
        return list(dict.fromkeys(found))

    def _attempt(self, look: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        """What ``look`` gives, or what was wrong; asked once for the same arguments."""
        key = f"{look!r}{arguments!r}"
        if key not in self._seen:
            try:
                self._seen[key] = look(*arguments), None
            except (ValueError, TypeError, OSError) as problem:
                self._seen[key] = None, str(problem)
        return self._seen[key]

    def _problem(self, where: str, look: Callable[..., Any], *arguments: Any) -> list[str]:
        """``where: what was wrong``, if anything was."""
        _, problem = self._attempt(look, *arguments)
        return [] if problem is None else [f"{where}: {problem}"]

    def _shapes(self, recipe: Recipe) -> Any:
        """The shapes of the base; None where it cannot be loaded."""
        return self._attempt(_shapes, recipe.base, recipe.adapter.has_new_head)[0]

    def adapter(self, base: str, settings: AdapterSettings) -> list[str]:
        """The problems of an adapter on a base."""
        found = self._problem("base", _shapes, base, settings.has_new_head)
        found = found or self._problem("base", load_processor, base)
        method, problem = self._attempt(find, settings.method)
        if problem is not None:
            return [*found, f"adapter.method: {problem}"]
        if method.factors is None:
            return found
        options = self._problem("adapter.options", method.check, 1, (1, 1), settings.options)
        shapes = _with_head if settings.has_new_head and not found else _shapes
        model, _ = self._attempt(shapes, base)
        layers = () if options or model is None else _rank_problems(model, settings)
        return [*found, *options, *layers]

    def _loading(self, recipe: Recipe) -> Iterator[str]:
        """What keeps the base from being loaded as the recipe asks."""
        config, problem = self._attempt(config_of, recipe.base)
        if problem is not None:  # which the adapter's own check tells
            return
        is_packed, launch = is_stored_packed(config), self._launch
        if recipe.attn_implementation is not None:
            look = _with_attention, recipe.base, recipe.attn_implementation
            yield from self._problem("attn_implementation", *look)
        if recipe.device_map is not None and launch.processes > 1:
            yield "device_map: is for one process; leave it out, or run without a launcher"
        if recipe.quantise is None and not is_packed:
            return
        where = "base" if recipe.quantise is None else "quantise"
        if recipe.quantise is not None and is_packed:
            yield "quantise: the base is stored in fewer bits already; leave quantise out"
        elif recipe.quantise is not None and (lack := unavailable(device_of())):
            yield f"quantise: {recipe.quantise!r} {lack}"
        head, _ = self._attempt(head_of, recipe.base)
        if recipe.quantise is not None and head.modality != "language":
            yield "quantise: fewer bits are for causal language models"
        if recipe.adapter.method == "full":
            yield (
                f"{where}: packed weights cannot be trained, as method 'full' would; take a method "
                "with an adapter, or a base that is not packed"
            )
        if recipe.sequence is not None and recipe.sequence.between == "merge":
            yield f"{where}: nothing can be merged into packed weights; stack or continue"
        if launch.strategy not in (None, "DDP"):
            yield f"{where}: {launch.strategy} cannot cut packed weights; train in one process"

    def _head(self, recipe: Recipe) -> Iterator[str]:
        """What is wrong with the new head, or with settings for one that there is not."""
        if recipe.adapter.has_new_head:
            if self._shapes(recipe) is not None:
                yield from self._problem("adapter.head", _with_head, recipe.base)
            return
        for name in ("head_learning_rate", "probe_steps"):
            if getattr(recipe.training, name):
                yield f"training.{name}: is for a new head; set adapter.head: new, or leave it out"

    def _checkpointing(self, recipe: Recipe) -> list[str]:
        """Whether the base can recompute activations, where that is asked for."""
        model = self._shapes(recipe)
        try:
            if model is not None and recipe.training.gradient_checkpointing:
                require_checkpointing(model)
        except UserError as problem:
            return [str(problem)]
        return []

    def _data(self, recipe: Recipe) -> Iterator[str]:
        classes: set[str] = set()
        failed = False
        for path, _ in recipe.data.sources:
            examples, problem = self._readable(recipe, path)
            if problem is not None:
                failed = True
                yield f"data.train: {problem}"
                continue
            try:
                as_kind(recipe.data.format, examples)
            except ValueError as misfit:
                yield f"data.format: {misfit}"
            if recipe.data.augment is not None and examples.kind != "image":
                yield f"data.augment: is for images, and {path} has none; leave it out"
            if examples.kind == "image":
                classes |= {record["label"] for record in examples}
        if len(classes) == 1 and not failed:
            yield f"data.train: has the class {classes.pop()!r} alone; nothing tells it from others"

    def _preference(self, recipe: Recipe) -> Iterator[str]:
        """What does not go with learning from pairs, or that pairs are there for nothing."""
        wanted, where = recipe.training.preference, "training.preference"
        for path, _ in recipe.data.sources:
            examples, _ = self._attempt(load_examples, path)
            if examples is None:
                continue
            if wanted is None and examples.kind == "preference":
                yield f"{where}: is null, and {path} has pairs of answers; give it {{loss: dpo}}"
            if wanted is not None and examples.kind != "preference":
                yield f"{where}: learns from rows of chosen and rejected, and {path} has others"
        if wanted is None:
            return
        if wanted.loss == "dpo" and recipe.adapter.method == "full":
            yield f"{where}: dpo compares with the base, which full replaces; take the loss orpo"
        if recipe.data.pack is True:
            yield "data.pack: pairs of answers are not packed; leave it out"
        beside = ("repair", "dial", "comparators", "spectra", "residual")
        for name in filter(lambda key: getattr(recipe, key), beside):
            yield f"{name}: weighs the loss of answers, which is not what pairs teach; leave it out"

    def _readable(self, recipe: Recipe, path: str) -> tuple[Any, str | None]:
        """The examples of a file of the training data, or what is wrong with them."""
        examples, problem = self._attempt(load_examples, path)
        if problem is None:
            head = recipe.adapter.head
            new = recipe.data.sources[0][0] if recipe.adapter.has_new_head else None
            said = recipe.data.chat_template, recipe.data.system
            _, problem = self._attempt(self._require_readable, recipe.base, path, new, head, said)
        return examples, problem

    def _require_readable(
        self,
        base: str,
        path: str,
        new: str | None,
        head: str | Sequence[str],
        said: tuple[ChatTemplate, str | None],
    ) -> None:
        """Raise what the base's processor has against a file's examples, ``said`` by a template."""
        examples, _ = self._attempt(load_examples, path)
        examples = replace(examples, chat_template=said[0], system=said[1])
        processor = self._processor(base, new, head)
        if processor is None:
            return
        modality = modality_of(base)
        if path == new and modality.labels is not None:
            processor = processor.under("new")
        modality.check(examples, processor)

    def _processor(self, base: str, new: str | None, head: str | Sequence[str]) -> Any:
        """That of the base, if it can be loaded.

        Where it has a new head, ``head`` names its classes, or they are those of the file ``new``.
        """
        if self._attempt(_shapes, base, new is not None)[1] is not None:
            return None
        processor, problem = self._attempt(load_processor, base)
        modality = None if problem else modality_of(base)
        if modality is None or new is None or modality.labels is None:
            return processor
        return processor.with_new(new_classes(modality, new) if isinstance(head, str) else head)

    def _require_classes(
        self, base: str, new: str | None, head: str | Sequence[str], task: ClassTask
    ) -> None:
        """Raise what of a task's classes the base cannot be asked."""
        processor = self._processor(base, new, head)
        labels = modality_of(base).labels if processor is not None else None
        if labels is not None:
            task.require_known(processor, labels(task.examples))

    def _calibration(self, recipe: Recipe) -> Iterator[str]:
        method = known(recipe.adapter.method)
        if method is None:
            return
        if "second_moment" in method.needs or recipe.is_repaired:
            where, look = "calibration.source", self._require_kept
            for source, _ in recipe.calibration.sources:
                if source != DATA:
                    yield from self._problem(where, look, recipe.base, source)

    def _require_kept(self, base: str, source: str) -> None:
        """Raise what is wrong with what is to be kept, or that the base does not read such."""
        modality, problem = self._attempt(modality_of, base)
        if source != SELF:
            examples = read_examples(source)
            if problem is None:
                require_kind(examples, modality.kinds)
            examples.require_whole()
        elif problem is None and modality.own_texts is None:
            raise UserError(f"base {base!r} says nothing by itself; name what it is to keep")

    def _aftercare(self, recipe: Recipe) -> Iterator[str]:
        """What is wrong with the repair, the dial, the comparators, the spectra and their texts."""
        wanted, method = recipe.repair, known(recipe.adapter.method)
        if recipe.is_repaired:
            wanted = None
        if recipe.residual and method is not None and method.trains != ("A", "B"):
            yield f"residual: a start of {method.name!r} is not kept, so none can be taken away"
        beside = recipe.dial, recipe.comparators, recipe.spectra, recipe.residual
        if wanted is None and not any(beside):
            return
        if self._is_bare(recipe):
            yield (
                "repair, dial, comparators, residual and spectra hold out what the base's own head "
                "says, and this base has none; leave them out"
            )
            return
        yield from self._comparators(recipe)
        try:
            kept = recipe.text_to_keep
            if kept != SELF and not is_statistics(kept):
                yield from self._problem("repair.keep", require_two_parts, kept)
        except UserError as problem:
            yield f"repair.keep: {problem}"
        task = DATA if wanted is None else wanted.task
        if task == DATA and (wanted is not None or recipe.dial):
            trained = recipe.data.sources[0][0], recipe.data.limit
            yield from self._problem("data.train", require_two_parts, *trained)
        if wanted is None:
            return
        if task not in (None, DATA) and not is_statistics(str(task)):
            yield from self._problem("repair.task", require_two_parts, str(task))
        if recipe.adapter.use_dora and recipe.adapter.method != "full":
            yield "repair: a DoRA adapter has no A to repair; leave use_dora or the repair out"

    def _comparators(self, recipe: Recipe) -> Iterator[str]:
        model = self._shapes(recipe)
        try:
            layers = target_layers(model, recipe.adapter.target_modules) if model else {}
        except ValueError:  # which the adapter's own check tells
            layers = {}
        least = min((min(weight_shape(layer)) for layer in layers.values()), default=0)
        seen: set[str] = set()
        for position, wanted in enumerate(recipe.comparators if layers else ()):
            where = f"comparators.{position}"
            if wanted.label in seen:
                yield f"{where}: asked for twice, as {wanted.label}; leave one out"
            seen.add(wanted.label)
            if isinstance(wanted, OPLoRA) and wanted.directions > least:
                yield f"{where}.directions: must be at most {least}, the layers' shortest side"
            for folder in wanted.adapters if isinstance(wanted, Ties) else ():
                yield from self._problem(f"{where}.adapters", require_within, folder, model, layers)

    def _penalties(self, recipe: Recipe) -> Iterator[str]:
        for position, spec in enumerate(recipe.penalties):
            penalty, problem = self._attempt(make_penalty, spec)
            if problem is None:
                _, problem = self._attempt(penalty.check, recipe.adapter.method)
            if problem is None and isinstance(penalty, HeldTexts) and self._is_bare(recipe):
                problem = f"{spec['kind']} asks the base's own head, and this base has none"
            if problem is not None:
                yield f"penalties.{position}: {problem}"

    def _is_bare(self, recipe: Recipe) -> bool:
        """Whether the base is an encoder without a head."""
        config, _ = self._attempt(config_of, recipe.base)
        return config is not None and getattr(config, "own_classes", None) == 0

    def _probes(self, recipe: Recipe) -> Iterator[str]:
        wanted = probed(recipe)
        asked = wanted, recipe.data.said
        yield from self._problem("probes", from_settings, *asked)
        if callback := self._attempt(from_settings, *asked)[0]:
            probes = callback.probes
            tasks = [*probes.learning.values(), *probes.forgetting.values()]
            yield from self._for_others("probes", recipe.base, tasks)

    def _for_others(self, where: str, base: str, tasks: Iterable[Task]) -> Iterator[str]:
        """Which of the tasks are for bases of another modality."""
        head, problem = self._attempt(head_of, base)
        for task in tasks:
            if problem is None and task.modality != head.modality:
                yield f"{where}: task {task.name!r} is not for {head.noun}, which base {base!r} is"

    def _tasks(self, recipe: Recipe) -> Iterator[str]:
        names: set[str] = set()
        first = recipe.data.sources[0][0] if recipe.adapter.has_new_head else None
        # The classes of unreadable data are not known, and one mistake is told once.
        unread = any(self._readable(recipe, path)[1] for path, _ in recipe.data.sources)
        wanted, _ = self._attempt(tasked, recipe)  # None where the base is none, which is told
        for kind in ("learning", "forgetting"):
            for position, spec in enumerate(getattr(wanted or recipe.tasks, kind)):
                where = f"tasks.{kind}.{position}"
                yield from self._problem(where, make_tasks, spec, recipe.data.said)
                made = self._attempt(make_tasks, spec, recipe.data.said)[0] or ()
                others = list(self._for_others(where, recipe.base, made))
                yield from others
                for task in made:
                    if isinstance(task, ClassTask) and not (others or unread):
                        asked = recipe.base, first, recipe.adapter.head, task
                        yield from self._problem(where, self._require_classes, *asked)
                    if kind == "learning" and _is_trained_on(task, recipe):
                        yield f"{where}: the images are those of data.train; give others to test on"
                    if task.name in names:
                        yield (
                            f"{where}: a second task named {task.name!r}; give it a 'name' of its "
                            "own"
                        )
                    names.add(task.name)


def _with_head(base: str) -> Any:
    """The shapes of a base with a new head."""
    if modality_of(base).labels is None:
        raise UserError("new heads are for classifiers, and this base answers with tokens")
    model = meta_model(base, bare=True)
    return model if new_modules(model) else add_head(model, ["", " "])


def _with_attention(base: str, implementation: str) -> Any:
    """The shapes of a base whose attention is computed in another way."""
    try:
        return meta_model(base, bare=True, attn_implementation=implementation)
    except ImportError as problem:  # of the package that computes it
        raise UserError(first_line(problem)) from None


def _shapes(base: str, has_new_head: bool = False) -> Any:
    """The shapes of a base, which may be without a head where it is to have a new one."""
    return meta_model(base, bare=has_new_head)


def _is_trained_on(task: Task, recipe: Recipe) -> bool:
    """Whether a task shows images of the training data, which say nothing of other ones."""
    if task.kind != "image_accuracy":
        return False
    shown = Path(task.path).resolve()  # type: ignore[attr-defined]
    return any(Path(path).resolve() == shown for path, _ in recipe.data.sources)


def _rank_problems(model: Any, settings: AdapterSettings) -> Iterator[str]:
    """The rank against every layer; one sentence for all layers of a shape and rank."""
    try:
        layers = target_layers(model, settings.target_modules)
    except ValueError as problem:
        yield f"adapter.target_modules: {problem}"
        return
    patterns = settings.rank_pattern, settings.alpha_pattern
    try:
        ranks = layer_ranks(layers, settings.rank, settings.alpha, *patterns)
    except ValueError as problem:
        yield f"adapter.{problem}"
        return
    ranks = narrowed(ranks, layers, settings.rank_pattern)
    alike: dict[tuple[int, tuple[int, int]], list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault((ranks[name].rank, weight_shape(layer)), []).append(name)
    for (rank, shape), names in alike.items():
        try:
            find(settings.method).check(rank, shape, {}, names[0])
        except ValueError as problem:
            more = f" (and {len(names) - 1} more of this shape)" if len(names) > 1 else ""
            yield f"adapter.rank: {problem}{more}"


def _sequence(recipe: Recipe, launch: Launch) -> Iterator[str]:
    """What a run cannot be in a sequence."""
    sequence, repair = recipe.sequence, recipe.repair
    if sequence is None:
        return
    if recipe.data.columns or recipe.data.validation is not None:
        yield (
            "data.columns, data.validation: each task of a sequence has data of its own; write "
            "them behind it, as in FILE#prompt=q,completion=a,rest=0.1, and behind the path of its "
            "test, FILE#prompt=q,completion=a,held=0.1"
        )
    full, dora = recipe.adapter.method == "full", recipe.adapter.use_dora
    alone = sequence.between != "continue"
    if recipe.adapter.head == "new":
        yield (
            "adapter.head: the tasks of a sequence share one new head; name the classes of all of "
            "them, head: [a, b, ...]"
        )
    elif wrong := [c for c in sequence.classes or () if c not in recipe.adapter.head]:
        yield f"sequence.classes: {wrong[0]!r} is no class of the new head, {recipe.adapter.head}"
    if full and (alone or repair):
        yield "sequence: full has no adapter to stack, merge or repair; continue without a repair"
    method = known(recipe.adapter.method)
    if sequence.apart is not None and (not alone or method is None or "A" not in method.trains):
        yield "sequence.apart: is for new adapters that train A; stack or merge, or leave it out"
    if dora and (alone or repair) and not full:
        yield "sequence: a DoRA is no sum and has no A to repair; leave use_dora out"
    if (alone or repair) and launch.processes > 1:
        yield "sequence: stack, merge and repair are the work of one process"
    if repair is not None:
        if repair.strength != "auto" and len(repair.strength) > 1:
            yield f"repair.strength: one that the next task starts from, got {repair.strength}"
        asked = repair.keep, repair.max_kl, repair.max_drop
        if asked != (None, None, None) or repair.scales != [1.0] or repair.task not in (None, DATA):
            yield (
                "repair: in a sequence it has a strength and a task, 'data' or null; what is to be "
                "kept is the calibration's text and the inputs of earlier tasks"
            )


def _loraplus(recipe: Recipe) -> Iterator[str]:
    """The rates of A and B can only differ where both are trained."""
    method = known(recipe.adapter.method)
    if recipe.training.loraplus_ratio != 1 and method and method.trains != ("A", "B"):
        yield (
            f"training.loraplus_ratio: {method.name!r} trains {' and '.join(method.trains)} "
            "alone, so there is no ratio of rates; leave it at 1 and set learning_rate"
        )


def check(recipe: Recipe) -> list[str]:
    """Every problem that can be known before any weight is loaded; empty when there is none.

    Looks for the base, the data and the calibration text, reads them, builds the model's shapes on
    the meta device, and asks the method about its rank and options and each task about its spec.
    """
    return Checker().check(recipe)


def load_recipe(
    given: Recipe | Mapping[str, Any] | str | Path,
    overrides: Mapping[str, Any] | None = None,
    checker: Checker | None = None,
) -> Recipe:
    """The recipe of a YAML file or a mapping, with all that is wrong with it told together.

    A user sees the misspelt key and the missing file in one go: what is left of a recipe without
    the values that are not even well-formed is checked too. `overrides` are dotted keys with their
    values, `checker` is that of other recipes which share files with this one.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: one line for each problem.
    """
    if isinstance(given, Recipe):
        return given.override(overrides) if overrides else given
    source = "recipe" if isinstance(given, Mapping) else str(given)
    content = given if isinstance(given, Mapping) else load_yaml(given)
    try:
        return Recipe.parse(content, overrides, source=source)
    except RecipeError as error:
        rest = _well_formed_part(with_overrides(content, overrides or {}))
        further = [] if rest is None else (checker or Checker()).check(rest)
        raise RecipeError(source, [*error.problems, *further]) from None


def _well_formed_part(content: dict[str, Any]) -> Recipe | None:
    """The recipe without its malformed values; None when what is left is no recipe."""
    for _ in range(2):
        try:
            return Recipe.model_validate(content)
        except ValidationError as error:
            details = error.errors()
        for detail in details:
            section: Any = content
            for part in detail["loc"][:-1]:
                section = section.get(part) if isinstance(section, dict) else None
            if isinstance(section, dict) and detail["loc"]:
                section.pop(detail["loc"][-1], None)
    return None
