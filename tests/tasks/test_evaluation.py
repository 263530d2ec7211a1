"""`fl.evaluate`: scores of several tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.tasks import Item, Spec, Task, TaskResult
from tests.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:.* answers .* are empty and .* were cut off")


@dataclass(frozen=True)
class Fixed(Task):
    """A task whose items are given, in place of a model's answers."""

    kind = "fixed"

    name: str
    given: tuple[Item, ...]
    metric: str = "accuracy"
    higher_is_better: bool = True

    def content(self) -> list[object]:
        return []

    def measure(self, *_: Any) -> TaskResult:
        return TaskResult.of_items(
            self, self.given, metric=self.metric, higher_is_better=self.higher_is_better
        )


def answers(*scores: float, name: str = "facts") -> TaskResult:
    items = tuple(Item(f"q{i}", f"Q{i}?", "yes", "no", x) for i, x in enumerate(scores))
    return Fixed(name, items).measure()


def documents(losses: Sequence[float], tokens: Sequence[float], name: str = "text") -> TaskResult:
    pairs = enumerate(zip(losses, tokens, strict=True))
    items = tuple(Item(str(i), "", "", "", loss, n) for i, (loss, n) in pairs)
    return Fixed(name, items, "loss", higher_is_better=False).measure()


# ---------------------------------------------------------------------------------- scores


def test_scores_survive_json() -> None:
    scores = fl.Scores([answers(1, 0, 1), documents([2.0], [7])])
    data = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    again = fl.Scores.from_json(data, {"facts": scores["facts"].items})
    assert again.to_json() == scores.to_json()
    assert again["facts"] == scores["facts"]
    assert again["text"].items == ()
    assert list(again) == ["facts", "text"]
    assert repr(scores) == "Scores(facts: accuracy 0.6667, text: loss 2)"


# ---------------------------------------------------------------------------------- evaluate


@pytest.fixture
def stories(shared_data: Path) -> tuple[nn.Module, Any]:
    from forgetless.models.load import load_model, load_tokenizer

    folder = str(shared_data / "stories260K" / "hf")
    return load_model(folder), load_tokenizer(folder)


def test_a_real_model_end_to_end(stories: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = stories
    path = tmp_path / "texts.jsonl"
    texts = ["Once upon a time, there was a little girl named Lily.", "zq xv kj wp! 9 7 # @"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tasks: list[Spec] = [
        {"kind": "perplexity", "path": str(path)},
        {"kind": "kl", "path": str(path)},
        {"kind": "pocket_problems", "limit": 2, "max_new_tokens": 4},
    ]
    base = fl.evaluate(model, tasks, tokenizer, reference=model)
    story, noise = (item.score for item in base["perplexity"].items)
    assert story < 2 < 4 < noise
    assert base["kl"].value == 0
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    step0 = fl.evaluate(tuned, tasks)
    assert step0["kl"].value == 0
    assert step0["perplexity"].items == base["perplexity"].items
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    final = fl.evaluate(tuned, tasks, tokenizer)
    row = fl.compare(base, final)["perplexity"]
    assert row.forgetting > 0
    assert final["kl"].value > 0
    switched_off = fl.evaluate(tuned, tasks[0], tokenizer, as_base=True)
    assert switched_off["perplexity"].items == base["perplexity"].items
    with pytest.raises(UserError, match="as_base needs a PeftModel, got LlamaForCausalLM"):
        fl.evaluate(FAMILIES["llama"].model(), tasks[0], tokenizer, as_base=True)


def test_evaluate_refuses_before_any_work() -> None:
    model = FAMILIES["llama"].model()
    with pytest.raises(UserError, match=r"unknown task 'nope'[\s\S]*'path'"):
        fl.evaluate(model, ["nope", "kl"])
    with pytest.raises(UserError, match=r"'kl' measures the distance to the base.*reference=base"):
        fl.evaluate(model, ["pocket_recall", {"kind": "kl", "path": "pocket:held"}])
    with pytest.raises(UserError, match=r"pass processor= \(its tokenizer\)"):
        fl.evaluate(model, "pocket_recall")
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1, got 0"):
        fl.evaluate(model, "pocket_recall", batch_size=0)


def test_a_task_of_ones_own_is_enough() -> None:
    task = Fixed("mine", answers(1, 0, 1).items)
    scores = fl.evaluate(nn.Identity(), task, tokenizer=object())
    assert scores["mine"].value == pytest.approx(2 / 3)
    assert scores["mine"].n == 3
