"""Parts of a benchmark: each a process of its own with a limit, whose rows outlive it.

    measure("step", work, out, device)                    # in that process: writes out/step.json
    run_part("step", command, limit, out)                 # starts it, and notes how it ended

The file of a part has `status`, with the `reason` where that is not "done": "skipped", "failed",
"cut off" or, where the whole benchmark was ended, "unfinished".
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from forgetless.core.files import read_json, write_json
from timing import surroundings

Row = dict[str, Any]
Save = Callable[[Sequence[Row]], None]
"""Writes all rows that a part has so far."""


class Part(NamedTuple):
    """What measures it, and the seconds that its process may take on a GPU and when tiny."""

    work: Callable[..., None]
    limit: float
    tiny_limit: float = 50


class Skipped(Exception):  # noqa: N818 - it is no error
    """A part cannot be done here, for the reason that this says."""


def measure(name: str, work: Callable[[Save], None], out: Path, device: str) -> None:
    """Do a part in this process; its file has every row as soon as there is one."""
    record: Row = {"part": name, "status": "unfinished", "surroundings": surroundings(device)}

    def save(rows: Sequence[Row]) -> None:
        record["rows"] = list(rows)
        write_json(out / f"{name}.json", record)

    save([])
    try:
        work(save)
        record["status"] = "done"
    except Skipped as reason:
        record |= {"status": "skipped", "reason": str(reason)}
    save(record["rows"])


def run_part(
    name: str, command: Sequence[str], limit: float, out: Path, *, hide_gpus: bool = False
) -> None:
    """Do a part by a command, in a process of its own, and note how that ended.

    Args:
        name: of the part; the process writes out/<name>.json, its output goes to <name>.log.
        command: what does the part.
        limit: seconds after which the process and all that it started are killed.
        out: the folder.
        hide_gpus: whether the process is to see none.
    """
    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})
    began, cut_off = time.monotonic(), False
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            cut_off = True
        finally:  # with all its workers, whose memory the next part needs
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    record = {"part": name, "status": "unfinished", "rows": []} | read_json(file)
    if record["status"] == "unfinished":
        said = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit {child.returncode}"
        record["status"] = "cut off" if cut_off else "failed"
        record["reason"] = f"its limit of {limit:g} s" if cut_off else f"{how}: {said}"
    write_json(file, record | {"seconds": round(time.monotonic() - began, 1)})
