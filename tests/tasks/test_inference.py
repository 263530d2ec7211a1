"""How many texts a model reads or writes at once; the meta device stands for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.tasks import inference
from forgetless.tasks.inference import rows_that_fit, rows_with_cache


def model(device: str, **sizes: int) -> nn.Module:
    config = LlamaConfig(
        **{
            "vocab_size": 50_000,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **sizes,
        }
    )
    with torch.device(device):
        made: nn.Module = LlamaForCausalLM(config)
    return made


@pytest.mark.parametrize(
    ("device", "length", "wanted", "rows"),
    [
        ("cpu", 8, None, 32),
        ("cpu", 512, None, (1 << 26) // (512 * 50_000)),
        ("cpu", 512, 100, (1 << 26) // (512 * 50_000)),
        ("cpu", 512, 1, 1),
        ("cpu", 1 << 20, None, 1),
        ("meta", 8, None, 128),
        ("meta", 512, None, (1 << 28) // (512 * 50_000)),
        ("meta", 8, 3, 3),
    ],
)
def test_logits_of_a_batch_have_room(
    device: str, length: int, wanted: int | None, rows: int
) -> None:
    assert rows_that_fit(model(device), length, wanted) == rows


def test_a_gpu_writes_as_many_texts_as_their_keys_and_values_allow() -> None:
    assert rows_with_cache(model("cpu"), 512) == 256
    assert rows_with_cache(model("meta"), 512) == 256
    # 2 * 40 * 5120 * 4 bytes a token: 4 GiB hold 2621 tokens, fewer than 32 texts of 512.
    large = {"hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 16}
    assert rows_with_cache(model("meta", **large), 512) == 32
    assert rows_with_cache(model("meta", **large), 40) == 65
    # Half of the heads have keys and values of their own, so twice as many texts fit.
    assert rows_with_cache(model("meta", **large, num_key_value_heads=2), 40) == 131


def test_a_large_model_on_a_cpu_writes_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_SMALL_MODEL", 1000)
    assert rows_with_cache(model("cpu"), 16) == 32


def test_a_model_that_does_not_say_its_sizes_writes_few_at_once() -> None:
    assert rows_with_cache(nn.Linear(4, 4, device="meta"), 16) == 32
