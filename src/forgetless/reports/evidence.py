"""What a study folder holds, read as it lies there: runs, score rows, training logs, answers."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import read_json
from forgetless.scores.comparison import TaskChange, compare
from forgetless.scores.files import Phase, read_score
from forgetless.studies.folder import RunFolder, curve, results, run_folders
from forgetless.tasks.base import Item, TaskResult

Row = Mapping[str, Any]
"""A row of results.csv or curve.csv."""


@dataclass(frozen=True)
class TaskInfo:
    """One measure of the study.

    Attributes:
        kind: learning or forgetting.
        is_share: every score seen lies in 0..1 and higher is better, so it reads as a percentage.
        mean_of: the tasks of which this is the average; empty for a task that was asked itself.
    """

    name: str
    kind: str
    metric: str
    higher_is_better: bool
    is_share: bool
    mean_of: tuple[str, ...] = ()

    @property
    def is_distance(self) -> bool:
        """Whether the score is a distance to the base, whose own is 0."""
        return self.metric == "kl"

    @property
    def has_retention(self) -> bool:
        """Whether what is kept of it is a share of the base's score."""
        return self.kind == "forgetting" and self.is_share


@dataclass(frozen=True)
class RunFiles:
    """One run folder: its recipe, its `run.json`, and its score rows by task name."""

    folder: RunFolder
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: Mapping[str, Row]

    @property
    def run_id(self) -> str:
        """The name of the folder, which is the run's id."""
        return self.folder.path.name

    @property
    def status(self) -> str:
        """How the run was left: pending, running, done or failed."""
        return str(self.record.get("status", "pending"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe with dotted keys."""
        return dict(flatten(self.recipe))

    @property
    def base(self) -> str:
        """The base model: a hub id as it is, of a folder's path the last two parts."""
        return "/".join(str(self.settings.get("base")).split("/")[-2:])

    def column(self, name: str) -> Any:
        """What every row of the run repeats in this column; None when the run has no row."""
        return next((row.get(name) for row in self.rows.values()), None)

    def part(self, name: str) -> Mapping[str, Any]:
        """A part of `run.json`; empty where it is not there."""
        found = self.record.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def exceeded(self) -> Mapping[str, Any]:
        """The budget of forgetting that ended the training; empty when none did."""
        return self.part("training").get("exceeded") or {}

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        lines = self.folder.lines(self.record)
        return [line for line in lines if number(line.get("step")) is not None]

    def log(self) -> list[tuple[int, float]]:
        """The training loss by step, in the order of the steps."""
        losses = {line["step"]: number(line.get("loss")) for line in self._lines if "loss" in line}
        return sorted((step, loss) for step, loss in losses.items() if loss is not None)

    def probes(self) -> list[tuple[int, dict[str, float]]]:
        """What was measured on the way, by step: name ("learning/loss") and value."""
        found = {line["step"]: line["probe"] for line in self._lines if line.get("probe")}
        return [
            (step, {name: value for name, value in values.items() if number(value) is not None})
            for step, values in sorted(found.items())
        ]

    def score(self, phase: Phase, task: str, step: int | str | None = None) -> dict[str, Any]:
        """The score file of one phase and task, of a step or a setting; empty without one."""
        folder = self.folder if step is None else self.folder.point(step)
        return read_json(folder.scores(phase, task), damaged_as_missing=True)

    def result(self, phase: Phase, task: str, step: int | str | None = None) -> TaskResult | None:
        """As `score`, with the items where these were kept; None where it was not measured."""
        folder = self.folder if step is None else self.folder.point(step)
        files = folder.scores(phase, task), folder.items(phase, task)
        score, lines = read_score(*files, damaged_as_missing=True)
        if number(score.get("value")) is None:
            return None
        try:
            return TaskResult.from_json(score, [Item.from_json(line) for line in lines])
        except (KeyError, TypeError, ValueError):  # a file that somebody else has written
            return None

    def compared(self, task: str) -> TaskChange | None:
        """The comparison of the final scores with the base's; None where it cannot be made."""
        base, score = self.result("base", task), self.result("final", task)
        try:
            return compare({task: base}, {task: score}).rows[0] if base and score else None
        except UserError:  # two versions of the task; the other tables still show both scores
            return None


@dataclass(frozen=True)
class Evidence:
    """Everything the report is made from; `curve` has the scores on the way, see `folder.curve`."""

    folder: Path
    name: str
    rows: Sequence[Row]
    runs: Sequence[RunFiles]
    tasks: Sequence[TaskInfo]
    study_text: str
    curve: Sequence[Row] = ()

    def first(self, kind: str) -> TaskInfo | None:
        """The first learning or forgetting task of the recipe: the one the words are about."""
        return next((task for task in self.tasks if task.kind == kind), None)

    @property
    def evaluations(self) -> list[str]:
        """The commands that measured it, where these are evaluations and not runs of training."""
        found = [run.record.get("evaluation") for run in self.runs]
        return [str(command) if command is not True else "" for command in found if command]

    def with_status(self, status: str) -> list[RunFiles]:
        """The runs left in this state."""
        return [run for run in self.runs if run.status == status]


def read(study_folder: str | Path) -> Evidence:
    """The evidence in a study folder.

    Raises:
        FileNotFoundError: there is no such folder, it is one run's, or it holds no run.
    """
    folder = Path(study_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no study folder {str(folder)!r}; give the folder of a study")
    if (folder / "run.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is one run; give the study that holds it: {str(folder.parent)!r}"
        )
    folders, rows = run_folders(folder), results(folder)
    if not folders:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no run; start one with 'forgetless run' or 'forgetless study'"
        )
    by_run: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["task"]:
            by_run.setdefault(row["run_id"], {})[row["task"]] = row
    found = (_read_run(each, by_run.get(each.path.name, {})) for each in folders)
    runs = [run for run in found if run]
    study_file = folder / "study.yaml"
    text = study_file.read_text("utf-8") if study_file.is_file() else ""
    return Evidence(folder, folder.resolve().name, rows, runs, tasks_of(rows), text, curve(folder))


def _read_run(folder: RunFolder, rows: Mapping[str, Row]) -> RunFiles | None:
    """None where its recipe is damaged, which the rows' warning says, or was deleted just now."""
    record = folder.read()
    try:
        recipe = folder.settings(record)
    except (UserError, FileNotFoundError):
        return None
    return RunFiles(folder, recipe, record, rows)


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results.csv or curve.csv with the types that they had; an empty field is None.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        return [{key: _typed(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _typed(field: str) -> str | float | bool | None:
    if field in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[field]
    for kind in (int, float):
        try:
            return kind(field)
        except ValueError:
            continue
    return field


def result_of_row(row: Row, column: str = "score") -> TaskResult | None:
    """The score of a row, which has no items; None where it was not measured."""
    value, stderr, n = (number(row.get(name)) for name in (column, "stderr", "n"))
    return None if value is None else TaskResult(
        task=str(row["task"]), metric=str(row["metric"]), value=value,
        stderr=math.nan if stderr is None else stderr, n=int(n or 0),
        higher_is_better=row["higher_is_better"] is not False, fingerprint="", seconds=0.0,
    )  # fmt: skip


def number(value: object) -> float | None:
    """The value as a float; None for what was not measured: None, NaN, infinity, text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a mapping of mappings, with dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def tasks_of(rows: Sequence[Row]) -> list[TaskInfo]:
    """The tasks of rows of results.csv or curve.csv, in the order of their first row."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"]:
            by_name.setdefault(row["task"], []).append(row)
    return [_task(name, of_task) for name, of_task in by_name.items()]


def _task(name: str, rows: Sequence[Row]) -> TaskInfo:
    # The harness writes "acc_norm,none", with the name of a filter that says nothing.
    metric = next((str(row["metric"]) for row in rows if row["metric"]), "score").partition(",")[0]
    told = [row["higher_is_better"] for row in rows if row["higher_is_better"] is not None]
    higher = bool(told[0]) if told else True
    columns = ("base_score", "step0_score", "score")
    seen = [value for row in rows for c in columns if (value := number(row.get(c))) is not None]
    is_share = higher and all(0.0 <= value <= 1.0 for value in seen)
    return TaskInfo(name, str(rows[0]["kind"]), metric, higher, is_share)
