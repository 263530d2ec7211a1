"""A study: the runs of one definition, in one folder, done by one process or by several.

Each run is a trial of a storage, see `forgetless.studies.trials`; one that comes after another is
asked for when that is over. Each call asks for every run once (``requested`` in run.json). A lock a
run keeps two processes from doing the same one, whichever definition they have it from.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from forgetless.studies.run import Run, prepare
from forgetless.studies.share import Share
from forgetless.studies.stages import Event, Listener
from forgetless.studies.trials import (
    DEATHS,
    MOST_RETRIES,
    Beat,
    open_trials,
    pending,
    work,
)
from forgetless.studies.workers import Workers, execute_run

if TYPE_CHECKING:
    from optuna.trial import Trial


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
        """The runs that did not come to their end, and that nobody is doing just now."""

        def has_failed(run: Run) -> bool:
            if run.status == "done" or is_locked(RunFolder(run.folder).lock):
                return False
            return run.status != "done"  # it may have ended between the two looks

        return list(filter(has_failed, self.runs))

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
    processes: int = 1,
    on: Literal["ray"] | None = None,
    address: str | None = None,
    share: str | None = None,
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
        threads: torch threads of a process; None for one on a small model.
        processes: that do a run together, each on a GPU of its own, see docs/devices.md.
        on: "ray" for workers on the nodes of a Ray cluster, which see the folder or have a `share`.
        address: of the cluster, as of ``ray.init``; None for the one that this machine belongs to,
            and without one for this machine alone.
        share: URL of a folder in an object store, such as s3://bucket/folder, for machines that do
            not see one folder: runs are uploaded at each checkpoint, and go on from there anywhere.
        listen: called with the `Event`s of all runs.

    Returns:
        The study; look at ``.failed``.

    Raises:
        RecipeError: what is wrong with the definition, before anything is run.
        UserError: the storage or the cluster cannot be used.
    """
    team = Workers(storage, workers, threads, processes, on, address, share)
    if not isinstance(definition, StudyRecipe):
        read = StudyRecipe.parse if isinstance(definition, Mapping) else StudyRecipe.load
        definition = read(definition)  # type: ignore[arg-type]
    folder = Path(out) / definition.name
    content = {"study.yaml": definition.model_dump()}
    do_runs(folder, definition.recipes(team.checker()), content, team, listen=listen)
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
    share = Share(team.share, folder.name) if team.share else None
    _lay_out(folder, recipes, definition, index or {}, share, listen)
    runs = [RunFolder(folder / run_id) for run_id in recipes]
    team.work(partial(take_part, runs=runs), folder, len(runs), listen)
    if share:
        share.fetch_all(runs)
    write_tables(folder, results(folder), curve(folder))


