"""A study: the runs of one definition, in one folder, done by one process or by several.

Each run is a trial of a storage, see `forgetless.studies.trials`; one that comes after another is
asked for when that is over. Each call asks for every run once (``requested`` in run.json). A lock a
run keeps two processes from doing the same one, whichever definition they have it from.
"""

from __future__ import annotations

import json
import logging
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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from forgetless.core.errors import UserError
from forgetless.core.files import is_locked, lock, remove_temporaries, write_json, write_text
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.study import StudyRecipe
from forgetless.scores.cache import digest
from forgetless.studies.folder import (
    RunFolder,
    curve,
    planned,
    results,
    run_folders,
    write_tables,
)
from forgetless.studies.run import Run, execute, prepare
from forgetless.studies.stages import Event, Listener
from forgetless.studies.trials import (
    DEATHS,
    MOST_RETRIES,
    Beat,
    open_trials,
    pending,
    work,
)

if TYPE_CHECKING:
    from optuna.trial import Trial

_log = logging.getLogger(__name__)

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
    storage: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    on: Literal["ray"] | None = None,
    address: str | None = None,
    listen: Listener | None = None,
) -> Study:
    """Do every run of a study that is not done yet, and write its results.csv.

    A run that fails keeps its folder with the reason, and the others are done. A run whose process
    dies is resumed by another. A study that was stopped, by whatever means, is resumed by the same
    call. Two calls at once, also on two machines that share the folder, share the runs.

    Args:
        definition: a `StudyRecipe`, the mapping that one is written as, or a YAML file.
        out: the folder that holds studies.
        storage: URL of a database that says who does which run, such as
            postgresql://user@host/database; None for a journal file in the study's folder.
        workers: processes that do runs side by side, each on a GPU of its own as long as there are
            enough; None for this very process, or for as many as a cluster has room for.
        threads: torch threads of a worker; None for one on a small model.
        on: "ray" for workers on the nodes of a Ray cluster, which see the folder.
        address: of the cluster, as of ``ray.init``; None for the one that this machine belongs to,
            and without one for this machine alone.
        listen: called with the `Event`s of all runs.

    Returns:
        The study; look at ``.failed``.

    Raises:
        RecipeError: what is wrong with the definition, before anything is run.
        UserError: the storage or the cluster cannot be used.
    """
    team = Workers(storage, workers, threads, on, address)
    if not isinstance(definition, StudyRecipe):
        read = StudyRecipe.parse if isinstance(definition, Mapping) else StudyRecipe.load
        definition = read(definition)  # type: ignore[arg-type]
    folder = Path(out) / definition.name
    content = {"study.yaml": definition.model_dump()}
    do_runs(folder, definition.recipes(), content, team, listen=listen)
    return Study(folder)


def do_runs(
    folder: Path,
    recipes: Mapping[str, Recipe],
    definition: Mapping[str, Any],
    team: Workers,
    *,
    index: Mapping[str, Any] | None = None,
    listen: Listener | None = None,
) -> None:
    """Do every run that is not done yet, and write the tables of the folder.

    Args:
        folder: of the study.
        recipes: by run id.
        definition: what they come from, by the name of the file to write it to.
        team: does them.
        index: what runs.json has beside the runs.
        listen: as of `study`.
    """
    listen = listen or (lambda event: None)
    _lay_out(folder, recipes, definition, index or {}, listen)
    runs = [RunFolder(folder / run_id) for run_id in recipes]
    team.work(partial(take_part, runs=runs), folder, len(runs), listen)
    write_tables(folder, results(folder), curve(folder))


def _lay_out(
    folder: Path,
    recipes: Mapping[str, Recipe],
    definition: Mapping[str, Any],
    index: Mapping[str, Any],
    listen: Listener,
) -> None:
    """Write the definition, and request every run that nobody is doing."""
    entries = [{"run_id": run_id, "name": recipe.name} for run_id, recipe in recipes.items()]
    with lock(folder / ".lock"):
        for name in (*definition, "runs.json", "trials.id"):
            remove_temporaries(folder, name)
        for name, content in definition.items():
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            write_text(folder / name, text)
        write_json(folder / "runs.json", {"runs": entries, **index}, checked=True)
    for run_id, recipe in recipes.items():
        run = RunFolder(folder / run_id)
        with lock(run.lock, wait=False) as free:
            if not free:
                continue
            try:
                prepare(run, recipe, requested=True)
            except UserError as damage:  # of its run.json; the other runs are done
                listen(Event(run_id, recipe.name or "", "failed", str(damage)))


_RUN = "run"
_AHEAD = 16
"""Runs that are asked for at a time, since a worker reads all that wait before each run."""


