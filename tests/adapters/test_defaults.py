"""Another default number format or device of PyTorch changes nothing of what is made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load, save
from forgetless.methods import METHODS
from forgetless.statistics.collection import collect
from forgetless.statistics.gradients import collect_gradients
from tests.adapters.test_attachment import ATTACHABLE, gradients, statistics
from tests.families import FAMILIES, language_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")

OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"niter": 2},
    "eva": {"rho": 2.0, "whiten": True},
    "intermediate": {"energy": 0.5},
    "corda_kpm": {"damping": 0.02},
}


@cache
def base() -> Any:
    return FAMILIES["llama"].model()


@cache
def batch() -> dict[str, Tensor]:
    return language_batch()


def attached(method: str) -> Any:
    return attach(
        copy.deepcopy(base()),
        method,
        2,
        3,
        stats=statistics("llama"),
        task_stats=statistics("llama", first=20),
        gradients=gradients("llama"),
        **OPTIONS.get(method, {}),
    )


@cache
def as_usual(method: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = attached(method).state_dict()
    return state


def assert_same(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].device == wanted[name].device
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name]), name


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    base(), batch(), statistics("llama"), statistics("llama", first=20), gradients("llama")
    for method in METHODS:
        if method in ATTACHABLE:
            as_usual(method)
    try:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", ATTACHABLE)
def test_every_start_is_the_same(method: str, other_default: None) -> None:
    assert_same(attached(method).state_dict(), as_usual(method))


@pytest.mark.parametrize("method", ["lora", "pissa", "mica"])
def test_so_is_what_is_saved_and_loaded(method: str, other_default: None, tmp_path: Path) -> None:
    model = attached(method)
    again = load(copy.deepcopy(base()), save(model, tmp_path / "native"))
    assert_same(again.state_dict(), as_usual(method))
    plain = load(copy.deepcopy(base()), export(model, tmp_path / "plain").folder)
    for name, tensor in plain.state_dict().items():
        assert (tensor.device.type, tensor.dtype) == ("cpu", torch.float32), name


def test_so_is_what_is_collected(other_default: None) -> None:
    model = copy.deepcopy(base())
    whole = collect(model, [batch()])
    parts = collect(model, [batch()], memory_budget="40KiB")
    loss = collect_gradients(model, [batch()])
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    wanted = {name: layer.second_moment for name, layer in collect(base(), [batch()]).items()}
    assert_same({name: layer.second_moment for name, layer in whole.items()}, wanted)
    assert_same({name: layer.second_moment for name, layer in parts.items()}, wanted)
    assert_same(loss, collect_gradients(base(), [batch()]))
