"""Learning from pairs of answers: TRL's loss, exact resume, and what is measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.core.files import read_json, read_jsonl
from forgetless.data.examples import from_rows, load_examples
from forgetless.data.losses import dpo_loss, orpo_loss
from forgetless.data.packing import IGNORED
from forgetless.data.tokens import preference_tokens
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from forgetless.tasks import make_task
from forgetless.training.loop import train
from forgetless.training.settings import PreferenceSettings, TrainingSettings

pytest_plugins = ["tests.tiny_fixtures"]

ROWS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": "no" if a % 2 else "none"}
    for a in range(1, 9)
    for b in range(4)
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def adapted(base: Path) -> Any:
    """The base with a new adapter."""
    return fl.attach(load_model(str(base)), "lora", rank=2, alpha=4)


# ---- rows ----------------------------------------------------------------------------------------

USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Go on"}
GOOD, BAD = ({"role": "assistant", "content": word} for word in ("Hello", "What"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_rows_of_turns_mean_the_same_however_the_prompt_stands(row: dict[str, Any]) -> None:
    (record,) = from_rows([("line 1", row)], "pairs")
    assert record == {"chosen": {"messages": [USER, GOOD]}, "rejected": {"messages": [USER, BAD]}}


def test_what_both_conversations_share_is_not_learned() -> None:
    row = {"chosen": [USER, GOOD, OTHER, GOOD], "rejected": [USER, GOOD, OTHER, BAD]}
    (record,) = from_rows([("line 1", row)], "pairs")
    assert [turn.get("weight") for turn in record["chosen"]["messages"]] == [None, 0, None, None]


def test_a_row_is_two_sequences_with_their_answers_learned(tiny_base: Path, pairs: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    first = preference_tokens(load_examples(pairs), tokenizer)[0]
    answers = [token for token in first["labels"] if token != IGNORED]
    assert tokenizer.decode(answers) == "1</s>no</s>"
    assert tokenizer.decode(first["input_ids"]) == "1+0=1</s>1+0=no</s>"
    assert first["lengths"] == [6, 7]


# ---- losses --------------------------------------------------------------------------------------


def test_the_loss_is_that_of_trl(tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    settings = TrainingSettings(
        learning_rate=1e-2,
        steps=4,
        batch_size=len(ROWS),
        schedule="constant",
        warmup_ratio=0,
        log_every=1,
        preference=PreferenceSettings(beta=0.3),
    )
    train(adapted(tiny_base), tokenizer, load_examples(pairs), settings, tmp_path / "own")
    own = [line["loss"] for line in read_jsonl(tmp_path / "own" / "log.jsonl")]
    theirs = DPOTrainer(
        model=adapted(tiny_base),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=4,
            per_device_train_batch_size=len(ROWS),
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            beta=0.3,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    theirs.train()
    of_trl = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert own == pytest.approx(of_trl, abs=1e-4)
    assert own[-1] < 0.69


def test_losses_by_hand() -> None:
    logps, base = torch.tensor([[-2.0, -3.0]]), torch.tensor([[-2.5, -2.5]])
    assert dpo_loss(logps, base, 0.5).item() == pytest.approx(0.474077, abs=1e-6)
    counts = torch.tensor([[2, 3]])  # means -1 and -1: the odds are alike
    assert orpo_loss(logps, counts, 0.1).item() == pytest.approx(1 + 0.1 * 0.693147, abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_an_interrupted_training_ends_with_the_same_weights(
    tiny_base: Path, pairs: Path, tmp_path: Path, loss: str
) -> None:
    tokenizer, found = load_tokenizer(str(tiny_base)), []
    settings = TrainingSettings(
        learning_rate=1e-2,
        steps=6,
        batch_size=4,
        gradient_accumulation=2,
        checkpoint_every=2,
        preference=PreferenceSettings.model_validate({"loss": loss}),
    )

    def fail(step: int, steps: int) -> None:
        if step == 3:
            raise RuntimeError

    for folder, stops in (("whole", False), ("cut", True), ("cut", False)):
        model = adapted(tiny_base)
        how: dict[str, Any] = {"on_step": fail} if stops else {}
        try:
            train(model, tokenizer, load_examples(pairs), settings, tmp_path / folder, **how)
        except RuntimeError:
            continue
        found.append([w.detach().clone() for w in model.parameters() if w.requires_grad])
    assert all(map(torch.equal, *found))


# ---- by recipe -----------------------------------------------------------------------------------


def recipe(given: dict[str, Any], pairs: Path, **changes: Any) -> Recipe:
    return Recipe.parse(
        given,
        {
            "data.train": str(pairs),
            "data.validation": 0.25,
            "adapter.method": "lora",
            "training.steps": 30,
            "training.preference": {"loss": "dpo"},
            "tasks.learning": [],
            **changes,
        },
    )


def test_a_run_learns_what_is_preferred(
    tiny_recipe: dict[str, Any], pairs: Path, tmp_path: Path
) -> None:
    asked = recipe(tiny_recipe, pairs)
    assert check(asked) == []
    scores = run(asked, tmp_path / "runs").folder / "scores"
    before, after = (read_json(scores / p / "validation.json") for p in ("base", "final"))
    assert (before["metric"], before["kind"], before["n"]) == ("accuracy", "learning", after["n"])
    assert after["extra"]["margin"] > before["extra"]["margin"]
    assert run_id(asked) != run_id(recipe(tiny_recipe, pairs, **{"training.preference.beta": 0.5}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.preference": None}, "has pairs of answers; give it"),
        ({"adapter.method": "full"}, "dpo compares with the base"),
        ({"repair": {"strength": 0.1}}, "repair: weighs the loss of answers"),
        ({"data.pack": True}, "are not packed"),
    ],
)
def test_what_does_not_go_with_pairs_is_said(
    tiny_recipe: dict[str, Any], pairs: Path, changes: dict[str, Any], message: str
) -> None:
    assert any(message in problem for problem in check(recipe(tiny_recipe, pairs, **changes)))


def test_pairs_are_asked_for(tiny_recipe: dict[str, Any], tiny_files: Path) -> None:
    problems = check(recipe(tiny_recipe, tiny_files / "train.jsonl"))
    assert any("learns from rows of chosen and rejected" in problem for problem in problems)
    with pytest.raises(UserError, match="'preference'"):
        make_task({"kind": "preference", "path": str(tiny_files / "old.txt")}).content()
