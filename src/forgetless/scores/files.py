"""Scores as files: what `forgetless eval --out` writes, and what a run keeps. No torch.

`scores.json` has the numbers alone, for other programs. Beside it, `scores.records.json` has what
a comparison needs too: fingerprints, settings and every item with its answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forgetless.core.errors import UserError, reading
from forgetless.core.files import read_json, read_jsonl, write_json, write_jsonl
from forgetless.core.hashing import checksum
from forgetless.tasks.base import Item, TaskResult
from forgetless.tasks.evaluation import Scores

Phase = Literal["base", "step0", "final"]
PHASES: tuple[Phase, ...] = ("base", "step0", "final")


def score_file(run_folder: Path, phase: Phase, task: str) -> Path:
    """Where a run keeps the score of one task: value, standard error, n, fingerprint."""
    return run_folder / "scores" / phase / f"{task}.json"


def items_file(run_folder: Path, phase: Phase, task: str) -> Path:
    """Where a run keeps what was asked, expected and answered, one line an item."""
    return run_folder / "items" / phase / f"{task}.jsonl"


def write_score(
    score: Path, items: Path, content: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> None:
    """Write a score and its items, the score last, for it says that the items are there."""
    write_jsonl(items, lines)
    write_json(score, {**content, _ITEMS: checksum(items)}, checked=True)


def read_score(
    score: Path, items: Path, *, damaged_as_missing: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `write_score` wrote, the lines of the items last; both empty where there is no score.

    Raises:
        UserError: either is damaged, or they are not the items of this score.
    """
    content = read_json(score, damaged_as_missing=damaged_as_missing)
    if not content:
        return {}, []
    known = content.pop(_ITEMS, None)
    return content, read_jsonl(items, damaged_as_missing=damaged_as_missing, written=known)


_ITEMS = "items_xxh3"


@dataclass(frozen=True)
class SavedScores:
    """Scores that were read.

    Attributes:
        scores: with their items, where these were kept.
        learning: the tasks that training should raise; known of runs alone.
    """

    scores: Scores
    learning: frozenset[str] = frozenset()


def records_file(path: str | Path) -> Path:
    """`scores.records.json` for `scores.json`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.records.json")


def write_records(scores: Mapping[str, TaskResult], path: str | Path) -> Path:
    """Write everything about the scores beside the numbers in `path`; gives the file."""
    file = records_file(path)
    records = {
        task: {**result.to_json(), "items": [item.to_json() for item in result.items]}
        for task, result in scores.items()
    }
    write_json(file, records, checked=True)
    return file


def read_scores(path: str | Path, phase: Phase = "final", point: Path | None = None) -> SavedScores:
    """The scores at `path`.

    Args:
        path: a file that `forgetless eval --out` wrote, or the records beside it; the folder of a
            run, or a folder of scores in it.
        phase: which scores of a run's folder to take: "base", "step0" or "final".
        point: a folder of the run with scores of its own, such as those at a repair.

    Raises:
        FileNotFoundError: there is nothing.
        UserError: it holds no scores, or the numbers alone.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no scores at {path}: give a file of 'eval --out' or a run")
    if path.is_file():
        return SavedScores(_read_file(path))
    if (path / "recipe.yaml").exists():
        return _read_run(path, phase, point)
    if path.name in PHASES and path.parent.name == "scores":
        return _read_run(path.parent.parent, path.name)
    raise UserError(
        f"{path} holds no scores: give a file of 'forgetless eval --out', the folder of a run, or "
        "its scores/base, scores/step0 or scores/final"
    )


def _read_file(path: Path) -> Scores:
    """From the records, whichever of the two files was named."""
    records = path if path.name.endswith(".records.json") else records_file(path)
    content = read_json(records) if records.exists() else read_json(path)
    if not content:
        raise UserError(f"{path} holds no scores")
    for task, record in content.items():
        if not (isinstance(record, Mapping) and "fingerprint" in record and "value" in record):
            raise UserError(
                f"{path} has the numbers of {task!r} alone, which do not say whether two tasks "
                f"were the same: keep {records.name}, which 'forgetless eval --out' writes, "
                "beside it"
            )
    with reading(records if records.exists() else path, "measure again with 'forgetless eval'"):
        return Scores(
            TaskResult.from_json({**record, "task": task}, _items(record.get("items", ())))
            for task, record in content.items()
        )


def _read_run(folder: Path, phase: Phase, point: Path | None = None) -> SavedScores:
    """The scores of one phase of a run, or of a point of it, in the order of its tasks."""
    kinds: Mapping[str, str] = read_json(folder / "run.json").get("tasks", {})
    results, place = [], point or folder
    for task in kinds:
        file = score_file(place, phase, task)
        score, lines = read_score(file, items_file(place, phase, task))
        if score:
            with reading(file, "delete it, and run the recipe again"):
                results.append(TaskResult.from_json(score, _items(lines)))
    if not results:
        raise UserError(
            f"the run {folder} has no {phase} scores yet; 'forgetless run' measures them"
        )
    return SavedScores(
        Scores(results), frozenset(task for task, kind in kinds.items() if kind == "learning")
    )


def _items(lines: Sequence[Mapping[str, Any]]) -> list[Item]:
    return [Item.from_json(line) for line in lines]