def take_part(
    folder: Path,
    *,
    storage: str | None,
    threads: int | None,
    listen: Listener,
    runs: Sequence[RunFolder] | None = None,
) -> None:
    """Do runs of a study until all are over, wherever they are done.

    Args:
        folder: of the study.
        storage: as of `study`.
        threads: likewise.
        listen: likewise.
        runs: of the definition; None for those that the folder says it has.
    """
    runs = planned(folder) if runs is None else runs
    beat, name = Beat(), _name(folder, runs, in_database=bool(storage))
    (trials,) = open_trials(storage, folder, [name], {"seconds": "minimize"}, {}, beat)
    over: set[RunFolder] = set()

    def is_over(run: RunFolder) -> bool:
        if run not in over and _is_over(run):
            over.add(run)
        return run in over

    def ask() -> bool:
        """Ask for runs that can be begun and that nobody has asked for; whether any is asked for.

        So whatever is asked for can be done at once, and no worker waits for another's run to end.
        """
        with lock(folder / ".trials.lock", wait=False) as is_first:
            if not is_first:  # what somebody else is asking for can be begun meanwhile
                time.sleep(0.1)
                return True
            known = pending(trials)
            if any(trial.state.name == "WAITING" for trial in known):
                return True
            asked = {trial.user_attrs.get(_RUN) for trial in known}
            left = (run for run in runs if run.path.name not in asked and not is_over(run))
            free = (run for run in left if run.before is None or is_over(run.before))
            # Those that somebody does, for another definition or by itself, come last.
            chosen = sorted(islice(free, _AHEAD), key=lambda run: is_locked(run.lock))
            for run in chosen:
                trials.enqueue_trial({}, user_attrs={_RUN: run.path.name})
        return bool(chosen)

    def do(trial: Trial) -> float:
        """Do the run of a trial, or find it done; the seconds that it took."""
        began, run = time.perf_counter(), RunFolder(folder / trial.user_attrs[_RUN])
        _do(run, trial.user_attrs.get(DEATHS, 0), threads, listen)
        return time.perf_counter() - began

    work(trials, do, folder, beat, ask=ask)


def _name(folder: Path, runs: Sequence[RunFolder], *, in_database: bool) -> str:
    """What the trials of these runs are called in a storage.

    Definitions have trials of their own, so that what one leaves out is not done; in a database,
    which has those of many folders, so have folders, wherever a machine finds them.
    """
    ids = [run.path.name for run in runs]
    if in_database:
        with lock(folder / ".lock"):  # under which `_lay_out` removes what was left of this file
            file = folder / "trials.id"
            if not file.exists():
                write_text(file, uuid.uuid4().hex)
            ids.append(file.read_text())
    return f"{folder.name} {digest(' '.join(ids))[:8]}"


def _do(run: RunFolder, deaths: int, threads: int | None, listen: Listener) -> None:
    """Take a run through its stages unless it is over; what goes wrong is in its run.json.

    Whoever holds it is waited for: who seemed dead and is not, or has it from another definition.
    """
    with lock(run.lock):
        if _is_over(run):
            return
        try:
            if deaths >= MOST_RETRIES and not run.read().get("requested"):
                raise UserError(f"its process died {deaths} times; perhaps it ran out of memory")
            execute(run, threads=threads, listen=listen)
        except Exception as error:
            if not _is_over(run):
                reason = f"{type(error).__name__}: {error}"
                run.update(status="failed", reason=reason, requested=False)
                listen(Event(run.path.name, run.read().get("name") or "", "failed", reason))
            raise


def _is_over(run: RunFolder) -> bool:
    record = run.read()
    return record.get("status") in ("done", "failed") and not record.get("requested")


@dataclass(frozen=True)
class Workers:
    """Who does the runs of a study or of a search; the attributes are arguments of `study`."""

    storage: str | None
    count: int | None
    threads: int | None
    on: Literal["ray"] | None
    address: str | None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UserError(f"workers must be at least 1, got {self.count}")

    def work(
        self, take_part: Callable[..., None], folder: Path, most: int, listen: Listener, **more: Any
    ) -> None:
        """Let all take part until there is nothing left to do.

        Args:
            take_part: what one does with the folder, given ``storage``, ``threads``, ``listen`` and
                what more there is.
            folder: of the study or the search.
            most: workers for which there is something to do.
            listen: called with the events of all.
            more: likewise, where it is not None.
        """
        more = {"threads": self.threads, **more}
        if self.on == "ray":
            from forgetless.studies.on_ray import work_on_ray  # Ray is optional

            part = partial(take_part, folder, storage=self.storage, **more)
            work_on_ray(part, self.address, self.count, most, self.threads or 1, listen)
            return
        if self.count is not None and self.count > 1:
            command = [sys.executable, "-m", "forgetless", "worker", str(folder)]
            for name, value in more.items():
                command += [] if value is None else [f"--{name}", str(value)]
            # In the environment, where other users of the machine see no password.
            secret = {"FORGETLESS_STORAGE": self.storage or ""}
            run_workers(command, min(self.count, most), listen, secret)
        # With workers, what is left: nothing, unless they died too often.
        take_part(folder, storage=self.storage, listen=listen, **more)


def run_workers(
    command: Sequence[str], workers: int, listen: Listener, changes: Mapping[str, str] | None = None
) -> None:
    """Run worker processes to their end; they end with this process, whatever ends it.

    What they report on their standard output, see `serve`, is passed on. In the place of one that
    the system killed, as where memory runs out, another is started.

    Args:
        command: of each worker.
        workers: how many.
        listen: called with their events.
        changes: of the environment of each.
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
            for line in worker.stdout or ():
                with suppress(ValueError):  # anything else that a library prints
                    listen(Event(**json.loads(line)))
            if worker.wait() >= 0 or is_ending.is_set():
                return
            _log.warning("a worker was killed by signal %d; another takes over", -worker.returncode)

    keepers = [threading.Thread(target=keep, args=[own]) for own in _environments(workers)]
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
