"""PiSSA: the largest singular components of W."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.linalg import randomised_svd, svd_slice
from forgetless.core.method import Factors, Method


def pissa(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    generator: torch.Generator | None = None,
    niter: int | None = None,
) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh over the first `rank` components of W.

    The start is the best approximation of W of that rank (Eckart-Young), for any scaling.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        generator: draws the test matrix of the randomised SVD.
        niter: power iterations of a randomised SVD, at least 0, in place of the exact one; 16 is
            PEFT's ``pissa_niter_16``. Quicker where the rank is small and the weight large.

    Returns:
        A (rank, in) and B (out, rank).

    Raises:
        ValueError: niter is no whole number of at least 0.

    Reference:
        Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
        Language Models", arXiv:2404.02948. PEFT divides by the scaling in the same way.
    """
    if niter is None:
        return Factors.balanced(*svd_slice(W, 0, rank), scaling)
    if not isinstance(niter, int) or niter < 0:
        raise ValueError(f"niter must be a whole number of at least 0, got {niter!r}")
    generator = generator or torch.Generator("cpu").manual_seed(0)
    return Factors.balanced(*randomised_svd(W, rank, niter, generator), scaling)


METHOD = Method(
    name="pissa",
    summary="the largest singular components of W",
    paper="Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation "
    "of Large Language Models, arXiv:2404.02948",
    trains=("A", "B"),
    factors=pissa,
)
