"""Who does runs: workers on this machine or on a cluster, and processes that share one run."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from forgetless.core.errors import UserError
from forgetless.recipes.checking import Checker
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import execute
from forgetless.studies.stages import Event, Listener
from forgetless.studies.trials import MOST_RETRIES
from forgetless.training.launch import Launch

_log = logging.getLogger(__name__)

_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Workers:
    """Who does the runs of a study or of a search; the attributes are arguments of `study`."""

    storage: str | None
    count: int | None
    threads: int | None
    processes: int
    on: Literal["ray"] | None
    address: str | None
    share: str | None = None

    def __post_init__(self) -> None:
        if self.share and not self.storage:
            raise UserError(
                f"--share {self.share} needs a database too, which says who does which run: "
                "--storage postgresql://user@host/database"
            )
        if self.count is not None and self.count < 1:
            raise UserError(f"workers must be at least 1, got {self.count}")
        if self.processes < 1:
            raise UserError(f"processes must be at least 1, got {self.processes}")
        if self.on is None and 0 < torch.cuda.device_count() < self.processes:
            raise UserError(
                f"processes: {self.processes} of a run, each on a GPU of its own, and this machine "
                f"has {torch.cuda.device_count()}"
            )

    def checker(self) -> Checker:
        """Checks recipes for the processes of a run."""
        several = self.processes > 1
        return Checker(Launch(self.processes, strategy="DDP") if several else None)

    def work(
        self, take_part: Callable[..., None], folder: Path, most: int, listen: Listener, **more: Any
    ) -> None:
        """Let all take part until there is nothing left to do.

        Args:
            take_part: what one does with the folder, given ``storage``, ``threads``, ``processes``,
                ``share``, ``listen`` and what more there is.
            folder: of the study or the search.
            most: workers for which there is something to do.
            listen: called with the events of all.
            more: likewise, where it is not None.
        """
        more = {"threads": self.threads, "share": self.share, "processes": self.processes, **more}
        if self.on == "ray":
            from forgetless.studies.on_ray import work_on_ray  # Ray is optional

            part = partial(take_part, folder, storage=self.storage, **more)
            size = {"threads": self.threads or 1, "processes": self.processes}
            work_on_ray(part, self.address, self.count, most, listen, **size)
            return
        if self.count is not None and self.count > 1:
            command = [sys.executable, "-m", "forgetless", "worker", str(folder)]
            for name, value in more.items():
                command += [] if value is None else [f"--{name}", str(value)]
            # In the environment, where other users of the machine see no password.
            secret = {"FORGETLESS_STORAGE": self.storage or ""}
            run_workers(command, min(self.count, most), listen, secret, gpus=self.processes)
        # With workers, what is left: nothing, unless they died too often.
        take_part(folder, storage=self.storage, listen=listen, **more)


def execute_run(run: RunFolder, *, threads: int | None, processes: int, listen: Listener) -> None:
    """Take a prepared run through its stages, in this process or by several that torchrun starts.

    For the holder of its lock.

    Raises:
        Exception: what went wrong, which is in run.json.
    """
    if processes == 1:
        execute(run, threads=threads, listen=listen)
        return
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *launch, "forgetless", "worker", str(run.path)]
    command += [] if threads is None else ["--threads", str(threads)]
    run_workers(command, 1, listen, gpus=processes)
    record = run.read()
    if record.get("status") != "done":
        raise UserError(record.get("reason") or "its processes ended without a word")


def run_workers(
    command: Sequence[str],
    workers: int,
    listen: Listener,
    changes: Mapping[str, str] | None = None,
    *,
    gpus: int = 1,
) -> None:
    """Run worker processes to their end; they end with this process, whatever ends it.

    What they report on their standard output, see `serve`, is passed on. In the place of one that
    the system killed, as where memory runs out, another is started.

    Args:
        command: of each worker.
        workers: how many.
        listen: called with their events.
        changes: of the environment of each.
        gpus: that each sees, where there are several.
    """
    team: list[subprocess.Popen[str]] = []
    starting, is_ending = threading.Lock(), threading.Event()

    def keep(own: Mapping[str, str]) -> None:
        environment = os.environ | own | dict(changes or {})
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(1 + MOST_RETRIES):
            with starting:
                if is_ending.is_set():
                    return
                # It ends when its standard input does, so none outlives a parent that is killed.
                worker = subprocess.Popen(command, env=environment, **pipes)
                team.append(worker)
            with worker:
                for line in worker.stdout or ():
                    with suppress(ValueError):  # anything else that a library prints
                        listen(Event(**json.loads(line)))
                worker.wait()  # with its standard input open, which is what it ends with
            if worker.returncode >= 0 or is_ending.is_set():
                return
            _log.warning("a worker was killed by signal %d; another takes over", -worker.returncode)

    keepers = [threading.Thread(target=keep, args=[own]) for own in _environments(workers, gpus)]
    try:
        for keeper in keepers:
            keeper.start()
        for keeper in keepers:
            keeper.join()
    finally:
        with starting:
            is_ending.set()
        for worker in team:
            worker.terminate()  # one that trains finishes and saves its step
        for keeper in keepers:
            keeper.join()


def _environments(workers: int, gpus: int) -> Iterator[dict[str, str]]:
    """What is different in the environment of each worker."""
    given = os.environ.get(_VISIBLE_GPUS)
    devices = [] if given is None else [name.strip() for name in given.split(",")]
    if devices and devices[0].startswith("MIG-"):
        # Of several parts of a GPU one process sees the first alone, so that no count would tell.
        devices = [name for name in devices if name.startswith("MIG-")]
    else:
        count = torch.cuda.device_count()  # asks NVML: this process takes no memory on any of them
        # CUDA leaves out the first name that it cannot find and all behind it.
        devices = [str(n) for n in range(count)] if given is None else devices[:count]
    for worker in range(workers):
        # The bars of several trainings at once are one heap: the listener draws them.
        changes = {"TTY_COMPATIBLE": "0"}
        if len(devices) > gpus:  # in the worker its own are then the first, which every run takes
            own = [devices[(worker * gpus + n) % len(devices)] for n in range(gpus)]
            changes[_VISIBLE_GPUS] = ",".join(own)
        yield changes


def serve(do: Callable[[Listener], None]) -> None:
    """What a worker process does, with its events as JSON lines on standard output."""

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which terminates us
    output = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed is no event

    def report(event: Event) -> None:
        print(json.dumps(asdict(event)), file=output, flush=True)

    try:
        do(report)
    except KeyboardInterrupt:  # the parent says what there is to say
        sys.exit(1)
