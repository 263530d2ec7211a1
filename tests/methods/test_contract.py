"""What holds for every method in METHODS, whatever the shape, the rank and the scaling."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetless.core.method import NEEDS, Decomposition, Factors
from forgetless.methods import METHODS, decompose

ADAPTERS = sorted(name for name, method in METHODS.items() if method.factors is not None)

# The start of these is scaling · B A with factors that do not depend on the scaling.
SCALED_STARTS = {"olora", "lora_ga"}


def inputs(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """A weight and everything that a method may ask for, of that shape."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    knowledge, task = draw(2 * in_features, in_features), draw(2 * in_features, in_features)
    return {
        "W": draw(out_features, in_features),
        "second_moment": knowledge.mT @ knowledge / len(knowledge),
        "task_moment": task.mT @ task / len(task),
        "gradient": draw(out_features, in_features),
    }


def start(
    name: str, given: dict[str, Tensor], rank: int, scaling: float = 1.0, **more: Any
) -> Decomposition:
    more |= {need: given[need] for need in METHODS[name].needs}
    return decompose(given["W"], rank, name, scaling, **more)


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SCALINGS = st.sampled_from([0.25, 1.0, 2.0, 5.656854249492381])
MANY = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ADAPTERS)
@MANY
@given(shape=SHAPES, scaling=SCALINGS, seed=st.integers(0, 99), data=st.data())
def test_contract(
    name: str, shape: tuple[int, int], scaling: float, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(shape)), label="rank")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), label="dtype")
    given = inputs(shape, seed)
    given["W"] = given["W"].to(dtype)
    before = {key: value.clone() for key, value in given.items()}

    first = start(name, given, rank, scaling, seed=seed)

    assert first.A.shape == (rank, shape[1])
    assert first.B.shape == (shape[0], rank)
    assert first.A.dtype == first.B.dtype == dtype
    assert first.A.is_contiguous()
    assert first.B.is_contiguous()
    assert first.A.isfinite().all()
    assert first.B.isfinite().all()
    assert first.scaling == scaling
    torch.testing.assert_close(first.residual + first.start, given["W"])
    for key, value in before.items():
        assert torch.equal(given[key], value), f"{key} was changed"
    again = start(name, given, rank, scaling, seed=seed)
    assert torch.equal(again.A, first.A)
    assert torch.equal(again.B, first.B)


@pytest.mark.parametrize("name", ADAPTERS)
@MANY
@given(shape=SHAPES, scaling=SCALINGS, data=st.data())
def test_scaling_does_not_change_the_start(
    name: str, shape: tuple[int, int], scaling: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(shape)), label="rank")
    given = inputs(shape, 0)
    plain, scaled = start(name, given, rank), start(name, given, rank, scaling)
    if name in SCALED_STARTS:
        torch.testing.assert_close(scaled.start, scaling * plain.start)
    else:
        torch.testing.assert_close(scaled.start, plain.start)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("shape", "rank"), [((1, 6), 1), ((6, 1), 1), ((1, 1), 1), ((5, 3), 3), ((3, 5), 3)]
)
def test_thin_layers_and_full_rank(name: str, shape: tuple[int, int], rank: int) -> None:
    result = start(name, inputs(shape, 1), rank)
    assert result.A.isfinite().all()
    assert result.B.isfinite().all()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("what", ["zero", "deficient", "repeated"])
def test_degenerate_weights(name: str, what: str) -> None:
    given = inputs((6, 5), 2)
    given["W"] = {
        "zero": torch.zeros(6, 5),
        "deficient": torch.ones(6, 5),
        "repeated": torch.eye(6, 5),
    }[what]
    result = start(name, given, 3)
    assert result.A.isfinite().all()
    assert result.B.isfinite().all()


def moment_of(what: str, size: int) -> Tensor:
    """The second moment of degenerate activations."""
    X = inputs((1, size), 9)["second_moment"]
    return {
        "no activation": torch.zeros(size, size),
        "one constant activation": torch.ones(size, size),
        "fewer tokens than inputs": X[:, :2] @ X[:2],
        "repeated eigenvalues": torch.eye(size),
        "one dead input": torch.eye(size).index_fill(0, torch.tensor([0]), 0.0),
        "one massive activation": X.index_fill(0, torch.tensor([0]), 0.0)
        .index_fill(1, torch.tensor([0]), 0.0)
        .add(torch.diag(torch.tensor([1e12] + [0.0] * (size - 1)))),
    }[what].double()


