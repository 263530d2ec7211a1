"""What an update of a weight is: its rank, where it points, and what it turned.

Every rank here is one of singular values. For activations these are the roots of the eigenvalues of
their second moment, see `activation_spectrum`; taken on the eigenvalues themselves the numbers are
far smaller (48 against 4 on one example), so reports must say which.

An update comes as a matrix delta_W (out, in), already times its scaling, or as `Factors` with
delta_W = B A (scaling in one of them). Of factors no (out, in) matrix is decomposed, and but for
`intruder_dimensions` none is formed: the thin QR decompositions of B and of Aᵀ leave a matrix of
rank x rank. What is asked of the weight W itself needs its whole SVD, of which `cached_spectra`
keeps what was asked, in float64.
"""

import torch
from torch import Tensor

from forgetless.core.cache import once
from forgetless.core.linalg import (
    Spectrum,
    Triples,
    complete_spectrum,
    eigen_slice,
    svd_end,
)
from forgetless.core.method import Factors

Update = Tensor | Factors
"""delta_W (out, in) itself, or its factors."""

_ROUNDING = 1e-12
"""Relative size of what is left of a zero after a decomposition in float64."""


# --- ranks of singular values ------------------------------------------------------------------


def effective_rank(S: Tensor) -> float:
    """exp(-Σ pᵢ ln pᵢ) with pᵢ = Sᵢ / Σ S: min(out, in) of equal ones, 1 of a single one.

    Args:
        S: singular values in any order, (m,). Zeros count for nothing; all of them zero give 0.

    Raises:
        ValueError: S is no vector, or holds a negative number, NaN or infinity.

    Reference:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    S = _singular(S)
    shares = S[S > 0] / S.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def stable_rank(S: Tensor) -> float:
    """Σ S² / max S², the ratio ‖M‖²_F / ‖M‖²₂; 0 where all are zero.

    Raises:
        ValueError: as `effective_rank`.
    """
    S = _singular(S)
    top = S.max() if len(S) else S.new_zeros(())
    return float((S / top).square().sum()) if top > 0 else 0.0


def rank_at_energy(S: Tensor, energy: float = 0.9) -> int:
    """How many of the largest singular values hold this share of Σ S²; 0 where all are zero.

    Args:
        S: singular values in any order, (m,).
        energy: above 0, up to 1.

    Raises:
        ValueError: an energy outside of that; or as `effective_rank`.

    Reference:
        Biderman et al. 2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673, takes 0.9.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    S = _singular(S).sort(descending=True).values
    if not (len(S) and S[0] > 0):
        return 0
    held = (S / S[0]).square().cumsum(0)
    # What rounding leaves of a zero must not count as one more where all energy is asked for.
    return int((held < energy * held[-1] * (1 - _ROUNDING)).sum()) + 1


def singular_values(M: Update) -> Tensor:
    """The singular values of a matrix or of a product B A, descending, float64.

    Of factors there are as many as their rank, zeros among them where the product has less.
    """
    S: Tensor = torch.linalg.svdvals(_core(M) if isinstance(M, Factors) else M.double())
    return S


def weight_spectrum(W: Tensor) -> Tensor:
    """The singular values of a weight, from the cache where one is open; descending, float64."""
    return _spectrum(W).S


def activation_spectrum(second_moment: Tensor) -> Tensor:
    """The singular values of X / √tokens from its second moment, descending, (in,), float64."""
    values = eigen_slice(second_moment, 0, len(second_moment)).values
    return values.clamp(min=0).sqrt()


# --- the update in the bases of its weight -----------------------------------------------------


def rotation_ratio(W: Tensor, delta_W: Update) -> float:
    """Share of an update that turns the weight's singular directions and does not rescale them.

        M = Uᵀ delta_W V of W = U diag(S) Vᵀ;  ‖M - diag(M)‖²_F / ‖M‖²_F

    Args:
        W: base weight, (out, in).
        delta_W: what was added to it, (out, in), or its factors.

    Returns:
        A number in 0..1; nan where the update has nothing in these directions. Where singular
        values of W are equal, so that their vectors are arbitrary, so is the number.

    Raises:
        ValueError: the shapes differ, or W holds NaN or infinity.

    Reference:
        After Quercia et al. 2026, "Least but not Last", arXiv:2602.03493, who look at the
        off-diagonal change in the pretrained singular basis; the ratio is ours.
    """
    _check_shapes(W, delta_W)
    U, _, Vh = _triples(W, min(W.shape))
    if isinstance(delta_W, Factors):
        left, right = U.mT @ delta_W.B.double(), delta_W.A.double() @ Vh.mT
        total = ((left.mT @ left) * (right @ right.mT)).sum()
        turned = total - (left * right.mT).sum(1).square().sum()
    else:
        M = U.mT @ delta_W.double() @ Vh.mT
        total = M.square().sum()
        turned = (M - M.diagonal().diag()).square().sum()
    return float(turned.clamp(min=0) / total) if total > 0 else float("nan")


