"""Trials that processes and machines share: each is done once, and none is lost.

Of studies, sequences and searches alike. Which trials there are, who does one and what came of it
lies in a storage of Optuna: a journal file, or a database by its URL. Drawing settings, taking
turns and heartbeats are Optuna's. What is added: who does a trial holds a lock file meanwhile,
since a journal has no heartbeats; a trial whose worker died waits to be begun again, as itself; and
a budget is met to the trial, by however many workers.
"""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from filelock import FileLock

from forgetless.core.errors import UserError
from forgetless.core.files import folder_name, is_locked, lock

if TYPE_CHECKING:
    from optuna import Study as Trials
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial
    from sqlalchemy import URL

T = TypeVar("T")
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
_OPENING_SECONDS = 5
_PATIENCE_SECONDS = 600
"""How long a database that fails is asked again: at first, and once it has answered."""


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
    import optuna  # takes a second, which commands without trials need not wait

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # whoever does trials tells of them
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")
    address = _parsed(url) if url else None

    def opened() -> list[Trials]:
        storage = _storage(address, folder / JOURNAL, beat)
        directions = list(values.values())
        found = [
            optuna.create_study(
                storage=storage, study_name=name, directions=directions, load_if_exists=True
            )
            for name in names
        ]
        for trials in found:
            _define(trials, values, definition)
        return found

    # Processes that create the tables of one database at once fail on each other. On one disk they
    # take turns; of several machines some fail, and at a further attempt the tables are there.
    with lock(folder / ".trials.lock"):
        try:
            return patiently(opened, _OPENING_SECONDS, 0.5)
        except _storage_errors() as problem:
            reason = str(problem).strip().partition("\n")[0]
            where = repr(address or JOURNAL)  # without a password
            raise UserError(f"the storage {where} cannot be used: {reason}") from None


