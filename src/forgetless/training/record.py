"""What a training writes on its way: its log, sealed checkpoints, the weights at certain steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from forgetless.core.progress import Bar
from forgetless.data.mixture import Mixture
from forgetless.statistics.ranks import Ranks
from forgetless.training import checkpoints
from forgetless.training.durations import Rows
from forgetless.training.forgetting import ForgettingCallback, Probe
from forgetless.training.log import LogLine, ProbeLine, TrainingLog
from forgetless.training.trainer import require_finite

__all__ = ["KEPT_CHECKPOINTS", "Points", "Record"]

KEPT_CHECKPOINTS = 2


class Points(TrainerCallback):
    """Has the weights kept after certain steps."""

    def __init__(self, steps: Sequence[int], keep: Callable[[int], None] | None) -> None:
        self.steps = frozenset(steps)
        self.keep = keep

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_log = True  # for the tokens that were read until then
            if self.keep is not None:
                self.keep(state.global_step)


class Record(TrainerCallback):
    """Keeps the log, the seals, the progress bar and the caller up to date."""

    def __init__(
        self,
        rows: Rows,
        log: TrainingLog,
        origin: Mapping[str, Any],
        steps: int,
        bar: Bar,
        on_step: Callable[[int, int], None] | None,
        probes: ForgettingCallback | None,
        seconds_before: float | None,
    ) -> None:
        self.rows = rows
        self.log = log
        self.origin = origin
        self.steps = steps
        self.bar = bar
        self.on_step = on_step
        self.probes = probes
        if seconds_before is None:
            seconds_before = log.lines[-1].seconds if log.lines else 0.0
        self.seconds_before = seconds_before

    def seconds(self) -> float:
        """Of training so far, interruptions not counted."""
        return round(self.seconds_before + time.perf_counter() - self.started, 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        # The probe before the first step came before this clock, and is training all the same.
        self.seconds_before += sum(probe.seconds for probe in self._keep_probes())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Accelerate tells the data set of a new epoch only where it wrapped no sampler.
        if isinstance(self.rows, Mixture):
            self.rows.set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The mean loss of a line must not reach over a checkpoint, or a resumed training would
        # give another mean than an undisturbed one.
        control.should_log |= control.should_save
        self._keep_probes()
        self.bar.advance()
        if self.on_step is not None:
            self.on_step(state.global_step, self.steps)

    def _keep_probes(self) -> list[Probe]:
        """Write what the probes gave since the last time, and say which these were."""
        history = self.probes.history if self.probes else []
        new = [probe for probe in history if probe.step not in self.log.probes]
        for probe in new:
            self.log.append(ProbeLine(probe.step, probe.values, probe.seconds))
        return new

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # the summary at the end
            return
        line = LogLine(
            step=state.global_step,
            loss=logs["loss"],
            penalty=logs.get("penalty"),
            learning_rate=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=state.num_input_tokens_seen,
            seconds=self.seconds(),
        )
        require_finite("loss", line.loss, line.step, line.learning_rate)
        require_finite("gradient", line.grad_norm, line.step, line.learning_rate)
        before = self.log.lines[-1] if self.log.lines else None
        tokens, seconds = (before.tokens, before.seconds) if before else (0, 0.0)
        speed = (line.tokens - tokens) / max(line.seconds - seconds, 1e-9)
        self.log.append(line)
        self.bar.advance(0, f"loss {line.loss:.4g}, {speed:,.0f} tokens/s")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder, ranks = Path(args.output_dir), Ranks.current()
        checkpoint = folder / f"{checkpoints.PREFIX}{state.global_step}"
        ranks.wait()  # every process writes a file of its own
        ranks.first(lambda: checkpoints.seal(checkpoint, self.origin))
        ranks.first(lambda: checkpoints.prune(folder, KEPT_CHECKPOINTS))
