"""EVA: A is the directions in which the task's activations are largest, B is zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from forgetless.core.linalg import eigen_top
from forgetless.core.method import Factors, Method, check_number


def eva(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    task_moment: Tensor,
    whiten: bool = False,
    rho: float = 1.0,
) -> Factors:
    """A = the eigenvectors of the task's second moment with the largest eigenvalues, and B = 0.

    The paper and PEFT use the principal components of centred activations. A second moment is not
    centred, so the mean activation, often the largest direction of all, takes part here; pass
    E[x xᵀ] - E[x] E[x]ᵀ for theirs. The paper also moves ranks between layers; see
    `redistribute_ranks`.

    Args:
        W: weight, (out, in); only its shape and device matter.
        rank: 1..min(out, in).
        scaling: not used; it multiplies a zero.
        task_moment: mean of x xᵀ over the new task's text, (in, in).
        whiten: whether to divide each row by the root of its eigenvalue, so that the entries of
            A x have a mean square of 1; the directions that hold less than 1e-12 of the first are
            divided by what that would be. PEFT's switch of this name divides by the fourth root of
            the eigenvalue times the tokens instead.
        rho: how far `attach` may move ranks between layers, see `redistribute_ranks`; it decides
            nothing in one layer. The paper's is 2.

    Returns:
        A (rank, in) with orthonormal rows (orthogonal if whitened), the largest first, and
        B (out, rank).

    Raises:
        ValueError: whiten is neither True nor False, or rho below 1.

    Reference:
        Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
        Variance Adaptation", arXiv:2410.07170.
    """
    if not isinstance(whiten, bool):
        raise ValueError(f"whiten must be True or False, got {whiten!r}")
    check_number("rho", rho, 1)
    values, vectors = eigen_top(task_moment, rank)
    A = vectors.mT
    if whiten and values[0] > 0:
        A = A / values.clamp(min=1e-12 * float(values[0])).sqrt()[:, None]
    return Factors(A=A, B=W.new_zeros(W.shape[0], rank))


def redistribute_ranks(
    eigenvalues: Mapping[str, Tensor], rank: int | Mapping[str, int], rho: float = 2.0
) -> dict[str, int]:
    """The rank of each layer, in proportion to how much of its input few directions explain.

    A direction's share is its eigenvalue over the sum of its layer's. Of all layers' first
    rho · rank directions, those with the largest shares are adapted, as many as there were ranks.

    Args:
        eigenvalues: layer -> all eigenvalues of its second moment, in descending order.
        rank: the ranks to share out, one number for every layer or layer -> rank.
        rho: at least 1; the most that a layer may get is its own rank times rho, rounded. 1 leaves
            every rank as it is.

    Returns:
        Layer -> rank, in the order of `eigenvalues`. A layer whose directions explain little may
        get 0, which means no adapter. The sum is that of the ranks given, unless the layers have
        fewer eigenvalues than that.

    Raises:
        ValueError: rho below 1.

    Reference:
        Paischer et al. 2024, arXiv:2410.07170, section 3.3; PEFT's ``EvaConfig.rho``.
    """
    rho = check_number("rho", rho, 1)
    asked = {name: rank if isinstance(rank, int) else rank[name] for name in eigenvalues}
    shares: list[tuple[float, str]] = []
    for name, values in eigenvalues.items():
        energies = values.clamp(min=0).double()
        total = float(energies.sum()) or 1.0
        shares += [(float(e) / total, name) for e in energies[: round(rho * asked[name])]]
    shares.sort(key=lambda share: -share[0])
    given = dict.fromkeys(eigenvalues, 0)
    for _, name in shares[: sum(asked.values())]:
        given[name] += 1
    return given


METHOD = Method(
    name="eva",
    summary="A orthonormal in the directions that the new task uses most, B zero",
    paper="Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained "
    "Variance Adaptation, arXiv:2410.07170",
    trains=("A", "B"),
    factors=eva,
    share_ranks=redistribute_ranks,
    reads_weight=False,
)
