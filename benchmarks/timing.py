"""What the benchmarks share: sides that take turns in one process, what a whole command
takes, medians, a table and a file.

    times = interleaved({"theirs": step_theirs, "ours": step_ours}, repeats=7)
    row = {"hidden": 1024, **medians(times), "ratio": ratio(times, "ours", "theirs")}
    report("step", "Training step, seconds", {"rank": 16}, [row])

`report` prints the rows as a table and writes benchmarks/results/step.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "forgetless")

Times = Mapping[str, Sequence[float]]
"""Side -> its seconds, one a repeat."""


@dataclass(frozen=True)
class Used:
    """What a command took: seconds of the clock and of the processor, and its most bytes."""

    clock: float = 0.0
    processor: float = 0.0
    peak: int = 0

    def __add__(self, other: Used) -> Used:
        """One command after the other."""
        clock, processor = self.clock + other.clock, self.processor + other.processor
        return Used(clock, processor, max(self.peak, other.peak))


def used_by(words: Sequence[str], threads: int, **more: str) -> Used:
    """Do a command, with `threads` for its arithmetic and more settings of its environment.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    fixed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        environment = {**os.environ, **fixed, **more}
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        clock = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise RuntimeError(said.read()[-4000:])
    unit = 1 if sys.platform == "darwin" else 1024
    return Used(clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmups: int = 1,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """The seconds of each side; the sides take turns, so that a busy moment hits them all.

    Args:
        sides: name -> what to time.
        repeats: timings a side, at least 1.
        warmups: rounds before them that are not kept.
        prepare: name -> what to do before each call of that side, outside of its time.
        device: where the work runs; a GPU is waited for before and after.

    Returns:
        Side -> seconds, one a repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(warmups + repeats):
        for name, work in sides.items():
            if prepare and name in prepare:
                prepare[name]()
            taken = timed(work, device)
            if repeat >= warmups:
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of one call; a GPU is waited for before and after."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: str | torch.device) -> None:
    """Return when the device has nothing left to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: str | torch.device) -> None:
    """Begin to look for the most memory of a GPU that is in use at a time."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: str | torch.device) -> float | None:
    """The most GiB of tensors on a GPU at a time since `reset_peak`; None on the CPU."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def medians(times: Times) -> dict[str, float]:
    """Side -> its median seconds."""
    return {name: median(values) for name, values in times.items()}


def ratio(times: Times, one: str, other: str) -> float:
    """Median seconds of one side over those of another."""
    return median(times[one]) / median(times[other])


def surroundings(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The hardware, the versions and the commit that a number depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "gpu GiB": torch.cuda.get_device_properties(device).total_memory / 2**30 if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "versions": found,
    }


def _said(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _cpu() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(
    name: str,
    title: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    device: str | torch.device = "cpu",
) -> Path:
    """Print the rows as a table and write them with all that they depend on.

    Args:
        name: of the file, benchmarks/results/<name>.json, which is replaced.
        title: the table's first line.
        settings: what was asked for, for instance {"rank": 16}.
        rows: mappings with the same keys in the same order; the keys are the columns.
        device: where the work ran.

    Returns:
        The file.
    """
    around = surroundings(device)
    print(f"{title}\n{', '.join(f'{key} {value}' for key, value in settings.items())}")
    print(table(rows))
    where = around["gpu"] or f"{around['cpu']}, {around['threads']} threads"
    print(f"{where}; {', '.join(f'{name} {v}' for name, v in around['versions'].items())}\n")
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "settings": settings, "surroundings": around, "rows": rows}
    file.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return file


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in columns under their keys; numbers to the right, with four digits."""
    if not rows:
        return "(no rows)"
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    numeric = [any(isinstance(row[column], int | float) for row in rows) for column in rows[0]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
