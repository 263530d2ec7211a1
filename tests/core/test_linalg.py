"""Slices, tails and projections against plain float64 decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetless.core import linalg


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def with_spectrum(rows: int, columns: int, S: Tensor) -> Tensor:
    U = torch.linalg.qr(matrix(rows, len(S), 1)).Q
    V = torch.linalg.qr(matrix(columns, len(S), 2)).Q
    return torch.mm(U * S, V.mT)


def product(triples: linalg.Triples) -> Tensor:
    return (triples.U * triples.S) @ triples.Vh


def orthonormal(columns: Tensor) -> None:
    torch.testing.assert_close(columns.mT @ columns, torch.eye(columns.shape[1]).to(columns))


@pytest.mark.parametrize(
    ("position", "length", "rank", "start"),
    [
        (0, 10, 3, 0),
        (1, 10, 3, 7),
        (0.5, 10, 3, 3),
        (0.5, 10, 4, 3),
        (0.5, 3, 3, 0),
        (0.3, 10, 0, 3),
    ],
)
def test_slice_start(position: float, length: int, rank: int, start: int) -> None:
    assert linalg.slice_start(position, length, rank) == start


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1)])
def test_slices_are_those_of_the_full_svd(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    m = min(shape)
    for start, rank in {(0, 1), (m // 2, m - m // 2), (m - 1, 1), (0, m)}:
        part = linalg.svd_slice(W, start, rank)
        picked = slice(start, start + rank)
        torch.testing.assert_close(part.S, S[picked])
        torch.testing.assert_close(product(part), (U[:, picked] * S[picked]) @ Vh[picked])
        orthonormal(part.U)
        orthonormal(part.Vh.mT)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_slices_beat_a_float32_svd_on_a_steep_spectrum(shape: tuple[int, int]) -> None:
    S = torch.logspace(0, -5, 32, dtype=torch.float64)
    W = with_spectrum(*shape, S)
    U32, S32, V32 = torch.linalg.svd(W.float(), full_matrices=False)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    exact = (U[:, -4:] * S[-4:]) @ Vh[-4:]
    error = (product(linalg.svd_slice(W, 28, 4)) - exact).norm()
    error32 = ((U32[:, -4:] * S32[-4:]) @ V32[-4:] - exact).norm()
    assert error < 1e-6 * exact.norm()
    assert error < error32 / 100


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_slices_of_a_rank_deficient_weight(shape: tuple[int, int]) -> None:
    W = with_spectrum(*shape, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    tail = linalg.svd_slice(W, 3, 3)
    assert tail.S.max() < 1e-12
    orthonormal(tail.U)
    orthonormal(tail.Vh.mT)
    assert (product(linalg.svd_slice(W, 0, 3)) - W).norm() < 1e-12


def test_a_zero_weight_has_orthonormal_triples() -> None:
    triples = linalg.svd_slice(torch.zeros(4, 6), 1, 2)
    assert not triples.S.any()
    orthonormal(triples.U)
    orthonormal(triples.Vh.mT)


def test_components_can_be_picked_by_index() -> None:
    W = matrix(8, 5)
    whole = linalg.spectrum(W)
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(whole.components(torch.tensor([0, 3])).S, S[[0, 3]])
    torch.testing.assert_close(whole.S, S)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_oriented_svd_has_fixed_signs(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    U, S, Vh = linalg.oriented_svd(W)
    torch.testing.assert_close((U * S) @ Vh, W)
    peaks = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()
    # The same matrix by another road: its transpose.
    V, _, Uh = torch.linalg.svd(W.mT, full_matrices=False)
    again = linalg._orient(Uh.mT, S, V.mT)
    torch.testing.assert_close(again.U, U)
    torch.testing.assert_close(again.Vh, Vh)


def test_projected_svd_is_the_svd_of_the_projection() -> None:
    W, N = matrix(20, 12), torch.linalg.qr(matrix(12, 4, 3)).Q
    U, S, Vh = linalg.projected_svd(W, N)
    torch.testing.assert_close((U * S) @ Vh, W @ N @ N.mT)
    torch.testing.assert_close(S, torch.linalg.svdvals(W @ N @ N.mT)[:4])
    orthonormal(U)
    orthonormal(Vh.mT)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), data=st.data())
def test_the_tail_captures_the_least_energy_of_any_subspace(n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, n))
    X = matrix(data.draw(st.integers(1, 30)), n, data.draw(st.integers(0, 99)))
    C = X.mT @ X / len(X)
    values, N = linalg.eigen_tail(C, rank)
    assert N.shape == (n, rank)
    orthonormal(N)
    torch.testing.assert_close((N.mT @ C @ N).trace(), values.sum(), atol=1e-10, rtol=0)
    other = torch.linalg.qr(matrix(n, rank, 7)).Q
    assert values.sum() <= (other.mT @ C @ other).trace() + 1e-10
    assert (values.diff() <= 1e-12).all()


def test_eigen_slice_counts_from_the_largest() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        C = torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=dtype))
        values, vectors = linalg.eigen_slice(C, 0, 2)
        assert values.tolist() == [9.0, 4.0]
        assert vectors.dtype == torch.float64
        torch.testing.assert_close(vectors, torch.eye(3, dtype=torch.float64)[:, [1, 2]])


def test_the_tail_of_too_few_tokens_is_an_exact_null_space() -> None:
    X = matrix(3, 10)
    values, N = linalg.eigen_tail(X.mT @ X / 3, 7)
    assert values.abs().max() < 1e-12
    assert (X @ N).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C", [torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4)])
def test_repeated_eigenvalues_still_give_orthonormal_vectors(C: Tensor, dtype: torch.dtype) -> None:
    N = linalg.eigen_tail(C.to(dtype), 2).vectors
    torch.testing.assert_close(N.mT @ N, torch.eye(2).to(N), atol=1e-6, rtol=0)


def test_float64_finds_a_tail_that_float32_cannot() -> None:
    lambdas = torch.logspace(0, -12, 24, dtype=torch.float64)
    Q = torch.linalg.qr(matrix(24, 24)).Q
    C = (Q * lambdas) @ Q.mT
    best = lambdas[-4:].sum()

    def leak(N: Tensor) -> float:
        return float((N.mT @ C @ N).trace() / best)

    assert leak(linalg.eigen_tail(C, 4).vectors) < 1.01
    assert leak(linalg.eigen_tail(C.float(), 4).vectors) > 10


@pytest.mark.parametrize("function", [linalg.spectrum, linalg.oriented_svd, linalg.symmetric])
def test_nan_and_infinity_are_refused(function: object) -> None:
    assert callable(function)
    for bad in (float("nan"), float("inf")):
        M = torch.eye(3)
        M[1, 1] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(M)
    with pytest.raises(ValueError, match="expected a matrix"):
        function(torch.zeros(3))


def test_a_float32_tail_is_that_of_the_float32_svd() -> None:
    X = matrix(30, 16) @ torch.diag(torch.logspace(0, -3, 16, dtype=torch.float64))
    C = (X.mT @ X).float()
    N, theirs = linalg.eigen_tail(C, 5).vectors, torch.linalg.svd(C).U[:, -5:].double()
    assert torch.equal(N.abs(), theirs.abs())
    assert not torch.equal(N.abs(), linalg.eigen_tail(C.double(), 5).vectors.abs())


def test_what_is_no_second_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        linalg.eigen_tail(matrix(4, 4), 1)
    with pytest.raises(ValueError, match="square"):
        linalg.eigen_tail(matrix(4, 5), 1)


def test_rounding_asymmetry_is_averaged_away() -> None:
    C = torch.eye(3) + 1e-6 * torch.triu(torch.ones(3, 3), 1)
    assert torch.equal(linalg.symmetric(C), linalg.symmetric(C).mT)


@pytest.mark.parametrize("place", [(1, 0), (0, 1099), (1099, 0), (600, 700), (700, 600)])
def test_one_asymmetric_entry_is_found_wherever_it_stands(place: tuple[int, int]) -> None:
    C = torch.eye(1100)
    assert linalg.symmetric(C) is C
    C[place] = 1e-6
    assert linalg.symmetric(C)[place] == linalg.symmetric(C)[place[::-1]] == 5e-7
