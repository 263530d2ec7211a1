"""Scores of a base, and beside them those of what was trained on it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from forgetless.adapters.folders import classes_for, load
from forgetless.cli.commands.folders import Trained
from forgetless.core.errors import UserError
from forgetless.core.files import require_place, write_json
from forgetless.data.modality import load_processor
from forgetless.models.hashes import base_hash, weights_hash
from forgetless.models.load import load_model
from forgetless.scores.cache import ScoreCache, default_folder
from forgetless.scores.comparison import Comparison, compare
from forgetless.scores.files import write_records
from forgetless.tasks import Task, TaskResult, make_tasks
from forgetless.tasks.base import whole_number
from forgetless.tasks.evaluation import Scores, evaluate


@dataclass(frozen=True)
class Measurement:
    """Scores of a base and, where an adapter was given, of the adapter on it."""

    base: Scores
    adapted: Scores | None = None

    @property
    def comparison(self) -> Comparison | None:
        """What the adapter changed."""
        return None if self.adapted is None else compare(self.base, self.adapted)


@dataclass
class _Models:
    """A base and what was trained on it, each loaded when it is first needed."""

    base_name: str
    trained: Trained | None
    dtype: str
    batch_size: int | None
    listen: Callable[[str], None]

    @cached_property
    def processor(self) -> Any:
        """The base's own."""
        return load_processor(self.base_name)

    @cached_property
    def base(self) -> Any:
        """The base; after `adapted` was asked for, an adapter sits on it."""
        return load_model(self.base_name, dtype=self.dtype, new_classes=self.new_classes)

    @cached_property
    def new_classes(self) -> list[str]:
        """Of the new head that was trained, if any."""
        return [] if self.trained is None else classes_for(self.trained.folder, self.base_name)

    @cached_property
    def adapted(self) -> Any:
        """The base with the adapter on it, or the fully trained model."""
        assert self.trained is not None
        if self.trained.is_adapter:
            return load(self.base, self.trained.folder)
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
            model, task, self.processor, reference=reference, batch_size=self.batch_size
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

    Scores that were measured before are in `cache`, by the content of model and task (None for
    `forgetless.scores.cache.default_folder`): where all are there no model is loaded, and an
    evaluation that was interrupted goes on where it was. Where that default cannot be written, they
    are kept as long as this call. `listen` is told, in words, what comes next.
    """
    tasks = make_tasks(specs)
    if not tasks:
        raise UserError("no task given; 'forgetless tasks' lists them")
    if problem := whole_number("batch_size", batch_size, optional=True):
        raise UserError(problem)
    trained = None if adapter is None else Trained.find(adapter)
    models = _Models(base, trained, dtype, batch_size, listen)
    with _folder_of_scores(cache) as folder:
        scores = ScoreCache(folder)
        key: tuple[str, ...] = (base_hash(base, models.new_classes), dtype)
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


@contextmanager
def _folder_of_scores(cache: str | Path | None) -> Iterator[Path]:
    """The cache, or a folder for the time being where the user's cannot be written."""
    folder = Path(cache or default_folder())
    try:
        require_place(folder / "scores.json")
    except UserError as problem:
        if cache is not None:
            raise
        warnings.warn(
            f"{problem}, so the scores are not kept for the next time; give a folder by --cache",
            stacklevel=4,
        )
        with TemporaryDirectory(prefix="forgetless-scores-") as place:
            yield Path(place)
        return
    yield folder


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
    write_json(path, scores.metrics)
    write_records(scores, path)
