"""Benchmarks of starts and layers run through, at sizes that say nothing of speed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
@pytest.mark.parametrize(
    "command",
    [
        "init_speed --hidden 32 --inner 64 --rank 4 --repeats 1",
        "vision --hidden 32 --layers 1 --side 96 --batch 4 --rank 2 --repeats 1",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_benchmark_runs_through_and_writes_its_rows(
    command: str, benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *options = command.split()
    monkeypatch.setattr("timing.RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [name, *options])
    runpy.run_path(str(benchmarks / f"{name}.py"), run_name="__main__")
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rows"]
