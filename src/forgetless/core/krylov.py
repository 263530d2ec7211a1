"""One end of a spectrum without the rest of it: block Krylov iteration with a check.

A full eigendecomposition of an (n, n) matrix costs about 10 n³ operations, half of them bound by
memory; a Cholesky factor costs n³ / 3. With it, (C + shift · I)⁻¹ is applied to a block of a few
more columns than are wanted, again and again. The blocks span a Krylov space in which the smallest
eigenvalues of C stand out; a small eigenproblem picks the vectors of that space in which they do,
and a second one the best of these for C itself (Rayleigh-Ritz). The functions return None where
they cannot vouch for the result, and the caller decomposes the whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
"""A linear map of columns, (n, k) -> (n, k)."""

End = Literal["smallest", "largest"]
"""Which end of a spectrum."""


class Pairs(NamedTuple):
    """Eigenvalues (r,) and their vectors as columns, (n, r)."""

    values: Tensor
    vectors: Tensor


SMALLEST_SIZE = 1024
"""Rows of a matrix below which the whole eigendecomposition is quick enough."""

LARGEST_SHARE = 8
"""The wanted columns must be at most one in so many."""

TOLERANCE = 0.01
"""Share of the tail's energy that may be above the least possible; the leak is its root."""

_EPSILON = torch.finfo(torch.float64).eps
_OVERSAMPLING = 4
_NARROWEST = 12
"""Columns of a block at the least: of five, a single one was seen to leak 1.011 times too much."""
_LARGEST_STEPS = 24
_COLUMNS = 384
"""Columns of a block of a Cholesky factor: of 512, a corner no longer stays in the second cache."""


def pays(size: int, rank: int) -> bool:
    """Whether `rank` columns out of `size` are few enough for an iteration."""
    return size >= SMALLEST_SIZE and rank * LARGEST_SHARE <= size


def smallest_eigenpairs(C: Tensor, rank: int) -> Pairs | None:
    """Orthonormal columns, (n, rank), that hold hardly more energy of C than any others.

    With N the result and λ the `rank` smallest eigenvalues, trace(Nᵀ C N) <= (1 + TOLERANCE) Σλ by
    an estimate from the last steps, or all of it is at the level of rounding, 1e-15 ‖C‖. Columns
    are Ritz vectors in descending order of their energy; where neighbouring eigenvalues lie closer
    than the tolerance they are not the eigenvectors themselves.

    Args:
        C: symmetric positive semi-definite up to rounding, (n, n), float64.
        rank: how many columns.

    Returns:
        The energies and the columns, or None: C is zero or indefinite, or the iteration did not
        converge.
    """
    size = torch.linalg.matrix_norm(C)
    factor = _shifted_cholesky(C, float(size))
    if factor is None:
        return None
    lower, shift = factor
    found = _krylov(
        partial(_solved, lower),
        lambda block: C @ block,
        C,
        rank,
        "smallest",
        floor=shift,
    )
    return None if found is None else Pairs(found.values.flip(0), found.vectors.flip(1))


def _shifted_cholesky(C: Tensor, size: float) -> tuple[Tensor, float] | None:
    """The Cholesky factor of C + shift · I, and the shift: the least that rounding asks for."""
    if size == 0:
        return None
    for times in (4, 100, 2500):
        shift = times * _EPSILON * size
        lower = _cholesky(C, shift)
        if lower is not None:
            return lower, shift
    return None


