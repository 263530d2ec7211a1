"""Lion: the sign of an interpolated momentum, with one moment a weight where Adam keeps two.

For the gradient g, with all operations by entry::

    w <- w - lr * (sign(beta1 m + (1 - beta1) g) + weight_decay * w)
    m <- beta2 m + (1 - beta2) g

Every entry that has a momentum moves by the whole learning rate, so Lion wants rates 3 to 10 times
smaller than AdamW's and, for the same pull ``lr * weight_decay``, as much more weight decay.
Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675,
algorithm 2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """The optimiser of the module's text.

    Args:
        params: weights or groups of them, as every optimiser of PyTorch takes them.
        lr: learning rate, positive.
        betas: beta1 and beta2, each in [0, 1).
        weight_decay: decoupled from the gradient, not negative.

    Raises:
        ValueError: a number outside of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every weight that has a gradient; returns what `closure` gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)
        return loss

    def _move(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        direction = momentum.lerp(weight.grad, 1 - beta1).sign_()
        weight.mul_(1 - lr * group["weight_decay"]).sub_(direction, alpha=lr)
        momentum.lerp_(weight.grad, 1 - beta2)
