"""What the single-purpose commands do: statistics, a start, scores, an export. No printing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from forgetless import adapters, store
from forgetless.adapters import ExportReport
from forgetless.cards import write_run_card
from forgetless.checking import Checker
from forgetless.core import Method, find_method
from forgetless.errors import RecipeError, UserError
from forgetless.evaluation import Scores, evaluate
from forgetless.inputs import ARGUMENT, Collecting
from forgetless.models import load_model, load_tokenizer, meta_model, target_layers
from forgetless.recipe import (
    TASK_METHODS,
    AdapterSettings,
    CalibrationSettings,
    DataSettings,
    Recipe,
    base_hash,
    weights_hash,
)
from forgetless.scores.cache import ScoreCache, default_folder
from forgetless.scores.comparison import Comparison, compare
from forgetless.scores.files import write_records
from forgetless.stages import attached
from forgetless.statistics import Statistics
from forgetless.store import RunFolder
from forgetless.tasks import TASKS, Task, TaskResult, make_tasks
from forgetless.tasks.base import whole_number
from forgetless.tasks.names import resolved

CONFIG_FILE = "adapter_config.json"


def collect_statistics(
    base: str,
    settings: CalibrationSettings,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: str = "auto",
    seed: int = 0,
    unfinished: Path | None = None,
) -> Statistics:
    """The statistics of the base's activations on a calibration text.

    An interrupted call goes on from the folder ``unfinished``, where other settings have another
    place; the statistics may read from it until they are saved.
    """
    target_layers(meta_model(base), target_modules)  # a name that matches nothing shows here
    asked = AdapterSettings(target_modules=target_modules)
    collecting = Collecting(asked, settings, seed=seed)
    collecting.check_texts({"second_moment"})
    model, tokenizer = load_model(base, dtype=dtype), load_tokenizer(base)
    place = hashlib.sha256(repr((base, dtype, collecting)).encode()).hexdigest()[:16]
    checkpoint = None if unfinished is None else unfinished / place
    found = collecting.collect("second_moment", model, tokenizer, checkpoint)
    assert isinstance(found, Statistics)
    return found


# ----------------------------------------------------------------------------------------- init


@dataclass(frozen=True)
class Start:
    """An adapter before its first step, written into a folder.

    Attributes:
        folder: where it lies.
        obstacle: why a trainer that knows only PEFT cannot continue it as the method means; None
            where it can.
    """

    folder: Path
    obstacle: str | None


def init(
    base: str,
    settings: AdapterSettings,
    out: str | Path,
    *,
    source: CalibrationSettings | Statistics | None = None,
    data: DataSettings | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Start:
    """Write the start of an adapter, for whatever trains it.

    A start that adds nothing to the base and trains both factors is a plain LoRA, which every
    PEFT-based trainer continues. The others are written in the package's own form.

    Raises:
        RecipeError: unknown method or option, a rank that does not fit, no such layers.
        UserError: the method needs statistics and ``source`` is None; ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    problems = Checker().adapter(base, settings)
    if problems:
        raise RecipeError("init", problems)
    method = find_method(settings.method)
    if method.factors is None:
        raise UserError("method 'full' trains the weights themselves: there is no adapter to start")
    _check_inputs(method, source, data)
    given = {"stats": source} if isinstance(source, Statistics) else {}
    asked = source if isinstance(source, CalibrationSettings) else CalibrationSettings()
    collecting = Collecting(settings, asked, data, seed)
    needs = sorted(need for need in method.needs if ARGUMENT[need] not in given)
    collecting.check_texts(needs)
    model = load_model(base, dtype=dtype)
    tokenizer = load_tokenizer(base) if needs else None
    inputs = {ARGUMENT[need]: collecting.collect(need, model, tokenizer) for need in needs}
    model = attached(settings, model, given | inputs, seed)
    with store.new_folder(out) as folder:
        adapters.save(model, folder)
    return Start(out, _obstacle(settings.method, model.peft_config["default"].start))


def _check_inputs(
    method: Method, source: CalibrationSettings | Statistics | None, data: DataSettings | None
) -> None:
    """Raise unless there is a text for every need of the method."""
    keeps = "second_moment" in method.needs and method.name not in TASK_METHODS
    if keeps and source is None:
        raise UserError(
            f"method {method.name!r} needs to know what to keep: give --calibration FILE, "
            "--calibration self (text sampled from the base), or --stats FOLDER"
        )
    on_task = method.needs - {"second_moment"} or (method.name in TASK_METHODS and source is None)
    if on_task and data is None:
        raise UserError(
            f"method {method.name!r} looks at the new task: give its training data by --data FILE"
        )