def intruder_dimensions(
    W: Tensor, delta_W: Update, top_k: int = 10, threshold: float = 0.5
) -> Tensor:
    """Positions of new directions that an update put among the weight's largest ones.

    A left singular vector u_j of W + delta_W, j < top_k, is an intruder when
    max_i |<u_j, u_i(W)>| < threshold, over the i whose singular value in W is not zero.

    Args:
        W: base weight, (out, in).
        delta_W: what was added to it, (out, in), or its factors.
        top_k: how many directions of W + delta_W to look at, from the largest; 1..min(out, in).
        threshold: a cosine, in 0..1.

    Returns:
        Positions in 0..top_k - 1, ascending, int64; empty where there is none.

    Raises:
        ValueError: the shapes differ, top_k or threshold outside of these.

    Reference:
        Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence",
        arXiv:2410.21228.
    """
    return intruders(W, delta_W, top_k, threshold)[0]


def intruders(
    W: Tensor, delta_W: Update, top_k: int = 10, threshold: float = 0.5
) -> tuple[Tensor, Triples]:
    """`intruder_dimensions`, and the singular triples of W + delta_W there."""
    _check_shapes(W, delta_W)
    check_count("top_k", top_k, W)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine in 0..1, got {threshold}")
    tuned = svd_end(W.double() + dense(delta_W), top_k, "largest")
    U, S, _ = _triples(W, min(W.shape))
    known = U[:, _ROUNDING * S[0] < S]  # the vectors of zero singular values are arbitrary
    cosines = (known.mT @ tuned.U).abs()
    found = (~(cosines >= threshold).any(dim=0)).nonzero().flatten()
    return found, Triples(tuned.U[:, found], tuned.S[found], tuned.Vh[found])


def head_overlap(W: Tensor, delta_W: Update, k: int) -> float:
    """Share of an update that lies within the k largest singular directions of the weight.

        ‖U_kᵀ delta_W V_k‖_F / ‖delta_W‖_F

    Args:
        W: base weight, (out, in).
        delta_W: what was added to it, (out, in), or its factors.
        k: 1..min(out, in).

    Returns:
        A number in 0..1; nan for an update of zero.

    Raises:
        ValueError: the shapes differ, or k is outside of that.

    Reference:
        After rho_k of Xiong and Xie 2025, "OPLoRA", arXiv:2510.13003.
    """
    _check_shapes(W, delta_W)
    check_count("k", k, W)
    U, _, Vh = _triples(W, k)
    if isinstance(delta_W, Factors):
        inside = singular_values(Factors(A=delta_W.A.double() @ Vh.mT, B=U.mT @ delta_W.B.double()))
    else:
        inside = U.mT @ delta_W.double() @ Vh.mT
    size = update_norm(delta_W)
    return float(inside.norm()) / size if size > 0 else float("nan")


def dense(delta_W: Update) -> Tensor:
    """delta_W (out, in) in float64."""
    if isinstance(delta_W, Factors):
        return delta_W.B.double() @ delta_W.A.double()
    return delta_W.double()


def update_norm(delta_W: Update) -> float:
    """‖delta_W‖_F."""
    M = _core(delta_W) if isinstance(delta_W, Factors) else delta_W.double()
    return float(torch.linalg.matrix_norm(M))


# --- the update and the activations ------------------------------------------------------------


