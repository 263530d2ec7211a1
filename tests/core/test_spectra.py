"""Spectra against matrices whose rank, rotation and intruders are known, and against a full SVD."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetless.core import spectra
from forgetless.core.cache import cached_spectra
from forgetless.core.method import Factors

SHAPES = [(24, 40), (40, 24), (32, 32)]


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q: Tensor = torch.linalg.qr(
        torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    ).Q
    return Q


def with_spectrum(S: Tensor, out: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W = U diag(S) Vᵀ, U and V."""
    U, V = orthonormal(out, len(S), seed), orthonormal(size, len(S), seed + 1)
    return U * S @ V.mT, U, V


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A second moment and its activations, (tokens, in), of falling energy."""
    X = random(tokens, size, seed=seed) * torch.arange(1, size + 1).double() ** -0.7
    X = X @ orthonormal(size, size, seed + 1).mT
    return X.mT @ X / tokens, X


# --- ranks -------------------------------------------------------------------------------------


def test_ranks_of_equal_singular_values_are_their_number() -> None:
    S = torch.tensor([3.0, 3.0, 3.0, 3.0, 0.0, 0.0])
    assert spectra.effective_rank(S) == pytest.approx(4)
    assert spectra.stable_rank(S) == pytest.approx(4)
    assert spectra.rank_at_energy(S, 1.0) == 4
    assert spectra.rank_at_energy(S, 0.9) == 4
    assert spectra.rank_at_energy(S, 0.75) == 3
    assert spectra.rank_at_energy(S, 0.5) == 2


def test_ranks_by_hand() -> None:
    S = torch.tensor([1.0, 3.0])  # in any order
    assert spectra.effective_rank(S) == pytest.approx(
        math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    )
    assert spectra.stable_rank(S) == pytest.approx(10 / 9)
    assert spectra.rank_at_energy(S, 0.9) == 1
    assert spectra.rank_at_energy(S, 0.91) == 2


def test_the_rank_of_nothing_is_zero() -> None:
    for S in (torch.zeros(5), torch.zeros(0)):
        assert spectra.effective_rank(S) == 0
        assert spectra.stable_rank(S) == 0
        assert spectra.rank_at_energy(S) == 0


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    st.floats(1e-150, 1e150),
    st.floats(0.01, 1.0),
)
def test_ranks_do_not_depend_on_scale_or_order(
    values: list[float], scale: float, energy: float
) -> None:
    S = torch.tensor(values, dtype=torch.float64)
    moved = S.flip(0) * scale
    assert spectra.effective_rank(moved) == pytest.approx(spectra.effective_rank(S), rel=1e-9)
    assert spectra.stable_rank(moved) == pytest.approx(spectra.stable_rank(S), rel=1e-9)
    assert abs(spectra.rank_at_energy(moved, energy) - spectra.rank_at_energy(S, energy)) <= 1
    assert 1 <= spectra.stable_rank(S) <= len(values) + 1e-9
    assert 1 - 1e-9 <= spectra.effective_rank(S) <= len(values) + 1e-9


@pytest.mark.parametrize(
    "S", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan]), torch.ones(2, 2)]
)
def test_what_cannot_be_singular_values_is_refused(S: Tensor) -> None:
    for rank in (spectra.effective_rank, spectra.stable_rank, spectra.rank_at_energy):
        with pytest.raises(ValueError, match="singular values"):
            rank(S)


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_an_energy_outside_its_range_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match="energy"):
        spectra.rank_at_energy(torch.ones(3), energy)


def test_the_spectrum_of_activations_is_that_of_the_activations() -> None:
    C, X = moment(20, 60)
    expected = torch.linalg.svdvals(X) / 60**0.5
    torch.testing.assert_close(spectra.activation_spectrum(C), expected, rtol=1e-8, atol=1e-10)


# --- the update in the bases of its weight -----------------------------------------------------


@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_an_update_that_only_rescales_does_not_rotate(out: int, size: int) -> None:
    S = torch.arange(24, 0, -1).double()
    W, U, V = with_spectrum(S, out, size)
    assert spectra.rotation_ratio(W, U * S.sqrt() @ V.mT) < 1e-12
    chosen = Factors(A=V[:, :3].mT, B=U[:, :3] * 2)
    assert spectra.rotation_ratio(W, chosen) < 1e-12


@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_an_update_between_two_directions_is_all_rotation(out: int, size: int) -> None:
    W, U, V = with_spectrum(torch.arange(24, 0, -1).double(), out, size)
    turn = U[:, [0]] @ V[:, [5]].mT - U[:, [5]] @ V[:, [0]].mT
    assert spectra.rotation_ratio(W, turn) == pytest.approx(1)
    half = turn + math.sqrt(2) * U[:, [3]] @ V[:, [3]].mT
    assert spectra.rotation_ratio(W, half) == pytest.approx(0.5)


@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_head_overlap_of_known_updates(out: int, size: int) -> None:
    W, U, V = with_spectrum(torch.arange(24, 0, -1).double(), out, size)
    inside, outside = U[:, [1]] @ V[:, [2]].mT, U[:, [1]] @ V[:, [9]].mT
    assert spectra.head_overlap(W, inside, 4) == pytest.approx(1)
    assert spectra.head_overlap(W, outside, 4) == pytest.approx(0, abs=1e-12)
    assert spectra.head_overlap(W, 3 * inside + 4 * outside, 4) == pytest.approx(0.6)


@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_intruders_are_found_where_they_were_put(out: int, size: int) -> None:
    S = torch.arange(20, 0, -1).double()
    W, U, V = with_spectrum(S, out, size)
    new, across = random(out, 1, seed=7), random(size, 1, seed=8)
    new, across = new - U @ (U.mT @ new), across - V @ (V.mT @ across)
    update = Factors(A=across.mT / across.norm(), B=17.5 * new / new.norm())
    assert spectra.intruder_dimensions(W, update).tolist() == [3]
    assert spectra.intruder_dimensions(W, update, top_k=3).tolist() == []
    dense = update.B @ update.A
    assert spectra.intruder_dimensions(W, dense, threshold=0.2).tolist() == [3]
    assert spectra.intruder_dimensions(W, torch.zeros(out, size)).tolist() == []
    assert spectra.intruder_dimensions(W, -W / 2).tolist() == []


@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_quick_ways_agree_with_the_whole_svd(out: int, size: int) -> None:
    W, factors = random(out, size), Factors(A=random(4, size, seed=1), B=random(out, 4, seed=2))
    dense = factors.B @ factors.A
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    M = U.mT @ dense @ Vh.mT
    off = M - torch.diag(M.diagonal())
    expected = {
        "rotation": float(off.square().sum() / M.square().sum()),
        "overlap": float((U[:, :5].mT @ dense @ Vh[:5].mT).norm() / dense.norm()),
        "norm": float(dense.norm()),
    }
    for update in (factors, dense):
        assert spectra.rotation_ratio(W, update) == pytest.approx(expected["rotation"], abs=1e-8)
        assert spectra.head_overlap(W, update, 5) == pytest.approx(expected["overlap"], abs=1e-8)
        assert spectra.update_norm(update) == pytest.approx(expected["norm"], rel=1e-12)
        found = spectra.singular_values(update)[:4]
        torch.testing.assert_close(found, torch.linalg.svdvals(dense)[:4], rtol=1e-8, atol=1e-8)
    tuned = torch.linalg.svd(W + dense, full_matrices=False).U[:, :10]
    cosines = (U.mT @ tuned).abs().max(0).values
    for threshold in (0.3, 0.5, 0.7):
        wanted = [i for i in range(10) if cosines[i] < threshold]
        assert spectra.intruder_dimensions(W, factors, 10, threshold).tolist() == wanted


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(6, 20), st.integers(6, 20), st.integers(0, 99))
def test_factors_and_their_product_say_the_same(rank: int, out: int, size: int, seed: int) -> None:
    W, C = random(out, size, seed=seed), moment(size, 30, seed)[0]
    factors = Factors(A=random(rank, size, seed=seed + 1), B=random(out, rank, seed=seed + 2))
    dense = factors.B @ factors.A

    def measured(update: spectra.Update) -> list[float]:
        return [
            spectra.rotation_ratio(W, update),
            spectra.head_overlap(W, update, 3),
            spectra.output_change(W, update, C),
            spectra.output_energy(update, C),
            spectra.stable_rank(spectra.singular_values(update)),
        ]

    assert measured(factors) == pytest.approx(measured(dense), rel=1e-8, abs=1e-10)
    torch.testing.assert_close(
        spectra.energy_on_eigenbasis(factors, C), spectra.energy_on_eigenbasis(dense, C)
    )


def test_a_larger_rank_than_the_layer_is_no_trouble() -> None:
    factors = Factors(A=random(12, 6), B=random(5, 12, seed=1))
    expected = torch.linalg.svdvals(factors.B @ factors.A)
    torch.testing.assert_close(spectra.singular_values(factors)[:5], expected)


def test_the_cache_decomposes_a_weight_once_and_changes_little() -> None:
    W, update = random(30, 20).float(), random(30, 20, seed=1)
    alone = spectra.rotation_ratio(W, update), spectra.head_overlap(W, update, 3)
    with cached_spectra():
        kept = spectra.rotation_ratio(W, update), spectra.head_overlap(W, update, 3)
    assert kept == pytest.approx(alone, abs=1e-6)


def test_an_update_of_nothing_has_no_direction() -> None:
    W, C = random(8, 6), moment(6, 20)[0]
    nothing = Factors(A=random(2, 6), B=torch.zeros(8, 2))
    for update in (nothing, torch.zeros(8, 6)):
        assert math.isnan(spectra.rotation_ratio(W, update))
        assert math.isnan(spectra.head_overlap(W, update, 2))
        assert spectra.output_change(W, update, C) == 0
        assert spectra.intruder_dimensions(W, update, 3).tolist() == []
        assert spectra.energy_on_eigenbasis(update, C).isnan().all()


# --- the update and the activations ------------------------------------------------------------


def test_the_change_of_the_output_is_that_of_the_tokens() -> None:
    C, X = moment(16, 50)
    W, update = random(10, 16), random(10, 16, seed=3)
    expected = (X @ update.mT).norm() / (X @ W.mT).norm()
    assert spectra.output_change(W, update, C) == pytest.approx(float(expected), rel=1e-10)


def test_an_update_that_reads_the_tail_lies_in_the_tail() -> None:
    C, _ = moment(16, 400)
    V = torch.linalg.eigh(C).eigenvectors.flip(1)
    tail = Factors(A=random(3, 4) @ V[:, 12:].mT, B=random(9, 3, seed=1))
    shares = spectra.energy_on_eigenbasis(tail, C)
    assert float(shares[12:].sum()) == pytest.approx(1)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(spectra.energy_on_eigenbasis(V[:, :1].mT, C)[0]) == pytest.approx(1)


def test_energy_shared_with_the_text_to_keep() -> None:
    V = orthonormal(10, 10)
    C = V[:, :4] @ V[:, :4].mT  # the text to keep fills four directions evenly
    T = 3 * V[:, [0]] @ V[:, [0]].mT + V[:, [8]] @ V[:, [8]].mT
    assert spectra.shared_energy(C, T, 1.0) == pytest.approx(0.75)
    assert spectra.shared_energy(C, C, 1.0) == pytest.approx(1)
    assert math.isnan(spectra.shared_energy(C, torch.zeros(10, 10)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda W, D, C: spectra.rotation_ratio(W, D.mT), "must agree"),
        (lambda W, D, C: spectra.intruder_dimensions(W, D, top_k=7), r"top_k must be in 1..6"),
        (lambda W, D, C: spectra.intruder_dimensions(W, D, 3, threshold=1.5), "cosine"),
        (lambda W, D, C: spectra.head_overlap(W, D, 0), r"k must be in 1..6"),
        (lambda W, D, C: spectra.output_change(W, D, C[:3, :3]), "second moment"),
        (lambda W, D, C: spectra.energy_on_eigenbasis(D, C[:3, :3]), "second moment"),
        (lambda W, D, C: spectra.shared_energy(C, C[:3, :3]), "second moment"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[..., object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(random(8, 6), random(8, 6, seed=1), moment(6, 20)[0])
