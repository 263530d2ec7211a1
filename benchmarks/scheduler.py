"""What it costs that the runs of a study are trials of a storage.

    python benchmarks/scheduler.py --storage journal postgresql [--runs 1000] [--workers 2] [--json]
    python benchmarks/scheduler.py --storage journal --study 5 [--json]

The first has runs that do nothing but sleep, so whatever a run takes beyond that is the scheduler
and the two lines that a run writes of itself. The second does the demo's arms, a tenth of the steps
each, as a study and by a bare loop of `execute`, in turns; what counts is the processor's seconds,
which the load of the machine changes less than the clock's. The server of PostgreSQL is Debian's,
started for this on a socket, with `fsync` off.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil

from forgetless.cli.demo import definition
from forgetless.core.files import write_json
from forgetless.recipes.study import StudyRecipe
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import execute, prepare
from timing import interleaved, table


def main() -> None:
    """Print a row a storage."""
    parser = argparse.ArgumentParser()
    kinds = "journal", "sqlite", "postgresql"
    parser.add_argument("--storage", nargs="+", choices=kinds, default=["journal"])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.1, help="that a run sleeps")
    parser.add_argument("--study", type=int, metavar="TURNS", help="instead: demo-sized studies")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for kind in given.storage:
        with tempfile.TemporaryDirectory(prefix="scheduler-") as name, storage(kind) as url:
            if given.study:
                found = share(Path(name), url, given.study)
            else:
                found = queued(Path(name), url, given.runs, given.workers, given.seconds)
        rows.append({"storage": kind, **found})
    print(json.dumps(rows, indent=2) if given.json else table(rows))


@contextmanager
def storage(kind: str) -> Iterator[str | None]:
    """The URL of an empty storage; None for the journal."""
    with tempfile.TemporaryDirectory(prefix="storage-") as folder:
        if kind == "postgresql":
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from tests.postgres import Server

            server = Server(Path(folder))
            server.start()
            yield server.new_database()
            server.stop()
        else:
            yield None if kind == "journal" else f"sqlite:///{folder}/trials.db"


def queued(out: Path, url: str | None, runs: int, workers: int, seconds: float) -> dict[str, Any]:
    """Runs a second, and what a worker needs, of a study whose runs sleep."""
    folder = out / "study"
    names = [f"run{number:05}" for number in range(runs)]
    for name in names:
        write_json(folder / name / "run.json", {"status": "pending", "requested": True})
    write_json(folder / "runs.json", {"runs": [{"run_id": name} for name in names]})
    context = multiprocessing.get_context("spawn")
    said: Any = context.SimpleQueue()
    arguments = folder, url, seconds, runs // workers, said
    team = [context.Process(target=take_part, args=arguments) for _ in range(workers)]
    for worker in team:
        worker.start()
    found = [said.get() for _ in team]
    for worker in team:
        worker.join()
    wall = max(f["last"] for f in found) - min(f["first"] for f in found)
    return {
        "runs": runs,
        "workers": workers,
        "runs a second": runs / wall,
        "ms a run beyond its own": 1000 * (wall * workers / runs - seconds),
        "processor ms a run": 1000 * sum(f["processor"] for f in found) / runs,
        "MB after a tenth": max(f["early"] for f in found),
        "MB at the end": max(f["late"] for f in found),
    }


def take_part(folder: Path, url: str | None, seconds: float, expected: int, said: Any) -> None:
    """A worker that says when its first run began, when its last one ended, and what it needed."""
    began: list[float] = []
    early: dict[str, float] = {}

    def sleep(run: RunFolder, **_: Any) -> None:
        if not began:
            early["processor"] = processor()
        began.append(time.time())
        time.sleep(seconds)
        run.update(status="done", requested=False)
        if len(began) <= max(1, expected // 10):
            early["memory"] = memory()

    how: dict[str, Any] = {"storage": url, "threads": 1, "listen": lambda event: None}
    with patch.object(studies, "execute_run", sleep):
        studies.take_part(folder, **how)
    said.put(
        {
            "first": began[0],
            "last": began[-1] + seconds,
            "processor": processor() - early["processor"],
            "early": early["memory"],
            "late": memory(),
        }
    )


def share(out: Path, url: str | None, turns: int) -> dict[str, Any]:
    """What a demo-sized study takes over a bare loop that does the same runs."""
    content = definition()
    content["recipe"]["training"] |= {"steps": 20, "checkpoint_every": 10}
    recipes = StudyRecipe.parse(content).recipes()
    seconds: dict[str, list[float]] = {"study": [], "loop": []}

    def bare() -> None:
        for run_id, recipe in recipes.items():
            run = RunFolder(out / "loop" / "pocket-demo" / run_id)
            prepare(run, recipe)
            execute(run)

    def counted(side: str, work: Callable[[], object]) -> None:
        shutil.rmtree(out / side, ignore_errors=True)
        before = processor()
        work()
        seconds[side].append(processor() - before)

    as_study = partial(studies.study, content, out / "study", storage=url)
    sides = {"study": partial(counted, "study", as_study), "loop": partial(counted, "loop", bare)}
    wall = interleaved(sides, turns)
    both = {"processor": {k: v[-turns:] for k, v in seconds.items()}, "clock": wall}
    row: dict[str, Any] = {"runs": len(recipes), "turns": turns}
    for clock, times in both.items():
        ratios = [a / b for a, b in zip(times["study"], times["loop"], strict=True)]
        row |= {f"{clock} s, loop": median(times["loop"]), f"{clock}, over it": median(ratios)}
    return row


def processor() -> float:
    """Seconds of the processor that this process has had."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory() -> float:
    """MB that this process has in memory."""
    return float(psutil.Process().memory_info().rss) / 1e6


if __name__ == "__main__":
    main()
