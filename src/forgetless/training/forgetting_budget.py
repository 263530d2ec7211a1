"""A budget of forgetting: what a training is allowed to forget, and what exceeded it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from forgetless.core import metrics
from forgetless.core.errors import UserError
from forgetless.tasks import TaskResult

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
        kept_tokens: that were read until then, where the trainer counts them.
    """

    limit: str
    allowed: float
    probe: str
    value: float
    step: int
    action: str
    kept_step: int
    kept_tokens: int = 0

    def __str__(self) -> str:
        """In words."""
        seen = f"{self.probe} reached {self.value:.4g} at step {self.step}"
        after = "stopped" if self.action == "stop" else f"went back to step {self.kept_step}"
        return f"{seen}, over {self.limit} {self.allowed:g}; {after}"


@dataclass(frozen=True)
class ForgettingBudget:
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

        `base` has the base's scores on those that are no distance to it.
        """
        for name, result in results.items():
            if result.metric == "kl" and self.max_kl is not None and result.value > self.max_kl:
                return "max_kl", self.max_kl, name, result.value
            if name in base and self.max_drop is not None:
                drop = metrics.forgetting(result.value, base[name], result.higher_is_better)
                if drop > self.max_drop:
                    return "max_drop", self.max_drop, name, drop
        return None
