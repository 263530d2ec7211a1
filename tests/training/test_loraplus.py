"""LoRA+: B learns at a multiple of A's rate, also where A and B are the moves of an anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from forgetless.adapters.attachment import attach
from forgetless.adapters.layer import adapted_layers
from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.training.loop import train
from forgetless.training.settings import TrainingSettings
from forgetless.training.trainer import speed_up
from tests.families import FAMILIES
from tests.tiny import save_base, save_files, tokenizer


def attached(method: str, **switches: Any) -> PeftModel:
    return attach(FAMILIES["llama"].model(), method, 4, 4, **switches)


def rates(model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    by_weight = {w: group["lr"] for group in optimizer.param_groups for w in group["params"]}
    return {n: by_weight[w] for n, w in model.named_parameters() if w.requires_grad}


@pytest.mark.parametrize("switches", [{}, {"use_dora": True}], ids=["", "dora"])
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_the_rates_are_those_of_pefts_optimizer(method: str, switches: dict[str, Any]) -> None:
    model = attached(method, **switches)
    ours = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    speed_up(ours, model, 16)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert rates(model, ours) == rates(model, theirs)
    assert set(rates(model, ours).values()) == {1e-3, 16e-3}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_examples(str(save_files(tmp_path_factory.mktemp("files")) / "train.jsonl"))


def trained(tmp_path: Path, examples: Any, method: str, **settings: Any) -> PeftModel:
    from forgetless.models.load import load_model

    base = load_model(str(save_base(tmp_path / "base")))
    model = attach(base, method, 4, 4, target_modules=["q_proj"])
    values: dict[str, Any] = {
        "learning_rate": 1e-3,
        "steps": 1,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    train(model, tokenizer(), examples, TrainingSettings(**values, **settings), tmp_path / "run")
    return model


def test_the_first_step_of_b_is_as_many_times_longer(tmp_path: Path, examples: Any) -> None:
    """AdamW's first step has the length of the learning rate, in every entry with a gradient."""
    plain = trained(tmp_path / "one", examples, "pissa")
    faster = trained(tmp_path / "two", examples, "pissa", loraplus_ratio=8.0)
    for one, two in zip(
        adapted_layers(plain).values(), adapted_layers(faster).values(), strict=True
    ):
        dA, dB = ((m.lora_A["default"].weight, m.lora_B["default"].weight) for m in (one, two))
        torch.testing.assert_close(dB[0], dA[0])
        torch.testing.assert_close(dB[1], 8 * dA[1])
        assert dA[1].any()


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_weight_decay_holds_for_both_factors(method: str, tmp_path: Path, examples: Any) -> None:
    """A step of AdamW with and without decay differs by rate x decay x weight, at B's own rate."""
    from forgetless.models.load import load_model

    base, ends = save_base(tmp_path / "base"), []
    for decay in (0.0, 0.3):
        model = attach(load_model(str(base)), method, 4, 4, target_modules=["q_proj"])
        for layer in adapted_layers(model).values():
            for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                torch.nn.init.constant_(weight, 0.05)
        how = TrainingSettings(
            learning_rate=1e-3, steps=1, schedule="constant", warmup_ratio=0, loraplus_ratio=16,
            weight_decay=decay,
        )  # fmt: skip
        train(model, tokenizer(), examples, how, tmp_path / str(decay))
        ends.append({n: w for n, w in model.named_parameters() if w.requires_grad})
    for name, without in ends[0].items():
        rate = 16e-3 if "lora_B" in name else 1e-3
        expected = torch.full_like(without, rate * 0.3 * 0.05)
        torch.testing.assert_close(without - ends[1][name], expected, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("method", ["mica"])
def test_a_ratio_needs_two_factors(method: str, tmp_path: Path, examples: Any) -> None:
    with pytest.raises(UserError, match=r"loraplus_ratio.*got 8, but this model does not train bo"):
        trained(tmp_path, examples, method, loraplus_ratio=8.0)
