"""What it costs that the runs of a study are trials of a storage.

    python benchmarks/scheduler.py --storage journal postgresql [--runs 1000] [--workers 2] [--json]
    python benchmarks/scheduler.py --storage journal postgresql --study 3 [--json]

The first has runs that do nothing but sleep, so whatever a run takes beyond that is the scheduler
and the two lines that a run writes of itself. The second does two real runs of the pocket base,
short ones, by a bare loop of `run` and as a study of each storage, so many times in turns. What
counts there are the processor's seconds, with those of child processes, which the load of the
machine changes less than the clock's; and since even these differ by more from turn to turn than a
scheduler takes, its own are counted apart: those of a worker that it does not spend in runs, and of
these what it takes to open the storage, once a study. The server of PostgreSQL is Debian's, started
for this on a socket, with `fsync` off; what it takes itself is not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil

from forgetless.cli.demo import definition
from forgetless.core.files import remove, write_json
from forgetless.recipes.study import StudyRecipe
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run
from timing import table


def main() -> None:
    """Print a row a storage."""
    parser = argparse.ArgumentParser()
    kinds = "journal", "sqlite", "postgresql"
    parser.add_argument("--storage", nargs="+", choices=kinds, default=["journal"])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.1, help="that a run sleeps")
    parser.add_argument("--study", type=int, metavar="TURNS", help="instead: real runs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scheduler-") as name, ExitStack() as servers:
        urls = {kind: servers.enter_context(storage(kind)) for kind in given.storage}
        if given.study:
            rows = beside_runs(Path(name), urls, given.study)
        else:
            how = given.runs, given.workers, given.seconds
            rows = [
                {"storage": kind, **queued(Path(name) / kind, url, *how)}
                for kind, url in urls.items()
            ]
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


def beside_runs(out: Path, urls: Mapping[str, str | None], turns: int) -> list[dict[str, Any]]:
    """For each storage, what the runs of a study take over a bare loop, and its scheduler alone."""
    before = processor()
    import optuna  # noqa: F401 - once a process, whatever the storage

    importing = processor() - before
    content = definition()
    content["recipe"] |= {"training": {"steps": 4, "batch_size": 32, "checkpoint_every": 2}}
    learned, kept = ({"kind": f"pocket_{kind}", "limit": 32} for kind in ("problems", "recall"))
    content["recipe"]["tasks"] = {"learning": [learned], "forgetting": [kept]}
    content |= {"arms": [{"adapter.method": "lora"}], "axes": {"seed": [0]}}
    name, recipes = content["name"], list(StudyRecipe.parse(content).recipes().values())

    def as_loop() -> None:
        for recipe in recipes:
            run(recipe, out / "loop", name)

    sides: dict[str, Callable[[], object]] = {"loop": as_loop}
    for kind, url in urls.items():
        sides[kind] = partial(studies.study, content, out / kind, storage=url)
    run(recipes[0], out / "loop", name)
    for kind in urls:  # the base's scores are not the scheduler's
        shutil.copytree(out / "loop" / name / "shared", out / kind / name / "shared")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    clock: dict[str, list[float]] = {side: [] for side in sides}
    opening: dict[str, list[float]] = {side: [] for side in sides}
    scheduling: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(turns):
        for side, work in sides.items():
            for file in (out / side / name).iterdir():
                if file.name != "shared":
                    remove(file)
            spent = dict.fromkeys(("take_part", "open_trials", "execute_run"), 0.0)
            with counted(spent):
                before, began = processor(), time.perf_counter()
                work()
            seconds[side].append(processor() - before)
            clock[side].append(time.perf_counter() - began)
            opening[side].append(spent["open_trials"])
            scheduling[side].append(spent["take_part"] - spent["execute_run"])
    return [
        {
            "storage": kind,
            "turns": turns,
            "processor s a run, loop": median(seconds["loop"]) / len(recipes),
            "processor, study over loop": ratios(seconds[kind], seconds["loop"]),
            "clock, study over loop": ratios(clock[kind], clock["loop"]),
            "scheduler, processor ms": 1000 * median(scheduling[kind]),
            "of these to open the storage": 1000 * median(opening[kind]),
            "scheduler, % of the runs": 100 * median(scheduling[kind]) / median(seconds["loop"]),
            "processor ms to import Optuna": 1000 * importing,
            "load": os.getloadavg()[0],
        }
        for kind in urls
    ]


@contextmanager
def counted(spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor's seconds in each of these functions of a study."""

    def counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*given: Any, **named: Any) -> Any:
            before = processor()
            found = work(*given, **named)
            spent[name] += processor() - before
            return found

        return counts

    with ExitStack() as patches:
        for name in spent:
            found = counting(name, getattr(studies, name))
            patches.enter_context(patch.object(studies, name, found))
        yield


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the turns, with the least and the greatest."""
    found = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return f"{median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"


def processor() -> float:
    """Seconds of the processor that this process has had, and its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def memory() -> float:
    """MB that this process has in memory."""
    return float(psutil.Process().memory_info().rss) / 1e6


if __name__ == "__main__":
    main()
