"""Repair: the formula in every layer of a model, and all else about the adapter untouched."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from forgetless.adapters.folders import export, load, save
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.adapters.repair import STRENGTHS, Repairs, factors_of, put, repair, repair_folder
from forgetless.core.errors import UserError
from forgetless.core.projection import repaired
from forgetless.core.spectra import output_energy
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import Statistics
from tests.adapters.test_attachment import ATTACHABLE, logits, train, trained
from tests.adapters.test_switches import KINDS, SWITCHES, attached
from tests.families import FAMILIES


@cache
def moments(family: str, first: int) -> Statistics:
    known = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few tokens are what is wanted here
        return collect(
            known.model(), [known.batch(rows=4, seed=s) for s in range(first, first + 6)]
        )


def keep(family: str = "llama") -> Statistics:
    return moments(family, 300)


def task(family: str = "llama") -> Statistics:
    return moments(family, 400)


def base(family: str = "llama") -> nn.Module:
    model: nn.Module = FAMILIES[family].model()
    return model


def updates(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    return {layer: delta for layer, _, delta in delta_weights(model, name)}


def by_formula(
    model: PeftModel, family: str, strength: float, with_task: bool = True
) -> dict[str, Tensor]:
    """delta_W T (T + strength C)^-1 of every layer, from the whole update."""
    found = {}
    for layer, delta in updates(model).items():
        T = task(family)[layer].second_moment if with_task else None
        found[layer] = repaired(delta, keep(family)[layer].second_moment, T, strength)
    return found


def assert_updates(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for layer, delta in found.items():
        size = float(expected[layer].abs().max())
        torch.testing.assert_close(
            delta.double(), expected[layer].double(), atol=2e-6 * size + 1e-9, rtol=1e-5
        )


def from_peft(family: str = "llama", **config: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config)
    model = get_peft_model(FAMILIES[family].model(), settings)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
    return model


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


# --- the formula, in every kind of adapter ------------------------------------------------------


@pytest.mark.parametrize("method", ATTACHABLE)
def test_every_start_is_repaired(method: str) -> None:
    model = trained("llama", method)
    healed = repair(model, base(), keep(), task(), 0.3)
    assert_updates(updates(healed), by_formula(model, "llama", 0.3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_repaired(family: str) -> None:
    model = trained(family, "pissa")
    healed = repair(model, base(family), keep(family), task(family), 0.3)
    assert_updates(updates(healed), by_formula(model, family, 0.3))
    by_hand = base(family)
    with torch.no_grad():
        for layer, delta in by_formula(model, family, 0.3).items():
            linear_weight(target_layers(by_hand)[layer]).add_(delta.float())
    torch.testing.assert_close(
        logits(healed, family), logits(by_hand, family), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("switches", ["rslora", "patterns"])
def test_every_switch_is_repaired(method: str, switches: str) -> None:
    model = attached(method, **SWITCHES[switches])
    train(model, "llama", steps=2)
    healed = repair(model, base(), keep(), task())
    assert_updates(updates(healed), by_formula(model, "llama", 0.1))


def test_without_a_task_every_direction_counts_alike() -> None:
    model = trained("llama", "lora")
    healed = repair(model, base(), keep(), strength=2)
    assert_updates(updates(healed), by_formula(model, "llama", 2, with_task=False))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": r".*\.layers\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "regex", "layers", "bias"],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*lora_B.bias")  # PEFT's
def test_a_folder_of_pefts_keeps_all_but_its_a(config: dict[str, Any], tmp_path: Path) -> None:
    model = from_peft(**config)
    model.save_pretrained(tmp_path / "theirs")
    healed = repair(tmp_path / "theirs", base(), keep(), task(), 0.3)
    save(healed, tmp_path / "healed")
    (before, old), (after, new) = files(tmp_path / "theirs"), files(tmp_path / "healed")
    assert old.keys() == new.keys()
    unchanged = {key for key, tensor in old.items() if torch.equal(tensor, new[key])}
    assert unchanged == {key for key in old if ".lora_A." not in key}
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type"):
        assert (before.get(key) or {}) == (after.get(key) or {})
    alone = PeftModel.from_pretrained(base(), tmp_path / "healed")
    assert torch.equal(logits(alone, "llama"), logits(healed, "llama"))
    if not config.get("lora_bias"):
        assert_updates(updates(alone), by_formula(model, "llama", 0.3))


# --- strength 0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_strength_0_is_the_adapter_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    from_peft(**config).save_pretrained(tmp_path / "theirs")
    healed = repair(tmp_path / "theirs", base(), keep(), task(), strength=0)
    save(healed, tmp_path / "healed")
    old, new = files(tmp_path / "theirs")[1], files(tmp_path / "healed")[1]
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("method", KINDS)
def test_strength_0_of_a_start_is_its_exact_export(method: str, tmp_path: Path) -> None:
    model = trained("llama", method)
    export(model, tmp_path / "plain")
    save(model, tmp_path / "native")
    anchored = method == "pissa"
    for adapter, same in (
        (model, "plain" if anchored else "native"),
        (tmp_path / "native", "plain" if anchored else "native"),
        (tmp_path / "plain", "plain"),
    ):
        healed = repair(adapter, base(), keep(), task(), strength=0)
        again = load(base(), tmp_path / same)
        assert torch.equal(logits(healed, "llama"), logits(again, "llama"))
        ranks = {max(layer.r.values()) for layer in adapted_layers(healed).values()}
        assert ranks == {8 if anchored else 4}


# --- where it goes ------------------------------------------------------------------------------


def test_the_given_model_is_left_as_it_is() -> None:
    model = trained("llama", "pissa")
    now = logits(model, "llama")
    repair(model, base(), keep(), task())
    assert torch.equal(logits(model, "llama"), now)
    assert list(model.peft_config) == ["default"]


def test_on_its_own_base_the_repaired_adapter_comes_beside_the_old_one() -> None:
    for given in ("the model", "its base"):
        model = attached("pissa")
        train(model, "llama", steps=2)
        now, expected = logits(model, "llama"), by_formula(model, "llama", 0.1)
        on = model if given == "the model" else model.get_base_model()
        healed = repair(model, on, keep(), task())
        assert healed is model
        assert model.active_adapters == ["repaired"]
        assert_updates(updates(model, "repaired"), expected)
        model.set_adapter("default")
        assert torch.equal(logits(model, "llama"), now)


def test_a_native_folder_leaves_nothing_on_the_base_but_the_repaired_adapter(
    tmp_path: Path,
) -> None:
    model = trained("llama", "pissa")
    save(model, tmp_path / "native")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        healed = repair(tmp_path / "native", base(), keep(), task())
    assert list(healed.peft_config) == ["default"]
    assert not any("anchor" in name for name, _ in healed.named_modules())
    assert_updates(updates(healed), by_formula(model, "llama", 0.1))


def test_the_result_is_saved_and_exported_as_a_plain_lora(tmp_path: Path) -> None:
    healed = repair(trained("llama", "lora_null_v2"), base(), keep(), task())
    assert not any(weight.requires_grad for weight in healed.parameters())
    save(healed, tmp_path / "saved")
    assert not (tmp_path / "saved" / "forgetless.json").exists()
    export(healed, tmp_path / "exported")
    for folder in ("saved", "exported"):
        alone = PeftModel.from_pretrained(base(), tmp_path / folder)
        torch.testing.assert_close(logits(alone, "llama"), logits(healed, "llama"))


def test_a_folder_is_repaired_without_a_weight_of_its_base(tmp_path: Path) -> None:
    from_peft(use_rslora=True).save_pretrained(tmp_path / "theirs")
    made, chosen = repair_folder(
        tmp_path / "theirs", tmp_path / "healed", base().to("meta"), keep(), task(), 0.3
    )
    assert (made.strengths, chosen) == ([0, 0.3], 0.3)
    with_base = repair(tmp_path / "theirs", base(), keep(), task(), 0.3)
    alone = PeftModel.from_pretrained(base(), tmp_path / "healed")
    assert torch.equal(logits(alone, "llama"), logits(with_base, "llama"))
    repair_folder(tmp_path / "theirs", tmp_path / "same", base().to("meta"), keep(), strength=0)
    theirs, same = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "same")
    )
    assert theirs.keys() == same.keys()
    assert all(torch.equal(theirs[key], same[key]) for key in theirs)
    save(trained("llama", "pissa"), tmp_path / "native")
    with pytest.raises(UserError, match="forgetless export"):
        repair_folder(tmp_path / "native", tmp_path / "out", base(), keep())


# --- several strengths at once ------------------------------------------------------------------


def test_each_of_several_strengths_is_the_one_alone() -> None:
    model = from_peft()
    repairs = Repairs(factors_of(model), keep(), task(), [1, 0.1, 0.1])
    assert repairs.strengths == [0, 0.1, 1]
    for strength in (1, 0, 0.1):
        alone = updates(repair(from_peft(), base(), keep(), task(), strength))
        found = updates(put(model, repairs.A(strength)))
        assert all(torch.equal(delta, alone[layer]) for layer, delta in found.items())


def test_the_forecast_is_what_happens_to_the_outputs() -> None:
    model = from_peft()
    repairs = Repairs(factors_of(model), keep(), task(), [0.3])
    before, after = updates(model), updates(put(model, repairs.A(0.3)))
    for layer, foreseen in repairs.forecasts[0.3].items():
        C, T = keep()[layer].second_moment, task()[layer].second_moment
        kept = output_energy(after[layer], C) / output_energy(before[layer], C)
        missed = output_energy(after[layer] - before[layer], T) / output_energy(before[layer], T)
        assert foreseen.kept == pytest.approx(kept, rel=1e-3)
        assert foreseen.missed == pytest.approx(missed, rel=1e-3)


def test_auto_is_the_strongest_that_spares_the_task() -> None:
    model = from_peft()
    repairs = Repairs(factors_of(model), keep(), task())
    chosen = repairs.foreseen()
    assert repairs.forecast(chosen).missed <= 0.01
    stronger = [strength for strength in STRENGTHS if strength > chosen]
    assert all(repairs.forecast(strength).missed > 0.01 for strength in stronger)
    found = updates(repair(model, base(), keep(), task(), "auto"))
    expected = updates(put(model, repairs.A(chosen)))
    assert all(torch.equal(delta, expected[layer]) for layer, delta in found.items())


# --- models tuned in whole ----------------------------------------------------------------------


@torch.no_grad()
def tuned(family: str = "llama", everything: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = FAMILIES[family].model()
    layers = set(target_layers(model).values())
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if everything or (module in layers and weight.ndim == 2):
                weight.add_(0.02 * torch.randn(weight.shape))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tuned_model_is_repaired_in_its_linear_layers(family: str) -> None:
    model = tuned(family, everything=True)
    now = logits(model, family)
    healed: nn.Module = repair(model, base(family), keep(family), task(family), 0.3)
    assert torch.equal(logits(model, family), now)
    old, new, made = target_layers(base(family)), target_layers(model), target_layers(healed)
    for layer, module in made.items():
        delta = linear_weight(new[layer]).double() - linear_weight(old[layer]).double()
        moments = keep(family)[layer].second_moment, task(family)[layer].second_moment
        expected = linear_weight(old[layer]).double() + repaired(delta, *moments, 0.3)
        torch.testing.assert_close(linear_weight(module).double(), expected, atol=1e-6, rtol=1e-6)
    of_layers = {f"{layer}.weight" for layer in made}
    trained_weights = dict(model.named_parameters())
    for name, weight in healed.named_parameters():
        assert name in of_layers or torch.equal(weight, trained_weights[name])


def test_a_tuned_model_at_strength_0_is_itself() -> None:
    healed: nn.Module = repair(tuned(), base(), keep(), task(), 0)
    assert torch.equal(logits(healed, "llama"), logits(tuned(), "llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tuned_model_becomes_a_lora_of_a_rank(family: str, tmp_path: Path) -> None:
    """At full rank it is the repaired model; below, ranks that are too large for a layer fit."""
    whole: nn.Module = repair(tuned(family), base(family), keep(family), task(family), 0.3)
    healed = repair(tuned(family), base(family), keep(family), task(family), 0.3, rank=48)
    torch.testing.assert_close(logits(healed, family), logits(whole, family), atol=1e-3, rtol=1e-3)
    save(healed, tmp_path / "healed")
    alone = PeftModel.from_pretrained(base(family), tmp_path / "healed")
    torch.testing.assert_close(logits(alone, family), logits(healed, family), atol=1e-5, rtol=1e-5)
    small = repair(tuned(family), base(family), keep(family), task(family), 0.3, rank=3)
    assert {len(layer.lora_A["default"].weight) for layer in adapted_layers(small).values()} == {3}


def test_what_a_lora_cannot_hold_of_a_tuned_model_is_named() -> None:
    with pytest.warns(UserWarning, match=r"base's again: .*embed_tokens"):
        repair(tuned(everything=True), base(), keep(), task(), rank=2)


def test_a_tuned_folder_is_repaired(tiny_base: Path, tmp_path: Path) -> None:
    from forgetless.models.load import load_model

    model = load_model(str(tiny_base), dtype="float32")
    stats = collect(model, [{"input_ids": torch.randint(4, 100, (4, 40))}])
    with torch.no_grad():
        for layer in target_layers(model).values():
            linear_weight(layer).add_(0.02 * torch.randn(linear_weight(layer).shape))
    model.save_pretrained(tmp_path / "tuned")
    healed: nn.Module = repair(tmp_path / "tuned", str(tiny_base), stats, strength=0.5)
    name = "model.layers.0.self_attn.q_proj"
    fresh = load_model(str(tiny_base), dtype="float32")
    delta = linear_weight(model.get_submodule(name)) - linear_weight(fresh.get_submodule(name))
    expected = linear_weight(fresh.get_submodule(name)) + repaired(
        delta, stats[name].second_moment, None, 0.5
    )
    found = linear_weight(healed.get_submodule(name))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


pytest_plugins = ["tests.tiny_fixtures"]


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf"), "much", None, True])
def test_a_strength_out_of_range_is_refused(strength: Any) -> None:
    with pytest.raises(UserError, match="strength must be a number from 0, or 'auto'"):
        repair(trained("llama", "lora"), base(), keep(), task(), strength)


def test_dora_is_refused_with_the_way_and_the_way_works() -> None:
    model = attached("pissa", use_dora=True)
    train(model, "llama", steps=2)
    with pytest.raises(UserError, match="merge_and_unload"):
        repair(model, base(), keep(), task())
    merged = model.merge_and_unload()
    healed: nn.Module = repair(merged, base(), keep(), task(), 0.3)
    assert not torch.equal(logits(healed, "llama"), logits(merged, "llama"))
    assert repair(merged, base(), keep(), task(), 0.3, rank=8).peft_config["default"].r == 8


@pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")
def test_layers_without_statistics_are_named() -> None:
    attention = collect(base(), [FAMILIES["llama"].batch()], target_modules=["q_proj", "k_proj"])
    model = trained("llama", "lora")
    with pytest.raises(UserError, match=r"no statistics of the text to keep for layer .*v_proj"):
        repair(model, base(), attention, task())
    with pytest.raises(UserError, match="statistics of the new task"):
        repair(model, base(), keep(), attention)
    with pytest.raises(UserError, match="are of 3 inputs, and it has 32"):
        repair(trained("gpt2", "lora"), base("gpt2"), keep("gpt2"), _other_sizes())


@pytest.mark.filterwarnings("ignore:.*1 of its 14 layers change nothing")
def test_a_layer_that_no_input_reached_stays_and_counts_nowhere() -> None:
    """PEFT adapts such layers too; B stays zero, and there are no statistics of them."""
    model = from_peft()
    still, *others = factors_of(model)
    adapted_layers(model)[still].lora_B["default"].weight.data.zero_()
    known = Statistics({name: keep()[name] for name in others})
    made = repair(model, base(), keep=known)
    assert torch.equal(factors_of(made)[still].A, factors_of(model)[still].A)
    assert not torch.equal(factors_of(made)[others[0]].A, factors_of(model)[others[0]].A)
    forecasts = Repairs(factors_of(model), keep(), strengths=[0.1]).forecasts
    assert set(forecasts[0.0]) == set(forecasts[0.1]) == set(others)


def _other_sizes() -> Statistics:
    from forgetless.statistics.moments import LayerStatistics

    small = LayerStatistics(torch.eye(3).double(), 9)
    return Statistics(dict.fromkeys(keep("gpt2"), small))


def test_kinds_of_lora_that_are_no_b_a_are_refused() -> None:
    activated: dict[str, Any] = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    with pytest.raises(UserError, match="alora_invocation_tokens"):
        repair(from_peft(**activated), base(), keep(), task())
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(FAMILIES["llama"].model(), config)
    with pytest.raises(UserError, match="has changed the base"):
        repair(model, base(), keep(), task())


def test_options_that_do_not_fit_the_kind_are_refused() -> None:
    with pytest.raises(UserError, match="keeps its own"):
        repair(trained("llama", "lora"), base(), keep(), task(), rank=2)
    with pytest.raises(UserError, match="'auto' is for adapters"):
        repair(tuned(), base(), keep(), task(), "auto")
    with pytest.raises(UserError, match="was not tuned from this base"):
        repair(tuned("gpt2"), base(), keep(), task())
    with pytest.raises(UserError, match="no adapter"):
        repair("nowhere", base(), keep(), task())


@pytest.mark.filterwarnings("ignore:what is trained beside")
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
def test_an_adapter_with_biases_is_repaired_alone(tmp_path: Path) -> None:
    """PEFT puts no second one on a model."""
    model = from_peft(target_modules=["q_proj"], bias="lora_only")
    model.save_pretrained(tmp_path)
    wanted = by_formula(model, "llama", 0.3)
    assert_updates(updates(repair(tmp_path, base(), keep(), task(), 0.3)), wanted)
    with pytest.raises(UserError, match="on a fresh base"):
        repair(model, model, keep(), task(), 0.3)
    with pytest.raises(UserError, match="on a fresh base"):
        load(model, tmp_path, adapter_name="second")


@pytest.mark.filterwarnings("ignore:what is trained beside")
def test_an_adapter_with_token_rows_is_repaired_alone_and_beside_itself(tmp_path: Path) -> None:
    model = from_peft(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model.save_pretrained(tmp_path)
    wanted = by_formula(model, "llama", 0.3)
    assert_updates(updates(repair(tmp_path, base(), keep(), task(), 0.3)), wanted)
    beside = repair(model, model, keep(), task(), 0.3)
    assert_updates(updates(beside, "repaired"), wanted)
    again = repair(model, base(), keep(), task(), 0.3)
    assert torch.equal(logits(beside, "llama"), logits(again, "llama"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_is_trained_besides_is_kept_and_named(tmp_path: Path) -> None:
    model = from_peft(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"left as it is: .*lm_head"):
        healed = repair(tmp_path / "theirs", base(), keep(), task(), 0)
    assert torch.equal(logits(healed, "llama"), logits(model, "llama"))
