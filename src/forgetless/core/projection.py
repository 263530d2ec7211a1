"""The closed form of repair: an update that does to the new task what it did, and less to the rest.

With C the second moment of a layer's inputs on text to keep and T that on the new task's text, the
update delta_W = scaling · B A becomes the minimiser over all matrices of

    ‖(delta_W' - delta_W) T^½‖² + strength ‖delta_W' C^½‖²

which is delta_W' = delta_W T (T + strength C)⁻¹: only A changes, so that the rank stays. Here

    A' = A T (T + strength C + ε I)⁻¹,    ε = EPSILON · mean diagonal of (T + strength C)

so that directions in which neither text has any energy are let go of. As the moments are those of
what really enters the layer, one strength means the same in every layer; without a task's text T
is the identity times the mean diagonal of C.

Where part of the kept inputs, share · E of C, is an earlier task's, the update need not vanish
there, but stay what it was before: with A₀ such that B A₀ is the earlier update,

    A' = (A T + strength · share · A₀ E) (T + strength C + ε I)⁻¹

minimises ‖(delta_W' - delta_W) T^½‖² + strength ‖delta_W' (C - share E)^½‖²
+ strength · share ‖(delta_W' - scaling B A₀) E^½‖².
"""

import math

import torch
from torch import Tensor

from forgetless.core.linalg import is_finite
from forgetless.core.method import Factors

EPSILON = 1e-8
"""Share of the mean diagonal that is added to it, so that the system can always be solved."""


def repaired(
    rows: Tensor,
    second_moment: Tensor,
    task_moment: Tensor | None = None,
    strength: float = 0.1,
    towards: Tensor | None = None,
) -> Tensor:
    """The rows A' = A T (T + strength C + ε I)⁻¹ of an update's A, or of the update itself.

    One solve does for all layers that read the same inputs: stack their rows.

    Args:
        rows: A, (rank, in), or a whole update (out, in); of several layers one below the other.
        second_moment: C, of the inputs on text to keep, (in, in).
        task_moment: T, of those on the new task's text; None for the identity times C's mean
            diagonal.
        strength: 0 or more; 0 gives `rows` back, untouched. Large ones project the rows out of
            whatever space the text to keep fills.
        towards: share · A₀ E, where the kept inputs are an earlier task's in part; as `rows`.

    Returns:
        (rows, in) in float64, or `rows` itself at strength 0.

    Raises:
        ValueError: shapes that do not fit, a negative strength, or moments that are no second
            moments.
    """
    C = _moment("second_moment", second_moment, rows)
    T = None if task_moment is None else _moment("task_moment", task_moment, rows)
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be a finite number of at least 0, got {strength!r}")
    if strength == 0:
        return rows
    read = rows.double() @ T if T is not None else rows.double() * C.diagonal().mean()
    if towards is not None:
        read = read + strength * towards.to(read)
    solved: Tensor = torch.cholesky_solve(read.mT, _factor(C, T, strength)).mT
    return solved


def best_of_rank(
    delta_W: Tensor,
    rank: int,
    second_moment: Tensor,
    task_moment: Tensor | None = None,
    strength: float = 0.1,
) -> Factors:
    """The minimiser of the same objective among the updates B A of a rank.

    With R the `repaired` update and M = T + strength C = L Lᵀ the objective is ‖(B A - R) L‖² plus
    a constant, so B A is the truncated SVD of R L, times L⁻¹.

    Args:
        delta_W: a whole update, (out, in).
        rank: 1..min(out, in).
        second_moment: as in `repaired`.
        task_moment: likewise.
        strength: likewise.

    Returns:
        A (rank, in) and B (out, rank) in float64, no scaling among them.

    Raises:
        ValueError: as `repaired`, or a rank that does not fit.
    """
    if not 1 <= rank <= min(delta_W.shape):
        shape = tuple(delta_W.shape)
        raise ValueError(f"rank must be in 1..{min(shape)} for a {shape} update, got {rank}")
    R = repaired(delta_W, second_moment, task_moment, strength).double()
    C = _moment("second_moment", second_moment, R)
    T = None if task_moment is None else _moment("task_moment", task_moment, R)
    L = _factor(C, T, strength)
    U, S, Vh = torch.linalg.svd(R @ L, full_matrices=False)
    root = S[:rank].sqrt()
    A = torch.linalg.solve_triangular(L, root[:, None] * Vh[:rank], upper=False, left=False)
    return Factors(A=A, B=U[:, :rank] * root)


def _factor(C: Tensor, T: Tensor | None, strength: float) -> Tensor:
    """L (in, in) with L Lᵀ = T + strength C + ε I; T of None is the identity at C's level."""
    if T is None:
        system = C * strength
        system.diagonal().add_(C.diagonal().mean())
    else:
        system = torch.add(T, C, alpha=strength)
    diagonal = system.diagonal()
    # Where neither text has any energy at all, any multiple of the identity does.
    diagonal.add_(EPSILON * diagonal.mean() if diagonal.any() else 1.0)
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise ValueError(
            "the second moments have negative eigenvalues beyond rounding, so they are none; "
            "collect them again with forgetless.collect, which sums in float64"
        )
    return L


def _moment(name: str, moment: Tensor, rows: Tensor) -> Tensor:
    """A second moment in float64 where the rows are, if it fits them."""
    size = rows.shape[-1]
    if tuple(moment.shape) != (size, size):
        raise ValueError(f"{name} must be {(size, size)} for these rows, got {tuple(moment.shape)}")
    if not is_finite(moment):
        raise ValueError(f"{name} holds NaN or infinity; check the text that it was collected on")
    return moment.to(rows.device, torch.float64)
