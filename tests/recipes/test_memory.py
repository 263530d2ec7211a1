"""The memory of a run, told from shapes alone, is what a real step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from forgetless import attach, collect
from forgetless.adapters.settings import AdapterSettings
from forgetless.models.targets import target_layers
from forgetless.recipes.memory import RunMemory, StepMemory, _Alive, around_step, step_memory
from forgetless.recipes.recipe import Recipe
from forgetless.training.settings import TrainingSettings

SHAPES = {
    "narrow": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    "wide": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 1},
    "large vocabulary": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 1,
        "vocab_size": 4000,
    },
}


def llama(shapes: str, device: str) -> LlamaForCausalLM:
    settings: dict[str, Any] = {"vocab_size": 500, "num_attention_heads": 4, **SHAPES[shapes]}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**settings))


def told(
    shapes: str = "narrow", method: str = "lora", length: int = 48, **training: Any
) -> StepMemory:
    settings = {"epochs": 1.0, "batch_size": 2, **training}
    return step_memory(
        llama(shapes, "meta"),
        AdapterSettings(method=method, rank=8),
        TrainingSettings(**settings),
        length=length,
    )


def really_alive(model: Any, *, gradients: bool) -> int:
    """Most bytes alive in a step of 2 x 48 on real tensors, beside the weights."""
    for weight in model.parameters():
        if gradients and weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    there = [*model.parameters(), *model.buffers()]
    there += [weight.grad for weight in model.parameters() if weight.grad is not None]
    tokens = torch.zeros((2, 48), dtype=torch.long)
    with _Alive(there) as alive:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return int(alive.most)


@pytest.mark.parametrize("method", ["full", "lora", "pissa"])
@pytest.mark.parametrize("shapes", ["narrow", "large vocabulary"])
def test_the_peak_is_that_of_a_real_step(shapes: str, method: str) -> None:
    real: Any = llama(shapes, "cpu")
    if method != "full":
        real = attach(real, method, rank=8)
    real.train()
    accumulating = told(shapes, method, gradient_accumulation=2)
    once = told(shapes, method)
    first = really_alive(real, gradients=False)
    assert once.gradients + once.activations == pytest.approx(first, rel=0.04)
    again = really_alive(real, gradients=True)
    assert accumulating.activations == pytest.approx(again, rel=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_a_mixture_of_experts_too_the_peak_is_that_of_a_real_step(dtype: torch.dtype) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=500, **heads, **SHAPES["narrow"])
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(dtype)
    training = TrainingSettings(epochs=1.0, batch_size=2)
    found = step_memory(
        model,
        AdapterSettings(method="lora", rank=8, target_modules="attention"),
        training,
        length=48,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    real = get_peft_model(
        MixtralForCausalLM(config).to(dtype), LoraConfig(r=8, target_modules=targets)
    )
    most = really_alive(real.train(), gradients=False)
    assert found.gradients + found.activations == pytest.approx(most, rel=0.05)


def test_a_view_of_a_weight_is_not_counted() -> None:
    weight = torch.zeros(100, 100)
    with _Alive([weight]) as alive:
        weight.t() + 0
    assert alive.most == weight.nbytes


def test_weights_gradients_and_moments_are_counted() -> None:
    model = llama("narrow", "meta")
    count = sum(weight.numel() for weight in model.parameters())
    rotary = sum(4 * buffer.numel() for buffer in model.buffers())
    found = told(method="full")
    assert (found.weights, found.gradients, found.optimizer, found.trained) == (
        4 * count + rotary,
        4 * count,
        8 * count,
        count,
    )
    assert found.adapter == 0
    parts = ("weights", "adapter", "gradients", "optimizer", "activations")
    assert found.total == sum(getattr(found, part) for part in parts)


@pytest.mark.parametrize(("optimizer", "each"), [("adamw", 4), ("lion", 2), ("adamw_8bit", 2)])
def test_moments_have_the_format_of_their_weights(optimizer: Any, each: int) -> None:
    found = step_memory(
        llama("narrow", "meta").to(torch.bfloat16),
        AdapterSettings(method="full"),
        TrainingSettings(epochs=1.0, batch_size=1, optimizer=optimizer),
        length=8,
    )
    assert found.optimizer == each * found.trained


def test_what_an_adapter_holds() -> None:
    small = "large vocabulary"  # of one layer
    real = get_peft_model(llama(small, "cpu"), LoraConfig(r=8, target_modules="all-linear"))
    trained = [weight for weight in real.parameters() if weight.requires_grad]
    size = sum(weight.nbytes for weight in trained)
    assert told(small, "lora").adapter == told(small, "lora").gradients == size
    assert told(small, "pissa").adapter == 2 * size  # the start that the moves begin at
    frozen = told(small, "lora_null_v2")
    B = sum(w.nbytes for name, w in real.named_parameters() if "lora_B" in name)
    assert (frozen.adapter, frozen.gradients, frozen.optimizer) == (size, B, 2 * B)


def test_what_a_setting_saves() -> None:
    def full(length: int = 64, **training: Any) -> StepMemory:
        return told("narrow", "full", length, gradient_accumulation=2, **training)

    plain = full()
    lion = full(optimizer="lion", precision="bf16")
    assert lion.optimizer == plain.optimizer / 2
    assert lion.activations < plain.activations
    assert full(gradient_checkpointing=True).activations < 0.8 * plain.activations
    assert full(length=128).activations > 1.7 * plain.activations


def of_a_run(method: str, **calibration: Any) -> RunMemory:
    recipe = Recipe.parse(
        {
            "base": "none",
            "adapter": {"method": method, "rank": 8},
            "data": {"train": "none"},
            "calibration": {"source": "none", "max_length": 32, **calibration},
            "training": {"epochs": 1.0, "batch_size": 2},
        }
    )
    step = step_memory(llama("wide", "meta"), recipe.adapter, recipe.training, length=16)
    return around_step(llama("wide", "meta"), recipe, step)


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_statistics_hold_their_matrices_or_what_the_budget_allows() -> None:
    tokens = torch.zeros((2, 32), dtype=torch.long)
    base: Any = llama("wide", "cpu")
    collected = collect(base, [{"input_ids": tokens}])
    groups = [names[0] for names in collected.shared_inputs]
    size = sum(collected[name].second_moment.nbytes for name in groups)
    free = of_a_run("lora_null_v1")
    assert free.matrices == size
    assert free.statistics > size + free.step.weights
    assert free.peak == free.start  # seven float64 matrices of the widest layer
    within = of_a_run("lora_null_v1", memory_budget="4MiB")
    assert within.matrices == 4 * 2**20
    assert within.statistics == free.statistics - free.matrices + within.matrices
    assert of_a_run("lora").statistics == 0


def test_sampling_from_the_base_holds_keys_and_values() -> None:
    some, many = (of_a_run("lora_null_v1", source="self", samples=n) for n in (2000, 8))
    assert some.statistics > many.statistics
    layers = target_layers(llama("wide", "meta"))
    assert some.statistics - some.step.weights == 256 * 32 * 2 * 4 * 256 * len(layers) // 7
