"""LoRA-GA: the singular vectors of the task's gradient, so that the first step follows it."""

from __future__ import annotations

from torch import Tensor

from forgetless.core import Factors, Method, check_number
from forgetless.errors import unknown
from forgetless.linalg import svd_slice

SCALES = ("peft", "paper")


def lora_ga(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    gradient: Tensor,
    scale: str = "peft",
    gamma: float = 16.0,
) -> Factors:
    """A from the first `rank` right singular vectors of the gradient, B from the next left ones.

    With gradient = U diag(S) Vh and c = out^¼ / √gamma,

        scale = "peft":   A = Vh[:r],    B = c U[:, r:2r] diag(S[r:2r]);
        scale = "paper":  A = c Vh[:r],  B = c U[:, r:2r], as in the authors' code.

    Neither depends on the scaling, so that the start, scaling · B A, does. If 2 · rank exceeds
    min(out, in), B takes the last `rank` vectors. PEFT finds the vectors by a randomised SVD; here
    they are exact. The sign of each term of B A is a convention, in the paper too.

    Args:
        W: weight, (out, in); only its shape matters.
        rank: 1..min(out, in).
        scaling: not used.
        gradient: gradient of the new task's loss with respect to W, (out, in).
        scale: "peft" or "paper".
        gamma: at least 1e-12; larger is a smaller start.

    Returns:
        A (rank, in) and B (out, rank).

    Raises:
        ValueError: an unknown scale, or gamma not positive.

    Reference:
        Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        arXiv:2407.05000.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    c = W.shape[0] ** 0.25 / check_number("gamma", gamma, 1e-12) ** 0.5
    used = min(2 * rank, min(W.shape))
    U, S, Vh = svd_slice(gradient, 0, used)
    A, B = Vh[:rank], c * U[:, used - rank :]
    return Factors(c * A, B) if scale == "paper" else Factors(A, B * S[used - rank :])


METHOD = Method(
    name="lora_ga",
    summary="singular vectors of the new task's gradient, so that the first step follows it",
    paper="Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation, "
    "arXiv:2407.05000",
    trains=("A", "B"),
    factors=lora_ga,
)
