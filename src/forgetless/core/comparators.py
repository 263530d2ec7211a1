"""What else can be done to a trained update without training: what `repair` is measured against.

An update comes as in `forgetless.core.spectra`, as a matrix delta_W (out, in) or as `Factors`, with
its scaling. The projections and the intruders leave factors factors; what drops single entries of
the product (`dare`, `ties`) gives a matrix, which is no LoRA of the rank that it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forgetless.core.linalg import svd_end
from forgetless.core.method import Factors
from forgetless.core.spectra import Update, dense, intruders, kept_space, singular_values


def hard_projection(delta_W: Update, second_moment: Tensor, energy: float = 0.99) -> Update:
    """delta_W (I - Q Qᵀ): the update no longer reads what the text to keep fills.

    What repair comes to at an infinite strength, with a sharp edge to the space.

    Args:
        delta_W: (out, in), or its factors, of which A alone changes.
        second_moment: C of the text to keep, (in, in).
        energy: Q is the fewest eigenvectors of C that hold this share of tr C; in 0..1, not 0. A
            share and no eigenvalue, so that it means the same in every layer.

    Raises:
        ValueError: C does not fit, or `energy` is outside of that.
    """
    Q = kept_space(second_moment, energy)
    if isinstance(delta_W, Factors):
        return Factors(A=_without(delta_W.A, Q), B=delta_W.B.double())
    return _without(delta_W, Q)


def oplora(W: Tensor, delta_W: Update, directions: int = 16) -> Update:
    """(I - U_k U_kᵀ) delta_W (I - V_k V_kᵀ): the k largest singular triples of W stay as they are.

    Args:
        W: base weight, (out, in).
        delta_W: what was added to it, (out, in), or its factors.
        directions: k, in 1..min(out, in).

    Raises:
        ValueError: k is outside of that.

    Reference:
        Xiong and Xie 2025, "OPLoRA", arXiv:2510.13003, who train within these projections; here
        they come afterwards.
    """
    if not 1 <= directions <= min(W.shape):
        raise ValueError(
            f"directions must be in 1..{min(W.shape)} for a {tuple(W.shape)} weight, got "
            f"{directions}"
        )
    U, _, Vh = svd_end(W, directions, "largest")
    if isinstance(delta_W, Factors):
        return Factors(A=_without(delta_W.A, Vh.mT), B=_without(delta_W.B.mT, U).mT)
    return _without(_without(delta_W, Vh.mT).mT, U).mT


def _without(M: Tensor, V: Tensor) -> Tensor:
    """M (I - V Vᵀ), V orthonormal columns."""
    if M.shape[1] != len(V):
        raise ValueError(f"the projection is of {len(V)} inputs and the update of {M.shape[1]}")
    M = M.double()
    return M - (M @ V) @ V.mT


def intruders_reduced(
    W: Tensor, delta_W: Update, keep: float, top_k: int = 10, threshold: float = 0.5
) -> Update:
    """The update of W + delta_W + (keep - 1) Σ σᵢ uᵢ vᵢᵀ over the intruders i of W + delta_W.

    Exact: of factors of rank r and n intruders come factors of rank r + n.

    Args:
        W: base weight, (out, in).
        delta_W: what was added to it, (out, in), or its factors.
        keep: the paper's lambda: what is left of each intruder's singular value; 1 changes nothing,
            0 takes them out.
        top_k: as in `forgetless.core.spectra.intruder_dimensions`.
        threshold: likewise.

    Raises:
        ValueError: as `intruder_dimensions`.

    Reference:
        Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence",
        arXiv:2410.21228.
    """
    _, (U, S, Vh) = intruders(W, delta_W, top_k, threshold)
    added = (keep - 1) * U * S
    if isinstance(delta_W, Factors):
        A, B = delta_W.A.double(), delta_W.B.double()
        return Factors(A=torch.cat([A, Vh]), B=torch.cat([B, added], dim=1))
    return delta_W.double() + added @ Vh


def dare(delta_W: Update, drop: float, generator: torch.Generator) -> Tensor:
    """The update with each entry of the product zero by chance `drop`, the others / (1 - drop).

    Args:
        delta_W: (out, in), or its factors.
        drop: 0..1, not 1.
        generator: draws the entries, on the CPU.

    Raises:
        ValueError: `drop` is outside of that.

    Reference:
        Yu et al. 2024, "Language Models are Super Mario", arXiv:2311.03099.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in 0..1 and not 1, got {drop}")
    D = dense(delta_W)
    kept = torch.rand(D.shape, generator=generator, dtype=torch.float64) >= drop
    return D * kept.to(D.device) / (1 - drop)


def ties(updates: Sequence[Update], keep: float = 0.2) -> Tensor:
    """One update of several: trimmed, a sign elected for each entry, the mean of those that agree.

    Args:
        updates: of one layer, (out, in) each, or factors.
        keep: the share of each update's entries that stay, the largest by magnitude; the others
            count for nothing. Of this layer, where the paper takes it of the whole model.

    Returns:
        (out, in); 0 where the trimmed entries add up to 0.

    Raises:
        ValueError: keep is not in 0..1, or 0.

    Reference:
        Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708, whose lambda is 1 here.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
    trimmed = torch.stack([_largest(dense(update), keep) for update in updates])
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(D: Tensor, share: float) -> Tensor:
    """D with zeros for all but this share of its entries."""
    count = max(1, round(share * D.numel()))
    kept = torch.zeros_like(D).flatten()
    positions = D.abs().flatten().topk(count).indices
    kept[positions] = D.flatten()[positions]
    return kept.view_as(D)


def lost_at_rank(delta_W: Update, rank: int) -> float:
    """‖delta_W - its best approximation of a rank‖_F / ‖delta_W‖_F; 0 for an update of zero."""
    S = singular_values(delta_W)
    size = float(S.norm())
    return float(S[rank:].norm()) / size if size else 0.0
