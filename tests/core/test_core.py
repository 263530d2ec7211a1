"""What `decompose` checks, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forgetless.core.method import Decomposition, Factors, Method, check_number
from forgetless.methods import METHODS, decompose, find

W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def first_rows(W: Tensor, rank: int, scaling: float, *, factor: float = 1.0) -> Factors:
    return Factors(A=factor * W[:rank], B=torch.eye(W.shape[0], rank).to(W) / scaling)


OWN = Method("own", "the first rows of W", "—", ("A", "B"), first_rows)


def test_a_method_of_ones_own_needs_no_registration() -> None:
    start = decompose(W, 2, OWN, scaling=0.5)
    torch.testing.assert_close(start.start[:2], W[:2])
    torch.testing.assert_close(start.residual[2:], W[2:])
    assert not start.residual[:2].any()
    assert OWN.options == {"factor": 1.0}
    assert OWN.needs == frozenset()
    assert not OWN.draws


def test_start_and_residual_add_up_to_the_weight() -> None:
    start = decompose(W, 2, "pissa", scaling=2.0)
    assert isinstance(start, Decomposition)
    torch.testing.assert_close(start.start + start.residual, W)
    torch.testing.assert_close(start.start, 2.0 * start.B @ start.A)
    assert not start.starts_at_zero
    assert decompose(W, 2, "lora").starts_at_zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_raised_to_float32(dtype: torch.dtype) -> None:
    start = decompose(W.to(dtype), 2, "pissa")
    assert start.W.dtype == start.A.dtype == start.B.dtype == torch.float32
    torch.testing.assert_close(start.W, W.to(dtype).float(), rtol=0, atol=0)


def test_float64_stays() -> None:
    start = decompose(W.double(), 2, "pissa")
    assert start.W.dtype == start.A.dtype == start.B.dtype == torch.float64


def test_a_parameter_can_be_passed_and_no_graph_is_kept() -> None:
    start = decompose(torch.nn.Parameter(W.clone()), 2, "pissa")
    assert not start.A.requires_grad
    assert not start.W.requires_grad


def test_what_a_method_does_not_need_is_ignored() -> None:
    nonsense = torch.full((1, 1), float("nan"))
    plain = decompose(W, 2, "pissa")
    start = decompose(W, 2, "pissa", second_moment=nonsense, gradient=nonsense)
    assert torch.equal(start.A, plain.A)


@pytest.mark.parametrize("rank", [0, -1, 5, 2.0, "2", None])
def test_rank_out_of_range(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.4 for a \(4, 6\) weight, got"):
        decompose(W, rank, "pissa")


def test_check_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.4 for layer 'q_proj' \(4, 6\)"):
        METHODS["lora"].check(9, (4, 6), {}, layer="q_proj")


def test_check_tries_the_values_of_options() -> None:
    METHODS["intermediate"].check(2, (4, 6), {"position": 0.25})
    with pytest.raises(ValueError, match=r"position must be a number in 0\.\.1, got 2"):
        METHODS["intermediate"].check(2, (4, 6), {"position": 2})


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match="unknown method 'pisa'; did you mean 'pissa'"):
        decompose(W, 2, "pisa")
    with pytest.raises(ValueError, match="unknown option of method 'intermediate' 'positon'"):
        decompose(W, 2, "intermediate", positon=0.5)
    assert find("lora") is METHODS["lora"]


def test_full_has_no_adapter() -> None:
    with pytest.raises(ValueError, match="'full' trains the weights themselves"):
        decompose(W, 2, "full")
    METHODS["full"].check(10_000, (4, 6), {})


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_scaling_must_be_positive(scaling: float) -> None:
    with pytest.raises(ValueError, match="scaling must be a positive number"):
        decompose(W, 2, "pissa", scaling=scaling)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.full((4, 6), float("nan")), ValueError, "W holds NaN or infinity"),
        (torch.full((4, 6), float("inf")), ValueError, "W holds NaN or infinity"),
        (torch.ones(4), ValueError, r"W must be a matrix, got shape \(4,\)"),
        (torch.ones(0, 4), ValueError, "W must be a matrix"),
        (torch.ones(4, 6, dtype=torch.int8), TypeError, "floating-point"),
        ([[1.0]], TypeError, r"W must be a torch\.Tensor, got list"),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(weight, 1, "pissa")


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (None, "needs second_moment"),
        (torch.eye(4), r"second_moment must have shape \(6, 6\), got \(4, 4\)"),
        (torch.full((6, 6), float("nan")), "second_moment holds NaN or infinity"),
        (torch.triu(torch.ones(6, 6)), "symmetric"),
    ],
)
def test_bad_second_moments(moment: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(W, 2, "lora_null_v1", second_moment=moment)


@pytest.mark.parametrize("value", ["0.5", None, -0.1, 1.1, float("nan")])
def test_check_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"share must be a number in 0\.\.1, got"):
        check_number("share", value, 0, 1)
    assert check_number("share", 1, 0, 1) == 1.0
    with pytest.raises(ValueError, match="size must be a number of at least 0"):
        check_number("size", -1, 0)
