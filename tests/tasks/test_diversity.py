"""Diversity: different outputs counted, right and wrong apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from forgetless.core.errors import UserError
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import generation as generation_module
from forgetless.tasks import make_task
from forgetless.tasks.diversity import Diversity, distinct

ANSWERS = [
    *(" 1 + 1 = 2. The answer is {}.", " The answer is {}.", " The answer is {}. "),
    *(" The answer is 0.", " The answer is 0.", " no idea at all"),
]


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Six draws for each of two problems, of which the first three are right."""
    task = Diversity({"kind": "pocket_problems", "limit": 2}, samples=6)
    asked = task.inner.questions()

    def written(model: Any, tokenizer: Any, prompts: Sequence[str], **_: Any) -> list[str]:
        assert list(prompts) == [question.prompt for question in asked for _ in range(6)]
        return [
            ANSWERS[i % 6].format(asked[i // 6].expected if i < 6 else "none")
            for i in range(len(prompts))
        ]

    monkeypatch.setattr(generation_module, "generate", written)
    return task.evaluate(None, None)  # type: ignore[arg-type]


def test_different_outputs_are_counted(result: Any) -> None:
    assert result.metric == "unique"
    assert [item.score for item in result.items] == [4 / 6, 4 / 6]
    assert result.extra["unique_right"] == (2 + 0) / 2
    assert result.extra["unique_wrong"] == (2 + 4) / 2


def test_the_curve_of_chances_is_that_of_the_draws(result: Any) -> None:
    assert result.extra["pass@1"] == pytest.approx((0.5 + 0) / 2)
    assert result.extra["pass@2"] == pytest.approx((1 - 3 / 15) / 2)
    assert result.extra["pass@4"] == 0.5
    assert "pass@8" not in result.extra


def test_an_item_shows_every_different_output(result: Any) -> None:
    lines = result.items[0].answer.splitlines()
    assert len(lines) == 4
    assert sorted(line[:3] for line in lines) == ["1 +", "1 -", "2 +", "2 -"]


def test_distinct_counts_runs_of_words() -> None:
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["a b", "a c"], 1) == 3 / 4
    assert distinct(["a", ""], 2) == 0.0


def test_a_real_model_is_as_diverse_with_any_batch() -> None:
    base, tokenizer = load_model("pocket"), load_tokenizer("pocket")
    task = make_task({"kind": "diversity", "task": {"kind": "pocket_recall", "limit": 4}})
    first, second = (task.evaluate(base, tokenizer, batch_size=size) for size in (3, 40))
    assert task.name == "diversity_pocket_recall"
    assert first.items == second.items
    assert first.extra == second.extra
    assert 0 < first.value <= 1


@pytest.mark.parametrize("inner", ["pocket_recall", "pocket_problems", "pocket_series"])
def test_it_takes_every_task_that_generates(inner: str) -> None:
    assert make_task({"kind": "diversity", "task": inner}).name == f"diversity_{inner}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "pocket_choice"}, "'pocket_choice' does not generate answers; give one of"),
        ({"task": "pocket_recal"}, "unknown task 'pocket_recal'"),
        ({"task": "humaneval"}, "--allow-code-execution"),
        ({"task": "pocket_recall", "samples": 1}, "samples must be a whole number"),
        ({"task": "pocket_recall", "temperature": 0}, "temperature must be above 0"),
        ({}, "needs a 'task'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_task({"kind": "diversity", **settings})


def test_settings_change_the_fingerprint() -> None:
    different = [
        Diversity("pocket_recall"),
        Diversity("pocket_recall", samples=5),
        Diversity("pocket_recall", seed=1),
        Diversity("pocket_recall", temperature=1.0),
        Diversity("pocket_series"),
    ]
    assert len({task.fingerprint for task in different}) == len(different)
