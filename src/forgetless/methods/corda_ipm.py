"""CorDA, instruction-previewed mode: the largest components of W seen through the task."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.method import Factors, Method, check_number
from forgetless.methods.corda_kpm import context_end


def corda_ipm(
    W: Tensor, rank: int, scaling: float, *, task_moment: Tensor, damping: float = 0.01
) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh C̃⁻¹ over the first components of W C̃.

    C̃ and the differences from the authors' code are those of `corda_kpm`, but for the text: this
    mode looks at the new task's.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        task_moment: mean of x xᵀ over the new task's text, (in, in).
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
    return Factors.balanced(*context_end(W, task_moment, rank, "largest", damping), scaling)


METHOD = Method(
    name="corda_ipm",
    summary="the largest components of W seen through the activations, here the new task's",
    paper="Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language "
    "Models for Task-Aware Parameter-Efficient Fine-tuning, arXiv:2406.05223",
    trains=("A", "B"),
    factors=corda_ipm,
)
