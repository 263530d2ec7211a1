"""What every method, task and penalty keeps to, as checks for those of one's own.

Each check raises an `AssertionError` that says what is wrong, so that a test of pytest or unittest
is one line::

    from forgetless.testing import check_method
    from my_package import METHOD

    def test_contract():
        check_method(METHOD)
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.core.method import NEEDS, Method
from forgetless.models.load import load_model
from forgetless.models.state import generators_kept
from forgetless.tasks import Task, TaskResult, make_task
from forgetless.tasks.base import Item
from forgetless.training.penalties import make_penalty

__all__ = ["check_method", "check_penalty", "check_task"]

_SHAPES = ((6, 5), (5, 6), (4, 4), (1, 6), (6, 1), (1, 1))
_SCALINGS = (1.0, 0.25, 2.0)


# ---- methods -------------------------------------------------------------------------------------


def check_method(method: Method) -> None:
    """See to it that a method keeps to the contract of `forgetless.METHODS`.

    On weights of six shapes, at every rank and several scalings, in float32 and float64, and on
    weights and activations that are zero, of low rank or repeated: A is (rank, in) and B (out,
    rank), finite and of W's dtype; residual and start add up to W; nothing that is passed in is
    changed; the same seed gives the same start, and another one another where the method says that
    it draws. NaN, ranks out of range and unknown or senseless options are refused.

    Raises:
        AssertionError: what of this does not hold.
    """
    assert isinstance(method, Method), f"{method!r} is no forgetless.Method"
    _check_words(method)
    assert method.factors is not None, f"method {method.name!r} has no factors"
    for shape in _SHAPES:
        for rank in range(1, min(shape) + 1):
            for scaling in _SCALINGS:
                _check_start(method, _inputs(shape, 7 * rank), rank, scaling)
    for what, given in _degenerate().items():
        _check_start(method, given, 2, 2.0, f" with {what}")
    _check_seed(method)
    _check_refusals(method)


def _check_words(method: Method) -> None:
    name = method.name
    assert name.isidentifier(), f"the name {name!r} must be letters, digits and '_': it names runs"
    one_line = method.summary and "\n" not in method.summary and len(method.summary) <= 90
    assert one_line, f"the summary of {name!r} must be one line of at most 90 characters"
    trains = set(method.trains)
    factors = {"A"}, {"B"}, {"A", "B"}
    assert trains in factors, f"{name!r} must train A, B or both, not {trains}"
    assert method.needs <= set(NEEDS), f"{name!r} needs what there is not: {method.needs}"


def _inputs(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """A weight and everything that a method may ask for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    keep, task = draw(2 * shape[1], shape[1]), draw(2 * shape[1], shape[1])
    return {
        "W": draw(*shape),
        "second_moment": keep.mT @ keep / len(keep),
        "task_moment": task.mT @ task / len(task),
        "gradient": draw(*shape),
    }


def _degenerate() -> dict[str, dict[str, Tensor]]:
    """What a dead or strange layer looks like."""
    usual = _inputs((6, 5), 2)
    zeros, ones, eye = (make(5, 5, dtype=torch.float64) for make in (torch.zeros, torch.ones, _eye))
    found = {
        "a weight of zeros": {"W": torch.zeros(6, 5)},
        "a weight of rank one": {"W": torch.ones(6, 5)},
        "a gradient of zeros": {"gradient": torch.zeros(6, 5)},
    }
    for name, moment in {"no": zeros, "constant": ones, "white": eye}.items():
        found[f"{name} activations"] = {"second_moment": moment, "task_moment": moment}
    return {name: {**usual, **changes} for name, changes in found.items()}


def _eye(size: int, _: int, *, dtype: torch.dtype) -> Tensor:
    return torch.eye(size, dtype=dtype)


def _start(
    method: Method, given: Mapping[str, Tensor], rank: int, scaling: float, **more: Any
) -> Any:
    inputs: Any = {need: given[need] for need in method.needs}
    return method.decompose(given["W"], rank, scaling, **inputs, **more)


def _check_start(
    method: Method, given: dict[str, Tensor], rank: int, scaling: float, where: str = ""
) -> None:
    for dtype in (torch.float32, torch.float64):
        given = {**given, "W": given["W"].to(dtype)}
        before = {name: value.clone() for name, value in given.items()}
        first, again = (_start(method, given, rank, scaling, seed=3) for _ in range(2))
        W = given["W"]
        what = f"of a {tuple(W.shape)} weight at rank {rank}{where}"
        shapes = tuple(first.A.shape), tuple(first.B.shape)
        wanted = (rank, W.shape[1]), (W.shape[0], rank)
        assert shapes == wanted, f"A and B {what} must be {wanted}, got {shapes}"
        for name, matrix in (("A", first.A), ("B", first.B)):
            assert matrix.isfinite().all(), f"{name} {what} is not finite"
        error = float((first.residual + first.start - W).abs().max())
        size = max(1.0, float(first.start.abs().max()), float(W.abs().max()))
        assert error <= 1e-5 * size, f"residual + start {what} is {error:.2g} away from W"
        same = torch.equal(first.A, again.A) and torch.equal(first.B, again.B)
        assert same, f"the start {what} is another one each time, with the same seed"
        changed = [name for name, value in before.items() if not torch.equal(given[name], value)]
        assert not changed, f"{changed[0] if changed else ''} was changed"


