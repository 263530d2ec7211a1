"""SC-LoRA: the output directions that the task uses and the kept knowledge does not."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.linalg import eigen_top, symmetric
from forgetless.core.method import Factors, Method, check_number


def sc_lora(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    second_moment: Tensor,
    task_moment: Tensor,
    beta: float = 0.5,
) -> Factors:
    """B = Q / √scaling and A = Qᵀ W / √scaling, with Q the top eigenvectors of the difference

        (1 - beta) W T Wᵀ - beta W C Wᵀ

    of the outputs' second moments over the new task, T, and over the knowledge to keep, C. The
    start projects the layer's output on Q. The paper's scaling is 1; the roots keep the start the
    same for every other.

    Eigenvectors are sought in the range of W, where all outputs lie: with W = Q₁ R the problem is
    that of R instead, of size min(out, in). Outside of it A would be zero.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        second_moment: mean of x xᵀ over the text whose knowledge is to be kept, (in, in).
        task_moment: mean of x xᵀ over the new task's text, (in, in).
        beta: in 0..1; 0 looks at the task alone, 1 at the knowledge alone. The default is ours.

    Returns:
        A (rank, in) and B (out, rank) with orthogonal columns.

    Raises:
        ValueError: beta outside 0..1.

    Reference:
        Luo et al. 2025, "SC-LoRA: Balancing Efficient Fine-tuning and Knowledge Preservation via
        Subspace-Constrained LoRA", arXiv:2505.23724, Algorithm 1.
    """
    beta = check_number("beta", beta, 0, 1)
    inputs = (1 - beta) * symmetric(task_moment).double() - beta * symmetric(second_moment).double()
    Q1, R = torch.linalg.qr(W)
    Q = Q1 @ eigen_top(R @ inputs @ R.mT, rank).vectors
    return Factors(A=Q.mT @ W / scaling**0.5, B=Q / scaling**0.5)


METHOD = Method(
    name="sc_lora",
    summary="output directions that the new task uses and the kept knowledge does not",
    paper="Luo et al. 2025, SC-LoRA: Balancing Efficient Fine-tuning and Knowledge Preservation "
    "via Subspace-Constrained LoRA, arXiv:2505.23724",
    trains=("A", "B"),
    factors=sc_lora,
)
