"""LoRA-Null from zero: A is the null space itself, B is zero."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.linalg import eigen_tail
from forgetless.core.method import Factors, Method


def lora_null_zero(W: Tensor, rank: int, scaling: float, *, second_moment: Tensor) -> Factors:
    """A = Nᵀ and B = 0, so that the start is zero and any PEFT-based trainer can go on from it.

    N (in, rank) holds the eigenvectors of the second moment with the smallest eigenvalues.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: not used; it multiplies a zero.
        second_moment: mean of x xᵀ over the text whose knowledge is to be kept, (in, in).

    Returns:
        A (rank, in) with orthonormal rows, and B (out, rank).

    Reference:
        The "singular_aware_2" path in the code of Tang et al. 2025, "LoRA-Null: Low-Rank Adaptation
        via Null Space for Large Language Models", arXiv:2503.02659; the paper does not report it.
    """
    N = eigen_tail(second_moment, rank).vectors
    return Factors(A=N.mT, B=W.new_zeros(W.shape[0], rank))


METHOD = Method(
    name="lora_null_zero",
    summary="A orthonormal in the directions that the kept activations hardly use, B zero",
    paper="Tang et al. 2025, LoRA-Null: Low-Rank Adaptation via Null Space for Large Language "
    "Models, arXiv:2503.02659",
    trains=("A", "B"),
    factors=lora_null_zero,
    reads_weight=False,
)
