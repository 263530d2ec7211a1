"""log.jsonl: a line for every few steps of a training, and one for every probe on its way.

Neither kind has two lines for the same step.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forgetless.core.errors import UserError

__all__ = ["LogLine", "ProbeLine", "TrainingLog"]


@dataclass(frozen=True)
class LogLine:
    """How the training stood after a step.

    Attributes:
        step: optimiser steps done.
        loss: mean over the steps since the line before; what was minimised, penalties included.
        penalty: the part of it that penalties are, each times its weight, so that the task's own
            loss is the difference; None for a training without any, and left out of the file.
        learning_rate: the rate of this step.
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


@dataclass(frozen=True)
class ProbeLine:
    """What was measured after a step, beside the training itself.

    Attributes:
        step: optimiser steps done; 0 is before the first.
        probe: values by name, "learning/loss" or "forgetting/kl".
        probe_seconds: what measuring them took.
    """

    step: int
    probe: dict[str, float]
    probe_seconds: float


class TrainingLog:
    """The lines of a log file up to the step from which a training continues.

    What a killed process wrote after that step is removed from the file.

    Args:
        path: of the file; need not exist.
        step: the last step to keep, 0 for none.

    Attributes:
        lines: how the training stood.
        probes: the steps of which the file has probes.
        is_kept: whether new lines are written to the file, which one process alone may do.

    Raises:
        UserError: the file has no line for that step.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.is_kept = path, True
        kept = [line for line in _read(path) if line.step <= step] if step else []
        self.lines = [line for line in kept if isinstance(line, LogLine)]
        self.probes = {line.step for line in kept if isinstance(line, ProbeLine)}
        if step and (not self.lines or self.lines[-1].step != step):
            raise UserError(
                f"{path} has no line for step {step}, from which the training would continue; "
                f"delete {path.parent / 'checkpoints'} to start anew"
            )
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text("".join(map(_json, kept)))
        os.replace(unfinished, path)

    def append(self, line: LogLine | ProbeLine) -> None:
        """Add a line and hand it to the system at once."""
        if isinstance(line, LogLine):
            self.lines.append(line)
        else:
            self.probes.add(line.step)
        if self.is_kept:
            with self.path.open("a") as file:
                file.write(_json(line))


def _json(line: LogLine | ProbeLine) -> str:
    return json.dumps({key: v for key, v in asdict(line).items() if v is not None}) + "\n"


def _read(path: Path) -> list[LogLine | ProbeLine]:
    """The whole lines of a file; the last one may be cut off."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    records = [json.loads(line) for line in whole]
    return [ProbeLine(**r) if "probe" in r else LogLine(**r) for r in records]
