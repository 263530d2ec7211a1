"""What is left of an update once the weights that hold it are rounded to few bits.

Merged into W, an update shares W's number format. Where W is on the grid of the format already,
as in a model that was stored so, an entry smaller than half a step of the grid is gone; elsewhere
it is kept on average, under a rounding error that may be many times its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NF4_BLOCK = 64
"""Entries that share a scale, those of bitsandbytes."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Rounded:
    """How an update dW came out as the change c of stored weights.

    Attributes:
        kept: <c, dW> / ||dW||^2, the share of the update in the change: 1 when all of it is there,
            0 when none is.
        error: ||c - dW|| / ||dW||, what rounding did beside: above 1 it is larger than the update.
    """

    kept: float
    error: float

    @classmethod
    def over(cls, sums: Mapping[str, tuple[float, float, float]]) -> Rounded:
        """Of the sums that `compared` gives for several layers."""
        shared, lost, size = (sum(parts) for parts in zip(*sums.values(), strict=True))
        return cls(shared / size, (lost / size) ** 0.5) if size else cls(1.0, 0.0)


def compared(change: Tensor, delta_W: Tensor) -> tuple[float, float, float]:
    """<c, dW>, ||c - dW||^2 and ||dW||^2 of one layer, summed in float64."""
    change, delta_W = change.double(), delta_W.double()
    return (
        float((change * delta_W).sum()),
        float((change - delta_W).square().sum()),
        float(delta_W.square().sum()),
    )


def nf4(W: Tensor) -> Tensor:
    """W (out, in) as 4 bits keep it: of each 64 entries the largest is exact, the others near.

    An entry becomes the nearest of sixteen values, the quantiles of a normal distribution, times
    the largest absolute value of its block. The scales are not rounded themselves, as double
    quantisation does.

    Reference:
        Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, appendix E.
    """
    levels = torch.tensor(_NF4, device=W.device)
    flat = W.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny), middles)
    return (levels[nearest] * scales).flatten()[: len(flat)].view_as(W)
