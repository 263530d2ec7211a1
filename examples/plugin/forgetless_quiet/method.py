"""Start where the text to keep is quietest, input by input."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless import Factors, Method


def factors(W: Tensor, rank: int, scaling: float, *, second_moment: Tensor) -> Factors:
    """A's rows are the unit vectors of the inputs with the least mean square, and B is zero.

    A null space of axes alone: it costs no decomposition, and keeps less than that of LoRA-Null.
    """
    quietest = second_moment.diagonal().argsort(stable=True)[:rank]
    A = torch.zeros(rank, W.shape[1], dtype=W.dtype, device=W.device)
    A[torch.arange(rank), quietest] = 1.0
    return Factors(A=A, B=W.new_zeros(W.shape[0], rank))


METHOD = Method(
    name="quiet_inputs",
    summary="A frozen on the inputs that the text to keep uses least, B = 0",
    paper="—",
    trains=("B",),
    factors=factors,
)