def _lay_out(
    folder: Path,
    recipes: Mapping[str, Recipe],
    definition: Mapping[str, Any],
    index: Mapping[str, Any],
    share: Share | None,
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
        _write_runs(folder, entries, **index)
    for run_id, recipe in recipes.items():
        run = RunFolder(folder / run_id)
        with lock(run.lock, wait=False) as free:
            if not free:
                continue
            try:
                _request(run, recipe, share)
            except UserError as damage:  # of its run.json; the other runs are done
                listen(Event(run_id, recipe.name or "", "failed", str(damage)))


def _write_runs(folder: Path, entries: Sequence[Mapping[str, Any]], **more: Any) -> None:
    write_json(folder / "runs.json", {"runs": entries, **more}, checked=True)


def _request(run: RunFolder, recipe: Recipe, share: Share | None) -> None:
    """Ask for a run, also of others who find it in a store; for the holder of its lock."""
    if share is not None:
        share.fetch(run)
    prepare(run, recipe, requested=True)
    if share is not None and share.record(run).get("status") != "running":
        share.put(run)


_RUN = "run"
_AHEAD = 8
"""Runs that are asked for at a time, since a worker reads all that wait before each run."""


def take_part(
    folder: Path,
    *,
    storage: str | None,
    threads: int | None,
    processes: int = 1,
    share: str | None = None,
    listen: Listener,
    runs: Sequence[RunFolder] | None = None,
) -> None:
    """Do runs of a study until all are over, wherever they are done.

    Args:
        folder: of the study.
        storage: as of `study`.
        threads: likewise.
        processes: likewise.
        share: likewise.
        listen: likewise.
        runs: of the definition; None for those that the folder says it has.
    """
    runs = planned(folder) if runs is None else runs
    beat, name = Beat(), _name(folder, runs, share, in_database=bool(storage))
    store = Share(share, folder.name) if share else None
    if not planned(folder):  # a node of a cluster; whether runs are several decides how they start
        _write_runs(folder, [{"run_id": run.path.name} for run in runs])
    (trials,) = open_trials(storage, folder, [name], {"seconds": "minimize"}, {}, beat)
    over: set[RunFolder] = set()

    def record(run: RunFolder) -> Mapping[str, Any]:
        found = run.read()
        return (store.record(run) or found) if store and not _is_over(found) else found

    def can_begin(run: RunFolder) -> bool:
        found = record(run)
        if _is_over(found):
            over.add(run)
            return False
        before = RunFolder(folder / (found.get("after") or ""))
        return before.path == folder or before in over or _is_over(record(before))

    def ask() -> bool:
        """Ask for runs that can be begun and that nobody has asked for; whether any is asked for.

        So whatever is asked for can be done at once, and no worker waits for another's run to end.
        """
        with lock(folder / ".trials.lock", wait=False) as is_first:
            if not is_first:  # what somebody else is asking for can be begun meanwhile
                time.sleep(0.02)
                return True
            asked = {trial.user_attrs.get(_RUN) for trial in pending(trials)}
            left = (run for run in runs if run.path.name not in asked and run not in over)
            free = filter(can_begin, left)
            # Those that somebody does, for another definition or by itself, come last.
            chosen = sorted(islice(free, _AHEAD), key=lambda run: is_locked(run.lock))
            for run in chosen:
                trials.enqueue_trial({}, user_attrs={_RUN: run.path.name})
        return bool(chosen)

    def do(trial: Trial) -> list[float]:
        """Do the run of a trial, or find it over; the seconds that it took."""
        began, run = time.perf_counter(), RunFolder(folder / trial.user_attrs[_RUN])
        deaths = trial.user_attrs.get(DEATHS, 0)
        # Whoever seemed dead and is not, or has the run from another definition, is waited for.
        with lock(run.lock), store.during(run, listen) if store else nullcontext(listen) as told:
            known = run.read()
            if not _is_over(known):
                try:
                    if deaths >= MOST_RETRIES and not known.get("requested"):
                        died = f"its process died {deaths} times; perhaps it ran out of memory"
                        raise UserError(died)
                    execute_run(run, threads=threads, processes=processes, listen=told)
                except Exception as error:
                    _note_failure(run, error, told)
                    raise
        return [time.perf_counter() - began]

    work(trials, do, folder, beat, ask=ask)


def _name(folder: Path, runs: Sequence[RunFolder], share: str | None, *, in_database: bool) -> str:
    """What the trials of these runs are called in a storage.

    Definitions have trials of their own, so that what one leaves out is not done; in a database,
    which has those of many folders, so have folders, wherever a machine finds them.
    """
    ids = [run.path.name for run in runs]
    if share:
        ids.append(share)
    elif in_database:
        with lock(folder / ".lock"):  # under which `_lay_out` removes what was left of this file
            file = folder / "trials.id"
            if not file.exists():
                write_text(file, uuid.uuid4().hex)
            ids.append(file.read_text())
    return f"{folder.name} {digest(' '.join(ids))[:8]}"


def _note_failure(run: RunFolder, error: Exception, listen: Listener) -> None:
    """Write what went wrong into run.json, unless that was done where it went wrong."""
    if not _is_over(run.read()):
        reason = f"{type(error).__name__}: {error}"
        run.update(status="failed", reason=reason, requested=False)
        listen(Event(run.path.name, run.read().get("name") or "", "failed", reason))


def _is_over(record: Mapping[str, Any]) -> bool:
    return record.get("status") in ("done", "failed") and not record.get("requested")