DEGENERATE = (
    "no activation",
    "one constant activation",
    "fewer tokens than inputs",
    "repeated eigenvalues",
    "one dead input",
    "one massive activation",
)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("what", DEGENERATE)
@pytest.mark.parametrize(("shape", "rank"), [((6, 5), 3), ((5, 6), 5), ((1, 6), 1)])
def test_degenerate_activations(name: str, what: str, shape: tuple[int, int], rank: int) -> None:
    """A finite start that adds up to the weight; the frozen space of a null method is a null space.

    Whatever the activations are, so that a dead layer does not stop a model from being started.
    """
    given = inputs(shape, 2)
    moment = moment_of(what, shape[1])
    moment = (moment + moment.mT) / 2
    given |= {"second_moment": moment, "task_moment": moment, "gradient": torch.zeros(shape)}
    result = start(name, given, rank, 2.0)
    assert result.A.isfinite().all()
    assert result.B.isfinite().all()
    torch.testing.assert_close(result.residual + result.start, given["W"])
    if name == "lora_null_zero":
        least = torch.linalg.eigvalsh(moment)[:rank].sum()
        leak = (result.A @ moment @ result.A.mT).trace()
        torch.testing.assert_close(leak, least, atol=1e-3 if moment.max() > 1e9 else 1e-9, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(name: str, bad: float) -> None:
    for what in ("W", *sorted(METHODS[name].needs)):
        given = inputs((5, 5), 3)
        given[what][2, 3] = bad
        with pytest.raises(ValueError, match=f"{what} holds NaN or infinity"):
            start(name, given, 2)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(name: str, dtype: torch.dtype) -> None:
    given = inputs((6, 5), 3)
    given["W"] = given["W"].to(dtype)
    result = start(name, given, 2)
    given["W"] = given["W"].float()
    raised = start(name, given, 2)
    assert torch.equal(result.A, raised.A)
    assert torch.equal(result.B, raised.B)


@pytest.mark.parametrize("name", [n for n in ADAPTERS if not METHODS[n].reads_weight])
def test_a_weight_that_is_not_read_is_not_copied(name: str) -> None:
    """The start is the same bit for bit as from the weight itself."""
    method, given = METHODS[name], inputs((8, 7), 4)
    sizes: list[int] = []
    assert method.factors is not None

    @wraps(method.factors)
    def noting(W: Tensor, *arguments: Any, **more: Any) -> Factors:
        assert method.factors is not None
        sizes.append(W.untyped_storage().nbytes())
        return method.factors(W, *arguments, **more)

    needs: dict[str, Any] = {need: given[need] for need in method.needs}
    unread, read = (
        replace(method, factors=noting, reads_weight=reads).decompose(given["W"], 2, **needs)
        for reads in (False, True)
    )
    assert sizes == [8, 8 * 7 * 8]
    assert torch.equal(unread.A, read.A)
    assert torch.equal(unread.B, read.B)


@pytest.mark.parametrize("name", [n for n in ADAPTERS if not METHODS[n].copies_weight])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_only_multiplied_starts_as_its_copy_does(
    name: str, dtype: torch.dtype
) -> None:
    given = inputs((2100, 9), seed=0)  # of more rows than are converted at once
    W, plain = given["W"].to(dtype), METHODS[name]
    needs: dict[str, Any] = {need: given[need] for need in plain.needs}
    copied = replace(plain, copies_weight=True)
    ours, theirs = (m.decompose(W, 3, **needs) for m in (plain, copied))
    for part in ("A", "B"):
        torch.testing.assert_close(getattr(ours, part), getattr(theirs, part))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_seed_matters_to_random_methods_alone(name: str) -> None:
    given = inputs((8, 7), 4)
    one, two = start(name, given, 2, seed=1), start(name, given, 2, seed=2)
    assert torch.equal(one.A, two.A) != METHODS[name].draws


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_missing_is_named(name: str) -> None:
    given = inputs((4, 4), 5)
    for need in METHODS[name].needs:
        rest: dict[str, Any] = {k: v for k, v in given.items() if k not in ("W", need)}
        if "second_moment" not in METHODS[name].needs:  # it is taken for the one that is missing
            del rest["second_moment"]
        with pytest.raises(ValueError, match=f"method '{name}' needs {need}"):
            decompose(given["W"], 2, name, **rest)


@pytest.mark.parametrize("name", ADAPTERS)
def test_of_one_weight_a_moment_alone_is_the_one_that_the_method_needs(name: str) -> None:
    if METHODS[name].needs != {"task_moment"}:
        return
    given = inputs((6, 5), 5)
    wanted = start(name, given, 2)
    W, keep = given["W"], torch.eye(5, dtype=torch.float64)
    alone = decompose(W, 2, name, second_moment=given["task_moment"])
    both = decompose(W, 2, name, second_moment=keep, task_moment=given["task_moment"])
    assert torch.equal(alone.start, wanted.start)
    assert torch.equal(alone.A, wanted.A)
    assert torch.equal(both.A, wanted.A)


def test_no_method_asks_for_the_text_to_keep_and_means_the_task() -> None:
    """By their papers: EVA and CorDA's second mode know nothing of a text to keep."""
    assert METHODS["eva"].needs == METHODS["corda_ipm"].needs == {"task_moment"}
    assert METHODS["corda_kpm"].needs == METHODS["lora_null_v1"].needs == {"second_moment"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_ranks_and_options(name: str) -> None:
    given = inputs((4, 6), 6)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=r"rank must be in 1\.\.4"):
            start(name, given, rank)
    with pytest.raises(ValueError, match="unknown option"):
        start(name, given, 2, no_such_option=1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_pass_at_their_defaults_and_are_checked(name: str) -> None:
    method = METHODS[name]
    method.check(2, (4, 6), method.options)
    for option in method.options:
        with pytest.raises(ValueError, match=option):
            method.check(2, (4, 6), {option: "nonsense"})


@pytest.mark.parametrize("name", METHODS)
def test_what_is_printed_about_a_method(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert "\n" not in method.summary
    assert len(method.summary) <= 90
    assert not method.summary.endswith(".")
    assert method.paper == "—" or "arXiv:" in method.paper
    assert method.needs <= set(NEEDS)
    assert set(method.trains) <= ({"A", "B"} if method.factors else {"W"})
    assert method.trains
