"""The benchmark for a GPU: parts that end badly, the order of its runs, means over whole seeds."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forgetless.recipes.study import StudyRecipe

pytestmark = pytest.mark.usefixtures("benchmarks")

ROOT = Path(__file__).parents[2]
WRITES = """
import json, os, subprocess, sys, time
def write(**changes):
    record = {"part": "PART", "status": "unfinished", "rows": [{"seconds": 1.5}]}
    with open("PART.json", "w") as file:
        json.dump(record | changes, file)
"""


def ended(folder: Path, code: str, limit: float = 60) -> dict[str, Any]:
    """What is noted of a part whose process does this."""
    from parts import run_part

    script = (WRITES + code).replace("PART.json", str(folder / "PART.json"))
    run_part("PART", [sys.executable, "-c", script], limit, folder)
    found: dict[str, Any] = json.loads((folder / "PART.json").read_text())
    return found


def lives(pid: int) -> bool:
    """Whether a process is there and did not end; one that nobody waits for is a zombie."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_part_cut_off_at_its_limit_keeps_its_rows_and_leaves_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
write()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    found = ended(tmp_path, code, limit=4)
    assert found["status"] == "cut off"
    assert found["rows"] == [{"seconds": 1.5}]
    assert "4 s" in found["reason"]
    for _ in range(100):
        if not lives(int(pid.read_text())):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the part started is still there")


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("write(); raise MemoryError('CUDA out of memory')", "failed", "exit 1: MemoryError: CUDA"),
        ("write(); os.kill(os.getpid(), 9)", "failed", "signal 9"),
        ("sys.exit('no such device')", "failed", "exit 1: no such device"),
        ("write(status='skipped', reason='no base')", "skipped", "no base"),
        ("write(status='done')", "done", ""),
    ],
)
def test_a_part_says_how_it_ended(tmp_path: Path, code: str, status: str, reason: str) -> None:
    (tmp_path / "PART.json").write_text('{"status": "done", "rows": ["of an earlier call"]}')
    found = ended(tmp_path, code)
    assert found["status"] == status
    assert found.get("reason", "").startswith(reason)
    assert found["rows"] == ([{"seconds": 1.5}] if "write" in code else [])


def test_what_a_part_saved_is_there_when_it_raises(tmp_path: Path) -> None:
    from parts import Skipped, measure

    def work(error: Exception, save: Any) -> None:
        save([{"a": 1}])
        raise error

    with pytest.raises(RuntimeError):
        measure("PART", lambda save: work(RuntimeError("no"), save), tmp_path, "cpu")
    found = json.loads((tmp_path / "PART.json").read_text())
    assert (found["status"], found["rows"]) == ("unfinished", [{"a": 1}])
    assert {"gpu", "cuda", "driver", "commit", "versions"} <= found["surroundings"].keys()
    measure("PART", lambda save: work(Skipped("no base"), save), tmp_path, "cpu")
    found = json.loads((tmp_path / "PART.json").read_text())
    assert (found["status"], found["reason"]) == ("skipped", "no base")


def test_the_runs_go_seed_by_seed_and_their_recipes_are_sound(tmp_path: Path) -> None:
    import on_gpu
    from parts import Skipped

    asked = argparse.Namespace(out=tmp_path, base=None, data=None, keep=None, tiny=True)
    tiny = StudyRecipe.parse(on_gpu.the_study(asked)).recipes()
    assert len(tiny) == 8

    asked.tiny = False
    with pytest.raises(Skipped, match="--base"):
        on_gpu.the_study(asked)
    asked.base, asked.data, asked.keep = tmp_path, tmp_path, tmp_path / "keep.txt"
    with pytest.raises(Skipped, match=r"train\.jsonl"):
        on_gpu.the_study(asked)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"question": "1 + 1?", "answer": "2"}\n')
    asked.keep.write_text(" = A head = \n" + "A long paragraph of text. " * 20)
    runs = [changes for _, changes in StudyRecipe.parse(on_gpu.the_study(asked)).combinations()]
    assert [run["seed"] for run in runs] == [0] * 12 + [1] * 12 + [2] * 12
    arms = {(run["adapter.method"], run["training.learning_rate"]) for run in runs}
    assert len(arms) == 12
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 1


def test_means_are_over_seeds_all_of_whose_runs_are_over() -> None:
    from on_gpu import means

    def rows(seed: int, method: str, score: float) -> list[dict[str, Any]]:
        common = {"seed": seed, "method": method, "learning_rate": 1e-3, "kept": 1.0, "kl": None}
        settings = {"trained": score, "base": 5.0}
        return [common | {"setting": name, "gsm8k": value} for name, value in settings.items()]

    measured = rows(0, "lora", 1.0) + rows(0, "full", 3.0) + rows(1, "lora", 100.0)
    found = {(row["method"], row["setting"]): row for row in means(measured, 2)}
    assert found["lora", "trained"]["gsm8k"] == "1.0000"
    assert found["base", "–"]["seeds"] == 1
    measured += rows(1, "full", 4.0)
    found = {(row["method"], row["setting"]): row for row in means(measured, 2)}
    assert found["full", "trained"]["gsm8k"] == "3.5000 ± 0.7071"
    assert found["full", "trained"]["kl"] == "–"
    assert found["full", "trained"]["seeds"] == found["base", "–"]["seeds"] == 2


def test_the_parts_fit_into_twelve_minutes_and_tiny_into_five() -> None:
    from on_gpu import PARTS

    # A minute is left for what comes before the first part: importing on a cold disk.
    assert sum(part.limit for part in PARTS.values()) <= 11 * 60
    assert sum(part.tiny_limit for part in PARTS.values()) <= 5 * 60


def test_the_quick_parts_measure_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import on_gpu
    import start

    asked = argparse.Namespace(tiny=True, device="cpu")
    saved: list[list[dict[str, Any]]] = []
    on_gpu.repair(asked, lambda rows: saved.append([*rows]))
    *groups, whole = saved[-1]
    assert [group["layers"] for group in groups] == [3, 1, 2, 1]
    assert whole["layers"] == 7 * 32
    assert whole["seconds"] == pytest.approx(32 * sum(group["seconds"] for group in groups))

    def broken(layers: Any, method: str, rank: int) -> None:
        if method == "pissa":
            raise RuntimeError("CUDA out of memory\nof 80 GiB")

    monkeypatch.setattr(start, "start", broken)
    on_gpu.at_shapes("llama-3.1-8b", asked, lambda rows: saved.append([*rows]))
    named = {row["what"].split(", ")[2]: row for row in saved[-1] if "start" in row["what"]}
    assert named.keys() == set(start.ATTACHABLE)
    assert [name for name, row in named.items() if row["seconds"] is None] == ["pissa"]
    assert named["pissa"]["what"].endswith("pissa, failed: CUDA out of memory")
    assert len(saved[-2]) == len(saved[-1]) - 1  # each is saved at once
