"""One defining property of each method, from its paper."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from forgetless.methods import METHODS, decompose
from forgetless.methods.eva import redistribute_ranks

OUT, IN, TOKENS, RANK = 14, 10, 40, 3


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W = draw(OUT, IN, seed=0)
# Activations with a steep spectrum: their last three directions hold 1e-8 of the energy.
X = draw(TOKENS, IN, seed=1) @ torch.diag(torch.logspace(0, -4, IN, dtype=torch.float64))
X = X @ torch.linalg.qr(draw(IN, IN, seed=2)).Q
C = X.mT @ X / TOKENS
S = torch.linalg.svdvals(W)


def orthonormal(rows: Tensor) -> None:
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)).to(rows))


def balanced(A: Tensor, B: Tensor) -> None:
    """A Aᵀ and Bᵀ B are the same diagonal matrix."""
    gram = A @ A.mT
    torch.testing.assert_close(gram, B.mT @ B)
    torch.testing.assert_close(gram, gram.diagonal().diag())


def test_every_method_has_its_identity() -> None:
    found = {
        match[1] for name in globals() if (match := re.match(r"test_identity_of_(\w+)$", name))
    }
    assert found == set(METHODS)


def test_identity_of_lora() -> None:
    start = decompose(W, RANK, "lora", seed=3)
    assert not start.B.any()
    bound = IN**-0.5
    assert start.A.abs().max() <= bound
    wide = decompose(draw(64, 256, seed=3), 64, "lora", seed=3).A
    assert abs(wide.std().item() - 256**-0.5 / 3**0.5) < 0.01 * 256**-0.5
    assert abs(wide.mean().item()) < 0.02 * 256**-0.5


def test_identity_of_pissa() -> None:
    """Eckart-Young: the residual holds the tail of the spectrum, and no start leaves less."""
    start = decompose(W, RANK, "pissa", scaling=2.0)
    torch.testing.assert_close(start.residual.norm(), S[RANK:].norm())
    torch.testing.assert_close(torch.linalg.matrix_norm(start.residual, 2), S[RANK])
    balanced(start.A, start.B)


def test_randomised_pissa_nears_the_exact_one() -> None:
    exact = decompose(W, RANK, "pissa", scaling=2.0)
    quick = decompose(W, RANK, "pissa", scaling=2.0, niter=24, seed=1)
    torch.testing.assert_close(quick.start, exact.start, atol=1e-4, rtol=0)
    balanced(quick.A, quick.B)
    rough = [decompose(W, RANK, "pissa", niter=0, seed=seed).A for seed in (1, 1, 2)]
    assert torch.equal(rough[0], rough[1])
    assert not torch.equal(rough[0], rough[2])
    for niter in (-1, 1.5, "2"):
        with pytest.raises(ValueError, match="niter must be a whole number"):
            decompose(W, RANK, "pissa", niter=niter)


def test_identity_of_milora() -> None:
    """The residual is the best approximation of W of rank m - r."""
    start = decompose(W, RANK, "milora", scaling=2.0)
    torch.testing.assert_close(start.start.norm(), S[-RANK:].norm())
    torch.testing.assert_close(torch.linalg.matrix_norm(start.start, 2), S[-RANK])
    assert torch.linalg.matrix_rank(start.residual) == IN - RANK
    balanced(start.A, start.B)


def test_identity_of_intermediate() -> None:
    """Positions 0 and 1 are PiSSA and MiLoRA; every position takes its own singular values."""
    for position, name in [(0.0, "pissa"), (1.0, "milora")]:
        slice_, end = (
            decompose(W, RANK, "intermediate", position=position),
            decompose(W, RANK, name),
        )
        torch.testing.assert_close(slice_.A, end.A)
        torch.testing.assert_close(slice_.B, end.B)
    middle = decompose(W, RANK, "intermediate")
    first = (IN - RANK) // 2
    torch.testing.assert_close(torch.linalg.svdvals(middle.start)[:RANK], S[first : first + RANK])
    torch.testing.assert_close(
        torch.linalg.svdvals(middle.residual)[: IN - RANK],
        torch.cat([S[:first], S[first + RANK :]]),
    )


@pytest.mark.parametrize("energy", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_intermediate_by_energy(energy: float) -> None:
    top = torch.linalg.svdvals(decompose(W, RANK, "intermediate", energy=energy).start)[0]
    first = int((S - top).abs().argmin())
    above = torch.nn.functional.pad(S.square().cumsum(0) / S.square().sum(), (1, 0))
    assert first == IN - RANK or above[first] >= energy
    assert first == 0 or above[first - 1] < energy
    with pytest.raises(ValueError, match="not both"):
        decompose(W, RANK, "intermediate", position=0.2, energy=energy)


def test_identity_of_random_slice() -> None:
    """Components of W itself, drawn without replacement; every one can be drawn."""
    seen = set()
    for seed in range(40):
        values = torch.linalg.svdvals(decompose(W, RANK, "random_slice", seed=seed).start)[:RANK]
        picked = (values[:, None] - S).abs().argmin(1)
        torch.testing.assert_close(values, S[picked])
        assert len(set(picked.tolist())) == RANK
        seen |= set(picked.tolist())
    assert seen == set(range(IN))


def null_projection() -> Tensor:
    N = torch.linalg.svd(X).Vh[-RANK:].mT
    return torch.mm(N, N.mT)


def test_identity_of_lora_null_v1() -> None:
    """X Aᵀ Bᵀ ≈ 0, and the residual is W (I - N Nᵀ)."""
    start = decompose(W, RANK, "lora_null_v1", scaling=2.0, second_moment=C)
    torch.testing.assert_close(start.residual, W - W @ null_projection())
    assert (X @ start.start.mT).norm() < 1e-2 * X.norm()
    assert (X @ start.start.mT).norm() < 0.1 * (X @ decompose(W, RANK, "milora").start.mT).norm()
    balanced(start.A, start.B)
    assert METHODS["lora_null_v1"].trains == ("A", "B")


def test_identity_of_lora_null_v2() -> None:
    """The factors of v1 with A frozen: no B can leak more than the tail allows."""
    start = decompose(W, RANK, "lora_null_v2", scaling=2.0, second_moment=C)
    other = decompose(W, RANK, "lora_null_v1", scaling=2.0, second_moment=C)
    assert start.trains == ("B",)
    assert torch.equal(start.A, other.A)
    assert torch.equal(start.B, other.B)
    moved = start.B + draw(OUT, RANK, seed=9)
    delta_W = start.scaling * (moved - start.B) @ start.A
    tail = torch.linalg.eigvalsh(C)[:RANK].sum()
    largest = torch.linalg.matrix_norm(W @ null_projection(), 2)
    step = torch.linalg.matrix_norm(moved - start.B, 2)
    bound = start.scaling * step * (largest / start.scaling).sqrt() * (TOKENS * tail).sqrt()
    assert (X @ delta_W.mT).norm() <= bound


def test_identity_of_lora_null_zero() -> None:
    """Orthonormal rows that span the null space, and a start of zero."""
    start = decompose(W, RANK, "lora_null_zero", scaling=2.0, second_moment=C)
    orthonormal(start.A)
    torch.testing.assert_close(start.A.mT @ start.A, null_projection())
    assert start.starts_at_zero
    assert not start.B.any()
    assert torch.equal(start.residual, W)


def test_identity_of_activation_slice() -> None:
    """Position 1 is LoRA-Null; every position takes W's share of its own directions."""
    tail = decompose(W, RANK, "activation_slice", second_moment=C, position=1.0)
    null = decompose(W, RANK, "lora_null_v1", second_moment=C)
    assert torch.equal(tail.A, null.A)
    assert torch.equal(tail.B, null.B)
    V = torch.linalg.svd(X).Vh
    for position, first in [(0.0, 0), (0.5, (IN - RANK) // 2)]:
        start = decompose(W, RANK, "activation_slice", second_moment=C, position=position)
        N = V[first : first + RANK].mT
        torch.testing.assert_close(start.start, W @ N @ N.mT)


def damped(damping: float = 0.01) -> Tensor:
    return torch.add(C, damping * C.diagonal().mean() * torch.eye(IN))


@pytest.mark.parametrize("damping", [0.01, 1e-5])
def test_identity_of_corda_kpm(damping: float) -> None:
    """Through C̃ the residual is the best approximation of W of rank m - r."""
    start = decompose(W, RANK, "corda_kpm", scaling=2.0, second_moment=C, damping=damping)
    seen = torch.linalg.svdvals(W @ damped(damping))
    torch.testing.assert_close((start.start @ damped(damping)).norm(), seen[-RANK:].norm())
    assert torch.linalg.matrix_rank(start.residual @ damped(damping), atol=seen[-1] / 10) == 7
    torch.testing.assert_close((start.B.mT @ start.B), seen[-RANK:].diag() / 2)


def test_identity_of_corda_ipm() -> None:
    """Through C̃ the start is the best approximation of W of rank r."""
    start = decompose(W, RANK, "corda_ipm", scaling=2.0, task_moment=C)
    seen = torch.linalg.svdvals(W @ damped())
    torch.testing.assert_close((start.residual @ damped()).norm(), seen[RANK:].norm())
    torch.testing.assert_close((start.B.mT @ start.B), seen[:RANK].diag() / 2)


@pytest.mark.parametrize(("name", "plain"), [("corda_kpm", "milora"), ("corda_ipm", "pissa")])
def test_corda_without_context_is_a_plain_slice(name: str, plain: str) -> None:
    for moment in (torch.eye(IN, dtype=torch.float64), torch.zeros(IN, IN, dtype=torch.float64)):
        start = decompose(W, RANK, name, second_moment=moment)
        torch.testing.assert_close(start.start, decompose(W, RANK, plain).start)


def test_corda_refuses_a_singular_moment_without_damping() -> None:
    low = torch.diag(torch.tensor([1.0] * (IN - 1) + [0.0]))
    with pytest.raises(ValueError, match="raise damping"):
        decompose(W, RANK, "corda_kpm", second_moment=low, damping=0.0)


def test_identity_of_eva() -> None:
    """Orthonormal rows that hold the most energy, the largest first, and a start of zero."""
    start = decompose(W, RANK, "eva", task_moment=C)
    orthonormal(start.A)
    assert not start.B.any()
    energies = (X @ start.A.mT).square().sum(0)
    torch.testing.assert_close(energies, torch.linalg.svdvals(X)[:RANK].square())


def test_whitened_eva_gives_entries_of_the_same_size() -> None:
    start = decompose(W, RANK, "eva", task_moment=C, whiten=True)
    torch.testing.assert_close(start.A @ C @ start.A.mT, torch.eye(RANK).to(C))
    nothing = decompose(W, RANK, "eva", task_moment=torch.zeros_like(C), whiten=True)
    orthonormal(nothing.A)


EIGENVALUES = {
    "one direction": torch.tensor([10.0, 0.1, 0.1, 0.1]),
    "many": torch.tensor([1.0, 1.0, 1.0, 1.0]),
    "nothing": torch.zeros(4),
}


def test_ranks_go_where_few_directions_explain_much() -> None:
    expected = {"one direction": 2, "many": 4, "nothing": 0}
    assert redistribute_ranks(EIGENVALUES, 2) == expected
    assert redistribute_ranks(EIGENVALUES, 2, rho=1.0) == dict.fromkeys(EIGENVALUES, 2)
    one, many = EIGENVALUES["one direction"], EIGENVALUES["many"]
    assert redistribute_ranks({"a": one, "b": many}, {"a": 3, "b": 1}) == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="rho"):
        redistribute_ranks(EIGENVALUES, 2, rho=0.5)


def test_identity_of_olora() -> None:
    """Orthonormal B, triangular A, and nothing left of the first columns of W."""
    start = decompose(W, RANK, "olora")
    orthonormal(start.B.mT)
    assert (start.A[:, :RANK].diagonal() > 0).all()
    torch.testing.assert_close(start.A[:, :RANK], start.A[:, :RANK].triu())
    torch.testing.assert_close(start.residual[:, :RANK], torch.zeros(OUT, RANK).to(W))
    assert torch.linalg.matrix_rank(start.residual) == IN - RANK


GRADIENT = draw(OUT, IN, seed=5)


def test_identity_of_lora_ga() -> None:
    """One gradient step moves W along the best 2r directions of the gradient.

    dA = Bᵀ G and dB = G Aᵀ, so that B dA + dB A projects G on A's rows and B's columns: in the
    paper's scale c² times the sum of its first 2r components.
    """
    start = decompose(W, RANK, "lora_ga", gradient=GRADIENT, scale="paper", gamma=4)
    A, B, c2 = start.A, start.B, OUT**0.5 / 4
    torch.testing.assert_close(A @ A.mT, c2 * torch.eye(RANK).to(A))
    torch.testing.assert_close(B.mT @ B, c2 * torch.eye(RANK).to(B))
    U, values, Vh = torch.linalg.svd(GRADIENT)
    best = (U[:, : 2 * RANK] * values[: 2 * RANK]) @ Vh[: 2 * RANK]
    torch.testing.assert_close(B @ B.mT @ GRADIENT + GRADIENT @ A.mT @ A, c2 * best)


def test_identity_of_mica() -> None:
    """B frozen in the output directions that W uses least; the start is zero."""
    start = decompose(W, RANK, "mica")
    assert start.trains == ("A",)
    assert not start.A.any()
    orthonormal(start.B.mT)
    torch.testing.assert_close((W.mT @ start.B).norm(dim=0), S[-RANK:])
    # Of a rank-deficient weight, B leaves every direction alone that W uses.
    low = W[:, :4] @ W[:4]
    assert (low.mT @ decompose(low, RANK, "mica").B).abs().max() < 1e-12


def test_identity_of_sc_lora() -> None:
    """The output is projected on the directions where the task outweighs the knowledge most."""
    Y = draw(TOKENS, IN, seed=6)
    T = Y.mT @ Y / TOKENS
    start = decompose(W, RANK, "sc_lora", 2.0, C, task_moment=T, beta=0.3)
    Q = start.B * 2.0**0.5
    orthonormal(Q.mT)
    torch.testing.assert_close(start.start, Q @ Q.mT @ W)
    difference = W @ (0.7 * T - 0.3 * C) @ W.mT
    best = torch.linalg.eigvalsh(difference)[-RANK:].sum()
    torch.testing.assert_close((Q.mT @ difference @ Q).trace(), best)


def test_identity_of_inflora() -> None:
    """A is outside of what is kept, and there nothing of its rank has more of the task's energy."""
    Y = draw(TOKENS, IN, seed=6)
    T = Y.mT @ Y / TOKENS
    start = decompose(W, RANK, "inflora", 2.0, C, task_moment=T, energy=0.99)
    assert not start.B.any()
    orthonormal(start.A * 3**0.5)
    values, vectors = torch.linalg.eigh(C)
    kept = int((values.flip(0).cumsum(0) < 0.99 * values.sum()).sum()) + 1
    assert 0 < kept < IN - RANK
    M = vectors[:, -kept:]
    assert (start.A @ M).abs().max() < 1e-12
    P = torch.eye(IN).double() - M @ M.mT
    best = torch.linalg.eigvalsh(P @ T @ P)[-RANK:].sum()
    torch.testing.assert_close(3 * (start.A @ T @ start.A.mT).trace(), best)
    # With nothing to keep A is that of EVA; with all of it, what is kept least.
    same = decompose(W, RANK, "eva", task_moment=T).A
    free = decompose(W, RANK, "inflora", 1.0, C, task_moment=T, energy=0).A
    torch.testing.assert_close((free.mT @ free) * 3, same.mT @ same)
    least = decompose(W, RANK, "inflora", 1.0, C, task_moment=T, energy=1.0).A
    assert (least @ vectors[:, RANK:]).abs().max() < 1e-12


def test_identity_of_full() -> None:
    """Every weight is trained, so there is nothing to decompose."""
    assert METHODS["full"].trains == ("W",)
    assert METHODS["full"].factors is None
