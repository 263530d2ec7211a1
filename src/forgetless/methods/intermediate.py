"""Intermediate components: a slice of W's SVD at any position between PiSSA's and MiLoRA's."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.core.linalg import slice_start, spectrum
from forgetless.core.method import Factors, Method, check_number


def intermediate(
    W: Tensor, rank: int, scaling: float, *, position: float = 0.5, energy: float | None = None
) -> Factors:
    """B = U √(S / scaling) and A = √(S / scaling) Vh over `rank` neighbouring components of W.

    With m = min(out, in) and S descending, the slice is s..s + rank - 1 with

        s = position · (m - rank), rounded, a half down; or
        s = the smallest with S_0² + … + S_{s-1}² >= energy · ΣS², at most m - rank.

    Args:
        W: weight, (out, in).
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        position: in 0..1; 0 is PiSSA, 1 is MiLoRA. The paper's own choice is not known to us; the
            middle is the "mid" mode of MiLoRA's code.
        energy: in 0..1, instead of a position: the share of ‖W‖² that lies above the slice.

    Returns:
        A (rank, in) and B (out, rank).

    Raises:
        ValueError: position or energy outside 0..1, or both given.

    Reference:
        Quercia et al. 2026, "Least but not Last: Fine-tuning Intermediate Principal Components for
        Better Performance-Forgetting Trade-Offs", arXiv:2602.03493. `energy` is ours.
    """
    whole, length = spectrum(W), min(W.shape)
    start = slice_start(check_number("position", position, 0, 1), length, rank)
    if energy is not None:
        if position != 0.5:
            raise ValueError(f"give position or energy, not both; got {position!r} and {energy!r}")
        above = torch.nn.functional.pad(whole.S.square().cumsum(0), (1, 0))
        wanted = check_number("energy", energy, 0, 1) * above[-1]
        start = min(int(torch.count_nonzero(above < wanted)), length - rank)
    return Factors.balanced(*whole.components(slice(start, start + rank)), scaling)


METHOD = Method(
    name="intermediate",
    summary="neighbouring singular components of W at any position, the middle by default",
    paper="Quercia et al. 2026, Least but not Last: Fine-tuning Intermediate Principal Components "
    "for Better Performance-Forgetting Trade-Offs, arXiv:2602.03493",
    trains=("A", "B"),
    factors=intermediate,
)
