"""Adapters on earlier adapters: their sum is one plain LoRA, and what is frozen stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from forgetless.adapters.attachment import attach
from forgetless.adapters.earlier import EARLIER, on_earlier, use_together
from forgetless.adapters.folders import load, save, save_plain
from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.plain import plain_lora, summed
from forgetless.core.errors import UserError
from forgetless.training.weights import trained_weights
from tests.families import tiny_llama, token_batch


def base() -> PreTrainedModel:
    """The same one every time."""
    torch.manual_seed(0)
    return tiny_llama()


def trained(method: str, folder: Path, targets: list[str], rank: int = 2) -> Path:
    """An adapter that has moved."""
    model = attach(base(), method, rank=rank, target_modules=targets, dropout=0.5)
    torch.manual_seed(rank)
    for weight in trained_weights(model).values():
        weight.data += 0.05 * torch.randn_like(weight)
    return save(model, folder)


@pytest.mark.parametrize("between", ["stack", "merge"])
def test_a_new_adapter_on_earlier_ones_is_one_lora_of_the_summed_rank(
    between: str, tmp_path: Path
) -> None:
    first = trained("pissa", tmp_path / "first", ["q_proj", "up_proj"])
    below, earlier = on_earlier(base(), first, between)  # type: ignore[arg-type]
    before = load(base(), first).eval()(**token_batch()).logits
    model = attach(below, "lora", rank=3, target_modules=["q_proj", "down_proj"])
    model = use_together(model, trainable=True).eval()
    assert torch.allclose(model(**token_batch()).logits, before, atol=1e-5)
    weights = trained_weights(model)
    assert weights
    assert all(".default." in name for name in weights)
    torch.manual_seed(7)
    for weight in weights.values():
        weight.data += 0.05 * torch.randn_like(weight)
    both = summed(earlier, plain_lora(model, "default"))
    assert both.config.r == 2 * 2 + 3
    assert len({name.rpartition(".")[2] for name in both.factors}) == 3
    save_plain(both, tmp_path / "both", model)
    expected = model(**token_batch()).logits
    found = load(base(), tmp_path / "both").eval()(**token_batch()).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


def test_a_frozen_factor_stays_frozen_and_earlier_dropout_is_off(tmp_path: Path) -> None:
    first = trained("lora", tmp_path / "first", ["q_proj"])
    below, _ = on_earlier(base(), first, "stack")
    model = use_together(
        attach(below, "mica", rank=2, target_modules=["q_proj"], dropout=0.5), trainable=True
    )
    assert {name.split(".lora_")[1][0] for name in trained_weights(model)} == {"A"}
    layer = next(iter(adapted_layers(model).values()))
    assert isinstance(layer.lora_dropout[EARLIER], torch.nn.Identity)
    assert layer.lora_dropout["default"].p == 0.5


def test_a_dora_is_no_sum(tmp_path: Path) -> None:
    model = attach(base(), "lora", rank=2, target_modules=["q_proj"], use_dora=True)
    other = attach(base(), "lora", rank=2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="no LoRA is a sum with it"):
        summed(plain_lora(model, "default"), plain_lora(other, "default"))
