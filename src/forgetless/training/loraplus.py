"""LoRA+: the up-projection learns faster than the down-projection by a constant ratio.

Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
arXiv:2402.12354. The groups are those of `peft.optimizers.create_loraplus_optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from forgetless.core.errors import UserError
from forgetless.training.restoring import trained_weights


def require_both_factors(model: nn.Module, ratio: float) -> None:
    """Refuse a ratio between two rates where only one of them is in use.

    Raises:
        UserError: the ratio is not 1, and not both of A and B are trained.
    """
    names = trained_weights(model)
    both = all(any(factor in name for name in names) for factor in ("lora_A", "lora_B"))
    if ratio != 1 and not both:
        raise UserError(
            f"loraplus_ratio is the rate of B over that of A, got {ratio:g}, but this model does "
            "not train both; leave it at 1 and set learning_rate, or choose a method that trains "
            "A and B"
        )


def speed_up(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Move the weights of B into groups of their own, with `ratio` times the learning rate.

    DoRA's lengths go with B. For an anchored adapter A and B are the moves.
    """
    fast = set(_fast(model))
    for group in list(optimizer.param_groups):
        moved = [weight for weight in group["params"] if weight in fast]
        if moved:
            group["params"] = [weight for weight in group["params"] if weight not in fast]
            optimizer.add_param_group({**group, "params": moved, "lr": ratio * group["lr"]})


def _fast(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lora_B" in name or "lora_magnitude_vector" in name):
            yield weight
