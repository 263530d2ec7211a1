"""Attached here or initialised by PEFT: the same model, and the same training, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from forgetless.adapters.attachment import attach
from forgetless.adapters.layer import adapted_layers, delta_weights
from tests.adapters.test_attachment import logits, trainable
from tests.families import FAMILIES

RANK, ALPHA = 4, 6

scalings = pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])


def theirs(init: Any, use_rslora: bool, family: str = "llama", **switches: Any) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        use_rslora=use_rslora,
        target_modules="all-linear",
        init_lora_weights=init,
        **switches,
    )
    return get_peft_model(FAMILIES[family].model(), config)


def losses(model: PeftModel, family: str = "llama", steps: int = 4) -> list[float]:
    """SGD with momentum, whose path does not depend on the sign of a singular vector."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)
    found = []
    for step in range(steps):
        loss = model(**FAMILIES[family].batch(seed=100 + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def same_in_the_end(one: PeftModel, other: PeftModel, family: str = "llama") -> None:
    """The losses on the way agree, and the logits after it."""
    assert losses(one, family) == pytest.approx(losses(other, family), rel=2e-5)
    torch.testing.assert_close(logits(one, family), logits(other, family), atol=2e-4, rtol=1e-3)


@scalings
@pytest.mark.parametrize("method", ["pissa", "olora", "mica"])
def test_starts_that_peft_knows_train_alike(method: str, use_rslora: bool) -> None:
    """PEFT writes the residual into the base; here the base stays and the path is the same."""
    ours = attach(FAMILIES["llama"].model(), method, RANK, ALPHA, use_rslora=use_rslora)
    other = theirs(method, use_rslora)
    torch.testing.assert_close(logits(ours, "llama"), logits(other, "llama"), atol=1e-4, rtol=1e-4)
    same_in_the_end(ours, other)


@scalings
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("switches", [{}, {"rank_pattern": {"c_attn|q_proj": 2}}])
def test_a_plain_lora_is_pefts(family: str, switches: dict[str, Any], use_rslora: bool) -> None:
    """The same A, B zero, in PEFT's own layers."""
    model = FAMILIES[family].model()
    ours = attach(model, "lora", RANK, ALPHA, use_rslora=use_rslora, **switches)
    other = theirs(True, use_rslora, family, **switches)
    for name, module in adapted_layers(other).items():
        start: Tensor = adapted_layers(ours)[name].lora_A["default"].weight
        module.lora_A["default"].weight.data.copy_(start)
        assert module.scaling["default"] == adapted_layers(ours)[name].scaling["default"]
        assert isinstance(adapted_layers(ours)[name], type(module))
    assert losses(ours, family) == losses(other, family)
    assert torch.equal(logits(ours, family), logits(other, family))


@scalings
def test_the_updates_of_an_anchored_start_are_those_of_pefts(use_rslora: bool) -> None:
    """The move from the base, W' - W, is what PEFT's final weight differs from W by."""
    ours = attach(FAMILIES["llama"].model(), "pissa", RANK, ALPHA, use_rslora=use_rslora)
    other = theirs("pissa", use_rslora)
    losses(ours), losses(other)
    moved = {name: (weight, delta) for name, weight, delta in delta_weights(ours)}
    for name, residual, product in delta_weights(other):
        weight, delta = moved[name]
        torch.testing.assert_close(weight + delta, residual + product, atol=2e-5, rtol=1e-4)
