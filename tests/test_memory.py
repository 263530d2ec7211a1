"""The memory of a training step, told from shapes alone, is what a real step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.memory import StepMemory, _Alive, step_memory

SHAPES = {
    "narrow": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3},
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


def really_alive(model: Any, batch_size: int, length: int) -> int:
    """Most bytes alive in a step on real tensors; the gradients are there before."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    tokens = torch.zeros((batch_size, length), dtype=torch.long)
    with _Alive() as alive:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return int(alive.most)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_activations_are_those_of_a_real_step(shapes: str, rank: int | None) -> None:
    real: Any = llama(shapes, "cpu")
    if rank:
        real = get_peft_model(real, LoraConfig(r=rank, target_modules="all-linear"))
    told = step_memory(llama(shapes, "meta"), rank=rank, batch_size=2, length=48).activations
    assert told == pytest.approx(really_alive(real.train(), 2, 48), rel=0.02)


def test_weights_gradients_and_moments_are_counted() -> None:
    model = llama("narrow", "meta")
    count = sum(weight.numel() for weight in model.parameters())
    rotary = sum(4 * buffer.numel() for buffer in model.buffers())
    told = step_memory(model, rank=None, batch_size=1, length=8)
    assert (told.weights, told.gradients, told.optimizer) == (
        4 * count + rotary,
        4 * count,
        8 * count,
    )
    assert told.adapter == 0
    assert told.total == sum(
        getattr(told, part)
        for part in ("weights", "adapter", "gradients", "optimizer", "activations")
    )


def adapted(**changes: Any) -> StepMemory:
    settings = {"rank": 8, "batch_size": 2, "length": 64, **changes}
    return step_memory(llama("narrow", "meta"), **settings)


def test_what_a_setting_saves() -> None:
    plain = adapted()
    assert adapted(anchored=True).adapter == 2 * plain.adapter
    assert adapted(anchored=True).gradients == plain.gradients
    assert adapted(optimizer="sgd").optimizer == 0
    assert adapted(gradient_checkpointing=True).activations < 0.7 * plain.activations
    assert adapted(length=128).activations > 1.7 * plain.activations
    assert adapted(bf16=True).activations < plain.activations
