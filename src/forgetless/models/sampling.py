"""A base as it writes texts: in bfloat16 where its processor multiplies such numbers faster."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from forgetless.models.state import as_base

_LEAST_PARAMETERS = 2**24
"""Of a base whose products take longer than what is around them."""


@contextmanager
def as_writer(model: nn.Module) -> Iterator[nn.Module]:
    """The base of a model, adapters off, or a copy of it that writes faster.

    A float32 base on a processor with matrix instructions for bfloat16 (AMX) is copied, which
    rounds its weights, where there is room for half of it once more. What it says is then a sample
    of the rounded base, several times as fast: for texts to calibrate or to measure on, for no
    score.
    """
    with as_base(model) as base:
        yield _copy_in_bfloat16(base) if _gains_by_bfloat16(base) else base


def _gains_by_bfloat16(base: nn.Module) -> bool:
    weights = list(base.parameters())
    count = sum(weight.numel() for weight in weights)
    return (
        count >= _LEAST_PARAMETERS
        and torch.cpu._is_amx_tile_supported()
        and all(type(w) is nn.Parameter and w.dtype == torch.float32 for w in weights)
        and all(w.device.type == "cpu" for w in weights)
        and not any(hasattr(module, "_hf_hook") for module in base.modules())  # offloaded
        and psutil.virtual_memory().available > 3 * count
    )


def _copy_in_bfloat16(base: nn.Module) -> nn.Module:
    """One whose buffers, such as the frequencies of positions, keep their precision."""
    rounded: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        for weight in base.parameters()
    }
    return copy.deepcopy(base, rounded)