def _parsed(url: str) -> URL:
    """The address of a database, with the driver of PostgreSQL that the extra has."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        address = make_url(url)
        if address.drivername in ("postgresql", "postgres"):
            address = address.set(drivername="postgresql+psycopg")
        address.get_dialect().import_dbapi()
    except (ArgumentError, ImportError, ValueError) as problem:
        raise UserError(
            "a storage is a URL such as sqlite:///search.db or postgresql://user@host/database "
            "(with psycopg: pip install 'forgetless[search]'), and without one a journal file "
            f"lies beside the runs: {problem}"
        ) from None
    return address


def _storage(address: URL | None, journal: Path, beat: Beat) -> BaseStorage:
    """The database at an address, or the journal file."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    class Database(RDBStorage):
        """One whose heartbeats outlast a restart of the server."""

        def record_heartbeat(self, trial_id: int) -> None:
            with suppress(*_storage_errors()):  # the next one will be recorded
                super().record_heartbeat(trial_id)

    if address is None:
        # Optuna's own lock is that of a killed process for half a minute; this one is free at once.
        turns = FileLock(journal.with_name(f".{journal.name}.lock"))
        return JournalStorage(JournalFileBackend(str(journal), turns))  # type: ignore[arg-type]
    return Database(
        address.render_as_string(hide_password=False),
        engine_kwargs={"pool_pre_ping": True},  # the server may have been restarted
        heartbeat_interval=beat.interval,
        grace_period=beat.grace,
    )


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
    objective: Callable[[Trial], Sequence[float]],
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
            number. What is asked for has user attributes.
        until: begin none after this time, in seconds as `time.time` has it.
        ask: called when none wait to be begun; asks for further ones, and gives whether there are
            any.
    """
    from optuna.storages._heartbeat import get_heartbeat_thread
    from optuna.trial import TrialState

    storage, known_to_beat = trials._storage, set[int]()

    def do() -> None:
        """Do one trial, unless others have begun all that there are."""
        trial = trials.ask()
        key, values, state = trial._trial_id, None, TrialState.FAIL
        if budget is not None and _is_surplus(trials, trial, budget):
            storage.set_trial_state_values(key, TrialState.PRUNED)
            return
        sign = _sign(folder, trials, trial)
        with lock(sign), get_heartbeat_thread(key, storage):
            try:
                if (deaths := trial.user_attrs.get(DEATHS, 0)) > MOST_RETRIES:
                    raise UserError(f"its process died {deaths} times")
                values, state = objective(trial), TrialState.COMPLETE
            except _storage_errors():  # as if it died: it is begun again
                raise
            except Exception as error:
                trial.set_user_attr(REASON, f"{type(error).__name__}: {error}")
            # `tell` would refuse a trial that waits again, since we seemed dead.
            storage.set_trial_state_values(key, state, values)
        sign.unlink(missing_ok=True)

    def step() -> bool:
        if until is not None:  # there is always something to begin, until it is late
            _let_lost_ones_wait(trials, folder, beat, known_to_beat)
        every = trials.get_trials(deepcopy=False)
        count = Counter(trial.state for trial in every)
        is_late = until is not None and time.time() > until
        more = budget is None or len(every) - count[TrialState.PRUNED] < budget
        if (more or count[TrialState.WAITING]) and not is_late:
            do()
        elif is_late or not ask():
            if not count[TrialState.RUNNING]:
                return False
            _let_lost_ones_wait(trials, folder, beat, known_to_beat)
            time.sleep(beat.poll)
        return True

    while patiently(step, _PATIENCE_SECONDS, beat.poll):
        pass


def patiently(act: Callable[[], T], seconds: float, pause: float) -> T:
    """What an act on the storage gives; one that fails is asked again for so many seconds.

    What a storage was not told is done again, which costs little, since the folder of a finished
    run reports at once.
    """
    failing_since = None
    while True:
        try:
            return act()
        except _storage_errors():
            failing_since = failing_since or time.time()  # what is done may take hours before
            if time.time() - failing_since > seconds:
                raise
        time.sleep(random.uniform(pause / 2, pause))


def _storage_errors() -> tuple[type[Exception], ...]:
    """What goes wrong with a storage and not with what asks for it.

    Also where somebody else finished our trial while we seemed dead.
    """
    from optuna import exceptions
    from sqlalchemy.exc import SQLAlchemyError

    of_optuna = exceptions.StorageInternalError, exceptions.DuplicatedStudyError
    return SQLAlchemyError, *of_optuna, exceptions.UpdateFinishedTrialError


def pending(trials: Trials) -> list[FrozenTrial]:
    """The trials that are not done yet."""
    from optuna.trial import TrialState

    return trials.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))


def _is_surplus(trials: Trials, trial: Trial, budget: int) -> bool:
    """Whether nobody asked for a trial, and as many as the budget has were begun before it."""
    from optuna.trial import TrialState

    if trial.user_attrs.keys() - {DEATHS} or trial.number < budget:  # known without a look
        return False
    earlier = [t for t in trials.get_trials(deepcopy=False) if t.number < trial.number]
    return sum(t.state != TrialState.PRUNED for t in earlier) >= budget


def _let_lost_ones_wait(trials: Trials, folder: Path, beat: Beat, known_to_beat: set[int]) -> None:
    """Let the trials of dead workers wait to be begun again, with the settings that they have.

    Args:
        trials: of a storage.
        folder: as of `open_trials`.
        beat: see `Beat`.
        known_to_beat: trials that have given a sign of life; those that may have died before their
            first are added, and get one here.
    """
    from optuna.storages import JournalStorage
    from optuna.trial import TrialState

    storage: Any = trials._storage
    in_database = not isinstance(storage, JournalStorage)
    with lock(folder / ".trials.lock"):
        silent = storage._get_stale_trial_ids(trials._study_id) if in_database else ()
        for trial in trials.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            key, sign = trial._trial_id, _sign(folder, trials, trial)
            if sign.exists():
                is_lost = not is_locked(sign)
            else:  # of another machine, or its worker has just begun it
                begun = trial.datetime_start or datetime.min
                age = abs((datetime.now() - begun).total_seconds())  # clocks may be ahead
                is_lost = age > 10 * beat.poll and (key in silent or not in_database)
            if is_lost:
                deaths = trial.user_attrs.get(DEATHS, 0)
                storage.set_trial_user_attr(key, DEATHS, deaths + 1)
                storage.set_trial_state_values(key, TrialState.WAITING)
                sign.unlink(missing_ok=True)
            elif in_database and key not in known_to_beat:
                storage.record_heartbeat(key)
                known_to_beat.add(key)


def _sign(folder: Path, trials: Trials, trial: Trial | FrozenTrial) -> Path:
    """The lock file that is held by who does a trial; another one after each death."""
    deaths = trial.user_attrs.get(DEATHS, 0)
    return folder / "workers" / f"{folder_name(trials.study_name)}-{trial.number}-{deaths}"
