"""What repair is compared with, against matrices made by hand in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from forgetless.core.comparators import (
    dare,
    hard_projection,
    intruders_reduced,
    lost_at_rank,
    oplora,
    ties,
)
from forgetless.core.method import Factors
from forgetless.core.spectra import Update, dense, intruder_dimensions
from tests.core.test_spectra import moment, orthonormal, random, with_spectrum

W, U, V = with_spectrum(torch.arange(12, 0, -1).double(), 12, 20)
FACTORS = Factors(A=random(3, 20), B=random(12, 3, seed=1))


def both(change: Callable[[Update], Update]) -> Tensor:
    """What a change makes of the factors and of their product, which are the same."""
    of_factors, of_product = change(FACTORS), change(FACTORS.B @ FACTORS.A)
    assert isinstance(of_factors, Factors)
    assert isinstance(of_product, Tensor)
    torch.testing.assert_close(dense(of_factors), of_product, rtol=1e-10, atol=1e-12)
    return of_product


def test_a_hard_projection_takes_out_the_space_that_holds_the_energy() -> None:
    Q = orthonormal(20, 20, seed=3)
    energies = torch.tensor([60.0, 30.0, 8.0, 2.0, *[0.0] * 16]).double()
    C = Q * energies @ Q.mT
    D = FACTORS.B @ FACTORS.A
    for energy, count in ((0.5, 1), (0.9, 2), (0.95, 3), (1.0, 4)):
        found = both(lambda delta, energy=energy: hard_projection(delta, C, energy))  # type: ignore[misc]
        torch.testing.assert_close(found, D - D @ Q[:, :count] @ Q[:, :count].mT)


def test_a_hard_projection_does_nothing_to_text_that_its_space_holds_whole() -> None:
    C, X = moment(20, 6)
    found = dense(hard_projection(FACTORS, C, 1.0))
    assert float((X @ found.mT).abs().max()) < 1e-9
    assert float(found.norm()) > 0.1


def test_oplora_leaves_the_largest_triples_as_they_are() -> None:
    D = FACTORS.B @ FACTORS.A
    found = both(lambda delta: oplora(W, delta, 4))
    left, right = torch.eye(12) - U[:, :4] @ U[:, :4].mT, torch.eye(20) - V[:, :4] @ V[:, :4].mT
    torch.testing.assert_close(found, left.double() @ D @ right.double())
    torch.testing.assert_close((W + found) @ V[:, :4], U[:, :4] * torch.arange(12, 8, -1))
    torch.testing.assert_close(U[:, :4].mT @ (W + found), (V[:, :4] * torch.arange(12, 8, -1)).mT)


def test_intruders_are_turned_down_as_the_paper_has_it() -> None:
    """A weight of rank 4 and an update that puts two new directions above all of its own."""
    W, U, V = with_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]).double(), 12, 20)
    new_U = torch.linalg.qr(torch.cat([U, random(12, 2)], 1)).Q[:, 4:]
    new_V = torch.linalg.qr(torch.cat([V, random(20, 2)], 1)).Q[:, 4:]
    sizes = torch.tensor([9.0, 8.0]).double()
    delta = Factors(A=new_V.mT, B=new_U * sizes)
    assert intruder_dimensions(W, delta, 5).tolist() == [0, 1]
    for keep in (0.0, 0.25, 1.0):
        found = intruders_reduced(W, delta, keep, 5)
        assert isinstance(found, Factors)
        assert len(found.A) == 4
        torch.testing.assert_close(dense(found), keep * new_U * sizes @ new_V.mT, atol=1e-9, rtol=0)
        of_product = intruders_reduced(W, dense(delta), keep, 5)
        torch.testing.assert_close(dense(found), dense(of_product), atol=1e-9, rtol=0)


def test_an_update_without_intruders_is_left_alone() -> None:
    delta = Factors(A=V[:, :1].mT, B=U[:, :1] * 5)
    torch.testing.assert_close(dense(intruders_reduced(W, delta, 0.0, 5)), dense(delta))


def test_what_is_lost_at_a_rank() -> None:
    D, _, _ = with_spectrum(torch.tensor([4.0, 3.0, 0.0]).double(), 6, 8)
    assert lost_at_rank(D, 1) == pytest.approx(3 / 5)
    assert lost_at_rank(D, 2) == pytest.approx(0, abs=1e-12)
    assert lost_at_rank(torch.zeros(3, 3), 1) == 0


def test_dare_drops_by_chance_and_keeps_the_mean() -> None:
    D = random(60, 80)

    def drawn(seed: int, delta: Update = D) -> Tensor:
        return dare(delta, 0.75, torch.Generator().manual_seed(seed))

    found = drawn(0)
    assert torch.equal(found[found != 0], (D * 4)[found != 0])
    assert float((found == 0).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(found, drawn(0))
    assert not torch.equal(found, drawn(1))
    mean = torch.stack([drawn(seed) for seed in range(400)]).mean(0)
    assert float((mean - D).norm() / D.norm()) < 0.12  # 3^½ / 20 is to be expected
    product = drawn(0, FACTORS)
    kept = product != 0
    assert torch.equal(product[kept], ((FACTORS.B @ FACTORS.A) / 0.25)[kept])


def test_ties_by_hand() -> None:
    first = torch.tensor([[5.0, -4.0, 1.0, 0.5]]).double()
    second = torch.tensor([[3.0, 6.0, 0.25, -2.0]]).double()
    # Half of each is kept: [5, -4, 0, 0] and [3, 6, 0, 0]; in the second column 6 outweighs -4.
    assert torch.equal(ties([first, second], 0.5), torch.tensor([[4.0, 6.0, 0.0, 0.0]]).double())
    assert torch.equal(ties([first], 1.0), first)
    assert torch.equal(ties([first, -first], 1.0), torch.zeros(1, 4).double())
    # With all kept the last two are the mean of those that agree with the sum's sign.
    found = ties([first, second], 1.0)
    assert torch.equal(found, torch.tensor([[4.0, 6.0, 0.625, -2.0]]).double())


def test_ties_of_factors_are_those_of_their_products() -> None:
    other = random(12, 20, seed=5)
    product = FACTORS.B @ FACTORS.A
    assert torch.equal(ties([FACTORS, other], 0.3), ties([product, other], 0.3))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hard_projection(FACTORS, torch.eye(19).double()), "19 inputs"),
        (lambda: hard_projection(FACTORS, torch.eye(20).double(), 1.5), "energy must be"),
        (lambda: oplora(W, FACTORS, 13), r"directions must be in 1\.\.12"),
        (lambda: dare(FACTORS, 1.0, torch.Generator()), "drop must be"),
        (lambda: ties([FACTORS], 0.0), "keep must be"),
        (lambda: intruders_reduced(W, FACTORS, 0.5, 13), "top_k must be"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
