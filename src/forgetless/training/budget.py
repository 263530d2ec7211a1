"""A budget of forgetting: what is allowed, what exceeded it, and the last weights inside it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from forgetless.core import metrics
from forgetless.core.errors import UserError
from forgetless.tasks import TaskResult

__all__ = ["WEIGHTS_FILE", "Budget", "Exceeded", "InsideWeights"]

WEIGHTS_FILE = "inside-budget.safetensors"
Action = Literal["stop", "rollback"]


@dataclass(frozen=True)
class Exceeded:
    """That a training went over its budget, and what was done.

    Attributes:
        limit: which budget, "max_kl" or "max_drop".
        allowed: its value.
        probe: the task that went over it.
        value: how far, in the unit of the limit.
        step: after which optimiser step that was seen; the last one of the training.
        action: "stop" (the weights are those of `step`) or "rollback".
        kept_step: the step whose weights the model has now.
    """

    limit: str
    allowed: float
    probe: str
    value: float
    step: int
    action: str
    kept_step: int

    def __str__(self) -> str:
        """In words."""
        seen = f"{self.probe} reached {self.value:.4g} at step {self.step}"
        after = "stopped" if self.action == "stop" else f"went back to step {self.kept_step}"
        return f"{seen}, over {self.limit} {self.allowed:g}; {after}"


@dataclass(frozen=True)
class Budget:
    """How much a training may forget.

    Attributes:
        max_kl: largest KL(base || model), nats per token, of every forgetting probe that measures
            it; None for no limit.
        max_drop: largest loss against the base's own score, in the unit of the score (0.05 is
            five points of an accuracy), of every other forgetting probe; None for no limit.
        on_exceed: "stop" ends the training where it is; "rollback" ends it too, and gives the
            model the weights of the last probe inside the budget.

    Raises:
        UserError: a limit that is no positive number, or an unknown `on_exceed`.
    """

    max_kl: float | None = None
    max_drop: float | None = None
    on_exceed: Action = "stop"

    def __post_init__(self) -> None:
        for name in ("max_kl", "max_drop"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a number above 0 or None, got {value!r}")
        if self.on_exceed not in ("stop", "rollback"):
            raise UserError(f"on_exceed must be 'stop' or 'rollback', got {self.on_exceed!r}")

    @property
    def is_set(self) -> bool:
        """Whether anything is limited."""
        return self.max_kl is not None or self.max_drop is not None

    def overrun(
        self, results: Mapping[str, TaskResult], base: Mapping[str, float]
    ) -> tuple[str, float, str, float] | None:
        """The first limit that is exceeded: (limit, allowed, probe, value); None inside the budget.

        Args:
            results: of the forgetting probes by name.
            base: the base's score on those that are no distance to it.
        """
        for name, result in results.items():
            if result.metric == "kl" and self.max_kl is not None and result.value > self.max_kl:
                return "max_kl", self.max_kl, name, result.value
            if name in base and self.max_drop is not None:
                drop = metrics.forgetting(result.value, base[name], result.higher_is_better)
                if drop > self.max_drop:
                    return "max_drop", self.max_drop, name, drop
        return None


class InsideWeights:
    """The trained weights of the last probe inside the budget, in a file of the trainer's folder.

    A file and not memory, so that a whole model fits beside its optimiser and a stopped training
    can go on. Every checkpoint gets a link to the file as it was then.

    Args:
        folder: the trainer's ``output_dir``.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / WEIGHTS_FILE

    def keep(self, model: nn.Module, step: int) -> None:
        """Write the weights of `model` that are trained."""
        weights = {
            name: weight.detach().cpu().clone().contiguous()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(self.file.name + ".tmp")
        save_file(weights, unfinished, metadata={"step": str(step)})
        os.replace(unfinished, self.file)

    def restore(self, model: nn.Module) -> int:
        """Give the weights back to `model`; returns the step that they are from."""
        trained = dict(model.named_parameters())
        with safe_open(self.file, framework="pt") as content, torch.no_grad():
            for name in content.keys():  # noqa: SIM118 - it is no mapping
                trained[name].copy_(content.get_tensor(name))
            return int(content.metadata()["step"])

    def add_to(self, checkpoint: Path) -> None:
        """Let a checkpoint have the file as it is now."""
        _link(self.file, checkpoint / WEIGHTS_FILE)

    def take_from(self, checkpoint: Path) -> None:
        """Go back to the file that a checkpoint has."""
        if not (checkpoint / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{checkpoint} has no {WEIGHTS_FILE}, the weights that 'rollback' may need; "
                "continue a checkpoint of a training that had the budget from its start"
            )
        _link(checkpoint / WEIGHTS_FILE, self.file)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    unfinished: Any = target.with_name(target.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)
