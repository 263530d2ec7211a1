"""MiLoRA: the smallest singular components of W."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.linalg import svd_slice
from forgetless.core.method import Factors, Method


def milora(W: Tensor, rank: int, scaling: float) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh over the last `rank` components of W.

    The residual is then the best approximation of W of rank min(out, in) - rank: no start of the
    same rank takes less of W away.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.

    Returns:
        A (rank, in) and B (out, rank).

    Reference:
        Wang et al. 2024, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
        Finetuning", arXiv:2406.09044.
    """
    return Factors.balanced(*svd_slice(W, min(W.shape) - rank, rank), scaling)


METHOD = Method(
    name="milora",
    summary="the smallest singular components of W",
    paper="Wang et al. 2024, MiLoRA: Harnessing Minor Singular Components for "
    "Parameter-Efficient LLM Finetuning, arXiv:2406.09044",
    trains=("A", "B"),
    factors=milora,
)
