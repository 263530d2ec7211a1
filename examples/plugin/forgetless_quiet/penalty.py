"""What is paid for each entry of a trained weight that has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass
class L1Start:
    """Sum of |w - w_start| over the trained weights.

    Attributes:
        weight: of the penalty.
    """

    weight: float
    files: ClassVar[Sequence[str]] = ()

    def check(self, method: str) -> None:
        """Nothing can be wrong with it."""

    def prepare(self, model: nn.Module, processor: Any, seed: int) -> None:
        """Remember the start."""
        self.start = {
            name: weight.detach().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """The value at this step."""
        weights = dict(model.named_parameters())
        moved = [(weights[name] - start).abs().sum() for name, start in self.start.items()]
        total = moved[0]
        for other in moved[1:]:
            total = total + other
        return total
