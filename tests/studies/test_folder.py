"""Folders of runs: their records, and the tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import read_json, write_json, write_jsonl
from forgetless.studies.folder import COLUMNS, RunFolder, curve, results, write_csv

# ---- the table -----------------------------------------------------------------------------------


def _write_run(
    study: Path,
    run_id: str,
    scores: dict[str, tuple[float, float]],
    *,
    higher: bool = True,
    **changes: Any,
) -> RunFolder:
    folder = RunFolder(study / run_id)
    recipe = {
        "name": f"arm of {run_id}",
        "base": "pocket",
        "seed": 3,
        "adapter": {
            "method": "pissa",
            "rank": 4,
            "alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
        },
        "training": {"learning_rate": 1e-3, "steps": 10, "weight_decay": 0.1},
    }
    write_json(folder.recipe, recipe)  # JSON is YAML
    folder.update(status="done", tasks=dict.fromkeys(scores, "forgetting"), **changes)
    for task, values in scores.items():
        for phase, value in zip(("base", "final"), values, strict=True):
            score = {"value": value, "stderr": 0.1, "n": 5, "metric": "m"}
            place = folder.scores("base" if phase == "base" else "final", task)
            write_json(place, score | {"higher_is_better": higher})
    return folder


def test_a_row_holds_every_column(tmp_path: Path) -> None:
    training = {"steps": 12, "train_seconds": 7.5}
    folder = _write_run(tmp_path / "s", "pissa-1", {"recall": (0.8, 0.6)}, training=training)
    write_json(folder.analysis, {"relative_update": 0.25})
    (row,) = results(tmp_path / "s")
    assert list(row) == list(COLUMNS)
    assert row == {
        "study": "s",
        "run_id": "pissa-1",
        "base": "pocket",
        "method": "pissa",
        "rank": 4,
        "learning_rate": 1e-3,
        "seed": 3,
        "steps": 12,
        "task": "recall",
        "kind": "forgetting",
        "metric": "m",
        "base_score": 0.8,
        "step0_score": None,
        "score": 0.6,
        "stderr": 0.1,
        "n": 5,
        "retention": pytest.approx(0.75),
        "relative_update": 0.25,
        "train_seconds": 7.5,
        "status": "done",
        "arm": "arm of pissa-1",
        "alpha": 8,
        "weight_decay": 0.1,
        "target_modules": "q_proj v_proj",
        "higher_is_better": True,
        "retention_uncapped": pytest.approx(0.75),
    }


def test_after_a_rollback_the_steps_are_those_of_the_weights(tmp_path: Path) -> None:
    exceeded = {"step": 10, "kept_step": 6, "action": "rollback"}
    training = {"steps": 10, "tokens": 100, "train_seconds": 1.0, "exceeded": exceeded}
    folder = _write_run(tmp_path / "s", "lora-1", {"recall": (0.8, 0.6)}, training=training)
    lines = [{"step": step, "loss": 1.0, "tokens": 10 * step} for step in (4, 6, 8, 10)]
    write_jsonl(folder.log, lines)
    for step in (4, 8):
        folder.point(step).native.mkdir(parents=True)
        write_json(folder.point(step).scores("final", "recall"), {"value": 0.7})
    (row,) = results(tmp_path / "s")
    assert row["steps"] == 6
    points = [(row["step"], row["tokens"], row["score"]) for row in curve(tmp_path / "s")]
    assert points == [(0, 0, 0.8), (4, 40, 0.7), (6, 60, 0.6)]


def test_a_rollback_to_the_start_leaves_one_point(tmp_path: Path) -> None:
    exceeded = {"step": 4, "kept_step": 0, "action": "rollback"}
    training = {"steps": 4, "tokens": 40, "train_seconds": 1.0, "exceeded": exceeded}
    folder = _write_run(tmp_path / "s", "lora-1", {"recall": (0.8, 0.8)}, training=training)
    folder.point(4).native.mkdir(parents=True)
    points = [(row["step"], row["tokens"], row["score"]) for row in curve(tmp_path / "s")]
    assert points == [(0, 0, 0.8)]


def test_the_curve_is_read_while_the_log_is_written(tmp_path: Path) -> None:
    folder = _write_run(tmp_path / "s", "lora-1", {"recall": (0.8, 0.6)})
    folder.point(4).native.mkdir(parents=True)
    folder.log.write_text('{"step": 4, "tokens": 40}\n{"step": 5, "tok')
    assert [row["tokens"] for row in curve(tmp_path / "s")] == [0, 40, None]


def test_what_was_not_measured_is_none_never_a_number(tmp_path: Path) -> None:
    folder = _write_run(tmp_path, "pissa-1", {})
    folder.update(status="failed", reason="out of memory", tasks={"recall": "forgetting"})
    (row,) = results(tmp_path)
    assert (row["score"], row["base_score"], row["retention"]) == (None, None, None)
    assert row["status"] == "failed"


def test_a_share_of_nothing_is_not_measured(tmp_path: Path) -> None:
    _write_run(tmp_path, "pissa-1", {"kl": (0.0, 0.3)}, higher=False)
    (row,) = results(tmp_path)
    assert row["score"] == 0.3
    assert row["retention"] is None


@pytest.mark.parametrize(
    ("scores", "higher", "capped", "uncapped"),
    [
        ((0.5, 0.6), True, 1.0, 1.2),
        ((2.0, 4.0), False, 0.5, 0.5),
        ((2.0, 0.0), False, 1.0, None),
        ((-3.0, -4.0), True, None, None),
    ],
)
def test_a_gain_counts_in_one_column_only(
    tmp_path: Path,
    scores: tuple[float, float],
    higher: bool,
    capped: float | None,
    uncapped: float | None,
) -> None:
    _write_run(tmp_path, "pissa-1", {"task": scores}, higher=higher)
    (row,) = results(tmp_path)
    assert (row["retention"], row["retention_uncapped"]) == (capped, uncapped)


def test_rows_come_in_the_order_of_the_study(tmp_path: Path) -> None:
    for run_id in ("a-1", "b-1", "c-1"):
        _write_run(tmp_path, run_id, {"recall": (1.0, 1.0)})
    (tmp_path / "shared").mkdir()
    write_json(tmp_path / "runs.json", {"runs": [{"run_id": i} for i in ("c-1", "a-1")]})
    assert [row["run_id"] for row in results(tmp_path)] == ["c-1", "a-1", "b-1"]


def test_csv_reads_back(tmp_path: Path) -> None:
    _write_run(tmp_path / "s", "pissa-1", {"recall": (0.1 + 0.2, 1 / 3)})
    rows = results(tmp_path / "s")
    write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert tuple(read) == COLUMNS
    assert float(read["score"]) == 1 / 3
    assert read["step0_score"] == ""


def test_no_study_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no study folder"):
        results(tmp_path / "absent")


def test_an_update_keeps_the_other_entries(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.update(seconds={"train": 1.0}, status="running")
    folder.update(status="done", seconds={"export": 2.0})
    assert read_json(folder.record) == {"seconds": {"export": 2.0}, "status": "done"}
