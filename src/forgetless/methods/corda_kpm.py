"""CorDA, knowledge-preserved mode: the smallest components of W seen through the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.cache import once
from forgetless.core.krylov import End
from forgetless.core.linalg import Triples, svd_end, symmetric
from forgetless.core.method import Factors, Method, check_number


def corda_kpm(
    W: Tensor, rank: int, scaling: float, *, second_moment: Tensor, damping: float = 0.01
) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh C̃⁻¹ over the last components of W C̃.

    C̃ is the second moment plus damping · (its mean diagonal) · I. What the adapter takes away from
    W hardly shows on the activations that C̃ describes.

    The authors' code and PEFT start from a damping of 0.01, invert C̃ in float32 and double the
    damping until the inverse passes a test; we solve for A with a Cholesky factor in float64, which
    a damped matrix always has, and never double. They call the second moment a covariance.
    Components of W C̃ below 1e-8 of its largest are not told apart (1e-7 in their float32). Of a
    large weight, a few components come from an iteration, see `forgetless.core.linalg.svd_end`.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        second_moment: mean of x xᵀ over the text whose knowledge is to be kept, (in, in).
        damping: at least 0; 0 only for a second moment that is safely positive definite.

    Returns:
        A (rank, in) and B (out, rank).

    Raises:
        ValueError: damping below 0, or C̃ not positive definite.

    Reference:
        Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
        for Task-Aware Parameter-Efficient Fine-tuning", arXiv:2406.05223.
    """
    damping = check_number("damping", damping, 0)
    return Factors.balanced(*context_end(W, second_moment, rank, "smallest", damping), scaling)


def context_end(W: Tensor, C: Tensor, rank: int, end: End, damping: float) -> Triples:
    """U, S and Vh C̃⁻¹ (not orthonormal) for the smallest or the largest components of W C̃."""
    damped, factor = once(C, ("damped", damping), lambda: _damped(C, damping))
    U, S, Vh = svd_end(W @ damped, rank, end)
    return Triples(U, S, torch.cholesky_solve(Vh.mT, factor).mT)


def _damped(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C̃ in float64, and its Cholesky factor."""
    damped = symmetric(C).double().clone()
    # No activation at all: any multiple of I gives the same factors.
    added = damping * damped.diagonal().mean() if damped.any() else damped.new_ones(())
    damped.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"the second moment with damping {damping:g} is not positive definite; "
            "raise damping or collect more tokens"
        )
    return damped, factor


METHOD = Method(
    name="corda_kpm",
    summary="the smallest components of W seen through the kept activations",
    paper="Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language "
    "Models for Task-Aware Parameter-Efficient Fine-tuning, arXiv:2406.05223",
    trains=("A", "B"),
    factors=corda_kpm,
)
