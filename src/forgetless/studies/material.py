"""What a run is made of: its data, its tasks, its folder, and the models that it is done with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from forgetless.adapters.earlier import on_earlier
from forgetless.adapters.folders import load
from forgetless.adapters.plain import PlainLora
from forgetless.core.errors import UserError
from forgetless.core.files import lock, new_folder, read_json, write_jsonl
from forgetless.data.examples import load_examples
from forgetless.data.mixture import Mixture
from forgetless.data.modality import Modality, Processor, Rows, modality_of, new_classes
from forgetless.data.shown import template_of
from forgetless.data.texts import OWN_SEED
from forgetless.methods import find
from forgetless.models.heads import learn_among
from forgetless.models.load import load_model
from forgetless.recipes.identity import base_words
from forgetless.recipes.measuring import tasked
from forgetless.recipes.recipe import Recipe
from forgetless.scores.cache import digest
from forgetless.studies.folder import RunFolder, is_kept, note_files
from forgetless.tasks import Task, make_tasks
from forgetless.tasks.kl import KL, OWN_TEXTS

OWN_FILE = "texts.jsonl"


@dataclass
class Material:
    """What the stages of a run stand on; one model is held at a time."""

    folder: RunFolder
    recipe: Recipe
    _held: tuple[str, Any] | None = field(default=None, init=False)
    _earlier: PlainLora | None = field(default=None, init=False)

    @cached_property
    def tasks(self) -> list[tuple[Task, str]]:
        """Every task with its kind, in the recipe's order."""
        specs = tasked(self.recipe, self.own_text)
        return [
            (task, kind)
            for kind, given in (("learning", specs.learning), ("forgetting", specs.forgetting))
            for spec in given
            for task in make_tasks(spec, self.recipe.data.said)
        ]

    def own_text(self, task: Mapping[str, Any]) -> str:
        """The file of what the base writes for a task, the same for all runs of the study."""
        asked = task.get("limit") or OWN_TEXTS, task.get("max_length", KL.max_length), OWN_SEED
        key = digest(*base_words(self.recipe), *map(str, asked))
        folder = self.shared / "own" / key
        with lock(folder.with_suffix(".lock")):
            if not is_kept(folder):
                assert self.modality.own_texts is not None  # a check has refused other bases
                texts = self.modality.own_texts(self._base(), self.processor, *asked)
                rows = [{"text": text} for text in texts if text.strip()]
                with new_folder(folder) as new:
                    write_jsonl(new / OWN_FILE, rows)
                    note_files(new)
        return str(folder / OWN_FILE)

    @cached_property
    def modality(self) -> Modality:
        """What the base reads."""
        return modality_of(self.recipe.base)

    @cached_property
    def processor(self) -> Processor:
        """What reads data for the base, with its new head."""
        processor = self.modality.load_processor(self.recipe.base)
        return processor.with_new(self.new_classes) if self.new_classes else processor

    @cached_property
    def new_classes(self) -> list[str]:
        """The classes of the new head: those named, or of the first training data; often none."""
        adapter = self.recipe.adapter
        if adapter.head != "new":
            return list(adapter.head) if adapter.has_new_head else []
        return new_classes(self.modality, self.recipe.data.sources[0][0])

    @cached_property
    def rows(self) -> Rows:
        """What is trained on, as the base reads it."""
        data, parts = self.recipe.data, []
        how: dict[str, Any] = {"max_length": data.max_length, "pack": data.pack}
        if data.augment is not None:
            how |= {"augment": data.augment, "seed": self.recipe.seed}
        for number, (path, _) in enumerate(data.sources):
            examples = load_examples(path, **data.reading)
            is_new = self.new_classes and number == 0
            reader = self.processor.under("new") if is_new else self.processor
            parts.append(self.modality.rows(examples, reader, **how))
        if isinstance(data.train, str):
            return parts[0]
        weights = [weight for _, weight in data.sources]
        return Mixture(parts, weights, self.recipe.seed, data.buffers)

    @cached_property
    def prompted(self) -> str | None:
        """How the new task is put to the base, in words; None where it has no chat template."""
        if not getattr(self.processor, "chat_template", None) or not self.modality.own_texts:
            return None
        data = self.recipe.data
        first = load_examples(data.sources[0][0], **{**data.reading, "limit": 1})
        return template_of(first, self.processor)

    @property
    def full(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.recipe.adapter.method == "full"

    @property
    def shared(self) -> Path:
        """What the runs of a study have in common."""
        return self.folder.path.parent / "shared"

    @property
    def record(self) -> dict[str, Any]:
        """run.json as it is now."""
        return read_json(self.folder.record)

    def _weights(self, run: RunFolder) -> Path:
        """Where the trained weights of a run lie, or those of a step on its way."""
        path: Path = run.model if self.full else run.native
        return path

    def _is_trained(self) -> bool:
        written = self._weights(self.folder).exists() or self.folder.unrepaired.exists()
        return written and ("training" in self.record or self.folder.training.exists())

    @cached_property
    def before(self) -> RunFolder | None:
        """The run whose task came before this one's; None where there is none.

        Raises:
            UserError: it is not trained.
        """
        if self.recipe.after is None:
            return None
        run = RunFolder(self.folder.path.parent / self.recipe.after)
        if not self._weights(run).exists():
            raise UserError(f"the run before this one, {run.path}, is not trained; run it first")
        return run

    @property
    def _between(self) -> Literal["stack", "merge"] | None:
        """What becomes of the earlier adapters where a new one is trained after them."""
        sequence = self.recipe.sequence
        if sequence is None or sequence.after is None or sequence.between == "continue":
            return None
        return sequence.between

    @property
    def hands_on(self) -> bool:
        """Whether what comes after needs the inputs of the tasks so far."""
        sequence, method = self.recipe.sequence, find(self.recipe.adapter.method)
        if sequence is None or self.full:
            return False
        starts = sequence.between != "continue" and "second_moment" in method.needs
        return starts or self.recipe.repair is not None

    def _below(self, device: str = "auto") -> Any:
        """What the adapter is put on: the base, with earlier adapters where there are some.

        `_earlier` is then the plain LoRA that these are.
        """
        base, self._earlier = self._load_base(device), None
        if self._between is not None and self.before is not None:
            base, self._earlier = on_earlier(base, self.before.native, self._between)
        return base

    def _load_base(self, device: str = "auto") -> Any:
        how = {"device": device, "new_classes": self.new_classes, **self.recipe.loading}
        return self._with_classes(load_model(self.recipe.base, **how))

    def _with_classes(self, model: Any) -> Any:
        """A model whose loss runs over the classes that a sequence asks for, if it does."""
        sequence = self.recipe.sequence
        over = None if sequence is None else sequence.classes
        return learn_among(model, over) if over else model

    def _model(self, which: str, load: Callable[[], Any]) -> Any:
        """The model called ``which``; the one held before is freed first."""
        if self._held is None or self._held[0] != which:
            self._held = None
            self._held = which, load()
        return self._held[1]

    def _base(self) -> Any:
        return self._model("base", self._load_base)

    def _trained_model(self, run: RunFolder) -> Any:
        """The trained weights of a run, or of a step on its way, as `_save` wrote them."""

        def read() -> Any:
            if self.full:
                return load_model(str(run.model), **self.recipe.loading)
            return load(self._load_base(), run.native)

        return self._model(str(run.path), read)
