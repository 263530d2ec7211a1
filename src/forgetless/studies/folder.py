"""Folders of runs: where everything lies, written so that a kill at any moment loses nothing.

<out>/<study>/study.yaml  runs.json            the definition, and its runs in order; sequences
                                               have a sequence.yaml, searches a search.yaml
<out>/<study>/trials.journal  workers/         who does which run, see `forgetless.studies.trials`;
                                               trials.id in its place where a database has it;
                                               runs may lie in an object store, see `share`, too
<out>/<study>/shared/                          base scores and statistics, used by every run
<out>/<study>/<run id>/                        one run, see `RunFolder`
<out>/<study>/report/                          the page, results.csv, results.parquet, figures
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.core import metrics
from forgetless.core.errors import UserError
from forgetless.core.files import load_yaml, read_json, read_jsonl, write_json, write_text
from forgetless.core.hashing import checksum, checksums, first_damaged
from forgetless.scores.files import PHASES, Phase, items_file, score_file

_log = logging.getLogger(__name__)

COLUMNS = (
    "study", "run_id", "base", "method", "rank", "learning_rate", "seed", "steps", "task", "kind",
    "metric", "base_score", "step0_score", "score", "stderr", "n", "retention", "relative_update",
    "train_seconds", "status", "arm", "alpha", "weight_decay", "target_modules",
    "higher_is_better", "retention_uncapped",
)  # fmt: skip
"""The columns of results.csv, one row a run and task."""

CURVE_COLUMNS = (
    "study", "run_id", "arm", "method", "rank", "learning_rate", "seed", "steps", "step", "tokens",
    "task", "kind", "metric", "higher_is_better", "base_score", "score", "stderr", "n", "status",
)  # fmt: skip
"""The columns of curve.csv, one row a run, measured step and task."""

AFTERCARE_COLUMNS = (
    "study", "run_id", "arm", "method", "rank", "learning_rate", "seed", "steps", "setting",
    "strength", "scale", "taken", "kl", "loss", "drift", "given_up", "task", "kind", "metric",
    "higher_is_better", "base_score", "score", "stderr", "n", "retention", "status",
)  # fmt: skip
"""The columns of aftercare.csv, one row a run, setting of its repair or dial, and task."""


@dataclass(frozen=True)
class RunFolder:
    """The places in one run's folder.

    recipe.yaml     the recipe, defaults included
    run.json        status, versions, hardware, seconds a stage, and what the stages reported
    log.jsonl       one line every few steps
    training.json   what the training came to, also in run.json
    checkpoints/    while training
    probe/          of a new head that is trained alone first, until training is done
    start/          the adapter before its first step, until training is done
    native/         the trained adapter, lossless (`model/` for full fine-tuning)
    unrepaired/     the same until its repair, where that is part of a sequence
    inputs/         statistics of what the layers read on the data of a sequence until here
    adapter/        the trained adapter as a plain PEFT LoRA
    scores/ items/  {base,step0,final}/<task>.json and .jsonl
    analysis.json   how far the weights moved
    points/<step>/  weights, scores and items of a step on the way, named as above
    points/<label>/ scores and items at a setting of the repair or the dial
    aftercare.json  these settings, on held-out text; repaired/ has the adapter of the one taken
    spectra.json    what the update of every layer is
    """

    path: Path

    recipe = property(lambda self: self.path / "recipe.yaml")
    record = property(lambda self: self.path / "run.json")
    log = property(lambda self: self.path / "log.jsonl")
    training = property(lambda self: self.path / "training.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    probe = property(lambda self: self.path / "probe")
    start = property(lambda self: self.path / "start")
    native = property(lambda self: self.path / "native")
    inputs = property(lambda self: self.path / "inputs")
    unrepaired = property(lambda self: self.path / "unrepaired")
    model = property(lambda self: self.path / "model")
    adapter = property(lambda self: self.path / "adapter")
    analysis = property(lambda self: self.path / "analysis.json")
    aftercare = property(lambda self: self.path / "aftercare.json")
    repaired = property(lambda self: self.path / "repaired")
    spectra = property(lambda self: self.path / "spectra.json")
    lock = property(lambda self: self.path / ".lock")

    def scores(self, phase: Phase, task: str) -> Path:
        """The score of one task: value, standard error, n, fingerprint."""
        return score_file(self.path, phase, task)

    def items(self, phase: Phase, task: str) -> Path:
        """What was asked, expected and answered, one line an item."""
        return items_file(self.path, phase, task)

    def point(self, step: int | str) -> RunFolder:
        """The folder of a step on the way, or of a setting, laid out like a run's.

        Its scores are final ones.
        """
        return RunFolder(self.path / "points" / str(step))

    def settings(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe as plain values, as run.json knows it.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is damaged.
        """
        known = record.get("files", {}).get(self.recipe.name)
        if known not in (None, checksum(self.recipe)):
            raise UserError("it does not hold what was written")
        return load_yaml(self.recipe)

    def lines(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Those of log.jsonl, as run.json knows it; none, with a warning, where it is damaged."""
        known = record.get("files", {}).get(self.log.name)
        return read_jsonl(self.log, damaged_as_missing=True, growing=not known, written=known)

    @property
    def points(self) -> list[int]:
        """The steps on the way whose weights were kept, in order."""
        return sorted(int(folder.name) for folder in self.path.glob("points/[0-9]*"))

    @property
    def taken(self) -> str | None:
        """The setting of the repair that was taken and scored; None where there is none."""
        found = read_json(self.aftercare, damaged_as_missing=True)
        label: str | None = found.get("repaired")
        return label if label in found.get("scored", ()) and self.repaired.is_dir() else None

    @property
    def shipped(self) -> Path:
        """The folder of the adapter that the run is for: the repaired one, where one was taken."""
        folder: Path = self.adapter if self.taken is None else self.repaired
        return folder

    @property
    def before(self) -> RunFolder | None:
        """The run of the task before in a sequence, by run.json."""
        after = self.read().get("after")
        return None if after is None else RunFolder(self.path.parent / after)

    def read(self) -> dict[str, Any]:
        """What run.json says; of a damaged one, that the run failed and what to do."""
        try:
            return read_json(self.record)
        except UserError as damage:
            return {"status": "failed", "reason": str(damage)}

    def update(self, **changes: Any) -> None:
        """Change entries of run.json; raises ``UserError`` where it is damaged."""
        write_json(self.record, {**read_json(self.record), **changes}, checked=True)


def adapter_checksums(folder: Path) -> dict[str, str]:
    """Those of the folder of an adapter or a model, but of its card, which is written anew."""
    return checksums(folder, lambda file: file.name != "README.md")


def is_kept(folder: Path) -> bool:
    """Whether a folder that runs share is there, as it was written; damage is named in the log."""
    if folder.is_dir() and not (folder / _FILES).exists():
        note_files(folder)  # it is of a former version
    try:
        damaged = first_damaged(folder, read_json(folder / _FILES))
    except UserError:
        damaged = folder / _FILES
    if damaged is not None:
        _log.warning("%s is damaged or gone; it is made again", damaged)
    return folder.is_dir() and damaged is None


def note_files(folder: Path) -> None:
    """Write down what is in a folder that runs share, for `is_kept`."""
    write_json(folder / _FILES, checksums(folder), checked=True)


_FILES = "files.json"


def run_folders(study_folder: str | Path) -> list[RunFolder]:
    """The runs of a study: first those of its definition, in order, then any others by name."""
    study_folder = Path(study_folder)
    of_study = planned(study_folder)
    found = {RunFolder(path.parent) for path in study_folder.glob("*/recipe.yaml")}
    others = sorted(found - set(of_study), key=lambda run: run.path.name)
    return [run for run in of_study if run in found] + others


def planned(study_folder: Path) -> list[RunFolder]:
    """The runs that the study's definition comes to, in its order, begun or not."""
    entries = read_json(study_folder / "runs.json", damaged_as_missing=True).get("runs", [])
    return [RunFolder(study_folder / entry["run_id"]) for entry in entries]


# ---- tables --------------------------------------------------------------------------------------


def has_sequences(folder: str | Path) -> bool:
    """Whether the runs of a folder make up sequences."""
    return bool(read_json(Path(folder) / "runs.json", damaged_as_missing=True).get("sequences"))


def is_search(folder: str | Path) -> bool:
    """Whether the runs of a folder are the trials of a search."""
    return (Path(folder) / "search.yaml").is_file()


def results(study_folder: str | Path) -> list[dict[str, Any]]:
    """One row per run and task with the columns of `COLUMNS`; None where nothing was measured.

    A task that a run has not been measured on yet has its row too, without a score. What is damaged
    is left out, which the log says.
    """
    return [row for folder in _existing_runs(study_folder) for row in run_rows(folder)]


def curve(study_folder: str | Path) -> list[dict[str, Any]]:
    """One row per run, measured step and task with the columns of `CURVE_COLUMNS`.

    Runs that were measured at their end only are left out. The first step of a run is 0, with the
    base's scores, and the last one that of the weights that it ended with.
    """
    return [row for folder in _existing_runs(study_folder) for row in curve_rows(folder)]


def aftercare(study_folder: str | Path) -> list[dict[str, Any]]:
    """One row per run, setting and task with the columns of `AFTERCARE_COLUMNS`."""
    return [row for folder in _existing_runs(study_folder) for row in aftercare_rows(folder)]


def _existing_runs(study_folder: str | Path) -> list[RunFolder]:
    if not Path(study_folder).is_dir():
        raise FileNotFoundError(f"no study folder {study_folder}")
    return run_folders(study_folder)


def run_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The rows of one run, see `results`."""
    record = folder.read()
    common = _run_columns(folder, record)
    for task, kind in record.get("tasks", {}).items() if common else ():
        scores = {phase: _score(folder, phase, task) for phase in PHASES}
        yield dict.fromkeys(COLUMNS) | common | _task_columns(task, kind, scores)


def curve_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The rows of `curve` of one run; none where it was measured at its end only."""
    record = folder.read()
    common = _run_columns(folder, record) if folder.points else {}
    if not common:
        return
    lines = folder.lines(record)
    tokens = {0: 0} | {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    trained, last = record.get("training", {}), common["steps"]
    if trained.get("steps") == last:
        tokens[last] = trained.get("tokens")
    # A rollback may go back to step 0.
    for step in dict.fromkeys([0, *(step for step in folder.points if step < last), last]):
        place = {"step": step, "tokens": tokens.get(step)}
        for task, kind in record.get("tasks", {}).items():
            base = score = _score(folder, "base", task)
            if step > 0:
                score = _score(folder if step == last else folder.point(step), "final", task)
            found = _task_columns(task, kind, {"base": base, "step0": {}, "final": score})
            yield {key: (common | place | found).get(key) for key in CURVE_COLUMNS}


def aftercare_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The rows of `aftercare` of one run, the adapter as trained first; none without a repair."""
    known = read_json(folder.aftercare, damaged_as_missing=True)
    record = folder.read()
    common = _run_columns(folder, record) if known else {}
    for label in ["trained", *known.get("scored", ())] if common else ():
        place = {"setting": label, "taken": label == known.get("repaired")} | known["points"].get(
            label, {}
        )
        for task, kind in record.get("tasks", {}).items():
            measured = folder if label == "trained" else folder.point(label)
            base, final = _score(folder, "base", task), _score(measured, "final", task)
            found = _task_columns(task, kind, {"base": base, "step0": {}, "final": final})
            row = common | place | found
            yield {key: row.get(key) for key in AFTERCARE_COLUMNS}


def _score(folder: RunFolder, phase: Phase, task: str) -> dict[str, Any]:
    return read_json(folder.scores(phase, task), damaged_as_missing=True)


def _run_columns(folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows of a run repeat; nothing where its recipe is damaged."""
    try:
        recipe = folder.settings(record)
        adapter, training = recipe["adapter"], recipe["training"]
        names, full = adapter["target_modules"], adapter["method"] == "full"
        trained = record.get("training", {})
        analysis = read_json(folder.analysis, damaged_as_missing=True)
        exceeded = trained.get("exceeded") or {}  # with the step that a rollback went back to
        return {
            "study": folder.path.parent.name,
            "run_id": folder.path.name,
            "base": recipe["base"],
            "method": adapter["method"],
            "rank": None if full else adapter["rank"],
            "learning_rate": training["learning_rate"],
            "seed": recipe["seed"],
            "steps": exceeded.get("kept_step", trained.get("steps", training["steps"])),
            "relative_update": analysis.get("relative_update"),
            "train_seconds": trained.get("train_seconds"),
            "status": record.get("status", "pending"),
            "arm": recipe["name"] or adapter["method"],
            "alpha": None if full else adapter["alpha"],
            "weight_decay": training["weight_decay"],
            "target_modules": None
            if full
            else (names if isinstance(names, str) else " ".join(names)),
        }
    except (UserError, KeyError, TypeError) as damage:
        _log.warning("%s is left out, since its recipe.yaml is damaged (%s)", folder.path, damage)
        return {}


def _task_columns(
    task: str, kind: str, scores: Mapping[Phase, Mapping[str, Any]]
) -> dict[str, Any]:
    base, final = scores["base"], scores["final"]
    known = final or base
    after, before = (math.nan if s.get("value") is None else s["value"] for s in (final, base))
    kept = metrics.retention(after, before, final.get("higher_is_better", True), capped=False)
    return {
        "task": task,
        "kind": kind,
        "metric": known.get("metric"),
        "base_score": base.get("value"),
        "step0_score": scores["step0"].get("value"),
        "score": final.get("value"),
        "stderr": final.get("stderr"),
        "n": final.get("n"),
        "retention": None if math.isnan(kept) else min(1.0, kept),
        "higher_is_better": known.get("higher_is_better"),
        "retention_uncapped": kept if math.isfinite(kept) else None,
    }


def write_tables(
    study_folder: Path, rows: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]
) -> None:
    """Write results.csv beside the page, and curve.csv and aftercare.csv where they have rows.

    Runs that were measured on their way have a curve; those that were repaired or turned down,
    their aftercare.
    """
    report = study_folder / "report"
    write_csv(report / "results.csv", rows)
    if points:
        write_csv(report / "curve.csv", points, CURVE_COLUMNS)
    if settings := aftercare(study_folder):
        write_csv(report / "aftercare.csv", settings, AFTERCARE_COLUMNS)


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS
) -> None:
    """Write rows as CSV, atomically; an unmeasured value is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
