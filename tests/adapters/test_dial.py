"""The dial: the base at 0, the adapter at 1, W + s · delta_W between and beyond, then undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from forgetless.adapters.dial import dial, residual
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.core.errors import UserError
from forgetless.models.state import adapter_off
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight
from tests.adapters.test_attachment import ATTACHABLE, logits, train, trained
from tests.adapters.test_switches import KINDS, SWITCHES, attached
from tests.families import FAMILIES

SCALES = [-1, -0.5, 0, 0.3, 0.5, 1, 2]


@torch.no_grad()
def merged_by_hand(model: PeftModel, family: str, scale: float) -> nn.Module:
    """The family's fresh base with scale times the model's update added to its weights."""
    base: nn.Module = FAMILIES[family].model()
    layers = target_layers(base)
    for name, _, delta in delta_weights(model):
        linear_weight(layers[name]).add_(scale * delta)
    return base


def assert_turned(model: PeftModel, family: str) -> None:
    """At every scale, and undone after each; nobody else's state is touched."""
    now = logits(model, family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    needed = [weight.requires_grad for weight in model.parameters()]
    base = logits(FAMILIES[family].model(), family)
    for scale in SCALES:
        with dial(model, scale) as turned:
            assert turned is model
            found = logits(model, family)
        if scale in (0, 1):
            assert torch.equal(found, base if scale == 0 else now)
        else:
            assert not torch.equal(found, now)
            by_hand = logits(merged_by_hand(model, family, scale), family)
            torch.testing.assert_close(found, by_hand, atol=1e-5 * float(now.abs().max()), rtol=0)
        assert torch.equal(logits(model, family), now)
    assert [weight.requires_grad for weight in model.parameters()] == needed
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("method", ATTACHABLE)
def test_every_method_is_turned(method: str) -> None:
    assert_turned(trained("llama", method), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_turned(family: str) -> None:
    assert_turned(trained(family, "pissa"), family)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_switch_is_turned(method: str, switches: str) -> None:
    model = attached(method, **SWITCHES[switches])
    train(model, "llama", steps=2)
    assert_turned(model, "llama")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    ],
    ids=["plain", "dora", "rslora and patterns"],
)
def test_an_adapter_of_peft_alone_is_turned(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **config)
    model = get_peft_model(FAMILIES["llama"].model(), settings)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn(weight.shape))
    assert_turned(model, "llama")


@pytest.mark.parametrize("switches", [{}, {"use_dora": True}])
def test_a_base_in_16_bits_is_the_base_at_0_and_the_adapter_at_1(switches: dict[str, Any]) -> None:
    model = attached("pissa", dtype=torch.bfloat16, **switches)
    train(model, "llama", steps=2)
    now = logits(model, "llama")
    with dial(model, 0):
        assert torch.equal(
            logits(model, "llama"), logits(FAMILIES["llama"].model(torch.bfloat16), "llama")
        )
    with dial(model, 1):
        assert torch.equal(logits(model, "llama"), now)


def test_dials_within_dials_multiply() -> None:
    model = trained("llama", "pissa")
    with dial(model, 0.25):
        quarter = logits(model, "llama")
    with dial(model, 0.5), dial(model, 0.5):
        assert torch.equal(logits(model, "llama"), quarter)
    with dial(model, 0.5), dial(model, 0), dial(model, 2):
        assert torch.equal(logits(model, "llama"), logits(FAMILIES["llama"].model(), "llama"))


@pytest.mark.parametrize("switches", [{}, {"use_dora": True}])
def test_switching_the_adapter_off_within_it_does_not_undo_it(switches: dict[str, Any]) -> None:
    model = attached("pissa", **switches)
    train(model, "llama", steps=2)
    base = logits(FAMILIES["llama"].model(), "llama")
    for scale in (0, 0.5):
        with dial(model, scale):
            turned = logits(model, "llama")
            with adapter_off(model):
                assert torch.equal(logits(model, "llama"), base)
            assert torch.equal(logits(model, "llama"), turned)


def test_only_the_active_adapter_is_turned() -> None:
    model = attached("lora")
    train(model, "llama", steps=2)
    first = logits(model, "llama")
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    with dial(model, 0.5):
        half = logits(model, "llama")
    assert not torch.equal(half, first)
    model.set_adapter("other")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with dial(model, 0.5):
        found = {item for layer in layers for item in layer.scaling.items()}
    assert found == {("default", 1.5), ("other", 2.0)}


def test_it_is_undone_when_something_fails() -> None:
    model = trained("llama", "pissa")
    now = logits(model, "llama")
    for scale in (0, 0.5):
        with pytest.raises(RuntimeError, match="on its way"), dial(model, scale):
            raise RuntimeError("on its way")
        assert torch.equal(logits(model, "llama"), now)


@pytest.mark.parametrize("switches", ["dora", "rslora"])
def test_a_merge_within_it_adds_so_much(switches: str) -> None:
    model = attached("pissa", **SWITCHES[switches])
    train(model, "llama", steps=2)
    by_hand = logits(merged_by_hand(model, "llama", 0.5), "llama")
    with dial(model, 0.5):
        alone = model.merge_and_unload()
    torch.testing.assert_close(logits(alone, "llama"), by_hand, atol=1e-4, rtol=1e-5)


def test_what_is_left_merged_is_refused() -> None:
    model = attached("lora")
    train(model, "llama", steps=2)
    with pytest.raises(UserError, match="unmerge_adapter"), dial(model, 0.5):
        model.merge_adapter()
    with pytest.raises(UserError, match="unmerge_adapter"), dial(model, 0.5):
        pass


