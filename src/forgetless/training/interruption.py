"""Ctrl-C, and the SIGTERM that clusters send: a training ends after its step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from forgetless.core.processes import Processes
from forgetless.training import checkpoints

STATE_KEY = "forgetless_unlogged"
"""Under which an interrupted training's checkpoint has the losses since the last log line."""

_OURS_TO_TAKE = (signal.default_int_handler, signal.SIG_DFL)
"""Handlers that nobody chose. One that somebody installed stays, and so does SIG_IGN (nohup)."""


@dataclass
class Unlogged:
    """The losses and penalties of the steps since the last line of the log.

    A checkpoint that was written between two lines holds them, so that the log of a training that
    was interrupted is that of one that was not.

    Attributes:
        since: the step of the last line.
        total: sum of the losses of the steps after it, in this process.
        penalty: the part of it that penalties are.
        seconds: of training until then; None where the line itself says so.
    """

    since: int = 0
    total: float = 0.0
    penalty: float = 0.0
    seconds: float | None = None

    @classmethod
    def of(cls, checkpoint: Path | None) -> Unlogged:
        """What a checkpoint holds; without one, the beginning of a training."""
        if checkpoint is None:
            return cls()
        held = checkpoints.callback_state(checkpoint, STATE_KEY)
        return cls(**held) if held else cls(checkpoints.step_of(checkpoint))

    def sums(self) -> tuple[float, float]:
        """Both sums, as the means over the processes."""
        found = Processes.current().gather((self.total, self.penalty))
        total, penalty = (sum(values) / len(found) for values in zip(*found, strict=True))
        return total, penalty

    def take(self, step: int) -> tuple[float, float]:
        """Mean loss and mean penalty of the steps up to `step`, which now have their line."""
        total, penalty = self.sums()
        steps = step - self.since
        self.since, self.total, self.penalty = step, 0.0, 0.0
        return total / steps, penalty / steps


@dataclass(eq=False)
class Interruption(TrainerCallback):
    """Lets a training end after the step in which the process was asked to stop.

    The last of the callbacks: what the others want of a step does not change.

    Attributes:
        unlogged: goes into the checkpoint.
        seconds: gives the seconds of training so far.
        tell: called when the first signal arrives, with what to say.
    """

    unlogged: Unlogged
    seconds: Callable[[], float]
    tell: Callable[[str], None]
    asked: bool = False
    stopped_at: int | None = None
    interrupts: int = 0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Take over the signals; at the end, stop the caller too where the training was stopped.

        Raises:
            KeyboardInterrupt: the training was stopped after a step and saved; or, at once, on a
                second Ctrl-C.
        """
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in _OURS_TO_TAKE:
                    before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)
        if self.asked or self.stopped_at is not None:
            after = "its last step" if self.stopped_at is None else f"step {self.stopped_at}"
            raise KeyboardInterrupt(f"training stopped after {after}, where it is saved")

    def _ask(self, number: int, frame: object) -> None:
        # Launchers answer Ctrl-C by a SIGTERM of their own, so only a second Ctrl-C is impatience.
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            with suppress(RuntimeError):  # the signal came while a line was being written
                self.tell("finishing the step; Ctrl-C again ends at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks.pop(STATE_KEY, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Whether any process was asked to stop: all must stop after the same step.
        if not Processes.current().sum(torch.tensor(float(self.asked))):
            return
        self.stopped_at = state.global_step
        control.should_save = control.should_training_stop = True
        if not control.should_log:
            held = Unlogged(self.unlogged.since, *self.unlogged.sums(), self.seconds())
            state.stateful_callbacks[STATE_KEY] = asdict(held)