def _cholesky(C: Tensor, shift: float) -> Tensor | None:
    """The lower factor of C + shift · I, its other triangle not set; None if that is indefinite.

    On a CPU, torch's own clears the other triangle across the rows of memory, which is a fourth of
    its time. By blocks of columns, most of the work is one matrix product for each of them.
    """
    if not C.is_cpu:
        # Columns in memory, as the factorisation has them: it overwrites them and copies nothing.
        lower = C.clone(memory_format=torch.contiguous_format).mT
        lower.diagonal().add_(shift)
        failed = torch.empty((), dtype=torch.int32, device=C.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        return None if failed else lower
    size = len(C)
    lower = torch.empty_like(C, memory_format=torch.contiguous_format)
    room = C.new_empty(size * min(_COLUMNS, size))
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        columns = room[: (size - start) * (stop - start)].view(size - start, stop - start)
        columns.copy_(C[start:, start:stop]).diagonal().add_(shift)
        columns.addmm_(lower[start:, :start], lower[start:stop, :start].mT, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(columns[: stop - start])
        if failed:
            return None
        lower[start:stop, start:stop], below = corner, columns[stop - start :]
        torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False, out=below)
        lower[stop:, start:stop] = below
    return lower


def largest_eigenpairs(C: Tensor, rank: int) -> Pairs | None:
    """The `rank` largest eigenvalues of C in descending order, and their vectors as columns.

    Args:
        C: symmetric, (n, n), float64; it may be indefinite.
        rank: how many columns.

    Returns:
        The eigenvalues to 1e-8 and the eigenvectors to about 1e-4, where eigenvalues are apart; or
        None: the iteration did not converge.
    """
    return _krylov(lambda block: C @ block, lambda block: C @ block, C, rank, "largest")


def smallest_singular_basis(M: Tensor, rank: int) -> Tensor | None:
    """Orthonormal columns near the smallest singular vectors of M, on its shorter side.

    The factor R of a QR factorisation stands for M, so that no Gram matrix squares the condition.

    Args:
        M: (out, in), float64.
        rank: how many columns.

    Returns:
        (min(out, in), rank), right singular vectors if out >= in, else left ones; or None: M is
        singular, or the iteration did not converge.
    """
    R = torch.linalg.qr(M if M.shape[0] >= M.shape[1] else M.mT, mode="r").R
    diagonal = R.diagonal().abs()
    if diagonal.min() <= len(R) * _EPSILON * diagonal.max():
        return None
    found = _krylov(
        partial(_solved, R.mT), lambda block: torch.mm(R.mT, R @ block), R, rank, "smallest"
    )
    return None if found is None else found.vectors


def _solved(lower: Tensor, block: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ applied to a block of columns, for a lower triangle L."""
    solution: Tensor = torch.linalg.solve_triangular(lower, block, upper=False)
    torch.linalg.solve_triangular(lower.mT, solution, upper=True, out=solution)
    return solution


def _krylov(
    expand: Map,
    matrix: Map,
    like: Tensor,
    rank: int,
    end: End,
    floor: float = 0.0,
) -> Pairs | None:
    """Ritz pairs of one end of a symmetric `matrix`, that end first; None without convergence.

    Args:
        expand: the map of which that end is the top: the inverse for the smallest, else `matrix`.
        matrix: the matrix.
        like: of the same size, dtype and device.
        rank: how many.
        end: which.
        floor: eigenvalues below it cannot be told apart.
    """
    size = len(like)
    width = min(max(rank + _OVERSAMPLING, _NARROWEST), size)
    drawn = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(size, width, generator=drawn, dtype=like.dtype, device="cpu").to(like)
    block = torch.linalg.qr(expand(start)).Q
    # Columns of one room each, which fills without copies: rows in memory, as the solver has them.
    room = width * max(min(_LARGEST_STEPS, size // (2 * width)), 1)
    basis, image = (like.new_empty(room, size).mT for _ in range(2))
    projected = like.new_empty(room, room)
    history: list[Tensor] = []
    for held in range(0, room, width):
        grown = held + width
        basis[:, held:grown] = block
        image[:, held:grown] = expand(block)
        beside = basis[:, :grown].mT @ image[:, held:grown]
        projected[held:grown, :grown], projected[:grown, held:grown] = beside.mT, beside
        top = torch.linalg.eigvalsh(projected[:grown, :grown]).flip(0)[:rank]
        history.append(top if end == "largest" else 1 / top)
        if _converged(history, end, floor):
            vectors = torch.linalg.eigh(projected[:grown, :grown]).eigenvectors.flip(1)
            # One more application of the map is there for the taking.
            space = torch.linalg.qr(image[:, :grown] @ vectors[:, :width]).Q
            return _ritz(space, matrix, rank, end)
        block = _orthonormal_to(basis[:, :grown], image[:, held:grown])
    return None


def leading_basis(W: Tensor, start: Tensor, niter: int) -> Tensor:
    """Orthonormal columns near the leading left singular vectors of W.

    They are as near as `niter` power iterations come. A Krylov space of about √niter blocks does
    it in fewer products, where half of all directions hold it: on what a power iteration multiplies
    by 1 + ε, a step of Krylov's does by some 1 + 2√ε. Otherwise it is power iterations. W and its
    transpose are applied to orthonormal columns in turns, so that singular values are lost below
    the rounding of W's precision, not its root.

    Args:
        W: (m, n) with m <= n.
        start: the block to begin with, (m, k).
        niter: at least 0.

    Returns:
        (m, k).

    Reference:
        Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster Approximate
        Singular Value Decomposition", Theorem 1.
    """

    def transposed(block: Tensor) -> Tensor:
        return (block.mT @ W).mT  # reads W along its rows, in two thirds of the time of Wᵀ X

    def applied(image: Tensor) -> Tensor:
        return W @ orthonormal(image)

    size, width = start.shape
    block = orthonormal(applied(transposed(start)))
    blocks = 1 + min(niter, 1 + math.ceil(niter**0.5))
    if 2 * blocks * width > size:
        for _ in range(niter if width < size else 0):
            block = orthonormal(applied(transposed(block)))
        return block
    space, images = block, transposed(block)
    while space.shape[1] < blocks * width:
        block = _orthonormal_to(space, applied(images[:, -width:]))
        space = torch.cat([space, block], 1)
        images = torch.cat([images, transposed(block)], 1)
    exact = images.double()
    vectors = torch.linalg.eigh(exact.mT @ exact).eigenvectors.flip(1)[:, :width]
    return orthonormal(applied(images @ vectors.to(images)))


def _ritz(space: Tensor, matrix: Map, rank: int, end: End) -> Pairs:
    """The `rank` orthonormal vectors of a space with the smallest or largest values."""
    projected = space.mT @ matrix(space)
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    if end == "largest":
        values, vectors = values.flip(0), vectors.flip(1)
    return Pairs(values[:rank], space @ vectors[:, :rank])


def _orthonormal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns that span what the block adds to an orthonormal basis.

    The block is what a symmetric map makes of the basis's last one, so that but for rounding it has
    parts in the last two alone. Once leaves a rounding error as large as what these held of it.
    """
    for held in (basis[:, -2 * block.shape[1] :], basis):
        block = orthonormal(torch.addmm(block, held, held.mT @ block, alpha=-1))
    return block


def orthonormal(block: Tensor) -> Tensor:
    """Columns that span the same space as a block's, (n, k), orthonormal if called twice.

    By a Cholesky factor of the Gram matrix, which is two matrix products where Householder's QR
    goes column by column. Once leaves an error of eps κ², with κ the block's condition; where that
    is above √eps, it is QR.
    """
    lower, failed = torch.linalg.cholesky_ex(block.mT @ block)
    diagonal = lower.diagonal()
    if failed or diagonal.min() < torch.finfo(block.dtype).eps ** 0.25 * diagonal.max():
        block = torch.linalg.qr(block).Q
    else:
        block = torch.linalg.solve_triangular(lower.mT, block, upper=True, left=False)
    return block


def _converged(history: list[Tensor], end: End, floor: float) -> bool:
    """Whether further steps would change the values by less than is allowed.

    For the smallest, what is left of their sum is extrapolated from the last two steps as the
    rest of a geometric series. The largest are followed one by one.
    """
    last = history[-1]
    if end == "largest" and len(history) > 1:
        noise = len(last) * _EPSILON * last.abs().max()
        return bool(((last - history[-2]).abs() <= 1e-8 * last.abs() + noise).all())
    if len(history) < 3:
        return False
    if last[-1] <= floor:
        return True
    before, previous, now = (float(values.sum()) for values in history[-3:])
    gained, earlier = previous - now, before - previous
    rate = min(max(gained / earlier, 0.5), 0.9) if earlier > 0 else 0.5
    return gained * rate / (1 - rate) <= TOLERANCE * abs(now)
