"""LoRA-Null: what W does to the directions that the kept activations hardly use."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.linalg import eigen_tail, projected_svd
from forgetless.core.method import Factors, Method


def lora_null_v1(W: Tensor, rank: int, scaling: float, *, second_moment: Tensor) -> Factors:
    """B = P √(D / scaling) and A = √(D / scaling) Qᵀ, where W N Nᵀ = P diag(D) Qᵀ.

    N (in, rank) holds the eigenvectors of the second moment with the smallest eigenvalues, so that
    A x ≈ 0 for the activations x to keep, and the residual is W (I - N Nᵀ). "Null" means low
    energy: Σ‖Nᵀ x‖² over the calibration tokens is exactly the sum of those eigenvalues.

    The authors' code takes the SVD of the (out, in) matrix; the thin SVD of W N gives the same
    factors. It also accumulates in float16 and ignores the scaling, which is 1 there.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        second_moment: mean of x xᵀ over the text whose knowledge is to be kept, (in, in).

    Returns:
        A (rank, in) and B (out, rank).

    Reference:
        Tang et al. 2025, "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models",
        arXiv:2503.02659.
    """
    N = eigen_tail(second_moment, rank).vectors
    return Factors.balanced(*projected_svd(W, N), scaling)


METHOD = Method(
    name="lora_null_v1",
    summary="W projected on the directions that the kept activations hardly use",
    paper="Tang et al. 2025, LoRA-Null: Low-Rank Adaptation via Null Space for Large Language "
    "Models, arXiv:2503.02659",
    trains=("A", "B"),
    factors=lora_null_v1,
    copies_weight=False,
)
