"""How many texts a model reads or writes at once; the meta device stands for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.tasks.inference import by_tokens, rows_with_cache
from forgetless.tasks.logits import tokens_at_once


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


class NoHead(LlamaForCausalLM):
    """As code on the hub may be: it makes all logits."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **given: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)


def test_a_batch_has_room_for_its_logits_where_all_are_made() -> None:
    cpu, gpu = model("cpu"), model("meta")
    assert (tokens_at_once(cpu), tokens_at_once(gpu)) == (1 << 10, 1 << 15)
    large = NoHead(LlamaConfig(vocab_size=1 << 18, hidden_size=8, num_attention_heads=1))
    assert tokens_at_once(large) == 1 << 8


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (12, None, [[1], [3, 0], [2, 4]]),
        (20, None, [[1, 3], [0, 2, 4]]),
        (20, 1, [[1], [3], [0], [2], [4]]),
        (1, None, [[1], [3], [0], [2], [4]]),
    ],
)
def test_batches_by_tokens_count_their_padding(
    tokens: int, rows: int | None, expected: list[list[int]]
) -> None:
    assert list(by_tokens([4, 10, 3, 6, 1], tokens, rows)) == expected


def test_as_many_texts_are_written_as_their_keys_and_values_allow() -> None:
    assert rows_with_cache(model("cpu"), 512) == 256
    assert rows_with_cache(model("meta"), 512) == 256
    # 2 * 40 * 5120 * 4 bytes a token: 4 GiB hold 2621 tokens, fewer than 32 texts of 512.
    large = {"hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 16}
    assert rows_with_cache(model("meta", **large), 512) == 32
    assert rows_with_cache(model("meta", **large), 40) == 65
    # Half of the heads have keys and values of their own, so twice as many texts fit.
    assert rows_with_cache(model("meta", **large, num_key_value_heads=2), 40) == 131


def test_a_model_that_does_not_say_its_sizes_writes_few_at_once() -> None:
    assert rows_with_cache(nn.Linear(4, 4, device="meta"), 16) == 32
