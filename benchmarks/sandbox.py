"""What the sandbox adds to a program: `python benchmarks/sandbox.py [--core N] [--data DIR]`.

A program that does nothing and its empty test are timed from the call of `run_code` to its result,
so that all of the time is overhead. With `--data`, the given solutions of HumanEval and MBPP are
run several times over, to see whether one ever fails. With `--forged` too, every program of
`tests/hostile.py` that is wrong and tries to pass is run on every problem of HumanEval; under each
further setting of the sandbox's layers that there is here, an eighth of these pairs, with every
problem and every program among them. That is some thirty thousand runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forgetless.tasks.humaneval import HumanEval
from forgetless.tasks.mbpp import MBPP
from forgetless.tasks.sandbox import _Supervisor, run_code
from forgetless.tasks.sandbox.confine import landlock_version


def main() -> None:
    """Print the times and the failures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, help="stay on this core, as the programs then do")
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="of the solutions")
    parser.add_argument("--data", type=Path, help="folder with humaneval/ and mbpp/ in it")
    parser.add_argument(
        "--forged", action="store_true", help="try to forge a pass on every problem"
    )
    given = parser.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    found: dict[str, Any] = {"first_ms": _milliseconds("x = 1")}
    for name, program in (("empty", ""), ("typing", "from typing import List"), ("fails", "1 / 0")):
        times = sorted(_milliseconds(program) for _ in range(given.programs))
        p95 = times[int(0.95 * len(times))]
        found[name] = {"median_ms": round(statistics.median(times), 2), "p95_ms": round(p95, 2)}
    if given.data is not None:
        for kind in (HumanEval, MBPP):
            task = kind(data_dir=given.data, allow_code_execution=True)
            found[task.name] = _repeated(task, given.repeats)
    if given.data is not None and given.forged:
        found["forged"] = _forged(given.data)
    print(json.dumps(found, indent=2))


def _milliseconds(program: str) -> float:
    started = time.perf_counter()
    run_code(program)
    return 1000 * (time.perf_counter() - started)


def _repeated(task: HumanEval | MBPP, repeats: int) -> dict[str, Any]:
    """How many of each problem's own solutions pass."""
    asked = task.questions()
    passed, failures = [], []
    for _ in range(repeats):
        right = [each == [True] for each in task.right([[item.expected] for item in asked])]
        passed.append(sum(right))
        failures += [item.id for item, one in zip(asked, right, strict=True) if not one]
    return {"programs": len(asked), "passed": passed, "failures": failures}


def _forged(folder: Path) -> dict[str, Any]:
    """What passes although it is wrong."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.hostile import FORGED

    rows = [json.loads(line) for line in (folder / "humaneval" / "HumanEval.jsonl").open()]
    pairs = [(i + j, (name, row)) for i, name in enumerate(FORGED) for j, row in enumerate(rows)]
    version = landlock_version()
    layers = [
        (),
        ("--landlock=0",),
        *[("--no-private-root", f"--landlock={v + 1}") for v in range(version)],
    ]

    def passed(supervisor: _Supervisor, name: str, row: dict[str, str]) -> bool:
        entry = row["entry_point"]
        program = f"{row['prompt']}    return None\n{FORGED[name].replace('NAME', entry)}"
        request = {"program": program, "seconds": 0.1, "memory_bytes": 256 << 20}
        test = f"{row['test']}\ncheck({entry})"
        tested = {"test": test, "helpers": row["prompt"], "names": [entry]}
        answer = supervisor.ask(request, tested, 60)
        assert answer is not None, (name, row["task_id"])
        return bool(answer["passed"])

    def wrongly(supervisor: _Supervisor, part: list[tuple[str, dict[str, str]]]) -> list[str]:
        pairs = [(name, row) for name, row in part if passed(supervisor, name, row)]
        return [f"{name} on {row['task_id']}" for name, row in pairs]

    found: dict[str, Any] = {}
    for options in layers:
        jobs = [pair for place, pair in pairs if not options or place % 8 == 0]
        supervisors = [_Supervisor(*options) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(wrongly, supervisors, (jobs[::2], jobs[1::2]))
            lines = [line for part in parts for line in part]
        for supervisor in supervisors:
            supervisor.end()
        found[" ".join(options) or "all"] = {"runs": len(jobs), "passed": lines}
        print(options, len(jobs), "runs, passed:", lines, file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
