"""Trials that processes and machines share: each is done once, and none is lost.

Of studies, sequences and searches alike. Which trials there are, who does one and what came of it
lies in a storage of Optuna: a journal file, or a database by its URL. Drawing settings, taking
turns and heartbeats are Optuna's. What is added: who does a trial holds a lock file meanwhile,
since a journal has no heartbeats; a trial whose worker died is asked for again at whatever moment
that was; and a budget is met to the trial, by however many workers.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from forgetless.core.errors import UserError
from forgetless.core.files import folder_name, is_locked, lock

if TYPE_CHECKING:
    from optuna import Study as Trials
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

Direction = Literal["minimize", "maximize"]

JOURNAL = "trials.journal"
"""The file in the folder of a study that is its storage where none is given."""

REASON = "reason"
"""The attribute of a trial that failed by itself, and not with the process that did it."""

MOST_RETRIES = 10
"""How often a trial is begun again when the process that did it died."""

DEATHS = "deaths"
"""The attribute of a trial that says how often a process died or was stopped in doing it."""

_DEFINITION = "definition"
FEW = 4
"""Trials that wait to be begun; with less, further ones are asked for."""

_ATTEMPTS = 8
_PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Beat:
    """How workers learn that another one died, in seconds.

    Attributes:
        interval: between two signs of life in a database.
        grace: without one, after which a trial is done by another worker. A process whose lock file
            can be seen, on the same machine or a shared disk, is known to be dead at once.
        poll: between two looks at the trials that others are doing.
    """

    interval: int = 20
    grace: int = 120
    poll: float = 1.0


def open_storage(url: str | None, journal: Path, beat: Beat) -> BaseStorage:
    """The storage at a database's URL, or the journal file.

    Raises:
        UserError: what is missing, or what is wrong with the URL.
    """
    import optuna  # takes a second, which commands without trials need not wait
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # a run that fails is told of by itself
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if not url:
        # Optuna's own lock is that of a killed process for half a minute; this one is free at once.
        turns = FileLock(journal.with_name(f".{journal.name}.lock"))
        return JournalStorage(JournalFileBackend(str(journal), turns))  # type: ignore[arg-type]
    if "://" not in url:
        raise UserError(
            f"a storage is a URL such as sqlite:///search.db or postgresql://user@host/database, "
            f"got {url!r}; without one a journal file lies beside the runs"
        )
    from sqlalchemy.exc import ArgumentError

    from forgetless.studies.database import Database

    if url.startswith(("postgresql://", "postgres://")):  # the driver that the extra has
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    try:
        return Database(url, beat.interval, beat.grace, _repeat)
    except (ImportError, ArgumentError) as problem:
        raise UserError(
            f"the storage {_shown(url)} cannot be used: {problem}; PostgreSQL needs psycopg: "
            "pip install 'forgetless[search]'"
        ) from None


def _repeat(trials: Trials, trial: FrozenTrial) -> None:
    """Ask for a trial again, with the same settings; that of a worker which died."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    trial.user_attrs = {**trial.user_attrs, DEATHS: 1 + trial.user_attrs.get(DEATHS, 0)}
    RetryHeartbeatStaleTrialCallback(max_retry=MOST_RETRIES)(trials, trial)


