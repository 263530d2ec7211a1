"""EVA: A is the directions in which the task's activations are largest, B is zero."""

from __future__ import annotations

from torch import Tensor

from forgetless.core import Factors, Method
from forgetless.linalg import eigen_slice


def eva(W: Tensor, rank: int, scaling: float, *, second_moment: Tensor) -> Factors:
    """A = the eigenvectors of the second moment with the largest eigenvalues, and B = 0.

    The paper and PEFT use the principal components of centred activations. A second moment is not
    centred, so the mean activation, often the largest direction of all, takes part here; pass
    E[x xᵀ] - E[x] E[x]ᵀ for theirs. They also move ranks between layers by explained variance,
    which is not the choice of one layer and so not made here.

    Args:
        W: weight, (out, in); only its shape and device matter.
        rank: 1..min(out, in).
        scaling: not used; it multiplies a zero.
        second_moment: mean of x xᵀ over the new task's text, (in, in).

    Returns:
        A (rank, in) with orthonormal rows, the largest first, and B (out, rank).

    Reference:
        Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
        Variance Adaptation", arXiv:2410.07170.
    """
    return Factors(
        A=eigen_slice(second_moment, 0, rank).vectors.mT,
        B=W.new_zeros(W.shape[0], rank),
    )


METHOD = Method(
    name="eva",
    summary="A orthonormal in the directions that the new task uses most, B zero",
    paper="Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained "
    "Variance Adaptation, arXiv:2410.07170",
    trains=("A", "B"),
    factors=eva,
)
