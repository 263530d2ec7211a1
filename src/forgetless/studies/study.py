"""A study: the runs of one definition, in one folder, done by one process or by several.

A lock a run keeps two processes from doing the same one, so that further processes, also on other
machines that share the folder, may join by the same command. Each call asks for every run once
(``requested`` in run.json), and the first process to take it does it for all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from forgetless.core.errors import UserError
from forgetless.core.files import lock, remove_temporaries, write_json, write_text
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.study import StudyRecipe
from forgetless.studies.folder import RunFolder, curve, results, run_folders, write_tables
from forgetless.studies.run import Run, execute, prepare
from forgetless.studies.stages import Event, Listener

_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Study:
    """A study as it lies in its folder."""

    folder: Path

    @property
    def runs(self) -> list[Run]:
        """The runs in the study's order."""
        return [Run(folder.path) for folder in run_folders(self.folder)]

    @property
    def failed(self) -> list[Run]:
        """The runs that did not come to their end."""
        return [run for run in self.runs if run.status != "done"]

    def results(self) -> list[dict[str, Any]]:
        """One row per run and task, as in results.csv."""
        return results(self.folder)


def study(
    definition: StudyRecipe | Mapping[str, Any] | str | Path,
    out: str | Path = "runs",
    *,
    workers: int = 1,
    threads: int | None = None,
    listen: Listener | None = None,
) -> Study:
    """Do every run of a study that is not done yet, and write its results.csv.

    A run that fails keeps its folder with the reason, and the others are done. A study that was
    stopped, by whatever means, is resumed by the same call. Two calls at once, also on two
    machines, share the runs.

    Args:
        definition: a `StudyRecipe`, the mapping that one is written as, or a YAML file.
        out: the folder that holds studies.
        workers: processes that do runs side by side, each on a GPU of its own as long as there are
            enough; 1 is this very process.
        threads: torch threads of a worker; None for one on a small model.
        listen: called with the `Event`s of all runs.

    Returns:
        The study; look at ``.failed``.

    Raises:
        RecipeError: what is wrong with the definition, before anything is run.
    """
    if not isinstance(definition, StudyRecipe):
        read = StudyRecipe.parse if isinstance(definition, Mapping) else StudyRecipe.load
        definition = read(definition)  # type: ignore[arg-type]
    folder = Path(out) / definition.name
    how: dict[str, Any] = {"workers": workers, "threads": threads, "listen": listen}
    do_runs(folder, definition.recipes(), {"study.yaml": definition.model_dump()}, **how)
    return Study(folder)


def do_runs(
    folder: Path,
    recipes: Mapping[str, Recipe],
    definition: Mapping[str, Any],
    *,
    index: Mapping[str, Any] | None = None,
    workers: int = 1,
    threads: int | None = None,
    listen: Listener | None = None,
) -> None:
    """Do every run that is not done yet, and write the tables of the folder.

    Args:
        folder: of the study.
        recipes: by run id.
        definition: what they come from, by the name of the file to write it to.
        index: what runs.json has beside the runs.
        workers: as of `study`.
        threads: likewise.
        listen: likewise.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    session, listen = uuid.uuid4().hex, listen or (lambda event: None)
    runs = _lay_out(folder, recipes, definition, index or {}, listen)
    if workers > 1:
        command = [sys.executable, "-m", "forgetless", "worker", str(folder), session]
        command += [] if threads is None else ["--threads", str(threads)]
        run_workers(command, min(workers, len(runs)), listen)
    # With workers, what is left: the run of one that died is marked, others are done.
    work(runs, session, threads=threads, listen=listen)
    write_tables(folder, results(folder), curve(folder))


def _lay_out(
    folder: Path,
    recipes: Mapping[str, Recipe],
    definition: Mapping[str, Any],
    index: Mapping[str, Any],
    listen: Listener,
) -> list[RunFolder]:
    """Write the definition, and ask for every run that nobody is doing; gives all of them."""
    entries = [{"run_id": run_id, "name": recipe.name} for run_id, recipe in recipes.items()]
    with lock(folder / ".lock"):
        for name in (*definition, "runs.json"):
            remove_temporaries(folder, name)
        for name, content in definition.items():
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            write_text(folder / name, text)
        write_json(folder / "runs.json", {"runs": entries, **index})
    runs = {RunFolder(folder / run_id): recipe for run_id, recipe in recipes.items()}
    for run, recipe in runs.items():
        with lock(run.lock, wait=False) as free:
            if not free:
                continue
            try:
                prepare(run, recipe)
                run.update(requested=True)
            except UserError as damage:  # of its run.json; the other runs are done
                listen(Event(run.path.name, recipe.name or "", "failed", str(damage)))
    return list(runs)


def work(
    runs: Sequence[RunFolder], session: str, *, threads: int | None = None, listen: Listener
) -> None:
    """Do these runs one after the other, but for those that somebody else does meanwhile.

    A run that was finished before is gone through once more, which costs little: its stages find
    their artefacts. When all that is left is in other hands, wait for them: should such a process
    die, its run is free again.
    """
    while waiting := [run for run in runs if not _is_over(run)]:
        if not any(_try_to_do(run, session, threads, listen) for run in waiting):
            time.sleep(0.5)


def _is_over(run: RunFolder) -> bool:
    record = run.read()
    return record.get("status") in ("done", "failed") and not record.get("requested")


def _try_to_do(run: RunFolder, session: str, threads: int | None, listen: Listener) -> bool:
    """Do a run if nobody else does; gives whether there was something to do.

    One that comes after another waits for that, and fails with it.
    """
    before = run.before
    if before is not None and not _is_over(before):
        return False
    with lock(run.lock, wait=False) as free:
        if not free or _is_over(run):
            return False
        record = run.read()
        if record.get("session") == session and not record.get("requested"):
            # It was begun by a worker of this study, and nobody is at it.
            reason = "the worker process died; perhaps it ran out of memory"
            run.update(status="failed", reason=reason)
            listen(Event(run.path.name, record.get("name") or "", "failed", reason))
            return True
        try:
            execute(run, threads=threads, session=session, listen=listen)
        except Exception as error:  # the reason is in run.json
            if not _is_over(run):
                reason = f"{type(error).__name__}: {error}"
                run.update(status="failed", reason=reason, requested=False)
        return True


def run_workers(
    command: Sequence[str], workers: int, listen: Listener, changes: Mapping[str, str] | None = None
) -> None:
    """Run worker processes to their end; they end with this process, whatever ends it.

    What they report on their standard output, see `serve`, is passed on.

    Args:
        command: of each worker.
        workers: how many.
        listen: called with their events.
        changes: of the environment of each.
    """
    # A worker ends when its standard input does, so none outlives a parent that is killed.
    team = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own | dict(changes or {}),
        )
        for own in _environments(workers)
    ]

    def pass_on(worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            with suppress(ValueError):  # anything else that a library prints
                listen(Event(**json.loads(line)))

    readers = [threading.Thread(target=pass_on, args=[worker]) for worker in team]
    try:
        for reader in readers:
            reader.start()
        for worker in team:
            worker.wait()
    finally:
        for worker in team:
            worker.terminate()  # one that trains finishes and saves its step
        for worker in team:
            worker.wait()
        for reader in readers:
            reader.join()


def _environments(workers: int) -> Iterator[dict[str, str]]:
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
        if len(devices) > 1:  # in the worker its own is then the first, which every run takes
            changes[_VISIBLE_GPUS] = devices[worker % len(devices)]
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
