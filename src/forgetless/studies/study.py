"""A study: the runs of one definition, in one folder, done by one process or by several.

A lock a run keeps two processes from doing the same one, so that further processes, also on other
machines that share the folder, may join by the same command.
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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from forgetless.core.errors import UserError
from forgetless.core.files import lock, read_json, remove_temporaries, write_json, write_text
from forgetless.recipes.study import StudyRecipe
from forgetless.studies.folder import RunFolder, curve, planned, results, run_folders, write_tables
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

    A run that fails keeps its folder with the reason, and the others go on. A study that was
    stopped, by whatever means, is continued by the same call.

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
    definition = _as_definition(definition)
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    folder = Path(out) / definition.name
    _lay_out(folder, definition)
    session, listen = uuid.uuid4().hex, listen or (lambda event: None)
    if workers == 1:
        work(folder, session, threads=threads, listen=listen)
    else:
        _Team(folder, session, threads, listen).work(min(workers, len(run_folders(folder))))
    write_tables(folder, results(folder), curve(folder))
    return Study(folder)


def _as_definition(given: StudyRecipe | Mapping[str, Any] | str | Path) -> StudyRecipe:
    if isinstance(given, StudyRecipe):
        return given
    return StudyRecipe.parse(given) if isinstance(given, Mapping) else StudyRecipe.load(given)


def _lay_out(folder: Path, definition: StudyRecipe) -> None:
    """Write the definition and a folder for every run; a run that somebody is doing is let be."""
    recipes = definition.recipes()
    text = yaml.safe_dump(definition.model_dump(), sort_keys=False, allow_unicode=True)
    entries = [{"run_id": run_id, "name": recipe.name} for run_id, recipe in recipes.items()]
    with lock(folder / ".lock"):
        for name in ("study.yaml", "runs.json"):
            remove_temporaries(folder, name)
        write_text(folder / "study.yaml", text)
        write_json(folder / "runs.json", {"runs": entries})
    for run_id, recipe in recipes.items():
        run = RunFolder(folder / run_id)
        with lock(run.lock, wait=False) as free:
            if free:
                prepare(run, recipe)


def work(study_folder: Path, session: str, *, threads: int | None = None, listen: Listener) -> None:
    """Do the runs of a study that nobody has done in this session, one after the other.

    A run that was finished before is gone through again, which costs little: its stages find their
    artefacts. When all that is left is in other hands, wait for them: should such a process die,
    its run is free again.
    """
    while waiting := [run for run in planned(study_folder) if not _is_over(run, session)]:
        if not any(_try_to_do(run, session, threads, listen) for run in waiting):
            time.sleep(0.5)


def _is_over(run: RunFolder, session: str) -> bool:
    record = read_json(run.record)
    return record.get("session") == session and record["status"] in ("done", "failed")


def _try_to_do(run: RunFolder, session: str, threads: int | None, listen: Listener) -> bool:
    """Do a run if nobody else does; gives whether there was something to do."""
    with lock(run.lock, wait=False) as free:
        if not free or _is_over(run, session):
            return False
        record = read_json(run.record)
        if record.get("session") == session:  # it was begun, and nobody is at it
            reason = "the worker process died; perhaps the system ended it for want of memory"
            run.update(status="failed", reason=reason)
            listen(Event(run.path.name, record.get("name") or "", "failed", reason))
            return True
        try:
            execute(run, threads=threads, session=session, listen=listen)
        except Exception as error:  # the study goes on; the reason is in run.json
            if not _is_over(run, session):
                reason = f"{type(error).__name__}: {error}"
                run.update(status="failed", reason=reason, session=session)
        return True


class _Team:
    """Worker processes, and the events that they report on their standard output."""

    def __init__(self, folder: Path, session: str, threads: int | None, listen: Listener) -> None:
        self.command = [sys.executable, "-m", "forgetless", "worker", str(folder), session]
        self.command += [] if threads is None else ["--threads", str(threads)]
        self.folder, self.session, self.threads, self.listen = folder, session, threads, listen

    def work(self, workers: int) -> None:
        """Run the workers to their end; they end with this process, whatever ends it."""
        # A worker ends when its standard input does, so none outlives a parent that is killed.
        team = [
            subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | changes,
            )
            for changes in _environments(workers)
        ]
        readers = [threading.Thread(target=self._pass_on, args=[worker]) for worker in team]
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
        if any(worker.returncode for worker in team):
            # What a dead worker leaves is seen to here: its run is marked, the rest is done.
            work(self.folder, self.session, threads=self.threads, listen=self.listen)

    def _pass_on(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            with suppress(ValueError):  # anything else that a library prints
                self.listen(Event(**json.loads(line)))


def _environments(workers: int) -> Iterator[dict[str, str]]:
    """What is different in the environment of each worker."""
    devices = _visible_gpus()
    for worker in range(workers):
        # The bars of several trainings at once are one heap: the listener draws them.
        changes = {"TTY_COMPATIBLE": "0"}
        if len(devices) > 1:  # in the worker its own is then the first, which every run takes
            changes[_VISIBLE_GPUS] = devices[worker % len(devices)]
        yield changes


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA knows them by."""
    given = os.environ.get(_VISIBLE_GPUS)
    names = None if given is None else [name.strip() for name in given.split(",")]
    if names and names[0].startswith("MIG-"):
        # Of several parts of a GPU one process sees the first alone, so that no count would tell.
        return [name for name in names if name.startswith("MIG-")]
    count = torch.cuda.device_count()  # asks NVML: this process takes up no memory on any of them
    # CUDA leaves out the first name that it cannot find and all behind it.
    return [str(number) for number in range(count)] if names is None else names[:count]


def serve(study_folder: Path, session: str, threads: int | None) -> None:
    """What a worker process does: `work`, with its events as JSON lines on standard output."""

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
        work(study_folder, session, threads=threads, listen=report)
    except KeyboardInterrupt:  # the parent says what there is to say
        sys.exit(1)
