"""What the sandbox adds to a program: `python benchmarks/sandbox.py [--core N]`.

A program that does nothing is timed from the call of `run_code` to its result, so that all of the
time is overhead; and the given solutions of HumanEval and MBPP are run, where their files are,
several times over, to see whether one ever fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from forgetless.tasks.sandbox import run_code


def main() -> None:
    """Print the times and the failures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, help="stay on this core, as the programs then do")
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="of the solutions")
    parser.add_argument("--data", type=Path, help="folder with humaneval/ and mbpp/ in it")
    given = parser.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    found: dict[str, Any] = {"first_ms": _milliseconds("x = 1")}
    for name, program in (("empty", ""), ("typing", "from typing import List"), ("fails", "1 / 0")):
        times = sorted(_milliseconds(program) for _ in range(given.programs))
        p95 = times[int(0.95 * len(times))]
        found[name] = {"median_ms": round(statistics.median(times), 2), "p95_ms": round(p95, 2)}
    if given.data is not None:
        for name, programs in _solutions(given.data).items():
            found[name] = _repeated(programs, given.repeats)
    print(json.dumps(found, indent=2))


def _milliseconds(program: str) -> float:
    started = time.perf_counter()
    run_code(program)
    return 1000 * (time.perf_counter() - started)


def _repeated(programs: list[str], repeats: int) -> dict[str, Any]:
    passed, reasons = [], []
    for _ in range(repeats):
        results = [run_code(program) for program in programs]
        passed.append(sum(result.passed for result in results))
        reasons += [
            f"{i}: {result.reason}" for i, result in enumerate(results) if not result.passed
        ]
    return {"programs": len(programs), "passed": passed, "failures": reasons}


def _solutions(folder: Path) -> dict[str, list[str]]:
    """Each problem's own solution with its tests."""
    humaneval = _rows(folder / "humaneval" / "HumanEval.jsonl")
    mbpp = [row for row in _rows(folder / "mbpp" / "mbpp.jsonl") if 10 < row["task_id"] <= 510]
    return {
        "humaneval": [
            f"{r['prompt']}{r['canonical_solution']}\n{r['test']}\ncheck({r['entry_point']})"
            for r in humaneval
        ],
        "mbpp": ["\n".join([r["code"], r["test_setup_code"], *r["test_list"]]) for r in mbpp],
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
