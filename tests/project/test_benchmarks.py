"""Benchmarks of starts and layers run through, at sizes that say nothing of speed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *options = command.split()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("timing.RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [name, *options])
    try:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    finally:
        for module in sys.modules.keys() - before:  # `timing` is no name for the other tests
            if Path(getattr(sys.modules[module], "__file__", None) or "/").parent == BENCHMARKS:
                del sys.modules[module]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rows"]
