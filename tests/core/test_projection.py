"""The closed form of repair against independent solutions of the same problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetless.core.projection import EPSILON, best_of_rank, repaired
from tests.core.test_spectra import moment, random


def solved_by_numpy(A: Tensor, C: Tensor, T: Tensor | None, strength: float) -> np.ndarray:
    """The stationary point of the objective, as least squares on stacked square roots.

    Every row a' minimises ‖(a' - a) T^½‖² + strength ‖a' C^½‖² + ε ‖a'‖².
    """
    second = C.numpy()
    task = np.eye(len(C)) * np.trace(second) / len(C) if T is None else T.numpy()
    epsilon = EPSILON * np.trace(task + strength * second) / len(C)
    roots = []
    for M in (task, strength * second, epsilon * np.eye(len(C))):
        values, vectors = np.linalg.eigh(M)
        roots.append((vectors * np.sqrt(values.clip(0))).T)
    targets = np.concatenate([roots[0] @ A.numpy().T, np.zeros((2 * len(C), len(A)))])
    found: np.ndarray = np.linalg.lstsq(np.concatenate(roots), targets, rcond=None)[0].T
    return found


@pytest.mark.parametrize("part", range(4))
def test_two_hundred_random_layers_equal_an_independent_solution(part: int) -> None:
    draw = torch.Generator().manual_seed(part)
    for layer in range(50):
        rows, size = (int(torch.randint(1, most, (), generator=draw)) for most in (9, 40))
        strength = float(10 ** (4 * torch.rand((), generator=draw) - 2))
        A = random(rows, size, seed=layer)
        C, T = moment(size, 3 * size, 2 * layer)[0], moment(size, 2 * size, 2 * layer + 1)[0]
        task = None if layer % 5 == 0 else T
        expected = solved_by_numpy(A, C, task, strength)
        difference = np.abs(repaired(A, C, task, strength).numpy() - expected).max()
        assert difference <= 1e-9 * np.abs(A.numpy()).max()


def objective(A: Tensor, start: Tensor, C: Tensor, T: Tensor, strength: float) -> float:
    moved = A - start
    return float(((moved @ T) * moved).sum() + strength * ((A @ C) * A).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_no_neighbour_is_better(seed: int, strength: float) -> None:
    A, C, T = random(3, 8, seed=seed), moment(8, 30, seed)[0], moment(8, 20, seed + 100)[0]
    found = repaired(A, C, T, strength)
    least = objective(found, A, C, T, strength)
    for other in range(5):
        near = found + 1e-3 * random(3, 8, seed=seed + other + 1)
        assert objective(near, A, C, T, strength) > least


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100), st.floats(0.1, 0.9))
def test_no_neighbour_is_better_where_an_earlier_task_is_to_stay(
    seed: int, strength: float, share: float
) -> None:
    """Over A with B fixed: near the new update on T, the earlier one on E, and nothing on C."""
    A, B = random(3, 8, seed=seed), random(5, 3, seed=seed + 1)
    earlier = random(5, 2, seed=seed + 2) @ random(2, 8, seed=seed + 3)
    text, T, E = (moment(8, 30, seed + 100 * i)[0] for i in range(3))
    C = (1 - share) * text + share * E
    found = repaired(A, C, T, strength, share * (torch.linalg.pinv(B) @ earlier) @ E)

    def cost(rows: Tensor) -> float:
        old, new = B @ rows - earlier, B @ (rows - A)
        kept = (1 - share) * ((B @ rows @ text) * (B @ rows)).sum() + share * (
            (old @ E) * old
        ).sum()
        return float(((new @ T) * new).sum() + strength * kept)

    for other in range(5):
        near = found + 1e-3 * random(3, 8, seed=seed + other + 4)
        assert cost(near) > cost(found)


def test_strength_0_returns_the_rows_themselves() -> None:
    A = random(3, 8).float()
    assert repaired(A, moment(8, 30)[0], moment(8, 20, 1)[0], 0) is A
    assert repaired(A, moment(8, 30)[0], None, 0.0) is A


def test_a_stronger_repair_changes_less_of_what_is_kept() -> None:
    A, C, T = random(3, 12), moment(12, 60)[0], moment(12, 40, 5)[0]
    kept, missed = [], []
    for strength in (0, 0.01, 0.1, 1, 10, 100):
        found = repaired(A, C, T, strength)
        kept.append(float(((found @ C) * found).sum()))
        missed.append(float((((found - A) @ T) * (found - A)).sum()))
    assert kept == sorted(kept, reverse=True)
    assert missed == sorted(missed)
    assert missed[0] == 0


def test_directions_that_the_task_alone_uses_stay_and_those_it_never_uses_go() -> None:
    """C fills the first four directions and T the middle four: two are contested."""
    C, T = torch.diag(torch.tensor([1.0] * 4 + [0.0] * 6)).double(), torch.zeros(10, 10).double()
    T.diagonal()[2:8] = 1
    found = repaired(torch.ones(1, 10, dtype=torch.float64), C, T, 3)[0]
    expected = torch.tensor([0, 0, 0.25, 0.25, 1, 1, 1, 1, 0, 0]).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_one_solve_does_for_layers_with_the_same_input() -> None:
    A, C, T = random(6, 10), moment(10, 40)[0], moment(10, 30, 1)[0]
    together = repaired(A, C, T)
    apart = torch.cat([repaired(A[:2], C, T), repaired(A[2:], C, T)])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


def test_scaling_the_inputs_changes_nothing() -> None:
    """A layer that reads c x through A / c is the same layer."""
    A, C, T = random(3, 10), moment(10, 40)[0], moment(10, 30, 1)[0]
    for task in (T, None):
        scaled = repaired(A / 7, C * 49, None if task is None else task * 49) * 7
        torch.testing.assert_close(scaled, repaired(A, C, task), rtol=1e-9, atol=1e-12)


def test_the_whole_update_and_its_factor_are_repaired_alike() -> None:
    A, B = random(3, 10), random(7, 3, seed=1)
    C, T = moment(10, 40)[0], moment(10, 30, 1)[0]
    torch.testing.assert_close(repaired(B @ A, C, T), B @ repaired(A, C, T))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 50), st.sampled_from([0.0, 0.1, 5.0]))
def test_the_best_of_a_rank_beats_the_repaired_updates_own_cut(
    rank: int, seed: int, strength: float
) -> None:
    D, C, T = random(7, 9, seed=seed), moment(9, 40, seed)[0], moment(9, 30, seed + 1)[0]
    found = best_of_rank(D, rank, C, T, strength)
    assert found.A.shape == (rank, 9)
    assert found.B.shape == (7, rank)
    U, S, Vh = torch.linalg.svd(repaired(D, C, T, strength), full_matrices=False)
    cut = U[:, :rank] * S[:rank] @ Vh[:rank]
    ours = objective(found.B @ found.A, D, C, T, strength)
    assert ours <= objective(cut, D, C, T, strength) * (1 + 1e-9) + 1e-12


def test_the_best_of_full_rank_is_the_repaired_update() -> None:
    D, C = random(5, 9), moment(9, 40)[0]
    for T in (moment(9, 30, 1)[0], None):
        found = best_of_rank(D, 5, C, T)
        torch.testing.assert_close(found.B @ found.A, repaired(D, C, T), rtol=1e-8, atol=1e-10)


def test_moments_of_nothing_and_of_fewer_tokens_than_inputs_are_no_trouble() -> None:
    A, zero, few = random(2, 6), torch.zeros(6, 6).double(), moment(6, 2)[0]
    for C, T in ((zero, zero), (zero, None), (few, moment(6, 2, 3)[0]), (few, None), (few, zero)):
        assert repaired(A, C, T).isfinite().all()


@pytest.mark.parametrize(
    ("C", "T", "strength", "said"),
    [
        (torch.eye(5), None, 0.1, "second_moment must be"),
        (torch.eye(6), torch.eye(5), 0.1, "task_moment must be"),
        (torch.eye(6), None, -1.0, "strength must be a finite number of at least 0"),
        (torch.eye(6), None, float("nan"), "strength must be a finite"),
        (torch.eye(6), None, float("inf"), "strength must be a finite"),
        (torch.eye(6) * float("nan"), None, 0.1, "NaN"),
        (-torch.eye(6), -torch.eye(6), 0.1, "negative eigenvalues"),
    ],
)
def test_what_cannot_be_repaired_is_refused(
    C: Tensor, T: Tensor | None, strength: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        repaired(random(2, 6), C, T, strength)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.5"):
        best_of_rank(random(5, 9), rank, moment(9, 20)[0])
