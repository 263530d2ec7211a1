"""The spectra of adapters, against each layer's whole update and its own full SVD."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.adapters.folders import export, save
from forgetless.adapters.layer import delta_weights
from forgetless.adapters.spectra import LayerSpectra, Spectra, spectra
from forgetless.core import spectra as of
from forgetless.core.errors import UserError
from forgetless.models.targets import target_layers
from tests.adapters.test_attachment import logits, statistics, train, trained
from tests.adapters.test_repair import base, from_peft, keep, tuned
from tests.adapters.test_switches import attached
from tests.families import FAMILIES


def assert_of(found: LayerSpectra, W: Tensor, delta: Tensor, C: Tensor | None) -> None:
    """By dense matrices and torch's SVD alone."""
    W, delta = W.double(), delta.double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    D = torch.linalg.svdvals(delta)
    near: Any = lambda value: pytest.approx(value, rel=1e-4, abs=1e-6)  # noqa: E731 - float32 sums
    assert found.relative_update == near(float(delta.norm() / W.norm()))
    assert found.update.effective == pytest.approx(of.effective_rank(D[: _rank(D)]), rel=1e-2)
    assert found.update.stable == near(of.stable_rank(D))
    assert found.update.at_90 == of.rank_at_energy(D)
    assert found.weight is not None
    assert found.weight.effective == near(of.effective_rank(S))
    M = U.mT @ delta @ Vh.mT
    assert found.rotation == near(
        float((M - M.diagonal().diag()).square().sum() / M.square().sum())
    )
    k = min(_rank(D), len(S))
    inside = U[:, :k].mT @ delta @ Vh[:k].mT
    assert found.head_overlap == near(float(inside.norm() / delta.norm()))
    turned = torch.linalg.svd(W + delta, full_matrices=False).U[:, :10]
    cosines = (U.mT @ turned).abs().max(dim=0).values
    assert found.intruders == tuple(i for i, c in enumerate(cosines.tolist()) if c < 0.5)
    if C is not None:
        change = ((delta @ C * delta).sum() / (W @ C * W).sum()).sqrt()
        assert found.output_change == near(float(change))
        values, V = torch.linalg.eigh(C)
        assert found.activations is not None
        assert found.activations.effective == near(of.effective_rank(values.clamp(min=0).sqrt()))
        shares = (delta @ V.flip(1)).square().sum(dim=0) / delta.square().sum()
        assert found.update_on_inputs is not None
        assert sum(found.update_on_inputs) == near(1)
        cut = round(len(C) / 10)
        assert found.update_on_inputs[0] == near(float(shares[:cut].sum()))


def _rank(S: Tensor) -> int:
    return int((1e-6 * S.max() < S).sum())


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_null_v2", "mica"])
def test_every_layer_of_a_start(method: str) -> None:
    model = trained("llama", method)
    found = spectra(model, stats=keep())
    for name, W, delta in delta_weights(model):
        assert_of(found[name], W, delta, keep()[name].second_moment)
    assert list(found) == [name for name, _, _ in delta_weights(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = trained(family, "pissa")
    found = spectra(model)
    for name, W, delta in delta_weights(model):
        assert_of(found[name], W, delta, None)


def test_dora_is_looked_at_by_its_whole_update() -> None:
    model = attached("pissa", use_dora=True)
    train(model, "llama", steps=2)
    found = spectra(model, stats=keep())
    for name, W, delta in delta_weights(model):
        assert_of(found[name], W, delta, keep()[name].second_moment)
    assert found["model.layers.0.self_attn.q_proj"].update.effective > 8


def test_folders_say_the_same_as_the_model_and_leave_the_base_alone(tmp_path: Path) -> None:
    model = trained("llama", "pissa")
    save(model, tmp_path / "native")
    export(model, tmp_path / "plain")
    expected = spectra(model, stats=keep())
    for folder in ("native", "plain"):
        fresh = base()
        before = logits(fresh, "llama")
        found = spectra(tmp_path / folder, fresh, keep())
        assert torch.equal(logits(fresh, "llama"), before)
        assert list(target_layers(fresh)) == list(found)
        for name, layer in found.items():
            assert layer.rotation == pytest.approx(expected[name].rotation, rel=1e-4)
            assert layer.update.stable == pytest.approx(expected[name].update.stable, rel=1e-4)
            assert layer.output_change == pytest.approx(expected[name].output_change, rel=1e-4)


@pytest.mark.filterwarnings("error:Adapter .* was active which is now deleted")
def test_a_folder_beside_another_adapter_comes_off_again(tmp_path: Path) -> None:
    from_peft().save_pretrained(tmp_path / "theirs")
    model = from_peft()
    now = logits(model, "llama")
    alone = spectra(tmp_path / "theirs", base()).by_module["q_proj"]["rotation"]
    beside = spectra(tmp_path / "theirs", model).by_module["q_proj"]["rotation"]
    assert beside == pytest.approx(alone, rel=1e-4)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, "llama"), now)


