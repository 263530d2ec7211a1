"""What rounding leaves of a merged update: nothing on the grid below half a step, else all."""

from __future__ import annotations

import pytest
import torch

from forgetless.adapters.rounding import NF4_BLOCK, Rounded, compared, nf4

torch.manual_seed(0)
W = torch.randn(40, 96)
DELTA = torch.randn(40, 3) @ torch.randn(3, 96)


def rounded(W: torch.Tensor, delta_W: torch.Tensor, store: object) -> Rounded:
    assert callable(store)
    return Rounded.over({"layer": compared(store(W + delta_W) - store(W), delta_W)})


def bfloat16(W: torch.Tensor) -> torch.Tensor:
    return W.bfloat16().float()


@pytest.mark.parametrize("store", [bfloat16, nf4])
def test_on_the_grid_a_small_update_vanishes_and_a_large_one_stays(store: object) -> None:
    on_grid = store(W)  # type: ignore[operator]
    entries = on_grid.abs() * (on_grid.abs() < 1)  # below the scale of a block
    small = rounded(on_grid, 2**-11 * entries * DELTA.sign(), store)
    assert small.kept < 0.01
    assert small.error == pytest.approx(1, abs=0.1)
    large = rounded(on_grid, 4 * DELTA, store)
    assert large.kept == pytest.approx(1, abs=0.02)
    assert large.error < 0.15


def test_in_float32_all_is_kept() -> None:
    whole = rounded(W, 1e-3 * DELTA, torch.clone)
    assert whole.kept == pytest.approx(1, abs=1e-4)
    assert whole.error < 1e-3


def test_off_the_grid_a_small_update_is_kept_on_average_under_a_larger_error() -> None:
    torch.manual_seed(1)
    many = torch.randn(2000, 192)
    found = rounded(many, 1e-2 * torch.randn(2000, 192), nf4)
    assert found.kept == pytest.approx(1, abs=0.15)
    assert found.error > 2


def test_of_several_layers_every_entry_counts_alike() -> None:
    change = {"first": torch.ones(2, 2), "second": torch.zeros(1, 4)}
    sums = {name: compared(found, torch.ones_like(found)) for name, found in change.items()}
    assert Rounded.over(sums) == Rounded(kept=0.5, error=0.5**0.5)
    assert Rounded.over({"layer": compared(W, 0 * W)}) == Rounded(1.0, 0.0)


def test_four_bits_are_sixteen_values_a_block() -> None:
    stored = nf4(W[:, :70])
    assert stored.shape == (40, 70)
    parts = (torch.split(each.flatten(), NF4_BLOCK) for each in (W[:, :70], stored))
    for own, kept in zip(*parts, strict=True):
        assert len(kept.unique()) <= 16
        largest = own.abs().argmax()
        assert kept[largest] == pytest.approx(float(own[largest]), rel=1e-6)
        assert (kept - own).abs().max() <= 0.16 * own.abs().max()
    assert torch.equal(nf4(stored), stored)
    assert not nf4(torch.zeros(2, 3)).any()


def test_four_bits_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=NF4_BLOCK)
    torch.testing.assert_close(nf4(W), functional.dequantize_4bit(packed, state))
