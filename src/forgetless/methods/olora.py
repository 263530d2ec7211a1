"""OLoRA: the first columns and rows of a QR factorisation of W."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.method import Factors, Method


def olora(W: Tensor, rank: int, scaling: float) -> Factors:
    """B = the first columns of Q and A = the first rows of R, where W = Q R.

    The diagonal of R is made positive, which fixes the signs. As in PEFT, A and B do not depend on
    the scaling, so that the start, scaling · B A, does: at scaling 1 the residual is zero in the
    first `rank` columns.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: not used.

    Returns:
        A (rank, in) and B (out, rank) with orthonormal columns.

    Reference:
        Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        arXiv:2406.01775.
    """
    Q, R = torch.linalg.qr(W[:, :rank])  # the first columns of Q depend on no others of W
    B = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(W)
    return Factors(A=B.mT @ W, B=B)


METHOD = Method(
    name="olora",
    summary="the first columns and rows of a QR factorisation of W",
    paper="Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, "
    "arXiv:2406.01775",
    trains=("A", "B"),
    factors=olora,
)