# --- what is trained in whole beside the adapter ------------------------------------------------


def with_saved_modules(family: str, module: str) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=[module])
    model = get_peft_model(FAMILIES[family].model(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
    return model


def saved_weight(model: PeftModel, module: str) -> Tensor:
    found: Tensor = model.get_base_model().get_submodule(module).modules_to_save["default"].weight
    return found


def test_a_language_models_saved_modules_are_mixed_with_the_bases() -> None:
    model = with_saved_modules("llama", "lm_head")
    now, base = logits(model, "llama"), FAMILIES["llama"].model()
    weight = saved_weight(model, "lm_head").clone()
    with dial(model, 0):
        assert torch.equal(logits(model, "llama"), logits(base, "llama"))
    with dial(model, 0.25):
        expected = base.lm_head.weight + 0.25 * (weight - base.lm_head.weight)
        torch.testing.assert_close(saved_weight(model, "lm_head"), expected)
    assert torch.equal(saved_weight(model, "lm_head"), weight)
    assert torch.equal(logits(model, "llama"), now)


def test_a_classifier_keeps_its_trained_head_whatever_the_scale() -> None:
    model = with_saved_modules("vit", "classifier")
    weight = saved_weight(model, "classifier").clone()
    alone = FAMILIES["vit"].model()
    with torch.no_grad():
        alone.classifier.weight.copy_(weight)
        alone.classifier.bias.copy_(
            model.get_base_model().classifier.modules_to_save["default"].bias
        )
    with dial(model, 0):
        assert torch.equal(saved_weight(model, "classifier"), weight)
        assert torch.equal(logits(model, "vit"), logits(alone, "vit"))


# --- models tuned in whole ----------------------------------------------------------------------


@torch.no_grad()
def tuned(family: str) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = FAMILIES[family].model()
    for weight in model.parameters():
        weight.add_(0.02 * torch.randn(weight.shape))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_model_tuned_in_whole_is_turned_towards_its_base(family: str) -> None:
    model, base = tuned(family), FAMILIES[family].model()
    now, before = logits(model, family), logits(base, family)
    with dial(model, 0, base=base):
        assert torch.equal(logits(model, family), before)
    with dial(model, 1, base=base):
        assert torch.equal(logits(model, family), now)
    by_hand = FAMILIES[family].model()
    with torch.no_grad():
        for (name, weight), tuned_weight in zip(
            by_hand.named_parameters(), dict(model.named_parameters()).values(), strict=True
        ):
            assert name
            weight.lerp_(tuned_weight, 0.4)
    with dial(model, 0.4, base=base):
        torch.testing.assert_close(
            logits(model, family), logits(by_hand, family), atol=1e-4, rtol=1e-5
        )
    assert torch.equal(logits(model, family), now)


def test_a_tuned_classifier_keeps_its_head() -> None:
    model, base = tuned("vit"), FAMILIES["vit"].model()
    with torch.no_grad():
        base.classifier.weight.copy_(model.classifier.weight)  # type: ignore[union-attr]
        base.classifier.bias.copy_(model.classifier.bias)  # type: ignore[union-attr]
    with dial(model, 0, base=FAMILIES["vit"].model()):
        assert torch.equal(logits(model, "vit"), logits(base, "vit"))


def test_another_base_is_refused() -> None:
    with pytest.raises(UserError, match="did not come from this base"):
        dial(tuned("llama"), 0.5, base=FAMILIES["gpt2"].model()).__enter__()


# --- the base without the start ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pissa", "lora_null_v1"])
@pytest.mark.parametrize("switches", [{}, {"use_rslora": True}])
def test_the_residual_is_the_base_without_the_start(method: str, switches: dict[str, Any]) -> None:
    model = attached(method, **switches)
    train(model, "llama", steps=2)
    now = logits(model, "llama")
    by_hand: nn.Module = FAMILIES["llama"].model()
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            anchor = layer.lora_anchor["default"]
            start = layer.scaling["default"] * anchor.anchor_B @ anchor.anchor_A
            linear_weight(target_layers(by_hand)[name]).sub_(start)
    with residual(model) as alone:
        torch.testing.assert_close(
            logits(alone, "llama"), logits(by_hand, "llama"), atol=1e-4, rtol=1e-4
        )
    assert torch.equal(logits(model, "llama"), now)


def test_without_an_anchor_there_is_no_residual() -> None:
    with pytest.raises(UserError, match="no anchored start"):
        residual(trained("llama", "lora")).__enter__()


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", None, True])
def test_a_scale_that_is_no_finite_number_is_refused(scale: Any) -> None:
    with pytest.raises(UserError, match="finite number"):
        dial(trained("llama", "pissa"), scale).__enter__()


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="pass base="):
        dial(FAMILIES["llama"].model(), 0.5).__enter__()


def test_what_no_scale_can_turn_is_refused_by_name() -> None:
    model = get_peft_model(
        FAMILIES["llama"].model(), LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    )
    with pytest.raises(UserError, match="biases"):
        dial(model, 0.5).__enter__()
    other = get_peft_model(
        FAMILIES["llama"].model(),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    )
    with pytest.raises(UserError, match="no LoRA adapter"):
        dial(other, 0.5).__enter__()
    tokens = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    with pytest.raises(UserError, match="TrainableTokens"):
        dial(get_peft_model(FAMILIES["llama"].model(), tokens), 0.5).__enter__()
