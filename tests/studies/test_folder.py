"""Folders of runs: whole files or none, locks that die with their holder, and the table."""

from __future__ import annotations

import csv
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import (
    folder_name,
    lock,
    new_folder,
    read_json,
    read_jsonl,
    remove_temporaries,
    write_json,
    write_jsonl,
)
from forgetless.studies.folder import COLUMNS, RunFolder, results, write_csv

# ---- writing -------------------------------------------------------------------------------------


def test_json_is_read_back_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    content = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": "é"}, "e": (1, None)}
    write_json(tmp_path / "new" / "x.json", content)
    assert read_json(tmp_path / "new" / "x.json") == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": "é"},
        "e": [1, None],
    }
    assert read_json(tmp_path / "absent.json") == {}


def test_lines_are_read_back(tmp_path: Path) -> None:
    rows = [{"id": "1", "answer": "two\nlines"}, {"id": "2", "answer": "\u2028"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"old": 1})

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(file, {"new": 2})
    monkeypatch.undo()
    assert read_json(file) == {"old": 1}
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_new_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with new_folder(tmp_path / "made") as folder:
            (folder / "below").mkdir()
            (folder / "below" / "file").write_text(content)
            assert not (tmp_path / "made").exists() or content == "two"
    assert (tmp_path / "made" / "below" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "made") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from forgetless.core.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]) / 'made') as folder:\n"
        "    (folder / 'file').write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "made").exists()
    assert len(list(tmp_path.iterdir())) == 1
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "folder"),
    [("my run", "my-run"), ("../up", "up"), ("a/b", "a-b"), ("...", "unnamed"), ("v1.2", "v1.2")],
)
def test_a_name_becomes_one_folder(name: str, folder: str) -> None:
    assert folder_name(name) == folder


# ---- locks ---------------------------------------------------------------------------------------


def _hold(path: Path, held: Any) -> None:
    with lock(path):
        held.set()
        time.sleep(60)


def test_a_lock_keeps_others_out_and_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    try:
        assert held.wait(120)
        with lock(tmp_path / "lock", wait=False) as free:
            assert not free
    finally:
        holder.kill()
        holder.join()
    with lock(tmp_path / "lock") as free:
        assert free
    with lock(tmp_path / "lock", wait=False) as free:
        assert free


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