def _obstacle(method: str, start: Mapping[str, Any]) -> str | None:
    """Why a trainer that knows only PEFT cannot train this start as the method means it."""
    if start["anchored"]:
        return (
            f"{method!r} does not start from the base itself: a plain LoRA with these factors "
            "would change the base before the first step"
        )
    frozen = {"A", "B"} - set(start["trains"])
    if frozen:
        return f"{method!r} keeps {frozen.pop()} frozen, and PEFT would train it"
    return None


# ----------------------------------------------------------------------------------------- eval


@dataclass(frozen=True)
class Measurement:
    """Scores of a base and, where an adapter was given, of the adapter on it."""

    base: Scores
    adapted: Scores | None = None

    @property
    def comparison(self) -> Comparison | None:
        """What the adapter changed."""
        return None if self.adapted is None else compare(self.base, self.adapted)

    def to_json(self) -> dict[str, Any]:
        """All scores without their items, and the comparison."""
        comparison = self.comparison
        return {
            "base": self.base.to_json(),
            "adapted": None if self.adapted is None else self.adapted.to_json(),
            "comparison": None if comparison is None else comparison.to_json(),
        }


@dataclass
class _Models:
    """A base and what was trained on it, each loaded when it is first needed."""

    base_name: str
    trained: Trained | None
    dtype: str
    batch_size: int | None
    listen: Callable[[str], None]

    @cached_property
    def tokenizer(self) -> Any:
        """The base's own."""
        return load_tokenizer(self.base_name)

    @cached_property
    def base(self) -> Any:
        """The base; after `adapted` was asked for, an adapter sits on it."""
        return load_model(self.base_name, dtype=self.dtype)

    @cached_property
    def adapted(self) -> Any:
        """The base with the adapter on it, or the fully trained model."""
        assert self.trained is not None
        if self.trained.is_adapter:
            return adapters.load(self.base, self.trained.folder)
        return load_model(str(self.trained.folder), dtype=self.dtype)

    def score_base(self, task: Task) -> TaskResult:
        """The base's score."""
        self.listen(f"{task.name}: the base")
        return self._score(task, self.base, self.base)

    def score_adapted(self, task: Task) -> TaskResult:
        """The score of what was trained."""
        assert self.trained is not None
        self.listen(f"{task.name}: {self.trained.folder}")
        # For an adapter the reference is the same model with the adapter off.
        apart = task.needs_reference and not self.trained.is_adapter
        return self._score(task, self.adapted, self.base if apart else None)

    def _score(self, task: Task, model: Any, reference: Any) -> TaskResult:
        found = evaluate(
            model, task, self.tokenizer, reference=reference, batch_size=self.batch_size
        )
        return found[task.name]


def measure(
    base: str,
    specs: Sequence[Any],
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    batch_size: int | None = None,
    cache: str | Path | None = None,
    listen: Callable[[str], None] = lambda message: None,
) -> Measurement:
    """Score a base on tasks, and an adapter, a run or a fully trained model beside it.

    Args:
        base: see `forgetless.models.resolve_base`.
        specs: tasks.
        adapter: folder of an adapter, a run or a trained model.
        dtype: number format of the weights.
        batch_size: texts at once; None lets each task choose.
        cache: folder of scores that were measured before, by the content of model and task; None
            for `forgetless.scores.cache.default_folder`. No model is loaded where all are there,
            and an evaluation that was interrupted goes on where it was.
        listen: told, in words, what is measured next.
    """
    tasks = make_tasks(specs)
    if not tasks:
        raise UserError("no task given; 'forgetless tasks' lists them")
    if problem := whole_number("batch_size", batch_size, optional=True):
        raise UserError(problem)
    trained = None if adapter is None else Trained.find(adapter)
    models = _Models(base, trained, dtype, batch_size, listen)
    scores = ScoreCache(cache or default_folder())
    key: tuple[str, ...] = (base_hash(base), dtype)
    before = Scores(
        scores.result(task, *key, measure=partial(models.score_base, task)) for task in tasks
    )
    if trained is None:
        return Measurement(before)
    key = (*key, weights_hash(trained.folder))
    after = Scores(
        scores.result(task, *key, measure=partial(models.score_adapted, task)) for task in tasks
    )
    return Measurement(before, after)


