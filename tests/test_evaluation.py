"""`fl.evaluate` and `fl.compare`: scores of several tasks, and what changed item by item."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import forgetless as fl
from forgetless.errors import UserError
from forgetless.metrics import mean_stderr, paired_bootstrap_interval
from forgetless.tasks import Item, Spec, TaskResult
from tests.families import FAMILIES


@dataclass(frozen=True)
class Fixed:
    """A task whose items are given, in place of a model's answers."""

    name: str
    given: tuple[Item, ...]
    metric: str = "accuracy"
    higher_is_better: bool = True
    fingerprint: str = "f" * 16

    needs_reference: ClassVar[bool] = False

    def evaluate(self, model: object = None, tokenizer: object = None, **_: Any) -> TaskResult:
        return TaskResult.of_items(
            self,
            self.given,
            metric=self.metric,
            higher_is_better=self.higher_is_better,
            seconds=0.5,
        )


def answers(*scores: float, name: str = "facts") -> TaskResult:
    items = tuple(Item(f"q{i}", f"Q{i}?", "yes", "no", x) for i, x in enumerate(scores))
    return Fixed(name, items).evaluate()


def documents(losses: Sequence[float], tokens: Sequence[float], name: str = "text") -> TaskResult:
    pairs = enumerate(zip(losses, tokens, strict=True))
    items = tuple(Item(str(i), "", "", "", loss, n) for i, (loss, n) in pairs)
    return Fixed(name, items, "loss", higher_is_better=False).evaluate()


# ---------------------------------------------------------------------------------- compare


def test_right_and_wrong_items_by_hand() -> None:
    base = fl.Scores([answers(1, 1, 1, 0, 0, 1)])
    tuned = fl.Scores([answers(1, 0, 0, 1, 0, 1)])
    row = fl.compare(base, tuned)["facts"]
    assert (row.base, row.score) == pytest.approx((4 / 6, 3 / 6))
    assert row.difference == pytest.approx(-1 / 6)
    assert row.forgetting == pytest.approx(1 / 6)
    assert row.retention == pytest.approx(0.75)
    assert (row.lost, row.gained, row.kept) == (("q1", "q2"), ("q3",), ("q0", "q5"))
    assert row.p_value == 1.0
    assert row.paired
    assert row.is_noise
    assert row.interval == paired_bootstrap_interval([1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1])


def test_a_clear_loss_is_not_noise() -> None:
    row = fl.compare({"facts": answers(*[1] * 40)}, {"facts": answers(*[1] * 20, *[0] * 20)})[
        "facts"
    ]
    assert not row.is_noise
    assert row.p_value is not None
    assert row.p_value < 1e-5
    assert row.interval.high < -0.3


def test_the_order_of_items_does_not_matter() -> None:
    base, tuned = answers(1, 1, 0, 1), answers(0, 1, 1, 1)
    turned = replace(tuned, items=tuned.items[::-1])
    comparison = fl.compare({"facts": base}, {"facts": turned})
    assert comparison == fl.compare({"facts": base}, {"facts": tuned})


def test_losses_are_weighted_by_tokens_and_better_when_lower() -> None:
    base, tuned = documents([2.0, 3.0], [10, 30]), documents([2.5, 2.9], [10, 30])
    row = fl.compare({"text": base}, {"text": tuned})["text"]
    assert row.difference == pytest.approx((0.5 * 10 - 0.1 * 30) / 40)
    assert row.forgetting == row.difference > 0
    assert row.retention == pytest.approx(base.value / tuned.value)
    assert (row.lost, row.gained, row.kept, row.p_value) == ((), (), (), None)
    assert row.interval.low <= row.difference <= row.interval.high


def test_without_items_the_two_errors_are_added() -> None:
    base, tuned = answers(1, 1, 1, 0), answers(1, 0, 1, 0)
    row = fl.compare({"facts": replace(base, items=())}, {"facts": tuned})["facts"]
    half = 1.959964 * math.hypot(mean_stderr([1, 1, 1, 0]).stderr, tuned.stderr)
    assert tuple(row.interval) == pytest.approx((-0.25 - half, -0.25 + half), abs=1e-6)
    assert not row.paired
    assert row.p_value is None


