"""PiSSA: the largest singular components of W."""

from __future__ import annotations

from torch import Tensor

from forgetless.core import Factors, Method
from forgetless.linalg import svd_slice


def pissa(W: Tensor, rank: int, scaling: float) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh over the first `rank` components of W.

    The start is the best approximation of W of that rank (Eckart-Young), for any scaling.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.

    Returns:
        A (rank, in) and B (out, rank).

    Reference:
        Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
        Language Models", arXiv:2404.02948. PEFT divides by the scaling in the same way.
    """
    return Factors.balanced(*svd_slice(W, 0, rank), scaling)


METHOD = Method(
    name="pissa",
    summary="the largest singular components of W",
    paper="Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation "
    "of Large Language Models, arXiv:2404.02948",
    trains=("A", "B"),
    factors=pissa,
)