def _check_seed(method: Method) -> None:
    one, two = (_start(method, _inputs((8, 7), 4), 2, 1.0, seed=seed) for seed in (1, 2))
    differs = not (torch.equal(one.A, two.A) and torch.equal(one.B, two.B))
    takes, gives = "takes" if method.draws else "takes no", "another" if differs else "the same"
    assert differs == method.draws, (
        f"method {method.name!r} {takes} generator without a default, and another seed gives "
        f"{gives} start"
    )


def _check_refusals(method: Method) -> None:
    for what in ("W", *sorted(method.needs)):
        given = _inputs((5, 5), 3)
        given[what][2, 3] = math.nan
        _refuses(partial(_start, method, given, 2, 1.0), f"NaN in {what}")
    method.check(2, (4, 6), method.options)
    for name in method.options:
        asked = partial(method.check, 2, (4, 6), {name: "nonsense"})
        _refuses(asked, f"{name}='nonsense'")


def _refuses(work: Callable[[], object], what: str) -> None:
    try:
        work()
    except (ValueError, TypeError):
        return
    raise AssertionError(f"{what} is taken; raise a ValueError that names it")


# ---- tasks ---------------------------------------------------------------------------------------


def check_task(
    spec: Mapping[str, Any] | Task, model: Any = None, processor: Any = None, reference: Any = None
) -> TaskResult:
    """See to it that a task keeps to the contract of `forgetless.tasks.TASKS`; its result.

    Scored twice, and one item at a time, it gives the same finite numbers; the model, its modes and
    all random generators are left as they were; items have names of their own; and result and items
    come back from JSON.

    Args:
        spec: as in a recipe, such as ``{"kind": "my_package:TASK", "path": "test.jsonl"}``.
        model: to score; None for the pocket base.
        processor: the model's; None likewise.
        reference: the base of a task that needs one; None for the model itself.

    Raises:
        AssertionError: what of this does not hold.
        UserError: the task cannot be made or asked.
    """
    task = make_task(spec)
    if model is None:
        model, processor = _pocket()
    same = make_task(spec) if isinstance(spec, Mapping) else task
    assert same.fingerprint == task.fingerprint, "the same settings give another fingerprint"
    json.dumps(task.content())
    base = (reference or model) if task.needs_reference else None
    asked = partial(task.evaluate, model, processor, reference=base)
    found, again = _unchanged(model, asked), _unchanged(model, asked)
    single = _unchanged(model, partial(asked, batch_size=1))
    assert isinstance(found, TaskResult), f"evaluate gives a {type(found).__name__}, no TaskResult"
    assert (found.task, found.fingerprint) == (task.name, task.fingerprint)
    assert math.isfinite(found.value), f"the value is {found.value}"
    assert again.value == found.value, f"the value is {found.value}, then {again.value}"
    near = math.isclose(single.value, found.value, rel_tol=1e-4, abs_tol=1e-6)
    assert near, f"the value is {found.value}, and {single.value} one item at a time"
    names = [item.id for item in found.items]
    assert len(set(names)) == len(names), "two items have the same id"
    items = [Item.from_json(json.loads(json.dumps(item.to_json()))) for item in found.items]
    back = TaskResult.from_json(json.loads(json.dumps(found.to_json())), items)
    assert back.items == found.items, "items do not come back from JSON as they were"
    assert back.value == found.value
    return found


# ---- penalties -----------------------------------------------------------------------------------


def check_penalty(
    spec: Mapping[str, Any], model: Any, processor: Any, method: str = "lora"
) -> None:
    """See to it that a penalty keeps to the contract of `forgetless.training.penalties`.

    Its value is a finite scalar with a graph over the trained weights alone, the same when it is
    made anew from the same seed; looking leaves the model, its gradients' needs and all random
    generators as they were.

    Args:
        spec: as in a recipe, such as ``{"kind": "my_package:Penalty", "weight": 0.1}``.
        model: with weights that ask for gradients, such as `forgetless.attach` gives it.
        processor: the model's.
        method: of its adapter.

    Raises:
        AssertionError: what of this does not hold.
        UserError: the penalty cannot be made, or refuses its settings.
    """
    values = []
    for _ in range(2):
        penalty = make_penalty(spec)
        penalty.check(method)
        _unchanged(model, partial(penalty.prepare, model, processor, 5))
        value = _unchanged(model, partial(penalty, model, 1))
        assert getattr(value, "ndim", None) == 0, f"the value is {value!r}, no scalar"
        assert value.isfinite(), f"the value is {value.item()}"
        values.append(value)
    assert values[0].item() == values[1].item(), "made anew with the same seed, it is another value"
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert values[0].requires_grad, "the value has no graph: nothing would follow it"
    reached = torch.autograd.grad(values[0], trained, allow_unused=True)
    assert any(gradient is not None for gradient in reached), "no trained weight decides the value"


# ---- what both ask -------------------------------------------------------------------------------


def _pocket() -> tuple[Any, Any]:
    from forgetless.data.modality import load_processor

    return load_model("pocket"), load_processor("pocket")


def _unchanged(model: nn.Module, work: Callable[[], Any]) -> Any:
    """What the work gives, which leaves the model and all random generators as they were."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    asked = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with generators_kept():
        torch.manual_seed(11)
        drawn = torch.get_rng_state()
        found = work()
        assert torch.equal(torch.get_rng_state(), drawn), (
            "random numbers were taken from torch's own generator"
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), f"{name} was changed"
    assert modes == {name: module.training for name, module in model.named_modules()}, (
        "modules were left in another mode (train or eval)"
    )
    assert asked == {name: weight.requires_grad for name, weight in model.named_parameters()}, (
        "weights were left with other needs of gradients"
    )
    return found
