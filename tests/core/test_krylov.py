"""The quick ends of a spectrum against full float64 decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forgetless.core import krylov as subspace
from forgetless.core import linalg

SIZE, RANK = 256, 8
INDEX = torch.arange(1, SIZE + 1, dtype=torch.float64)

SPECTRA = {
    "k^-0.8": INDEX**-0.8,
    "k^-1.6": INDEX**-1.6,
    "k^-3.6": INDEX**-3.6,
    "exponential": torch.logspace(0, -8, SIZE, dtype=torch.float64),
    "even": torch.linspace(1, 0.5, SIZE, dtype=torch.float64),
    "a flat tail": torch.where(INDEX > SIZE // 2, 1e-3, 1.0).double(),
    "a tail of exact zeros": torch.where(INDEX > SIZE - 20, 0.0, 1.0).double(),
    "the identity": torch.ones(SIZE, dtype=torch.float64),
    "constant activations": torch.where(INDEX > 1, 0.0, 1.0).double(),
    "nothing": torch.zeros(SIZE, dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def _small_matrices_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "SMALLEST_SIZE", 64)
    monkeypatch.setattr(subspace, "_COLUMNS", 100)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> Tensor:
    Q: Tensor = torch.linalg.qr(draw(size, size, seed=seed)).Q
    return Q


def moment(values: Tensor) -> Tensor:
    Q = rotation(len(values))
    C = torch.mm(Q * values, Q.mT)
    return (C + C.mT) / 2


def energy(C: Tensor, N: Tensor) -> float:
    return float((N * (C @ N)).sum())


def orthonormal(columns: Tensor) -> None:
    eye = torch.eye(columns.shape[1], dtype=torch.float64)
    torch.testing.assert_close(columns.mT @ columns, eye, atol=1e-12, rtol=0)


def test_a_cholesky_factor_by_blocks_is_that_of_the_shifted_matrix() -> None:
    C = moment(SPECTRA["k^-1.6"])
    lower = subspace._cholesky(C, 0.5)
    assert lower is not None
    expected = torch.linalg.cholesky(C + 0.5 * torch.eye(SIZE))
    torch.testing.assert_close(lower.tril(), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("position", [0, 99, 100, SIZE - 1])
def test_an_indefinite_matrix_has_no_cholesky_factor_whichever_block_shows_it(
    position: int,
) -> None:
    C = torch.eye(SIZE, dtype=torch.float64)
    C[position, position] = -1
    assert subspace._cholesky(C, 0.5) is None
    assert subspace._cholesky(C, 1.5) is not None


@pytest.mark.parametrize("name", SPECTRA)
def test_the_tail_leaks_hardly_more_than_the_least_possible(name: str) -> None:
    """‖X N‖ <= 1.01 times that of the exact tail, or what rounding makes of zero."""
    C = moment(SPECTRA[name])
    values, N = linalg.eigen_tail(C, RANK)
    exact = linalg.eigen_slice(C, SIZE - RANK, RANK)
    orthonormal(N)
    assert N.shape == (SIZE, RANK)
    assert energy(C, N) <= 1.01**2 * energy(C, exact.vectors) + 1e-14 * RANK
    torch.testing.assert_close(values.sum().item(), energy(C, N), atol=1e-13, rtol=1e-6)
    assert (values.diff() <= 1e-12).all()


def test_a_single_column_leaks_hardly_more_than_the_least_possible() -> None:
    values = torch.arange(1, 1025, dtype=torch.float64) ** -4.0
    found = subspace.smallest_eigenpairs(C := moment(values), 1)
    assert found is not None
    assert energy(C, found.vectors) <= 1.01**2 * values[-1]


@pytest.mark.parametrize("name", ["k^-0.8", "k^-1.6", "k^-3.6", "exponential"])
def test_the_iteration_itself_found_these_tails(name: str) -> None:
    assert subspace.smallest_eigenpairs(moment(SPECTRA[name]), RANK) is not None


def test_the_tail_of_fewer_tokens_than_inputs_is_a_null_space() -> None:
    X = draw(100, SIZE)
    N = linalg.eigen_tail(X.mT @ X / 100, RANK).vectors
    orthonormal(N)
    assert (X @ N).norm() < 1e-6 * X.norm()


def test_a_float32_moment_has_a_float64_tail() -> None:
    C = moment(SPECTRA["k^-1.6"])
    N = linalg.eigen_tail(C.float(), RANK).vectors
    assert N.dtype == torch.float64
    assert energy(C, N) <= 1.01**2 * float(SPECTRA["k^-1.6"][-RANK:].sum())


def test_the_same_moment_has_the_same_tail() -> None:
    C = moment(SPECTRA["k^-0.8"])
    assert torch.equal(linalg.eigen_tail(C, RANK).vectors, linalg.eigen_tail(C, RANK).vectors)


@pytest.mark.parametrize("rank", [SIZE // 2, SIZE])
def test_many_columns_come_from_the_full_decomposition(rank: int) -> None:
    C = moment(SPECTRA["k^-1.6"])
    tail, exact = linalg.eigen_tail(C, rank), linalg.eigen_slice(C, SIZE - rank, rank)
    assert torch.equal(tail.vectors, exact.vectors)


def test_an_indefinite_matrix_comes_from_the_full_decomposition() -> None:
    C = moment(torch.linspace(1, -1, SIZE, dtype=torch.float64))
    assert subspace.smallest_eigenpairs(C, RANK) is None
    torch.testing.assert_close(
        linalg.eigen_tail(C, RANK).values, linalg.eigen_slice(C, SIZE - RANK, RANK).values
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    C = moment(SPECTRA["k^-1.6"])
    C[3, 3] = bad
    for function in (linalg.eigen_tail, linalg.eigen_top):
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(C, RANK)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_top_is_that_of_the_full_decomposition(name: str) -> None:
    C = moment(SPECTRA[name])
    values, V = linalg.eigen_top(C, RANK)
    exact = linalg.eigen_slice(C, 0, RANK)
    orthonormal(V)
    torch.testing.assert_close(values, exact.values, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(energy(C, V), energy(C, exact.vectors), rtol=1e-7, atol=1e-12)


def test_the_top_of_an_indefinite_matrix_is_its_largest_not_its_biggest() -> None:
    C = moment(torch.cat([INDEX[: SIZE // 2] ** -1.0, -2 * INDEX[: SIZE // 2] ** -1.0]))
    values = linalg.eigen_top(C, RANK).values
    torch.testing.assert_close(values, INDEX[:RANK] ** -1.0, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(200, 128), (128, 200), (160, 160)])
def test_the_ends_of_an_svd(shape: tuple[int, int]) -> None:
    U, V = rotation(shape[0], 1)[:, :128], rotation(shape[1], 2)[:, :128]
    S = torch.logspace(0, -5, 128, dtype=torch.float64)
    W = torch.mm(U * S, V.mT)
    top, tail = linalg.svd_end(W, 4, "largest"), linalg.svd_end(W, 4, "smallest")
    torch.testing.assert_close(top.S, S[:4], rtol=1e-7, atol=0)
    if min(shape) == 128:
        assert float(tail.S.norm()) <= 1.01 * float(S[-4:].norm())
    for part in (top, tail):
        orthonormal(part.U)
        orthonormal(part.Vh.mT)
        tall = shape[0] >= shape[1]
        projected = W @ part.Vh.mT @ part.Vh if tall else part.U @ part.U.mT @ W
        torch.testing.assert_close((part.U * part.S) @ part.Vh, projected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("end", ["smallest", "largest"])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_the_ends_of_a_singular_weight(end: subspace.End, fill: float) -> None:
    W = torch.full((130, 80), fill, dtype=torch.float64)
    triples = linalg.svd_end(W, 3, end)
    orthonormal(triples.U)
    orthonormal(triples.Vh.mT)
    largest = (130 * 80) ** 0.5 * fill if end == "largest" else 0.0
    torch.testing.assert_close(float(triples.S.max()), largest, atol=1e-6, rtol=1e-9)


def test_a_randomised_svd_nears_the_best_approximation() -> None:
    W = draw(60, 1) * INDEX[:40] ** -1.0 @ rotation(40) + draw(60, 40, seed=1) / 100
    best = torch.linalg.svdvals(W)[4:].norm()

    def error(niter: int, seed: int = 0) -> float:
        generator = torch.Generator().manual_seed(seed)
        U, S, Vh = linalg.randomised_svd(W, 4, niter, generator)
        orthonormal(U)
        return float((W - (U * S) @ Vh).norm() / best)

    assert error(8) < 1.0001
    assert error(8) <= error(0)
    assert error(0, seed=1) != error(0)


@pytest.mark.parametrize("spectrum", ["flat", "of a random matrix", *SPECTRA])
@pytest.mark.parametrize("niter", [0, 2, 5, 16, 40])
def test_the_leading_basis_is_as_near_as_power_iterations(spectrum: str, niter: int) -> None:
    """As Krylov space, and for a block so wide that it is power iterations itself."""
    more = {"flat": INDEX**-0.05, "of a random matrix": torch.linalg.svdvals(draw(SIZE, SIZE))}
    S = {**SPECTRA, **more}[spectrum]
    W = moment(S).float()
    for width in (16, 60):
        start = draw(SIZE, width, seed=3).float()
        power = torch.linalg.qr(W @ (W.mT @ start)).Q
        for _ in range(niter):
            power = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ power).Q).Q
        found = subspace.leading_basis(W, start, niter)

        def caught(basis: Tensor, rank: int = width - 4) -> float:
            """Energy of the best approximation of that rank within the space."""
            Q = torch.linalg.qr(basis.double()).Q
            return float(torch.linalg.svdvals(Q.mT @ W.double())[:rank].square().sum())

        assert caught(found) >= caught(power) - 1e-8 * float(S.square().sum())
