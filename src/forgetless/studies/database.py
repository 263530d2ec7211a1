"""A database of trials, that of Optuna, for short and for long ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from optuna import Study as Trials

_LOOK_SECONDS = 1.0
"""Between two looks for trials without heartbeats, which Optuna takes before each trial."""


class Database(RDBStorage):
    """Trials whose heartbeats outlast a restart of the server.

    Args:
        url: of the database.
        interval: seconds between two heartbeats.
        grace: seconds without one after which a trial is another worker's.
        repeat: called with each such trial when it has failed.
    """

    def __init__(
        self, url: str, interval: int, grace: int, repeat: Callable[[Trials, FrozenTrial], None]
    ) -> None:
        super().__init__(
            url,
            engine_kwargs={"pool_pre_ping": True},  # the server may have been restarted
            heartbeat_interval=interval,
            grace_period=grace,
            heartbeat_stale_trial_callback=repeat,
        )
        self._grace, self._looked = timedelta(seconds=grace), -_LOOK_SECONDS
        self._waiting: dict[int, FrozenTrial] = {}
        self._begun: FrozenTrial | None = None

    def _get_trials(self, *given: Any, **named: Any) -> list[FrozenTrial]:
        found = super()._get_trials(*given, **named)
        self._waiting = {t._trial_id: t for t in found if t.state == TrialState.WAITING}
        return found

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set them; of a trial that is begun it is known what `get_trial` is asked for next."""
        self._begun = None
        is_set = super().set_trial_state_values(trial_id, state, values)
        if is_set and state == TrialState.RUNNING and trial_id in self._waiting:
            self._begun = deepcopy(self._waiting[trial_id])
            self._begun.state, self._begun.datetime_start = state, datetime.now()
        return is_set

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial as it is; half a dozen statements, if it was not begun just now."""
        begun, self._begun = self._begun, None
        return begun if begun and begun._trial_id == trial_id else super().get_trial(trial_id)

    def record_heartbeat(self, trial_id: int) -> None:
        """Record one; where the server is away, the next one will be."""
        with suppress(StorageInternalError, SQLAlchemyError):
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Those without heartbeats, also of who died before the first; none at once again."""
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return []
        self._looked = time.monotonic()
        begun_before = datetime.now() - self._grace
        silent = select(TrialModel).where(
            TrialModel.study_id == study_id,
            TrialModel.state == TrialState.RUNNING,
            ~TrialModel.heartbeats.any(),
        )
        with Session(self.engine) as session:
            return super()._get_stale_trial_ids(study_id) + [
                int(trial.trial_id)
                for trial in session.scalars(silent)
                if trial.datetime_start is None or trial.datetime_start < begun_before
            ]
