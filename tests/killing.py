"""Kill a study at random moments, continue it, and compare its results.csv with an undisturbed one.

    python -m tests.killing --times 10 --workers 2

uses the real command line on a tiny model; `tests/test_study.py` does the same faster.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import recipe_of, save_base, save_files

TIMES = ("train_seconds",)


# What a run imports is imported once, in the process that the others are forked from.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "forgetless.studies.study",
        "forgetless.training.loop",
        *("forgetless.studies.search", "optuna.storages._rdb.storage", "psycopg", "scipy.stats"),
    ]
)


def killed_until_done(work: Callable[..., object], *arguments: Any, most: int = 6) -> int:
    """Do some work in a process that is killed at random moments, until it ends; how often."""
    draw = random.Random(os.environ.get("FORGETLESS_KILL_SEED", "0"))
    for kills in range(most + 1):
        process = FORKSERVER.Process(target=work, args=arguments)
        process.start()
        process.join(draw.uniform(0.3, 4.0) if kills < most else None)
        if not process.is_alive():
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
    raise AssertionError("the last one is waited for")


def study_of(base: Path, files: Path, steps: int = 6) -> dict[str, Any]:
    """Four short runs: full fine-tuning, a plain LoRA, and two that share statistics."""
    recipe = recipe_of(base, files, **{"training.steps": steps, "adapter.dropout": 0.1})
    methods = ["full", "lora", "lora_null_v1", "lora_null_v2"]
    return {"name": "killed", "recipe": recipe, "axes": {"adapter.method": methods}}


def results(study_folder: Path) -> list[dict[str, str]]:
    """The rows of results.csv without what depends on the clock."""
    with (study_folder / "report" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def start(study: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """The study as a process group of its own."""
    command = [sys.executable, "-m", "forgetless", "study", str(study), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--workers", str(workers), "--no-report"],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def main() -> None:
    """Run the study undisturbed, then kill and continue it until it was killed often enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="forgetless-killing-"))
    study = folder / "killed.yaml"
    definition = study_of(save_base(folder / "base"), save_files(folder / "files"), options.steps)
    study.write_text(json.dumps(definition))

    started = time.perf_counter()
    if start(study, folder / "whole", options.workers).wait() != 0:
        sys.exit("the undisturbed study failed")
    seconds = time.perf_counter() - started
    expected = results(folder / "whole" / "killed")
    print(f"undisturbed: {len(expected)} rows in {seconds:.0f} s")

    killed = 0
    while killed < options.times:
        process = start(study, folder / "cut", options.workers)
        try:
            process.wait(draw.uniform(0.1, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            killed += 1
            os.kill(process.pid, signal.SIGKILL)  # the workers must notice by themselves
            process.wait()
            print(f"killed {killed} of {options.times}: {_state(folder / 'cut' / 'killed')}")
            continue
        _compare(expected, results(folder / "cut" / "killed"))
        shutil.rmtree(folder / "cut")
    if start(study, folder / "cut", options.workers).wait() != 0:
        sys.exit("the continued study failed")
    _compare(expected, results(folder / "cut" / "killed"))
    shutil.rmtree(folder)


def _state(study_folder: Path) -> str:
    """How far each run is, by the names of its files."""
    found = (json.loads(path.read_text()) for path in sorted(study_folder.glob("*/run.json")))
    return ", ".join(
        f"{record['status']} after {len(record.get('seconds', {}))} stages" for record in found
    )


def _compare(expected: list[dict[str, str]], found: list[dict[str, str]]) -> None:
    if found != expected:
        sys.exit(f"the results differ:\n{expected}\n{found}")
    print(f"continued to its end: {len(found)} rows, all as expected")


if __name__ == "__main__":
    main()
