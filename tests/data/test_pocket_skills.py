"""The second and third skill of the pocket world, and its multiple choice."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.pocket.functions import functions
from forgetless.data.pocket.knowledge import matches, questions
from forgetless.data.pocket.series import same_sums, series
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import make_task
from forgetless.tasks.pocket_choice import PocketChoice

MAKERS: list[Any] = [functions, series]


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    return load_model("pocket"), load_tokenizer("pocket")


@pytest.mark.parametrize("make", MAKERS)
def test_examples_follow_their_seed(make: Any) -> None:
    assert make(30, 1) == make(30, 1) != make(30, 2)


@pytest.mark.parametrize("make", MAKERS)
def test_no_example_is_in_both_splits(make: Any) -> None:
    train = {example.prompt for example in make(4000, 0)}
    test = {example.prompt for example in make(500, 3, "test")}
    assert len(train) == 4000
    assert len(test) == 500
    assert not train & test


def test_no_sentence_is_in_both_splits_under_another_name() -> None:
    train = {f.prompt.partition("\n")[0] for f in functions(4000, 0)}
    test = {f.prompt.partition("\n")[0] for f in functions(500, 0, "test")}
    assert not train & test


@pytest.mark.parametrize("make", MAKERS)
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="split must be"):
        make(1, 0, "dev")
    with pytest.raises(ValueError, match="count must be"):
        make(-1, 0)
    assert make(0, 0) == []


def test_the_given_functions_pass_their_own_tests() -> None:
    for function in functions(200, 5, "test"):
        exec(function.program(function.completion), {})


def test_a_function_that_is_a_little_wrong_fails_its_tests() -> None:
    caught = 0
    made = functions(100, 6)
    for function in made:
        body = function.completion
        sign = next(s for s in (" + ", " - ", " * ") if s in body)
        wrong = function.program(body.replace(sign, " - " if sign != " - " else " + ", 1))
        try:
            exec(wrong, {})
        except AssertionError:
            caught += 1
    assert caught == len(made)


@pytest.mark.parametrize("sign", [" > ", " < ", " == ", " != "])
def test_a_wrong_comparison_fails(sign: str) -> None:
    chosen = [f for f in functions(200, 7) if sign in f.completion]
    assert chosen
    for function in chosen:
        for other in {" > ", " < ", " == ", " != "} - {sign}:
            with pytest.raises(AssertionError):
                exec(function.program(function.completion.replace(sign, other)), {})


def test_series_say_what_they_mean() -> None:
    for one in series(400, 1):
        first, *steps = map(int, re.findall(r"\d+", one.prompt))
        signs = {"up": 1, "down": -1}
        ways = [signs[word] for word in re.findall(r"\b(up|down)\b", one.prompt)]
        given = [way * step for way, step in zip(ways, steps, strict=True)]
        sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", one.completion)
        starts, ends = [int(a) for a, *_ in sums], [int(b) for *_, b in sums]
        assert starts == [first, *ends[:-1]]
        moved = [int(sign + by) for _, sign, by, _ in sums]
        assert moved == (given * 3)[:3]
        assert [b - a for a, b in zip(starts, ends, strict=True)] == moved
        assert all(0 < number < 100 for number in ends)
        assert one.completion == f" {one.answer}"


def test_a_series_counts_by_all_its_sums() -> None:
    answer = "3 + 4 = 7. 7 + 4 = 11."
    assert same_sums(f" {answer}\nQ: more 1 + 1 = 2.", answer)
    assert not same_sums("3 + 4 = 7.", answer)
    assert not same_sums("3 + 4 = 7. 7 + 4 = 12.", answer)
    assert not same_sums(f"{answer} 11 + 4 = 15.", answer)
    assert not same_sums("", answer)


@pytest.mark.parametrize("skill", ["problems", "functions", "series"])
def test_skills_are_training_data(skill: str, pocket: tuple[Any, Any]) -> None:
    train = load_examples(f"pocket:{skill}", limit=300)
    test = load_examples(f"pocket:{skill}:test", limit=300)
    assert train.kind == "prompt_completion"
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    longest = max(len(pocket[1](r["prompt"] + r["completion"])["input_ids"]) for r in train)
    assert longest <= 120


def test_unknown_skills_are_refused() -> None:
    with pytest.raises(UserError, match="'pocket:problems', 'pocket:functions', 'pocket:series'"):
        load_examples("pocket:songs")


# ------------------------------------------------------------------------------- multiple choice


def test_wrong_answers_are_wrong_and_of_the_same_relation() -> None:
    by_id = {question.id: question for question in questions()}
    answers: dict[str, set[str]] = {}
    for question in questions():
        answers.setdefault(question.fact.relation, set()).add(question.answer)
    for item, options in PocketChoice()._choices:
        question = by_id[item.id]
        assert len(set(options)) == 4
        assert set(options) <= answers[question.fact.relation]
        right = [matches(option, question) for option in options]
        assert right == [option == item.expected for option in options]


def test_the_right_answer_is_in_every_place_as_often() -> None:
    places = Counter(o.index(item.expected) for item, o in PocketChoice()._choices)
    assert max(places.values()) / min(places.values()) < 1.3


def test_the_pocket_base_recognises_what_it_recalls(pocket: tuple[Any, Any]) -> None:
    result = PocketChoice(limit=60).evaluate(*pocket)
    assert result.metric == "accuracy"
    assert result.value >= 0.95
    assert result.right_or_wrong


def test_a_limit_leaves_the_choices_of_a_fact_alone() -> None:
    every = {q.id: choice for q, choice in PocketChoice()._choices}
    assert all(every[q.id] == choice for q, choice in PocketChoice(limit=50)._choices)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": 1}, "options must be a whole number of at least 2"),
        ({"options": 6}, "options must be 2 to 5"),
        ({"seed": -1}, "seed must be"),
        ({"limit": 0}, "limit must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_task({"kind": "pocket_choice", **settings})