def _shown(url: str) -> str:
    """A URL without its password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    with suppress(ArgumentError):
        return make_url(url).render_as_string(hide_password=True)
    return f"{url.partition('://')[0]}://..."


def _storage_errors() -> tuple[type[Exception], ...]:
    """What goes wrong with a storage and not with what asks for it."""
    from optuna.exceptions import DuplicatedStudyError, StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError, StorageInternalError, DuplicatedStudyError


def open_trials(
    url: str | None,
    folder: Path,
    names: Sequence[str],
    values: Mapping[str, Direction],
    definition: Mapping[str, Any],
    beat: Beat,
) -> list[Trials]:
    """The trials under each name; created if there are none.

    Args:
        url: of the database; None for the journal in the folder.
        folder: shared by the processes of a machine, or of several.
        names: under which they lie in the storage.
        values: what comes of a trial, each with "maximize" or "minimize".
        definition: plain JSON values that say what settings mean; they must not change.
        beat: see `Beat`.

    Raises:
        UserError: the storage cannot be used, or these trials were begun with another definition.
    """
    from optuna import create_study

    directions = list(values.values())
    # Processes that create the tables of one database at once fail on each other. On one disk they
    # take turns; of several machines some fail, and at a further attempt the tables are there.
    with lock(folder / ".trials.lock"):
        for attempt in range(_ATTEMPTS):
            try:
                storage = open_storage(url, folder / JOURNAL, beat)
                found = [
                    create_study(
                        storage=storage,
                        study_name=name,
                        directions=directions,
                        load_if_exists=True,
                    )
                    for name in names
                ]
                for trials in found:
                    _define(trials, values, definition)
                return found
            except UserError:
                raise
            except _storage_errors() as problem:
                if attempt == _ATTEMPTS - 1:
                    reason = str(problem).strip().partition("\n")[0]
                    raise UserError(f"the storage {_shown(url or JOURNAL)}: {reason}") from None
                time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError("the last attempt raises")


def _define(trials: Trials, values: Mapping[str, Direction], definition: Mapping[str, Any]) -> None:
    """Write down what the settings of new trials mean; of known ones it must be the same."""
    known = trials.user_attrs.get(_DEFINITION)
    if known is None:
        trials.set_metric_names(list(values))  # for optuna-dashboard
        trials.set_user_attr(_DEFINITION, dict(definition))
    elif known != definition:
        changed = [key for key in definition if known.get(key) != definition[key]]
        raise UserError(
            f"{trials.study_name} was begun with another {' and '.join(changed)}, and its trials "
            "cannot be counted together with others; give the new search another name"
        )


def work(
    trials: Trials,
    objective: Callable[[Trial], float | tuple[float, ...]],
    folder: Path,
    beat: Beat,
    *,
    budget: int | None = 0,
    until: float | None = None,
    ask: Callable[[], bool] = lambda: False,
) -> None:
    """Do trials until the budget is spent and none is left, also of workers that died meanwhile.

    A trial that fails by itself counts, and its `REASON` is kept. So does one whose workers died
    more often than `MOST_RETRIES`.

    Args:
        trials: of a storage.
        objective: does one; gives its values.
        folder: as of `open_trials`.
        beat: see `Beat`.
        budget: how many trials there are to be beside those that are asked for; None for any
            number.
        until: begin none after this time, in seconds as `time.time` has it.
        ask: called when fewer than `FEW` wait to be begun; asks for further ones, and gives whether
            there are any.
    """
    from optuna import TrialPruned
    from optuna.trial import TrialState

    signs = ExitStack()

    def one(trial: Trial) -> float | tuple[float, ...]:
        # No sampler draws attributes, so what has some was asked for.
        is_asked_for = bool(trial.user_attrs.keys() - {DEATHS})
        if not (is_asked_for or budget is None) and _is_surplus(trials, trial.number, budget):
            trials.stop()
            raise TrialPruned  # several workers began the last one
        sign = _sign(folder, trials, trial.number)
        signs.push(lambda kind, *_: None if kind else sign.unlink(missing_ok=True))
        signs.enter_context(lock(sign))
        try:
            return objective(trial)
        except Exception as error:
            if not _is_of_the_storage(error):
                trial.set_user_attr(REASON, f"{type(error).__name__}: {error}")
            raise

    def step() -> bool:
        every = trials.get_trials(deepcopy=False)
        states = [trial.state for trial in every]
        waiting, running = states.count(TrialState.WAITING), states.count(TrialState.RUNNING)
        is_late = until is not None and time.time() > until
        more = budget is None or (budget > 0 and len(_counted(every)) < budget)
        asked = waiting < FEW and not (more or is_late) and ask()
        if (more or waiting) and not is_late:
            # Where many wait, each worker takes some of them before it looks at all again.
            share = 1 if until else max(1, waiting // (2 * running + 2))
            with signs:  # until the storage was told
                trials.optimize(one, n_trials=share, catch=(Exception,))
        elif not asked:
            to_come = _ask_again(trials, folder, beat)
            if not (running or to_come):
                return False
            time.sleep(beat.poll)
        return True

    try:
        while patiently(step, beat):
            pass
    except KeyboardInterrupt:
        with suppress(Exception):  # what is not asked for now is found by others later
            _ask_again(trials, folder, replace(beat, poll=0.0))
        raise


def patiently(act: Callable[[], bool], beat: Beat) -> bool:
    """What an act on the storage gives; a database that is restarted is waited for.

    What it was not told is done again, which costs little, since the folder of a finished run
    reports at once.
    """
    failing_since = None
    while True:
        try:
            return act()
        except Exception as problem:
            failing_since = failing_since or time.time()  # what is done may take hours before
            lasts = time.time() - failing_since
            if not _is_of_the_storage(problem) or lasts > _PATIENCE_SECONDS:
                raise
        time.sleep(beat.poll)


def _is_of_the_storage(problem: BaseException | None) -> bool:
    """Whether the storage failed, or somebody else finished our trial while we seemed dead.

    Optuna's own handling of the first hides it behind a NameError.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    while problem is not None:
        if isinstance(problem, (*_storage_errors(), UpdateFinishedTrialError)):
            return True
        if isinstance(problem, ValueError) and str(problem).startswith("Cannot tell a "):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def origin(trial: FrozenTrial) -> int:
    """The number of the trial that this one is, or repeats."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    return next(iter(RetryHeartbeatStaleTrialCallback.retry_history(trial)), trial.number)


def pending(trials: Trials) -> list[FrozenTrial]:
    """The trials that are not done yet, with those that will be asked for again."""
    every = trials.get_trials(deepcopy=False)
    return [trial for trial in every if not trial.state.is_finished()] + _lost(every)


def _counted(every: Sequence[FrozenTrial]) -> list[int]:
    """The numbers of the trials that a budget counts: no repeated ones, and none too many."""
    from optuna.trial import TrialState

    return [t.number for t in every if origin(t) == t.number and t.state != TrialState.PRUNED]


def _is_surplus(trials: Trials, number: int, budget: int) -> bool:
    """Whether as many trials as the budget has were begun before this one."""
    if number < budget:  # known without a look at the others
        return False
    every = trials.get_trials(deepcopy=False)
    own = next(trial for trial in every if trial.number == number)
    if "fixed_params" in own.system_attrs:  # somebody asked for it
        return False
    return sum(counted < origin(own) for counted in _counted(every)) >= budget


def _ask_again(trials: Trials, folder: Path, beat: Beat) -> bool:
    """Ask for the trials of dead workers again; whether some that they failed are still to come."""
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    fail_stale_trials(trials)  # those without heartbeats, in a database
    every = trials.get_trials(deepcopy=False)
    for trial in every:
        if trial.state == TrialState.RUNNING and _is_dead(trials, trial, folder, beat):
            with suppress(ValueError, RuntimeError):  # somebody else was first, or it has ended
                trials.tell(trial.number, state=TrialState.FAIL)
                _repeat(trials, trials.get_trials()[trial.number])
    if not _lost(every):
        return False
    # Whoever failed them was stopped before it could ask for them again, or is just doing it.
    with lock(folder / ".trials.lock"):
        for trial in _lost(trials.get_trials()):
            if _age(trial.datetime_complete) > 10 * beat.poll:
                _repeat(trials, trial)
    return True


def _sign(folder: Path, trials: Trials, number: int) -> Path:
    """The lock file that is held by who does a trial."""
    return folder / "workers" / f"{folder_name(trials.study_name)}-{number}"


def _is_dead(trials: Trials, trial: FrozenTrial, folder: Path, beat: Beat) -> bool:
    """Whether nobody is doing a trial that is said to be running, as far as this disk can tell."""
    from optuna.storages import JournalStorage

    sign = _sign(folder, trials, trial.number)
    if sign.exists():
        return not is_locked(sign)
    is_elsewhere = not isinstance(trials._storage, JournalStorage)  # or its heartbeats are awaited
    return not is_elsewhere and _age(trial.datetime_start) > 10 * beat.poll


def _age(moment: datetime | None) -> float:
    """Seconds since then; the clock of another machine may be ahead."""
    return abs((datetime.now() - (moment or datetime.min)).total_seconds())


def _lost(every: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that failed with their worker, and that nobody has asked for again."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import TrialState

    history = RetryHeartbeatStaleTrialCallback.retry_history
    repeated = {number for trial in every for number in history(trial)}
    return [
        trial
        for trial in every
        if trial.state == TrialState.FAIL
        and REASON not in trial.user_attrs
        and trial.number not in repeated
        and len(history(trial)) < MOST_RETRIES
    ]
