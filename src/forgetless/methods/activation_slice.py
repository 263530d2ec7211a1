"""Activation slice: LoRA-Null's projection at any position along the activations' eigenbasis."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.linalg import eigen_slice, eigen_tail, projected_svd, slice_start
from forgetless.core.method import Factors, Method, check_number


def activation_slice(
    W: Tensor, rank: int, scaling: float, *, second_moment: Tensor, position: float = 0.5
) -> Factors:
    """B = P √(D / scaling) and A = √(D / scaling) Qᵀ, where W N Nᵀ = P diag(D) Qᵀ.

    N (in, rank) holds neighbouring eigenvectors of the second moment: s..s + rank - 1 in descending
    order of the eigenvalues, with s = position · (in - rank), rounded, a half down.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        second_moment: mean of x xᵀ over the text whose knowledge is to be kept, (in, in).
        position: in 0..1; 0 is the busiest directions, 1 is LoRA-Null.

    Returns:
        A (rank, in) and B (out, rank).

    Raises:
        ValueError: position outside 0..1.

    Reference:
        Ours: it joins the positions of Quercia et al. 2026, arXiv:2602.03493, and the activations
        of Tang et al. 2025, arXiv:2503.02659.
    """
    start = slice_start(check_number("position", position, 0, 1), W.shape[1], rank)
    if start + rank == W.shape[1]:
        N = eigen_tail(second_moment, rank).vectors
    else:
        N = eigen_slice(second_moment, start, rank).vectors
    return Factors.balanced(*projected_svd(W, N), scaling)


METHOD = Method(
    name="activation_slice",
    summary="W projected on a slice of the kept activations' eigenbasis, at any position",
    paper="—",
    trains=("A", "B"),
    factors=activation_slice,
    copies_weight=False,
)
