"""Eigen-slices, singular slices and projections: the linear algebra that the methods share.

It runs in float64 (`eigen_slice` says where not). The singular values of W are the roots of the
eigenvalues of its smaller Gram matrix, W Wᵀ or Wᵀ W, and a slice of the SVD follows from the thin
SVD of W times r of the eigenvectors. On weights of 256 to 1024 with singular values k^-0.8, against
a float64 SVD, the last 16 components come out within 1e-11 relative this way and within 2e-5 to
1e-3 by a float32 SVD, which is no faster (0.06 s against 0.11 s at 512 x 1024 on one core).

Where one end of a large spectrum is enough, `krylov` finds it without the rest; what
an input or a weight is decomposed into is remembered by `forgetless.core.cache`.

Signs are fixed: the entry of largest magnitude in each right singular vector or eigenvector is
positive. Inside a group of equal singular values or eigenvalues any rotation is a right answer, and
which one comes back depends on the LAPACK in use; products over the whole group do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from forgetless.core import krylov as subspace
from forgetless.core.cache import SpectrumCache, active_cache, content_key, once


class Triples(NamedTuple):
    """r singular triples: U (out, r), S (r,) descending, Vh (r, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


class Eigen(NamedTuple):
    """r eigenpairs of a symmetric matrix: values (r,) descending, vectors (n, r) as columns."""

    values: Tensor
    vectors: Tensor


def slice_start(position: float, length: int, rank: int) -> int:
    """Where a slice of `rank` out of `length` begins: 0 at position 0, length - rank at 1.

    A half is rounded down, so that 0.5 gives (length - rank) // 2.
    """
    return max(0, math.ceil(position * (length - rank) - 0.5))


# --- singular values ---------------------------------------------------------------------------


def oriented_svd(M: Tensor) -> Triples:
    """The thin SVD of M in float64, with fixed signs.

    Args:
        M: a finite matrix, (out, in).

    Returns:
        All min(out, in) triples.

    Raises:
        ValueError: M is no matrix, or holds NaN or infinity.
    """
    return _orient(*torch.linalg.svd(_finite(M).double(), full_matrices=False))


def projected_svd(W: Tensor, N: Tensor) -> Triples:
    """The r singular triples of W N Nᵀ, without forming that (out, in) matrix.

    W N = P diag(D) Rᵀ is the thin SVD of an (out, r) matrix; the triples are P, D and (N R)ᵀ.

    Args:
        W: (out, in), in any precision.
        N: orthonormal columns, (in, r) with r <= out, float64.

    Returns:
        r triples.
    """
    P, D, Rh = torch.linalg.svd(_product(W, N), full_matrices=False)
    return _orient(P, D, Rh @ N.mT)


def _product(W: Tensor, N: Tensor) -> Tensor:
    """W N in float64; rows of W are converted a few at a time, since fresh memory is slow."""
    if W.dtype == torch.float64:
        return W @ N
    product = N.new_empty(W.shape[0], N.shape[1])
    rows = N.new_empty(min(_ROWS, W.shape[0]), W.shape[1])
    for start in range(0, W.shape[0], _ROWS):
        some = W[start : start + _ROWS]
        torch.mm(rows[: len(some)].copy_(some), N, out=product[start : start + _ROWS])
    return product


_ROWS = 1024


class Spectrum(Protocol):
    """The singular values of a weight, and any slice of its SVD."""

    @property
    def S(self) -> Tensor:
        """All min(out, in) singular values, descending, float64."""
        ...

    def components(self, picked: slice | Tensor) -> Triples:
        """The singular triples at these positions of the descending order, in float64."""
        ...


@dataclass(frozen=True, eq=False)
class GramSpectrum:
    """A spectrum of which one side is known; a slice of the other follows from W.

    Attributes:
        W: (out, in), float64.
        S: singular values, descending, (m,) with m = min(out, in). Those below 1e-8 of the first
            are noise of that size; `components` returns accurate ones.
        vectors: the singular vectors of W's shorter side as columns, (m, m).
    """

    W: Tensor
    S: Tensor
    vectors: Tensor

    def components(self, picked: slice | Tensor) -> Triples:
        """The singular triples at these positions of the descending order.

        Where W is rank-deficient and the slice lies in its null space, the vectors of the longer
        side are orthonormal but arbitrary; their singular values are zero up to rounding.
        """
        return projected_slice(self.W, self.vectors[:, picked])


@dataclass(frozen=True, eq=False)
class CompleteSpectrum:
    """A spectrum of which both sides are known.

    Attributes:
        triples: all of them.
    """

    triples: Triples

    @property
    def S(self) -> Tensor:
        """All singular values."""
        return self.triples.S

    def components(self, picked: slice | Tensor) -> Triples:
        """The singular triples at these positions; orthonormal among all, in a null space too."""
        U, S, Vh = self.triples
        return Triples(U[:, picked], S[picked], Vh[picked])


@dataclass(frozen=True, eq=False)
class CachedSpectrum:
    """A spectrum of which the cache keeps what it is asked for.

    Attributes:
        W: (out, in), float64.
        decomposed: what decomposes it where the cache has no answer.
        cache: where answers are kept.
    """

    W: Tensor
    decomposed: Callable[[Tensor], GramSpectrum | CompleteSpectrum]
    cache: SpectrumCache

    @cached_property
    def _made(self) -> GramSpectrum | CompleteSpectrum:
        return self.decomposed(self.W)

    @cached_property
    def _key(self) -> str:
        return f"{content_key(self.W)}-{self.decomposed.__name__.strip('_')}"

    def _kept(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        kept = self.cache.kept(f"{self._key}-{what}", make)
        return {name: tensor.to(self.W.device) for name, tensor in kept.items()}

    @property
    def S(self) -> Tensor:
        """All singular values."""
        return self._kept("values", lambda: {"S": self._made.S})["S"]

    def components(self, picked: slice | Tensor) -> Triples:
        """The singular triples at these positions of the descending order."""
        if isinstance(picked, slice):
            start, stop, _ = picked.indices(min(self.W.shape))
            what = f"{start}-{stop}"
        else:
            what = content_key(picked)

        def rows() -> dict[str, Tensor]:
            U, S, Vh = self._made.components(picked)
            return {"left": U.mT, "S": S, "right": Vh}

        kept = self._kept(what, rows)
        return Triples(kept["left"].mT, kept["S"], kept["right"])


def projected_slice(W: Tensor, basis: Tensor) -> Triples:
    """The singular triples of W that belong to singular vectors of its shorter side, as columns."""
    out_features, in_features = W.shape
    if in_features <= out_features:
        return projected_svd(W, basis)
    V, S, Uh = projected_svd(W.mT, basis)
    return _orient(Uh.mT, S, V.mT)


def spectrum(W: Tensor) -> Spectrum:
    """The spectrum of W, by its smaller Gram matrix; what is asked of it is kept in an open cache.

    Raises:
        ValueError: W is no matrix, or holds NaN or infinity.
    """
    cache = active_cache()
    if cache is None:
        return gram_spectrum(W)
    if cache.whole:
        return complete_spectrum(W)
    return CachedSpectrum(_finite(W).double(), gram_spectrum, cache)


def gram_spectrum(W: Tensor) -> GramSpectrum:
    """The spectrum of W, from the eigenvalues of its smaller Gram matrix.

    Raises:
        ValueError: W is no matrix, or holds NaN or infinity.
    """
    W = _finite(W).double()
    energy, vectors = torch.linalg.eigh(_smaller_gram(W))
    return GramSpectrum(W=W, S=energy.clamp(min=0).sqrt().flip(0), vectors=vectors.flip(1))


def _smaller_gram(W: Tensor) -> Tensor:
    """Wᵀ W or W Wᵀ, (min(out, in), min(out, in)); what mirrors a strip is not multiplied again."""
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    size = tall.shape[1]
    gram = tall.new_empty(size, size)
    width = -(-size // _STRIPS)
    for start in range(0, size, width):
        strip = slice(start, start + width)
        gram[strip, start:] = tall[:, strip].mT @ tall[:, start:]
        gram[start + width :, strip] = gram[strip, start + width :].mT
    return gram


_STRIPS = 4


def complete_spectrum(W: Tensor) -> Spectrum:
    """Both sides of the SVD of W; what is asked of it is kept in an open cache.

    Raises:
        ValueError: W is no matrix, or holds NaN or infinity.
    """
    W, cache = _finite(W).double(), active_cache()
    if cache is None:
        return _complete(W)
    kept = CachedSpectrum(W, _complete, cache)
    return CompleteSpectrum(kept.components(slice(None))) if cache.whole else kept


def _complete(W: Tensor) -> CompleteSpectrum:
    """All triples of W, from its Gram matrix where that is quicker than an SVD."""
    if min(W.shape) < subspace.SMALLEST_SIZE:
        return CompleteSpectrum(oriented_svd(W))
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    short = gram_spectrum(tall).vectors
    long = tall @ short
    S = long.norm(dim=0)
    # Below this the vectors of the longer side are no longer orthogonal to single precision.
    clear = int(torch.count_nonzero(1e-4 * S[0] < S))
    if clear < len(S):
        P, D, Rh = torch.linalg.svd(long[:, clear:], full_matrices=False)
        short = torch.cat([short[:, :clear], short[:, clear:] @ Rh.mT], 1)
        S = torch.cat([S[:clear], D])
        long, R = torch.linalg.qr(torch.cat([long[:, :clear], P * D], 1))
        long = long * torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    else:
        long = long / S
    U, V = (long, short) if tall is W else (short, long)
    return CompleteSpectrum(_orient(U, S, V.mT))


def svd_slice(W: Tensor, start: int, rank: int) -> Triples:
    """The singular triples start..start + rank - 1 of W, counted from the largest."""
    return spectrum(W).components(slice(start, start + rank))


def svd_end(W: Tensor, rank: int, end: subspace.End) -> Triples:
    """The `rank` largest or smallest singular triples of W, which is used once and not cached.

    A few of a large W come from a Krylov iteration: the largest as exact as a full decomposition's,
    the smallest with at most 1.01 times their ‖S‖.
    """
    if subspace.pays(min(W.shape), rank):
        if end == "smallest":
            basis = subspace.smallest_singular_basis(W, rank)
        else:
            found = subspace.largest_eigenpairs(_smaller_gram(W), rank)
            basis = None if found is None else found.vectors
        if basis is not None:
            return projected_slice(W, basis)
    start = 0 if end == "largest" else min(W.shape) - rank
    return gram_spectrum(W).components(slice(start, start + rank))


def randomised_svd(W: Tensor, rank: int, niter: int, generator: torch.Generator) -> Triples:
    """About the `rank` largest singular triples of W, as near as `niter` power iterations come.

    Args:
        W: (out, in), float64.
        rank: 1..min(out, in).
        niter: at least 0; each one multiplies a wrong component by (its S / the slice's last S)².
        generator: draws the test matrix, on the CPU.

    Returns:
        `rank` triples of the best approximation within the space that was found.

    Reference:
        Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", Algorithm 4.4, with
        the space of `forgetless.core.krylov.leading_basis`.
    """
    short = W if W.shape[0] <= W.shape[1] else W.mT
    single = short.float()  # the space is a guess anyway; what is made of it is exact
    width = min(rank + 4, len(short))
    drawn = torch.randn(
        len(short), width, generator=generator, dtype=torch.float32, device="cpu"
    ).to(single)
    basis = subspace.leading_basis(single, drawn, niter)
    U, S, Vh = projected_slice(W, torch.linalg.qr(basis.double()).Q)
    return Triples(U[:, :rank], S[:rank], Vh[:rank])


# --- eigenvalues -------------------------------------------------------------------------------


def eigen_slice(C: Tensor, start: int, rank: int) -> Eigen:
    """The eigenpairs start..start + rank - 1 of a second moment, counted from the largest.

    The precision is that of C. In float64, which is what `forgetless.collect` gives, it is an
    `eigh`. A matrix of lower precision goes through the float32 SVD of the papers' own code, whose
    factors come back to 1e-6; small eigenvalues that lie closer together than 1e-7 of the largest
    are mixed there, and float64 afterwards could not tell them apart either.

    Args:
        C: symmetric and positive semi-definite, (n, n); in float64 any symmetric matrix will do.
            It may be singular, or zero: where eigenvalues are equal, the vectors are orthonormal
            and arbitrary inside their common space.
        start: position of the first pair.
        rank: how many.

    Returns:
        The pairs, in float64.

    Raises:
        ValueError: C is not square, not symmetric, or holds NaN or infinity.
    """
    values, vectors = once(C, "eigenpairs", lambda: _eigenpairs(symmetric(C)))
    picked = slice(start, start + rank)
    return _oriented(values[picked].double(), vectors[:, picked].double())


def _eigenpairs(C: Tensor) -> Eigen:
    """All eigenpairs in descending order, in C's precision."""
    if C.dtype == torch.float64:
        values, vectors = torch.linalg.eigh(C)
        return Eigen(values.flip(0), vectors.flip(1))
    vectors, values, _ = torch.linalg.svd(C)
    return Eigen(values, vectors)


def eigen_tail(C: Tensor, rank: int) -> Eigen:
    """The `rank` eigenpairs of C with the smallest eigenvalues, in descending order.

    Of a large C (`subspace.pays`), in whatever precision, a few come from a shift-invert Krylov
    iteration in float64: they leak, ‖X N‖, at most 1.01 times what the exact ones do, in a tenth of
    the time. Within such a tail the single pairs are Ritz pairs. Otherwise they are those of
    `eigen_slice`, which is also what the tests compare with.

    For a second moment over fewer tokens than C has rows, the tail is an exact null space and
    arbitrary inside it. Rounding may leave its eigenvalues slightly below zero.

    Raises:
        ValueError: as `eigen_slice`.
    """
    found = once(C, ("tail", rank), lambda: _quick_tail(C, rank))
    return eigen_slice(C, C.shape[0] - rank, rank) if found is None else found


def _quick_tail(C: Tensor, rank: int) -> Eigen | None:
    """The tail by iteration, where that pays and converges."""
    if not subspace.pays(len(C), rank):
        return None
    C = symmetric(C).double()
    found = subspace.smallest_eigenpairs(C, rank)
    return None if found is None else _oriented(*found)


def eigen_top(C: Tensor, rank: int) -> Eigen:
    """The `rank` eigenpairs of C with the largest eigenvalues, in descending order.

    Of a large float64 C, a few come from a Krylov iteration; otherwise as `eigen_slice`.

    Raises:
        ValueError: as `eigen_slice`.
    """
    found = once(C, ("top", rank), lambda: _quick_top(C, rank))
    return eigen_slice(C, 0, rank) if found is None else found


def _quick_top(C: Tensor, rank: int) -> Eigen | None:
    """The top by iteration, where that pays and converges."""
    if C.dtype != torch.float64 or not subspace.pays(len(C), rank):
        return None
    found = subspace.largest_eigenpairs(symmetric(C), rank)
    return None if found is None else _oriented(*found)


def symmetric(C: Tensor) -> Tensor:
    """C, in float32 or float64, with its rounding asymmetry averaged away.

    Raises:
        ValueError: C is not square, holds NaN or infinity, or differs from its transpose by more
            than 1e-4 of its largest entry.
    """
    C = C.to(torch.float64 if C.dtype == torch.float64 else torch.float32)
    is_square = C.ndim == 2 and C.shape[0] == C.shape[1]
    if is_square and _is_finite_and_symmetric(C):
        return C
    C = _finite(C)
    if not is_square:
        raise ValueError(f"expected a square matrix, got shape {tuple(C.shape)}")
    gap, largest = (C - C.mT).abs().max().item(), C.abs().max().item()
    if gap > 1e-4 * largest:
        raise ValueError(
            f"expected a symmetric matrix such as a second moment, but entries differ from the "
            f"transpose by {gap:.3g} where the largest is {largest:.3g}"
        )
    return (C + C.mT) / 2


def _is_finite_and_symmetric(C: Tensor) -> bool:
    """Whether C is its own transpose, block by block, each of which is summed while it is at hand.

    That takes a sixth of the time of reading all of C across its rows. NaN equals nothing.
    """
    starts = range(0, len(C), _BLOCK)
    blocks = {i: slice(i, i + _BLOCK) for i in starts}
    pairs = (
        (C[blocks[i], blocks[j]], C[blocks[j], blocks[i]]) for i in starts for j in starts if i <= j
    )
    return all(
        torch.equal(upper, lower.mT) and bool(upper.sum().isfinite()) for upper, lower in pairs
    )


_BLOCK = 512

# --- shared ------------------------------------------------------------------------------------


def is_finite(M: Tensor) -> bool:
    """Whether M holds neither NaN nor infinity, mostly at the price of one sum."""
    return bool(M.sum().isfinite()) or bool(M.isfinite().all())


def _finite(M: Tensor) -> Tensor:
    """M itself, if it is a finite matrix."""
    if M.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(M.shape)}")
    if not is_finite(M):
        raise ValueError("the matrix holds NaN or infinity; check the data that it came from")
    return M


def _signs(rows: Tensor) -> Tensor:
    """+1 or -1 for each row: the sign of its entry of largest magnitude."""
    peak = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(peak < 0, -1.0, 1.0).to(rows)


def _oriented(values: Tensor, vectors: Tensor) -> Eigen:
    """The same pairs with fixed signs."""
    return Eigen(values, vectors * _signs(vectors.mT))


def _orient(U: Tensor, S: Tensor, Vh: Tensor) -> Triples:
    """The same triples with the signs fixed by Vh."""
    signs = _signs(Vh)
    return Triples(U * signs, S, Vh * signs[:, None])
