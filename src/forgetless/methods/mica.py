"""MiCA: the output directions that W uses least, frozen; only A is trained."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.linalg import complete_spectrum
from forgetless.core.method import Factors, Method


def mica(W: Tensor, rank: int, scaling: float) -> Factors:
    """B = the left singular vectors of the smallest singular values of W, and A = 0.

    The start is zero. B stays as it is, so that the update only ever writes to these directions.
    The whole SVD is computed: where W is rank-deficient, a slice alone would not keep B orthogonal
    to the directions that W does use.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: not used; it multiplies a zero.

    Returns:
        A (rank, in) and B (out, rank) with orthonormal columns.

    Reference:
        Rüdiger and Raschka 2026, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning",
        arXiv:2604.01694.
    """
    last = slice(min(W.shape) - rank, None)
    return Factors(
        A=W.new_zeros(rank, W.shape[1]),
        B=complete_spectrum(W).components(last).U,
    )


METHOD = Method(
    name="mica",
    summary="B frozen in the output directions that W uses least, A zero",
    paper="Rüdiger and Raschka 2026, MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning, "
    "arXiv:2604.01694",
    trains=("A",),
    factors=mica,
)
