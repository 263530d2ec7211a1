"""Gradients of the mean token loss: those of autograd, whatever the batches and the passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import forgetless
from forgetless.core.errors import UserError
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight
from forgetless.statistics.gradients import Gradients, collect_gradients
from tests.families import FAMILIES, language_batch
from tests.statistics.test_collection import Batch, batched, examples

FAMILY = pytest.mark.parametrize("family", FAMILIES)
EXACT = {"bert", "vit"}
"""Families that compute in float64 throughout; the others take the loss in float32."""


def double(rows: list[Batch]) -> list[Batch]:
    return [{n: v.double() if v.is_floating_point() else v for n, v in r.items()} for r in rows]


def reference(family: str, model: nn.Module, rows: list[Batch]) -> dict[str, Tensor]:
    """Autograd's gradients of the mean loss, one unpadded example at a time."""
    weights: dict[str, Any] = {n: layer.weight for n, layer in target_layers(model).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    shifted = int(FAMILIES[family].batch is language_batch and family != "bert")
    total, count = torch.zeros(()), 0
    for row in rows:
        learned = row["labels"].numel() - shifted
        total, count = total + model(**row).loss * learned, count + learned
    gradients = torch.autograd.grad(total / count, list(weights.values()))
    transposed = family == "gpt2"
    return {n: g.T if transposed else g for n, g in zip(weights, gradients, strict=True)}


def error(found: Gradients, expected: dict[str, Tensor]) -> float:
    """The largest error of any layer, relative to the largest gradient."""
    assert list(found) == list(expected)
    scale = max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm()) for n, g in expected.items()) / scale


@FAMILY
def test_they_are_those_of_autograd_whatever_the_batches(family: str) -> None:
    model = FAMILIES[family].model(torch.float64)
    rows = double(examples(family))
    expected = reference(family, model, rows)
    for size, side in ((1, "right"), (2, "left"), (5, "right")):
        found = collect_gradients(model, batched(rows, size, side))
        assert error(found, expected) < (1e-11 if family in EXACT else 1e-6)
    assert all(gradient.dtype == torch.float64 for gradient in found.values())
    assert all(g.shape == linear_weight(target_layers(model)[n]).shape for n, g in found.items())


@FAMILY
def test_passes_do_not_matter(family: str) -> None:
    model = FAMILIES[family].model(torch.float64)
    batches = batched(double(examples(family)), 2)
    whole = collect_gradients(model, iter(batches))
    widest = 8 * max(gradient.numel() for gradient in whole.values())
    for budget in (widest, 3 * widest):
        found = collect_gradients(model, iter(batches), memory_budget=budget)
        assert error(found, dict(whole)) < 1e-14
        assert found.metadata == whole.metadata


def test_the_loss_is_the_mean_over_learned_tokens() -> None:
    model, batch = FAMILIES["llama"].model(torch.float64), language_batch()
    batch["labels"][0, :6] = -100
    found = collect_gradients(model, [batch])
    assert found.metadata["tokens"] == int((batch["labels"][:, 1:] != -100).sum())
    assert found.metadata["loss"] == pytest.approx(model(**batch).loss.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_give_float32(dtype: torch.dtype) -> None:
    rows = examples("llama")
    exact = reference("llama", FAMILIES["llama"].model(torch.float64), rows)
    found = collect_gradients(FAMILIES["llama"].model(dtype), batched(rows, 2))
    assert error(found, exact) < (1e-5 if dtype == torch.float32 else 0.1)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_a_pass_goes_back_only_as_far_as_needed() -> None:
    model = FAMILIES["llama"].model()
    reached = []
    model.model.layers[0].register_full_backward_hook(lambda *_: reached.append(0))
    collect_gradients(model, [language_batch()], ["model.layers.1.self_attn.q_proj"])
    assert reached == []


def test_the_model_is_left_as_it_was() -> None:
    model = FAMILIES["llama"].model().train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asked = [weight.requires_grad for weight in model.parameters()]
    collect_gradients(model, [language_batch()])
    assert model.training
    assert [weight.requires_grad for weight in model.parameters()] == asked
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_of_a_peft_model_the_base_is_measured() -> None:
    plain = collect_gradients(FAMILIES["llama"].model(), [language_batch()])
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(FAMILIES["llama"].model(), config)
    found = collect_gradients(model, [language_batch()])
    assert list(found) == list(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_lora_ga_starts_from_them() -> None:
    model = FAMILIES["llama"].model()
    gradients = collect_gradients(model, [language_batch()])
    attached = forgetless.attach(model, "lora_ga", rank=2, alpha=2, gradients=gradients)
    assert attached.peft_config["default"].start["method"] == "lora_ga"


def test_save_and_load_lose_nothing(tmp_path: Path) -> None:
    found = collect_gradients(FAMILIES["llama"].model(), [language_batch()])
    file = found.save(tmp_path / "new")
    assert file == tmp_path / "new" / "gradients.safetensors"
    for loaded in (Gradients.load(file), Gradients.load(file.parent)):
        assert set(loaded) == set(found)
        assert all(torch.equal(loaded[name], found[name]) for name in found)
        assert loaded.metadata == found.metadata
    with pytest.raises(UserError, match="no gradients at"):
        Gradients.load(tmp_path)
    save_file({"a": torch.eye(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not hold gradients"):
        Gradients.load(tmp_path / "a.safetensors")


def test_what_cannot_be_is_refused() -> None:
    model, batch = FAMILIES["llama"].model(), language_batch()
    without = {name: value for name, value in batch.items() if name != "labels"}
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(UserError, match="batch 1 has no 'labels'"):
        collect_gradients(model, [batch, without])
    for batches in ([], [nothing]):
        with pytest.raises(UserError, match="nothing to learn"):
            collect_gradients(model, batches)
    with pytest.raises(UserError, match="at least 12288 bytes"):
        collect_gradients(model, [batch], memory_budget=100)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="the loss of batch 0 is nan"):
        collect_gradients(model, [batch])
