"""InfLoRA: A is where the new task's inputs are largest outside of those to keep, and frozen."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.linalg import eigen_slice, eigen_top, symmetric
from forgetless.core.method import Factors, Method, check_number


def inflora(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    second_moment: Tensor,
    task_moment: Tensor,
    energy: float = 0.98,
) -> Factors:
    """A = Vᵀ / √3 and B = 0, with V the top eigenvectors of (I - M Mᵀ) T (I - M Mᵀ).

    T is the second moment of the new task's inputs. M holds the eigenvectors of the second moment
    to keep that together have the share `energy` of its trace, but at most in - rank of them. What
    is trained, B, then answers to nothing that lies in M. Rows of length 1 / √3, as in the authors'
    code, are as long as those of LoRA's random start.

    In the paper M is a basis that grows by each task's inputs (DualGPM) and leaves the base's own
    out; here it is that of the accumulated moment of earlier tasks and the text to keep.

    Args:
        W: weight, (out, in); only its shape and device matter.
        rank: 1..min(out, in).
        scaling: not used; it multiplies a zero.
        second_moment: mean of x xᵀ over the text whose knowledge is to be kept, in a sequence with
            the inputs of earlier tasks, (in, in).
        task_moment: mean of x xᵀ over the new task's text, (in, in).
        energy: in 0..1; the paper's thresholds are 0.95 to 1. 0 keeps nothing, and A is that of
            `eva`.

    Returns:
        A (rank, in) with orthogonal rows, the largest first, and B (out, rank).

    Raises:
        ValueError: energy outside 0..1.

    Reference:
        Liang and Li 2024, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
        CVPR, arXiv:2404.00228, section 3.2.
    """
    energy = check_number("energy", energy, 0, 1)
    size = len(second_moment)
    values, vectors = eigen_slice(second_moment, 0, size)
    within = values.clamp(min=0).cumsum(0)
    kept = int((within < energy * within[-1]).sum()) + (1 if energy * within[-1] > 0 else 0)
    free = vectors[:, min(kept, size - rank) :]
    inside = free.mT @ symmetric(task_moment).double() @ free
    V = free @ eigen_top((inside + inside.mT) / 2, rank).vectors  # its rounding may be all of it
    return Factors(A=V.mT / 3**0.5, B=W.new_zeros(W.shape[0], rank))


METHOD = Method(
    name="inflora",
    summary="A frozen on the new task's inputs outside of those to keep, B zero",
    paper="Liang and Li 2024, InfLoRA: Interference-Free Low-Rank Adaptation for Continual "
    "Learning, arXiv:2404.00228",
    trains=("B",),
    factors=inflora,
    reads_weight=False,
)
