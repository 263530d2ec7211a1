"""What else can be done to a trained update without training: what `repair` is measured against.

Here W is the base's weight, (out, in), and delta_W what was added to it, (out, in), or its factors,
scaling and all. The projections and the intruders leave factors factors; what drops entries of the
product (`dare`, `ties`) gives a matrix, which is no LoRA of the rank that it was. Results are in
float64. All raise ValueError for shapes that do not fit and settings outside of what is told.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from forgetless.core.linalg import svd_end
from forgetless.core.method import Factors
from forgetless.core.spectra import (
    Update,
    check_count,
    dense,
    intruders,
    kept_space,
    singular_values,
)


def hard_projection(delta_W: Update, second_moment: Tensor, energy: float = 0.99) -> Update:
    """delta_W (I - Q Qᵀ): the update no longer reads what the text to keep fills.

    What repair comes to at an infinite strength, with a sharp edge to the space: Q is the fewest
    eigenvectors of C (in, in), the second moment, that hold the share `energy` of tr C. A share
    means the same in every layer, which no eigenvalue would.
    """
    Q = kept_space(second_moment, energy)
    if isinstance(delta_W, Factors):
        return Factors(A=_without(delta_W.A, Q), B=delta_W.B.double())
    return _without(delta_W, Q)


def oplora(W: Tensor, delta_W: Update, directions: int = 16) -> Update:
    """(I - U_k U_kᵀ) delta_W (I - V_k V_kᵀ): the k largest singular triples of W stay as they are.

    Reference:
        Xiong and Xie 2025, "OPLoRA", arXiv:2510.13003, who train within these projections; here
        they come afterwards. k is `directions`, in 1..min(out, in).
    """
    check_count("directions", directions, W)
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
    """delta_W + (keep - 1) Σ σᵢ uᵢ vᵢᵀ over the intruders i of W + delta_W.

    Exact: of factors of rank r and n intruders come factors of rank r + n. `keep` is the paper's
    lambda, what is left of each intruder; the others are those of `intruder_dimensions`.

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
    """Each entry of the product is 0 by chance `drop`, in 0..1 and not 1; the others / (1 - drop).

    The generator is one of the CPU.

    Reference:
        Yu et al. 2024, "Language Models are Super Mario", arXiv:2311.03099.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in 0..1 and not 1, got {drop}")
    D = dense(delta_W)
    kept = torch.rand(D.shape, generator=generator, dtype=torch.float64) >= drop
    return D * kept.to(D.device) / (1 - drop)


def ties(updates: Sequence[Update], keep: float = 0.2) -> Tensor:
    """One update of several: each trimmed, a sign elected by entry, the mean of those that agree.

    Of each the share `keep` of its entries stays, above 0 and at most 1, the largest by magnitude;
    of this layer, where the paper takes them of the whole model. The elected sign is that of the
    sum; where it is 0, so is the entry.

    Reference:
        Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708, whose lambda is 1 here.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
    trimmed = torch.stack([dense(update) for update in updates])
    entries = trimmed.flatten(1)
    least = entries.shape[1] - max(1, round(keep * entries.shape[1]))
    entries.scatter_(1, entries.abs().argsort(1)[:, :least], 0.0)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def lost_at_rank(delta_W: Update, rank: int) -> float:
    """‖delta_W - its best approximation of a rank‖_F / ‖delta_W‖_F; 0 for an update of zero."""
    S = singular_values(delta_W)
    size = float(S.norm())
    return float(S[rank:].norm()) / size if size else 0.0
