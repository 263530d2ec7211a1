"""LoRA: A random, B zero."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.method import Factors, Method


def lora(W: Tensor, rank: int, scaling: float, *, generator: torch.Generator) -> Factors:
    """A uniform in ±1/√in and B = 0, so that the start is zero.

    The bounds are those of ``kaiming_uniform_`` with a = √5, as in the authors' code and in PEFT;
    the paper itself draws A from a Gaussian.

    Args:
        W: weight, (out, in); only its shape and device matter.
        rank: 1..min(out, in).
        scaling: not used; it multiplies a zero.
        generator: draws A, on the CPU, so that the same seed gives the same A on every device.

    Returns:
        A (rank, in) and B (out, rank).

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """
    out_features, in_features = W.shape
    unit = torch.rand(rank, in_features, generator=generator, dtype=W.dtype, device="cpu")
    return Factors(
        A=((2 * unit - 1) / in_features**0.5).to(W.device),
        B=W.new_zeros(out_features, rank),
    )


METHOD = Method(
    name="lora",
    summary="A random, B zero: plain LoRA",
    paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
    trains=("A", "B"),
    factors=lora,
    reads_weight=False,
)
