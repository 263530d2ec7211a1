"""The weights that a training moves: found, remembered and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["put_back", "trained_copy", "trained_weights"]


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that ask for gradients, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def trained_copy(model: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """These weights as they are now, on their own device where none is given."""
    weights = trained_weights(model)
    return {n: w.detach().to(device or w.device, copy=True) for n, w in weights.items()}


@torch.no_grad()
def put_back(model: nn.Module, copied: Mapping[str, Tensor]) -> None:
    """Set the weights that were copied to what they were then."""
    for name, weight in model.named_parameters():
        if name in copied:
            weight.copy_(copied[name])