def write_scores(found: Measurement, path: Path) -> None:
    """Write {task: {metric: {"value", "stderr", "n"}}} of the model that was asked for.

    With an adapter, the file has the adapter's scores; the base's are beside it, in a file of the
    same form: ``scores.json`` and ``scores.base.json``. Each has its records beside it, see
    `forgetless.scores.files`.
    """
    base = path
    if found.adapted is not None:
        _write_scores(found.adapted, path)
        base = path.with_name(f"{path.stem}.base{path.suffix}")
    _write_scores(found.base, base)


def _write_scores(scores: Scores, path: Path) -> None:
    """The numbers, and beside them the records that 'forgetless compare' reads."""
    store.write_json(path, scores.metrics)
    write_records(scores, path)


def task_specs(names: str, **options: Any) -> list[dict[str, Any]]:
    """Tasks of the command line: ``pocket_recall,perplexity:notes.txt,commonsense,mine.yaml``.

    Args:
        names: of kinds, tasks and suites, or YAML files, with commas between; a colon stands
            between a kind and its file.
        options: settings for those of the tasks that have them, such as ``limit``; None for none.
    """
    known = {kind: task.settings for kind, task in TASKS.items()}
    given = {key: value for key, value in options.items() if value is not None}
    specs: list[dict[str, Any]] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        kind, _, path = name.partition(":")
        label = store.folder_name(f"{kind}_{Path(path).stem}")
        spec = {"kind": kind, "path": path, "name": label} if path else {"kind": kind}
        for settings in resolved(spec, known):
            has = known[settings["kind"]]
            specs.append(settings | {key: value for key, value in given.items() if key in has})
    return specs


def learned_among(specs: Sequence[Any], names: str) -> list[str]:
    """The tasks of ``specs`` that ``names``, written as for `task_specs`, mean; by their own names.

    Raises:
        UserError: a name that is none of them.
    """
    known = [task.name for task in make_tasks(specs)]
    learned = []
    for name in filter(None, names.split(",")):
        own = [name] if name in known else _names_of(name)
        if not own or not set(own) <= set(known):
            raise UserError(f"{name} cannot be learned: not among the tasks {', '.join(known)}")
        learned += own
    return learned


def _names_of(spec: str) -> list[str]:
    """Of the tasks that a name on the command line stands for; none where it stands for nothing."""
    try:
        return [task.name for task in make_tasks(task_specs(spec))]
    except (UserError, FileNotFoundError):
        return []


# --------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Trained:
    """Trained weights: an adapter's folder or a whole model's, and the base where it is known."""

    folder: Path
    base: str | None
    is_adapter: bool

    @classmethod
    def find(cls, path: str | Path) -> Trained:
        """What lies at ``path``: a run's folder, an adapter's or a model's."""
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}; give a run or an adapter")
        run = RunFolder(path)
        if run.recipe.exists():
            base = Recipe.load(run.recipe).base
            for folder, is_adapter in ((run.native, True), (run.model, False)):
                if folder.exists():
                    return cls(folder, base, is_adapter)
            raise UserError(f"the run {path} has no trained weights yet; finish it first")
        config = store.read_json(path / CONFIG_FILE)
        if config:
            return cls(path, config.get("base_model_name_or_path"), True)
        if (path / "config.json").exists():
            return cls(path, None, False)
        raise UserError(
            f"{path} is neither a run nor an adapter: it has no recipe.yaml and no {CONFIG_FILE}"
        )


def export(
    source: str | Path, out: str | Path, rank: Any = "exact", base: str | None = None
) -> ExportReport:
    """Write a run's or a folder's adapter as a plain PEFT LoRA for the untouched base."""
    trained, out = Trained.find(source), Path(out)
    if not trained.is_adapter:
        raise UserError(f"{source} is a whole model, not an adapter; use it as it is")
    base = base or trained.base
    if base is None:
        raise UserError(f"{source} does not say which base it is for; give --base")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    model = adapters.load(load_model(base), trained.folder)
    with store.new_folder(out) as folder:
        report = adapters.export(model, folder, rank)
        if (run := RunFolder(Path(source))).recipe.exists():
            write_run_card(run, folder, report.relative_error)
    return replace(report, folder=out)


def parse_rank(text: str) -> str | int:
    """``exact``, ``requested`` or a number, from the command line."""
    if text in ("exact", "requested"):
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"rank must be 'exact', 'requested' or a number from 1, got {text!r}")
    return int(text)
