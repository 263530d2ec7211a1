"""Trainers that know PEFT alone train, save and resume an anchored adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import load, save
from forgetless.statistics.collection import collect
from tests.families import FAMILIES, image_batch, language_batch
from tests.tiny import tokenizer

LLAMA = FAMILIES["llama"]
METHODS = ["lora", "pissa", "lora_null_v1", "lora_null_v2", "lora_null_zero"]


def attached(method: str) -> PeftModel:
    model = LLAMA.model()
    stats = collect(model, [language_batch(seed=seed) for seed in range(3)])
    return attach(model, method, rank=4, alpha=4, stats=stats, dropout=0.1)


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Twelve rows of random tokens."""

    def __init__(self) -> None:
        batch = language_batch(rows=5)
        self.rows = [{key: batch[key][i % 5] for key in batch} for i in range(12)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trainer(model: PeftModel, folder: Path, **changes: Any) -> Trainer:
    how: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return Trainer(model=model, args=TrainingArguments(**how | changes), train_dataset=Examples())


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_resumes_its_own_checkpoint_with_identical_losses(
    method: str, tmp_path: Path
) -> None:
    undisturbed = trainer(attached(method), tmp_path)
    undisturbed.train()
    resumed = trainer(attached(method), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(undisturbed)[-3:]
    ours, theirs = resumed.model.state_dict(), undisturbed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_trainers_anchored_checkpoint_is_loaded_without_the_trainer(tmp_path: Path) -> None:
    done = trainer(attached("pissa"), tmp_path)
    done.train()
    again = load(LLAMA.model(), tmp_path / "checkpoint-6")
    batch = language_batch(seed=9)
    done.model.eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, done.model(**batch).logits)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainers_checkpoints_change_no_weight(method: str, tmp_path: Path) -> None:
    often = trainer(attached(method), tmp_path / "often", save_steps=1)
    needed = [weight.requires_grad for weight in often.model.parameters()]
    often.train()
    never = trainer(attached(method), tmp_path / "never", save_strategy="no")
    never.train()
    assert losses(often) == losses(never)
    ours, theirs = often.model.state_dict(), never.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [weight.requires_grad for weight in often.model.parameters()] == needed


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Twelve random images with a class."""

    def __init__(self, seed: int = 0) -> None:
        batch = image_batch(rows=12, seed=seed)
        self.rows = [{key: batch[key][i] for key in batch} for i in range(12)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_classifier_is_evaluated_on_the_way_and_its_best_step_is_taken(
    method: str, tmp_path: Path
) -> None:
    """Trainer finds the names of the labels behind the adapter, and the checkpoint of the best."""
    model = attach(FAMILIES["vit"].model(), method, rank=4, alpha=4)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    done = Trainer(model=model, args=settings, train_dataset=Images(), eval_dataset=Images(1))
    done.train()
    found = {e["step"]: e["eval_loss"] for e in done.state.log_history if "eval_loss" in e}
    assert list(found) == [2, 4, 6, 8]
    best = min(found, key=lambda step: found[step])
    assert done.state.best_global_step == best != 8
    assert done.evaluate()["eval_loss"] == pytest.approx(found[best], abs=1e-6)


@pytest.mark.parametrize("method", ["pissa", "lora_null_v1"])
def test_the_first_dpo_loss_is_the_logarithm_of_two(method: str, tmp_path: Path) -> None:
    """The reference is the adapter switched off; were that not the base, the loss would differ."""
    save(attached(method), tmp_path / "start")
    model = load(LLAMA.model(), tmp_path / "start", trainable=True)
    rows = [
        {"prompt": "Is it? ", "chosen": f"Yes, {word}.", "rejected": f"No, {word}!"}
        for word in ("so it is", "it is true", "of course", "it was")
    ]
    settings = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
    )
    done = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    done.train()
    first, *later = losses(done)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(loss - math.log(2)) > 1e-6 for loss in later)