def output_change(W: Tensor, delta_W: Update, second_moment: Tensor) -> float:
    """‖delta_W X‖_F / ‖W X‖_F over the tokens that the second moment was taken of.

    How much of the layer's output on that text the update changed, from
    ‖M X‖² = tokens · tr(M C Mᵀ).

    Args:
        W: base weight, (out, in).
        delta_W: what was added to it, (out, in), or its factors.
        second_moment: C, (in, in).

    Returns:
        0 or more; nan where W X is zero.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(W, delta_W)
    before = output_energy(W, second_moment)
    return (output_energy(delta_W, second_moment) / before) ** 0.5 if before > 0 else float("nan")


def output_energy(M: Update, second_moment: Tensor) -> float:
    """tr(M C Mᵀ): mean of ‖M x‖² over the tokens of the second moment C, (in, in).

    Raises:
        ValueError: C does not fit the inputs of M.
    """
    C = _moment(second_moment, _shape(M)[1])
    if isinstance(M, Factors):
        A, B = M.A.double(), M.B.double()
        energy = ((A @ C @ A.mT) * (B.mT @ B)).sum()
    else:
        M = M.double()
        energy = ((M @ C) * M).sum()
    return float(energy.clamp(min=0))


def energy_on_eigenbasis(M: Update, second_moment: Tensor) -> Tensor:
    """Where the inputs that M reads lie among the directions of the activations.

    With the eigenvectors v_i of the second moment, by descending eigenvalue: ‖M v_i‖² / ‖M‖²_F.
    Of an update this is what it does whatever its factors; of A alone (rank, in), LoRA-Null's
    figure 4, it depends on how the product is shared out between A and B.

    Args:
        M: an update, its factors, or any matrix with as many columns as C.
        second_moment: C, (in, in).

    Returns:
        Shares that sum to 1, (in,), the first for the direction of most activation; all nan for a
        matrix of zeros.

    Raises:
        ValueError: C does not fit.

    Reference:
        Tang et al. 2025, "LoRA-Null", arXiv:2503.02659, figure 4.
    """
    C = _moment(second_moment, _shape(M)[1])
    V = eigen_slice(C, 0, len(C)).vectors
    # The orthonormal factor of B changes no length.
    rows = torch.linalg.qr(M.B.double()).R @ M.A.double() if isinstance(M, Factors) else M.double()
    energy = (rows @ V).square().sum(dim=0)
    return energy / energy.sum()


def shared_energy(second_moment: Tensor, task_moment: Tensor, energy: float = 0.9) -> float:
    """Share of a new task's activation energy that lies in the space of the text to keep.

        tr(Qᵀ T Q) / tr T, with Q the fewest eigenvectors of C that hold `energy` of tr C

    Known before any training: near 1, whatever the task changes in this layer moves what is to be
    kept too; near 0 the two can be had together.

    Args:
        second_moment: C of the text to keep, (in, in).
        task_moment: T of the new task, (in, in).
        energy: how much of the kept text's energy its space holds; above 0, up to 1.

    Returns:
        A number in 0..1; nan where the task has no energy.

    Raises:
        ValueError: the shapes differ, or `energy` is outside of that.
    """
    T = _moment(task_moment, len(second_moment))
    Q = kept_space(second_moment, energy)
    total = float(T.trace())
    return float(((T @ Q) * Q).sum()) / total if total > 0 else float("nan")


def kept_space(second_moment: Tensor, energy: float = 0.9) -> Tensor:
    """Q (in, k): the fewest eigenvectors of C, (in, in), that hold this share of tr C.

    Raises:
        ValueError: `energy` is not above 0 and at most 1.
    """
    values, vectors = eigen_slice(second_moment, 0, len(second_moment))
    return vectors[:, : rank_at_energy(values.clamp(min=0).sqrt(), energy)]


# --- shared ------------------------------------------------------------------------------------


def _core(factors: Factors) -> Tensor:
    """R_B R_Aᵀ of the thin QR decompositions of B and Aᵀ: it has the singular values of B A."""
    R_B = torch.linalg.qr(factors.B.double()).R
    R_A = torch.linalg.qr(factors.A.double().mT).R
    core: Tensor = R_B @ R_A.mT
    return core


def _spectrum(W: Tensor) -> Spectrum:
    """The SVD of W; within `shared_inputs` the same tensor is decomposed once."""
    return once(W, "spectrum", lambda: complete_spectrum(W))


def _triples(W: Tensor, count: int) -> Triples:
    return _spectrum(W).components(slice(0, count))


def _shape(M: Update) -> tuple[int, int]:
    return (len(M.B), M.A.shape[1]) if isinstance(M, Factors) else (M.shape[0], M.shape[1])


def _check_shapes(W: Tensor, delta_W: Update) -> None:
    if tuple(W.shape) != _shape(delta_W):
        raise ValueError(f"W is {tuple(W.shape)} and its update {_shape(delta_W)}; they must agree")


def check_count(name: str, count: int, W: Tensor) -> None:
    """Raise ValueError where a weight has not so many directions."""
    if not 1 <= count <= min(W.shape):
        raise ValueError(
            f"{name} must be in 1..{min(W.shape)} for a {tuple(W.shape)} weight, got {count}"
        )


def _moment(C: Tensor, size: int) -> Tensor:
    if tuple(C.shape) != (size, size):
        raise ValueError(f"the second moment must be {(size, size)}, got {tuple(C.shape)}")
    return C.double()


def _singular(S: Tensor) -> Tensor:
    """S in float64, if it can be singular values."""
    S = torch.as_tensor(S).double()
    if S.ndim != 1 or not bool(S.isfinite().all()) or bool((S < 0).any()):
        raise ValueError(
            "singular values are a vector of finite numbers from 0, got shape "
            f"{tuple(S.shape)}{f' with {float(S.min()):.3g}' if S.numel() else ''}"
        )
    return S
