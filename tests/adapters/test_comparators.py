"""Comparators on models: in place they are as merged, and afterwards all is as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

from forgetless.adapters.comparators import compared, updated
from forgetless.adapters.folders import export
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.adapters.settings import Comparator, Dare, HardProjection, Intruders, OPLoRA, Ties
from forgetless.core.errors import UserError
from forgetless.core.spectra import dense
from forgetless.models.state import adapter_off
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight
from forgetless.statistics.collection import collect
from tests.adapters.test_attachment import logits, train, trained
from tests.adapters.test_switches import attached
from tests.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")

WANTED: list[Comparator] = [
    HardProjection(kind="hard_projection", energy=0.9),
    OPLoRA(kind="oplora", directions=2),
    Dare(kind="dare"),
    Intruders(kind="intruders", keep=0.0, threshold=0.9),
]


def statistics(family: str) -> Any:
    ids = torch.randint(4, 90, (4, 24), generator=torch.Generator().manual_seed(3))
    return collect(FAMILIES[family].model(), [{"input_ids": ids}])


def merged(family: str, updates: Any) -> Any:
    """The family's fresh base with these updates added to its weights."""
    base = FAMILIES[family].model()
    layers = target_layers(base)
    with torch.no_grad():
        for name, update in updates.items():
            linear_weight(layers[name]).add_(dense(update).float())
    return base


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def dora() -> Any:
    model = attached("lora", use_dora=True)
    train(model, "llama", steps=2)
    return model


@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: wanted.kind)
@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "gpt2"])
def test_in_place_an_update_is_what_it_is_merged(wanted: Any, kind: str) -> None:
    family = "gpt2" if kind == "gpt2" else "llama"
    model: Any = dora() if kind == "dora" else trained(family, "pissa" if kind == "gpt2" else kind)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    now, base = logits(model, family), logits(FAMILIES[family].model(), family)
    made = compared(wanted, model, model, statistics(family))
    with updated(model, made.updates) as changed:
        assert changed is model
        found = logits(model, family)
        with adapter_off(model):
            assert torch.equal(logits(model, family), base)
    same(found, logits(merged(family, made.updates), family))
    assert not torch.equal(found, now)
    assert torch.equal(logits(model, family), now)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert (made.lost_at_rank is not None) == (wanted.kind == "intruders" and kind != "dora")


def test_its_own_update_is_the_adapter() -> None:
    model = trained("llama", "pissa")
    now = logits(model, "llama")
    with updated(model, {name: delta for name, _, delta in delta_weights(model)}):
        same(logits(model, "llama"), now)


def tuned(family: str) -> Any:
    model = FAMILIES[family].model()
    with torch.no_grad():
        for number, layer in enumerate(target_layers(model).values()):
            draw = torch.Generator().manual_seed(number)
            weight = linear_weight(layer)
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    return model


@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: wanted.kind)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tuned_model_is_treated_likewise(wanted: Any, family: str) -> None:
    model, base = tuned(family), FAMILIES[family].model()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    now = logits(model, family)
    made = compared(wanted, model, base, statistics(family))
    with updated(model, made.updates, base):
        same(logits(model, family), logits(merged(family, made.updates), family))
    assert torch.equal(logits(model, family), now)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert made.lost_at_rank is None


@pytest.mark.parametrize("kind", ["adapter", "tuned"])
def test_ties_merges_with_further_adapters(kind: str, tmp_path: Path) -> None:
    export(trained("llama", "lora"), tmp_path / "other")
    wanted = Ties(kind="ties", adapters=[str(tmp_path / "other")], keep=1.0)
    stats, is_adapter = statistics("llama"), kind == "adapter"
    model: Any = trained("llama", "pissa") if is_adapter else tuned("llama")
    base = model if is_adapter else FAMILIES["llama"].model()
    now = logits(model, "llama")
    made = compared(wanted, model, base, stats)
    if is_adapter:
        assert list(model.peft_config) == ["default"]
        own = {name: delta for name, _, delta in delta_weights(model)}
    else:
        layers = target_layers(base)
        own = {
            n: linear_weight(m) - linear_weight(layers[n]) for n, m in target_layers(model).items()
        }
    for name, _, theirs in delta_weights(trained("llama", "lora")):
        one, other = own[name].double(), theirs.double()
        agree = one.sign() == other.sign()
        larger = torch.where(one.abs() > other.abs(), one, other)
        expected = torch.where(agree, (one + other) / 2, larger)
        torch.testing.assert_close(dense(made.updates[name]), expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(logits(model, "llama"), now)


def test_ties_refuses_an_adapter_of_more_layers(tmp_path: Path) -> None:
    export(trained("llama", "lora"), tmp_path / "other")
    wanted = Ties(kind="ties", adapters=[str(tmp_path / "other")])
    model: Any = attached("lora", target_modules=["q_proj"])
    train(model, "llama", steps=2)
    with pytest.raises(UserError, match="changes layers that are not trained here"):
        compared(wanted, model, model, statistics("llama"))


def test_cut_to_their_rank_reduced_intruders_are_those_of_peft() -> None:
    model: Any = attached("lora")
    train(model, "llama", steps=2)
    keep = 0.75
    wanted = Intruders(kind="intruders", keep=keep, threshold=0.9)
    made = compared(wanted, model, model, statistics("llama"))
    before = {name: delta.double() for name, _, delta in delta_weights(model)}
    model.peft_config["default"].start = None
    reduce_intruder_dimension(
        model, "default", "mitigated", 10, 0.9, mitigation_lambda=keep, logging_sink=None
    )
    changed = 0
    for name, layer in adapted_layers(model, "mitigated").items():
        U, S, Vh = torch.linalg.svd(dense(made.updates[name]), full_matrices=False)
        ours, theirs = U[:, :4] * S[:4] @ Vh[:4], layer.get_delta_weight("mitigated").double()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        changed += not torch.allclose(theirs, before[name], atol=1e-4)
    assert changed > len(before) / 2


def test_by_the_moments_a_projection_leaves_what_it_leaves() -> None:
    """What all energy but a hundredth is projected out of disturbs at most what that reads."""
    model, stats = trained("llama", "lora"), statistics("llama")
    kept = [
        compared(
            HardProjection(kind="hard_projection", energy=e), model, model, stats
        ).forecast.kept
        for e in (0.5, 0.9, 0.99, 1.0)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 1e-12
    nothing = compared(Dare(kind="dare", drop=0.0), model, model, stats).forecast
    assert nothing.kept == pytest.approx(1)
    assert nothing.missed == pytest.approx(0, abs=1e-12)


def test_layers_without_statistics_are_named() -> None:
    model = trained("llama", "lora")
    with pytest.raises(UserError, match="no statistics"):
        compared(
            WANTED[0],
            model,
            model,
            collect(
                FAMILIES["llama"].model(), [{"input_ids": torch.arange(4, 20)[None]}], ["q_proj"]
            ),
        )
