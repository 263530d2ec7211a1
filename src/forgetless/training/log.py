"""log.jsonl: one line for every few steps of a training, never two for the same step."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from forgetless.errors import UserError

__all__ = ["LogLine", "TrainingLog"]


@dataclass(frozen=True)
class LogLine:
    """How the training stood after a step.

    Attributes:
        step: optimiser steps done.
        loss: mean over the steps since the line before.
        learning_rate: the rate of this step.
        grad_norm: of this step, before clipping.
        tokens: tokens that were read so far, padding not counted.
        seconds: of training so far, interruptions not counted.
    """

    step: int
    loss: float
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

    Raises:
        UserError: the file has no line for that step.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in _read(path) if line.step <= step]
        if step and (not self.lines or self.lines[-1].step != step):
            raise UserError(
                f"{path} has no line for step {step}, from which the training would continue; "
                f"delete {path.parent / 'checkpoints'} to start anew"
            )
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text("".join(map(_json, self.lines)))
        os.replace(unfinished, path)

    def append(self, line: LogLine) -> None:
        """Add a line and hand it to the system at once."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(_json(line))


def _json(line: LogLine) -> str:
    return json.dumps(asdict(line)) + "\n"


def _read(path: Path) -> list[LogLine]:
    """The whole lines of a file; the last one may be cut off."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [LogLine(**json.loads(line)) for line in whole]
