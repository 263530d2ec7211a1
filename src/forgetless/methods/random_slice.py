"""Random slice: singular components of W drawn at random, the control for every chosen slice."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.linalg import spectrum
from forgetless.core.method import Factors, Method


def random_slice(W: Tensor, rank: int, scaling: float, *, generator: torch.Generator) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh over `rank` components of W drawn at random.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        generator: draws the components, without replacement.

    Returns:
        A (rank, in) and B (out, rank), in descending order of the singular values.

    Reference:
        The "random" arm of Wang et al. 2024, "MiLoRA: Harnessing Minor Singular Components for
        Parameter-Efficient LLM Finetuning", arXiv:2406.09044.
    """
    everything = torch.randperm(min(W.shape), generator=generator, device="cpu")
    drawn = everything[:rank].sort().values
    return Factors.balanced(*spectrum(W).components(drawn.to(W.device)), scaling)


METHOD = Method(
    name="random_slice",
    summary="singular components of W drawn at random: the control for every chosen slice",
    paper="Wang et al. 2024, MiLoRA: Harnessing Minor Singular Components for "
    "Parameter-Efficient LLM Finetuning, arXiv:2406.09044",
    trains=("A", "B"),
    factors=random_slice,
)