def test_a_single_item_has_an_unknown_interval() -> None:
    row = fl.compare({"facts": answers(1)}, {"facts": answers(0)})["facts"]
    assert math.isnan(row.interval.low)
    assert row.is_noise
    assert row.to_json()["low"] is None


def test_equal_scores_of_zero_are_no_forgetting() -> None:
    zero = documents([0.0, 0.0], [3, 4], name="kl")
    row = fl.compare({"kl": zero}, {"kl": zero})["kl"]
    assert tuple(row.interval) == (0, 0)
    assert math.isnan(row.retention)
    assert row.p_value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 16}, "differs between the two.*evaluate both models with the same"),
        ({"metric": "f1"}, "accuracy over 3 items.* against f1 over 3 items"),
        ({"items": answers(1, 0).items}, "items of the two are not the same"),
        ({"items": tuple(replace(i, weight=2.0) for i in answers(1, 0, 1).items)}, "tokenizer"),
    ],
)
def test_what_must_not_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    base = answers(1, 1, 0)
    with pytest.raises(UserError, match=message):
        fl.compare({"facts": base}, {"facts": replace(base, **change)})


def test_tasks_of_one_side_are_named_and_not_compared() -> None:
    base = fl.Scores([answers(1, 0), answers(1, 1, name="more")])
    tuned = fl.Scores([answers(1, 1), answers(0, 1, name="other")])
    comparison = fl.compare(base, tuned)
    assert [row.task for row in comparison] == ["facts"]
    assert comparison.unmatched == ("more", "other")
    assert "not compared, scored once only: more, other" in str(comparison)
    with pytest.raises(UserError, match="no task in common: the base has facts, the other none"):
        fl.compare({"facts": answers(1)}, {})
    with pytest.raises(KeyError):
        comparison["more"]


def test_a_comparison_reads_well_and_is_json() -> None:
    base = fl.Scores([answers(*[1] * 9, 0), documents([2.0, 3.0], [10, 30])])
    tuned = fl.Scores([answers(*[1] * 6, *[0] * 3, 1), documents([2.5, 2.9], [10, 30])])
    comparison = fl.compare(base, tuned)
    lines = str(comparison).splitlines()
    assert " ".join(lines[0].split()) == "task metric base score difference 95 % left lost gained"
    assert lines[1].split()[:5] == ["facts", "accuracy", "0.9000", "0.7000", "-0.2000"]
    assert lines[1].split()[-4:] == ["77.8", "%", "3", "1"]
    assert lines[2].split()[-2:] == ["-", "-"]
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert data["rows"][0]["lost"] == ["q6", "q7", "q8"]
    assert len(comparison) == 2


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
    from forgetless.models import load_model, load_tokenizer

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


def test_evaluate_refuses_before_any_work() -> None:
    model = FAMILIES["llama"].model()
    with pytest.raises(UserError, match=r"unknown task 'nope'[\s\S]*'path'"):
        fl.evaluate(model, ["nope", "kl"])
    with pytest.raises(UserError, match=r"'kl' measures the distance to the base.*reference=base"):
        fl.evaluate(model, ["pocket_recall", {"kind": "kl", "path": "pocket:held"}])
    with pytest.raises(UserError, match="pass tokenizer="):
        fl.evaluate(model, "pocket_recall")
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1, got 0"):
        fl.evaluate(model, "pocket_recall", batch_size=0)


def test_a_task_of_ones_own_is_enough() -> None:
    task = Fixed("mine", answers(1, 0, 1).items)
    scores = fl.evaluate(nn.Identity(), task, tokenizer=object())
    assert scores["mine"].value == pytest.approx(2 / 3)
    assert scores["mine"].n == 3
