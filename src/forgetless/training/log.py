"""What a training writes on its way: its log, sealed checkpoints, the weights at certain steps.

log.jsonl has a line for every few steps, and one for every probe; neither kind has two lines for
the same step.
"""

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from forgetless.core.errors import UserError
from forgetless.core.files import new_file
from forgetless.core.processes import Processes
from forgetless.core.progress import Bar
from forgetless.data.mixture import Mixture
from forgetless.data.modality import Rows
from forgetless.training import checkpoints
from forgetless.training.forgetting import ForgettingCallback, Probe
from forgetless.training.trainer import DivergenceError, require_finite
from forgetless.training.weights import trained_weights


@dataclass(frozen=True)
class LogLine:
    """How the training stood after a step.

    Attributes:
        loss: mean over the steps since the line before; what was minimised, penalties included.
        penalty: the part of it that penalties are, each times its weight, so that the task's own
            loss is the difference; None for a training without any, and left out of the file.
        grad_norm: of this step, before clipping.
        tokens: tokens that were read so far, padding not counted.
        seconds: of training so far, interruptions not counted.
    """

    step: int
    loss: float
    penalty: float | None = field(default=None, kw_only=True)
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


class TrainingLog:
    """The lines of a log file up to the step from which a training continues.

    What a killed process wrote after that step is removed from the file.

    Args:
        path: of the file; need not exist.
        step: the last step to keep, 0 for none.
        checkpoint: that has a copy of the file as it was then, whose checksum was compared.

    Attributes:
        probes: the steps of which the file has probes.
        is_kept: whether new lines are written to the file, which one process alone may do.

    Raises:
        UserError: the file has no line for that step.
    """

    def __init__(self, path: Path, step: int, checkpoint: Path | None = None) -> None:
        self.path, self.is_kept = path, True
        copy = None if checkpoint is None else checkpoint / path.name
        source = copy if copy is not None and copy.exists() else path
        kept = [line for line in _read(source) if line.step <= step] if step else []
        self.lines = [line for line in kept if isinstance(line, LogLine)]
        self.probes = {line.step for line in kept if isinstance(line, Probe)}
        if step and (not self.lines or self.lines[-1].step != step):
            raise UserError(
                f"{path} has no line for step {step}, from which the training would continue; "
                f"delete {path.parent / 'checkpoints'} to start anew"
            )
        with new_file(path) as file:
            file.write_text("".join(map(_json, kept)))

    def append(self, line: LogLine | Probe) -> None:
        """Add a line and hand it to the system at once."""
        if isinstance(line, LogLine):
            self.lines.append(line)
        else:
            self.probes.add(line.step)
        if self.is_kept:
            with self.path.open("a") as file:
                file.write(_json(line))


def _json(line: LogLine | Probe) -> str:
    if isinstance(line, Probe):
        found = {"step": line.step, "probe": line.values, "probe_seconds": line.seconds}
    else:
        found = {key: value for key, value in asdict(line).items() if value is not None}
    return json.dumps(found) + "\n"


def _read(path: Path) -> list[LogLine | Probe]:
    """The whole lines of a file; the last one may be cut off."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [
        Probe(r["step"], r["probe"], r["probe_seconds"]) if "probe" in r else LogLine(**r)
        for r in map(json.loads, whole)
    ]


@dataclass(eq=False)
class Record(TrainerCallback):
    """Keeps the log, the seals, the progress bar and the caller up to date.

    Attributes:
        origin: what the training is made of, for the seals.
        points: steps after which `on_point` is called, to keep the weights.
        probes: whose values go to the log.
        seconds_before: of training before this session.
    """

    rows: Rows
    log: TrainingLog
    origin: Mapping[str, Any]
    steps: int
    bar: Bar
    on_step: Callable[[int, int], None] | None
    points: Collection[int]
    on_point: Callable[[int], None] | None
    probes: ForgettingCallback | None
    seconds_before: float

    def seconds(self) -> float:
        """Of training so far, interruptions not counted."""
        return round(self.seconds_before + time.perf_counter() - self.started, 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The probe before the first step came before this clock, and is training all the same.
        self.started = time.perf_counter() - sum(probe.seconds for probe in self._log_probes())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Accelerate tells the data set of a new epoch only where it wrapped no sampler.
        if isinstance(self.rows, Mixture):
            self.rows.set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step in self.points:
            control.should_log = True  # for the tokens that were read until then
            if self.on_point is not None:
                self.on_point(step)
        # The mean loss of a line must not reach over a checkpoint, or a resumed training would
        # give another mean than an undisturbed one.
        control.should_log |= control.should_save
        self._log_probes()
        self.bar.advance()
        if self.on_step is not None:
            self.on_step(step, self.steps)

    def _log_probes(self) -> list[Probe]:
        """Write what the probes gave since the last time, and say which these were."""
        history = self.probes.history if self.probes else []
        new = [probe for probe in history if probe.step not in self.log.probes]
        for probe in new:
            self.log.append(probe)
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
        if control.should_save:
            self._require_sound(line, kwargs["model"])
        before = self.log.lines[-1] if self.log.lines else None
        tokens, seconds = (before.tokens, before.seconds) if before else (0, 0.0)
        speed = (line.tokens - tokens) / max(line.seconds - seconds, 1e-9)
        self.log.append(line)
        self.bar.advance(0, f"loss {line.loss:.4g}, {speed:,.0f} tokens/s")

    def _require_sound(self, line: LogLine, model: Any) -> None:
        """Refuse to keep weights that are no numbers, or that gradients do not reach (any more).

        A rate far too high often ends in numbers all the same: the model says one thing whatever
        it reads, at a gradient of exactly 0. Of a model that learned all there is the loss is 0.
        """
        for weight in trained_weights(model).values():
            own = (weight.to_local() if isinstance(weight, DTensor) else weight).detach()
            if not own.isfinite().all():
                broken = float(own[~own.isfinite()][0])
                require_finite("weights", broken, line.step, line.learning_rate)
        lines = [*self.log.lines, line]
        if any(each.grad_norm or each.loss < lines[0].loss / 2 for each in lines[-2:]):
            return
        if not any(each.grad_norm for each in lines):
            raise UserError(
                f"no gradient reached any trained weight in {line.step} steps: every gradient norm "
                "in the log is 0, so nothing was learned; look for frozen or detached layers below "
                "what is trained, such as gradient checkpointing that was set up by hand"
            )
        last = max(each.step for each in lines if each.grad_norm)
        raise DivergenceError(
            f"every gradient after step {last} is 0 at a loss of {line.loss:.4g}: the model says "
            "the same whatever it reads; lower training.learning_rate or raise "
            "training.warmup_ratio"
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder, processes = Path(args.output_dir), Processes.current()
        checkpoint = folder / f"{checkpoints.PREFIX}{state.global_step}"

        def seal() -> None:
            shutil.copyfile(self.log.path, checkpoint / self.log.path.name)
            checkpoints.seal(checkpoint, self.origin)
            checkpoints.prune(folder)

        processes.wait_for_everyone()  # every process writes a file of its own
        processes.first(seal)