def test_a_model_tuned_in_whole() -> None:
    model, before = tuned(), base()
    found = spectra(model, before, keep())
    for name, layer in target_layers(before).items():
        delta = model.get_submodule(name).weight - layer.weight  # type: ignore[operator]
        assert isinstance(layer.weight, Tensor)
        assert_of(found[name], layer.weight.detach(), delta.detach(), keep()[name].second_moment)
        assert found[name].A_on_inputs is None


def test_A_is_A0_and_its_move_where_there_is_an_anchor() -> None:
    model = attached("lora_null_v1")
    train(model, "llama", steps=1)
    found = spectra(model, stats=statistics("llama"))
    for layer in found.values():
        assert layer.A_on_inputs is not None
        assert len(layer.A_on_inputs) == 10
        assert sum(layer.A_on_inputs) == pytest.approx(1, rel=1e-5)
        assert layer.A_on_inputs[-1] + layer.A_on_inputs[-2] > 0.9  # it started in the tail


def test_without_the_weights_the_factors_still_tell_their_ranks() -> None:
    model = trained("llama", "pissa")
    quick, whole = spectra(model, of_weights=False), spectra(model)
    for name, layer in quick.items():
        assert layer.update == whole[name].update
        assert layer.relative_update == whole[name].relative_update
        assert (layer.weight, layer.rotation, layer.intruders, layer.head_overlap) == (None,) * 4


def test_means_by_module_and_rows() -> None:
    found = spectra(trained("llama", "pissa"), stats=keep())
    q = found.by_module["q_proj"]
    layers = [layer for layer in found.values() if layer.module == "q_proj"]
    assert q["layers"] == 2
    assert q["rotation"] == pytest.approx(sum(layer.rotation or 0 for layer in layers) / 2)
    assert q["update_rank_at_90"] == sum(layer.update.at_90 for layer in layers) / 2
    assert found.overall["layers"] == len(found) == 14
    row = found.rows[0]
    assert row["layer"] == "model.layers.0.self_attn.q_proj"
    assert (row["module"], row["part"], row["block"]) == ("q_proj", "attention", 0)
    assert row["activations_rank_effective"] > row["activations_rank_stable"] >= 1


def test_json_and_back() -> None:
    found = spectra(trained("llama", "pissa"), stats=keep())
    again = Spectra.from_json(json.loads(json.dumps(found.to_json())))
    assert dict(again) == dict(found)
    assert again.overall == found.overall


def test_layers_without_statistics_have_all_but_those_numbers() -> None:
    from forgetless.statistics.collection import collect

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = collect(base(), [FAMILIES["llama"].batch()], target_modules=["q_proj"])
    found = spectra(trained("llama", "lora"), stats=some)
    assert found["model.layers.0.self_attn.q_proj"].output_change is not None
    assert found["model.layers.0.self_attn.k_proj"].output_change is None
    assert found.by_module["k_proj"]["output_change"] is None
    assert not math.isnan(found.overall["output_change"] or math.nan)


class TestMistakes:
    def test_no_base(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="give the base"):
            spectra(tmp_path)

    def test_another_base(self) -> None:
        with pytest.raises(UserError, match="was not tuned from this base"):
            spectra(tuned(), base("gpt2"))

    def test_nothing_to_look_at(self) -> None:
        with pytest.raises(UserError, match="zero in every linear layer"):
            spectra(attached("pissa"))
        with pytest.raises(UserError, match="zero in every linear layer"):
            spectra(base(), base())

    def test_no_such_adapter(self) -> None:
        model: PeftModel | nn.Module = trained("llama", "lora")
        with pytest.raises(UserError, match="no adapter 'other'"):
            spectra(model, adapter_name="other")
