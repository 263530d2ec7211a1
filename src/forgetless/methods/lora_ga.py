"""LoRA-GA: the singular vectors of the task's gradient, so that the first step follows it."""

from __future__ import annotations

from torch import Tensor

from forgetless.core.errors import unknown
from forgetless.core.linalg import svd_end
from forgetless.core.method import Factors, Method, check_number

SCALES = ("peft", "paper", "weight_svd", "gd_scale", "unit")
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")


def lora_ga(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    gradient: Tensor,
    scale: str = "peft",
    gamma: float = 16.0,
    direction: str = "ArB2r",
) -> Factors:
    """A from right singular vectors of the gradient and B from other left ones, 2 · rank in all.

    With gradient = U diag(S) Vh, a and b the places that `direction` gives to A and B, and
    c = out^¼ / √gamma,

        scale = "peft":        A = Vh[a],            B = c U[:, b] diag(S[b]), PEFT's "stable";
        scale = "paper":       A = c Vh[a],          B = c U[:, b], as in the authors' code;
        scale = "weight_svd":  A = Vh[a],            B = U[:, b] diag(S[b]) ‖W‖₂ / S[b₀];
        scale = "gd_scale":    A = Vh[a] / scaling,  B = U[:, b] diag(S[b]) / scaling;
        scale = "unit":        A = Vh[a],            B = U[:, b] diag(S[b]).

    But for "gd_scale" they do not depend on the scaling, so that the start, scaling · B A, does. If
    2 · rank exceeds min(out, in), A and B share some places. PEFT finds the vectors by a randomised
    SVD; here they are exact. The sign of each term of B A is a convention, in the paper too.

    Args:
        W: weight, (out, in); only "weight_svd" looks at its values.
        rank: 1..min(out, in).
        scaling: what will multiply B A.
        gradient: gradient of the new task's loss with respect to W, (out, in).
        scale: one of the above.
        gamma: at least 1e-12; larger is a smaller start in the first two scales.
        direction: "ArB2r" gives A the first `rank` places and B the next, "A2rBr" the other way
            round, "ArBr" gives A the second, fourth, … and B the first, third, ….

    Returns:
        A (rank, in) and B (out, rank).

    Raises:
        ValueError: an unknown scale or direction, or gamma not positive.

    Reference:
        Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        arXiv:2407.05000.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    c = W.shape[0] ** 0.25 / check_number("gamma", gamma, 1e-12) ** 0.5
    used = min(2 * rank, *W.shape)
    U, S, Vh = svd_end(gradient.double(), used, "largest")
    a, b = _places(direction, rank, used)
    A, B = Vh[a], U[:, b]
    if scale == "paper":
        return Factors(c * A, c * B)
    B = B * S[b]
    if scale == "gd_scale":
        return Factors(A / scaling, B / scaling)
    if scale == "peft":
        return Factors(A, c * B)
    if scale == "weight_svd" and S[b[0]] > 0:
        B = B * (svd_end(W.double(), 1, "largest").S[0] / S[b[0]])
    return Factors(A, B)


def _places(direction: str, rank: int, used: int) -> tuple[list[int], list[int]]:
    """Which of the first `used` components A and B take."""
    if direction == "ArBr":
        even, odd = list(range(0, used, 2)), list(range(1, used, 2))
        return (odd + even)[:rank], (even + odd)[:rank]
    first, last = list(range(rank)), list(range(used - rank, used))
    return (first, last) if direction == "ArB2r" else (last, first)


METHOD = Method(
    name="lora_ga",
    summary="singular vectors of the new task's gradient, so that the first step follows it",
    paper="Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation, "
    "arXiv:2407.05000",
    trains=("A", "B"),
    factors=lora_ga,
    copies_weight=False,
)
