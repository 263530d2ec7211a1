"""`fl.compare`: what changed item by item, what may be compared, and how it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.core.metrics import (
    Interval,
    detectable_change,
    mean_stderr,
    paired_difference,
    paired_proportions_interval,
)
from forgetless.scores.averages import paper_averages
from forgetless.scores.comparison import TaskChange
from forgetless.scores.showing import as_text, sentence
from forgetless.tasks import Item, TaskResult
from forgetless.tasks.base import settings_of
from forgetless.tasks.kl import KL
from forgetless.tasks.pocket_recall import PocketRecall


def result(task: str, items: Sequence[Item], metric: str, *, higher: bool = True) -> TaskResult:
    mean = mean_stderr([item.score for item in items], [item.weight for item in items])
    return TaskResult(task, metric, *mean, higher, "f" * 16, 0.5, tuple(items))


def answers(*scores: float, name: str = "facts", said: str = "no") -> TaskResult:
    items = [
        Item(f"q{i}", f"Q: Which is {i}?\nA:", "yes", "yes" if x == 1 else said, x)
        for i, x in enumerate(scores)
    ]
    return result(name, items, "accuracy")


def documents(losses: Sequence[float], tokens: Sequence[float], name: str = "text") -> TaskResult:
    pairs = enumerate(zip(losses, tokens, strict=True))
    items = [Item(str(i), "", "", "", loss, n) for i, (loss, n) in pairs]
    return result(name, items, "loss", higher=False)


def row_of(base: TaskResult, tuned: TaskResult) -> TaskChange:
    return fl.compare({base.task: base}, {base.task: tuned})[base.task]


# ---------------------------------------------------------------------------------- the numbers


def test_right_and_wrong_items_by_hand() -> None:
    row = row_of(answers(1, 1, 1, 0, 0, 1), answers(1, 0, 0, 1, 0, 1, said="?"))
    assert (row.base, row.score) == pytest.approx((4 / 6, 3 / 6))
    assert row.difference == pytest.approx(-1 / 6)
    assert row.forgetting == pytest.approx(1 / 6)
    assert row.retention == row.retention_uncapped == pytest.approx(0.75)
    assert (row.lost, row.gained, row.kept) == (("q1", "q2"), ("q3",), ("q0", "q5"))
    assert row.still_wrong == ("q4",)
    assert row.p_value == 1.0
    assert row.paired
    assert row.verdict == "noise"
    assert row.interval == paired_proportions_interval(2, 1, 6)
    assert row.detectable == detectable_change(6, 3 / 6)
    (lost, _) = row.flips("lost")
    assert (lost.prompt, lost.expected) == ("Q: Which is 1?\nA:", "yes")
    assert (lost.before, lost.after) == ("yes", "?")


def test_a_clear_loss_is_not_noise() -> None:
    row = row_of(answers(*[1] * 40), answers(*[1] * 20, *[0] * 20))
    assert row.verdict == "worse"
    assert row.p_value is not None
    assert row.p_value < 1e-5
    assert row.interval.high < -0.3


def test_a_gain_counts_in_one_retention_only() -> None:
    row = row_of(answers(*[1] * 20, *[0] * 20), answers(*[1] * 40))
    assert (row.retention, row.retention_uncapped) == (1.0, 2.0)
    assert row.verdict == "better"


def test_the_order_of_items_does_not_matter() -> None:
    base, tuned = answers(1, 1, 0, 1), answers(0, 1, 1, 1)
    turned = replace(tuned, items=tuned.items[::-1])
    assert row_of(base, turned) == row_of(base, tuned)


def test_losses_are_weighted_by_tokens_and_better_when_lower() -> None:
    before, after, tokens = [2.0, 3.0, 1.0, 2.0, 2.5], [2.5, 2.9, 1.1, 2.0, 2.7], [10, 30, 5, 9, 6]
    base, tuned = documents(before, tokens), documents(after, tokens)
    row = row_of(base, tuned)
    assert row.difference == pytest.approx((0.5 * 10 - 0.1 * 30 + 0.1 * 5 + 0.2 * 6) / 60)
    assert row.forgetting == row.difference > 0
    assert row.retention == pytest.approx(base.value / tuned.value)
    assert (row.lost, row.gained, row.kept, row.p_value) == ((), (), (), None)
    assert row.interval == paired_difference(before, after, tokens).interval
    assert row.interval.low <= row.difference <= row.interval.high


def test_scores_that_may_be_negative_have_no_retention() -> None:
    base = result("likelihood", [Item(str(i), "", "", "", -float(i)) for i in range(9)], "logprob")
    tuned = replace(base, value=base.value - 1, items=())
    row = row_of(base, tuned)
    assert math.isnan(row.retention)
    assert math.isnan(row.retention_uncapped)
    assert row.forgetting == pytest.approx(1)


def test_without_items_the_two_errors_are_added() -> None:
    base, tuned = answers(1, 1, 1, 0), answers(1, 0, 1, 0)
    row = row_of(replace(base, items=()), tuned)
    half = 1.959964 * math.hypot(mean_stderr([1, 1, 1, 0]).stderr, tuned.stderr)
    assert tuple(row.interval) == pytest.approx((-0.25 - half, -0.25 + half), abs=1e-6)
    assert not row.paired
    assert row.p_value is None


def test_of_a_few_documents_no_interval_is_known() -> None:
    row = row_of(documents([2.0, 3.0], [10, 30]), documents([2.5, 2.9], [10, 30]))
    assert math.isnan(row.interval.low)
    assert row.verdict == "unknown"
    assert row.to_json()["low"] is None
    assert "not to be told from 2 items" in sentence(row)


def test_one_of_many_tasks_may_change_by_chance() -> None:
    alike, changed = [1] * 30, [1] * 24 + [0] * 6
    alone = row_of(answers(*alike), answers(*changed))
    assert alone.verdict == "worse"
    assert alone.chance == pytest.approx(0.0143, abs=1e-4)
    names = [f"facts{i}" for i in range(9)]
    base = {name: answers(*alike, name=name) for name in names}
    tuned = base | {"facts4": answers(*changed, name="facts4")}
    row = fl.compare(base, tuned)["facts4"]
    assert row.interval == alone.interval
    assert row.verdict == "noise"
    assert row.chance == pytest.approx(9 * alone.chance)
    assert sentence(row).startswith("no change beyond what chance does to one of many tasks; of 30")
    assert row.to_json()["chance"] == row.chance


def test_many_tasks_without_a_change_hardly_ever_have_one_that_is_clear() -> None:
    rng = np.random.default_rng(0)
    clear = 0
    for _ in range(100):
        names = [f"facts{i}" for i in range(8)]
        base, tuned = (
            {name: answers(*rng.integers(0, 2, 40).tolist(), name=name) for name in names}
            for _ in range(2)
        )
        clear += any(row.verdict != "noise" for row in fl.compare(base, tuned))
    assert clear <= 5


def test_equal_scores_of_zero_are_no_forgetting() -> None:
    zero = documents([0.0, 0.0], [3, 4], name="kl")
    row = row_of(zero, zero)
    assert tuple(row.interval) == (0, 0)
    assert math.isnan(row.retention)
    assert row.verdict == "noise"


# ------------------------------------------------------------------------- what may be compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 16}, "is not the same for the two: its texts, or the version"),
        ({"metric": "f1"}, "metric 'accuracy' against 'f1'; evaluate both models with the same"),
        ({"items": answers(1, 0).items}, "items of the two are not the same"),
        ({"items": tuple(replace(i, weight=2.0) for i in answers(1, 0, 1).items)}, "tokenizer"),
        (
            {"items": tuple(replace(i, prompt="Say it!") for i in answers(1, 0, 1).items)},
            "3 of 3 items have another prompt or another right answer",
        ),
    ],
)
def test_what_must_not_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    base = answers(1, 1, 0)
    with pytest.raises(UserError, match=message):
        fl.compare({"facts": base}, {"facts": replace(base, **change)})


@pytest.mark.parametrize(
    ("setting", "before", "after", "said"),
    [
        ("version", 2, 3, "version 2 against 3"),
        ("num_fewshot", 5, 0, "num_fewshot 5 against 0"),
        ("limit", 100, None, "limit 100 against none"),
        ("prompt", "Q: {q}", "{q}", r"prompt 'Q: {q}' against '{q}'"),
        ("generation", {"temperature": 0}, {"temperature": 1}, "generation .*0} against .*1}"),
    ],
)
def test_the_setting_that_differs_is_named(
    setting: str, before: Any, after: Any, said: str
) -> None:
    same = {"split": "test", "path": "here.jsonl"}
    base = replace(answers(1, 0), settings=same | {setting: before})
    tuned = replace(base, settings=same | {setting: after})
    with pytest.raises(UserError, match=f"not the same for the two: {said}; evaluate both"):
        fl.compare({"facts": base}, {"facts": replace(tuned, fingerprint="0" * 16)})
    with pytest.raises(UserError, match=said):
        fl.compare({"facts": base}, {"facts": tuned})


def test_where_the_same_texts_lie_does_not_matter() -> None:
    base = replace(answers(1, 0), settings={"path": "a.jsonl"})
    fl.compare({"facts": base}, {"facts": replace(base, settings={"path": "b.jsonl"})})


def test_a_result_says_how_its_task_was_set(tmp_path: Path) -> None:
    assert settings_of(PocketRecall(limit=3)) == {
        "phrasing": "held_out",
        "limit": 3,
        "max_new_tokens": 16,
    }
    path = tmp_path / "held.txt"
    path.write_text("Once upon a time.")
    assert settings_of(KL(path)) == {
        "path": "held.txt",
        "limit": None,
        "max_length": 256,
        "chat_template": "auto",
        "system": None,
    }
    base = replace(answers(1, 0), settings={"limit": 3})
    assert TaskResult.from_json(base.to_json(), base.items) == base


def test_tasks_of_one_side_are_named_and_not_compared() -> None:
    base = {"facts": answers(1, 0), "more": answers(1, 1, name="more")}
    tuned = {"facts": answers(1, 1), "other": answers(0, 1, name="other")}
    comparison = fl.compare(base, tuned)
    assert [row.task for row in comparison] == ["facts"]
    assert comparison.unmatched == ("more", "other")
    assert "not compared, scored once only: more, other" in str(comparison)
    with pytest.raises(UserError, match="no task in common: the base has facts, the other none"):
        fl.compare({"facts": answers(1)}, {})
    with pytest.raises(KeyError):
        comparison["more"]


# ---------------------------------------------------------------------------------- how it reads


def both() -> fl.Comparison:
    base = {"facts": answers(*[1] * 9, 0), "text": documents([2.0] * 6, [10] * 6)}
    tuned = {
        "facts": answers(*[1] * 6, *[0] * 3, 1, said="so\nmany words"),
        "text": documents([2.5, 2.9, 2.4, 2.2, 2.3, 2.7], [10] * 6),
    }
    return fl.compare(base, tuned)


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_reads_well_in_any_terminal(width: int) -> None:
    text = as_text(both(), width=width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    words = [" ".join(line.split()) for line in lines]
    metric = ("metric n ", "accuracy 10 ", " p") if width > 100 else ("", "", "")
    assert (
        words[0] == f"task {metric[0]}before after change 95 % interval kept lost gained{metric[2]}"
    )
    assert words[1].startswith(f"facts {metric[1]}0.900 0.700 -0.200 -0.5")
    assert " 77.8 % 3 1" in words[1]
    assert "text: clearly worse; perplexity times 1.65" in text
    assert "facts: lost (3)" in lines
    assert "Which is 6? yes so many words" in words
    assert "facts: gained (1)" in lines


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (62, "task before after change 95 % interval kept"),
        (56, "task before after change 95 % interval"),
        (44, "task change 95 % interval"),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_cuts_off_none(width: int, head: str) -> None:
    changed = both()
    named = [replace(row, task=f"{row.task}_about_countries") for row in changed]
    text = as_text(replace(changed, rows=tuple(named)), items=0, width=width)
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert words[0] == head
    assert "facts_abou" in words[1]
    assert "-0.200 -0.5" in words[1]
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_as_many_items_are_shown_as_asked_for() -> None:
    text = as_text(both(), items=2, width=100)
    assert "facts: lost (2 of 3)" in text
    assert "Which is 7?" in text
    assert "Which is 8?" not in text
    assert "lost (" not in as_text(both(), items=0, width=100)


def test_the_sentence_says_what_noise_means() -> None:
    said = sentence(row_of(answers(*[1] * 50), answers(*[1] * 49, 0)))
    assert said == (
        "no change beyond noise; of 50 right answers 1 lost "
        "(McNemar's p = 1.000); 50 items show a change of about 0.15 or more"
    )


def test_the_sentence_of_a_distance_says_how_far() -> None:
    base = result("kl", [Item(str(i), "", "", "", 0.0) for i in range(6)], "kl", higher=False)
    items = tuple(replace(item, score=0.1 + i / 50) for i, item in enumerate(base.items))
    extra = {"perplexity_ratio": 1.25, "top1_agreement": 0.875}
    tuned = replace(base, value=0.15, items=items, extra=extra)
    assert sentence(row_of(base, tuned)) == (
        "moved 0.15 nats per token away from the base; perplexity times 1.25; "
        "the likeliest next token agrees in 87.5 %"
    )
    assert sentence(row_of(base, base)) == "predicts exactly what the base predicts"


def test_odd_texts_do_not_break_the_table() -> None:
    base = answers(1, 1)
    odd = "\x1b[31m\x07" + "long " * 200 + "[bold]x[/bold]"
    items = tuple(replace(item, prompt=odd, answer=odd) for item in base.items)
    tuned = replace(answers(0, 1), items=tuple(replace(i, prompt=odd) for i in answers(0, 1).items))
    text = as_text(fl.compare({"facts": replace(base, items=items)}, {"facts": tuned}), width=80)
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_comparison_is_json() -> None:
    data = json.loads(json.dumps(both().to_json(), allow_nan=False))
    facts, text = data["rows"]
    assert [item["id"] for item in facts["lost"]] == ["q6", "q7", "q8"]
    assert facts["lost"][0]["after"] == "so\nmany words"
    assert facts["verdict"] == "noise"
    assert text["p_value"] is None
    assert len(both()) == 2


# ------------------------------------------------------------------------- the papers' averages

LORA = {"triviaqa": 0.4595, "nq_open": 0.0116, "webqs": 0.0664, "gsm8k": 0.4299, "math": 0.0626}
BASE = {"triviaqa": 0.5250, "nq_open": 0.1884, "webqs": 0.0591, "gsm8k": 0.1300, "math": 0.0250}


def test_the_averages_of_lora_nulls_table() -> None:
    found = {average.name: average for average in paper_averages(BASE, LORA)}
    assert 100 * found["LoRA-Null Avg1"].score == pytest.approx(17.92, abs=0.01)
    assert 100 * found["LoRA-Null Avg1(Per)"].score == pytest.approx(64.56, abs=0.01)
    assert found["LoRA-Null Avg1(Per)"].base == 1
    assert 100 * found["LoRA-Null Avg2 (math)"].score == pytest.approx(24.63, abs=0.01)
    assert 100 * found["LoRA-Null GM (math)"].score == pytest.approx(21.00, abs=0.02)
    assert "Biderman mean" not in found
    assert "LoRA-Null Avg2 (code)" not in found


def test_a_missing_number_is_not_averaged_and_is_named() -> None:
    scores = {"hellaswag": 0.5, "arc_challenge": 0.4, "gsm8k": 0.2}
    found = {average.name: average for average in paper_averages(scores, scores)}
    assert found.keys() == {"Biderman mean", "LoRA-Null Avg2 (math)"}
    biderman = found["Biderman mean"]
    assert math.isnan(biderman.score)
    assert biderman.missing == ("winogrande",)
    assert biderman.to_json()["score"] is None
    assert found["LoRA-Null Avg2 (math)"].missing == ("math",)
    both_sides = paper_averages({"hellaswag": 0.5}, scores)
    assert both_sides[0].missing == ("arc_challenge", "winogrande")


def test_math_counts_under_the_harness_s_name() -> None:
    scores = {"gsm8k": 0.2, "hendrycks_math": 0.1}
    (avg2,) = paper_averages(scores, scores)
    assert avg2.score == pytest.approx(0.15)
    assert avg2.tasks == ("gsm8k", "hendrycks_math")


def test_the_interval_of_a_mean_comes_from_those_of_its_parts() -> None:
    tasks = ["hellaswag", "arc_challenge", "winogrande"]
    base, tuned = dict.fromkeys(tasks, 0.5), dict.fromkeys(tasks, 0.4)
    ends = dict.fromkeys(tasks, Interval(-0.13, -0.08))
    (biderman,) = paper_averages(base, tuned, ends)
    assert biderman.interval.low == pytest.approx(-0.1 - 0.03 / math.sqrt(3))
    assert biderman.interval.high == pytest.approx(-0.1 + 0.02 / math.sqrt(3))


def test_averages_are_shown_where_they_were_measured() -> None:
    base = {name: answers(1, 1, 1, 0, name=name) for name in ("triviaqa", "nq_open", "hellaswag")}
    text = as_text(fl.compare(base, base), width=80)
    assert "not measured: webqs" in text
    assert "not measured: arc_challenge, winogrande" in " ".join(text.split())
