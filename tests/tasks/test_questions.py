"""Questions over a file of one's own: multiple choice, and generated answers that must match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import TaskResult, make_task
from forgetless.tasks.generate import ExactMatch, normalised
from forgetless.tasks.generation import Written
from forgetless.tasks.multiple_choice import MultipleChoice, choice_scores
from forgetless.tasks.perplexity import Perplexity
from tests.tiny import tokenizer as tiny_tokenizer

pytest_plugins = ["tests.tiny_fixtures"]

pytestmark = pytest.mark.filterwarnings("ignore:.* answers .* are empty and .* were cut off")

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return load_model(str(tiny_base))


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def four_lines(folder: Path, *lines: str) -> str:
    (folder / "mine.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / "mine.yaml")


# --------------------------------------------------------------------------------- multiple choice


def by_hand(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Log p(choice | prompt) token by token, without batch or padding."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(f"{prompt} {choice}")["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(log_p[t - 1, ids[t]] for t in range(start, len(ids))))


def test_choices_are_scored_by_their_log_probability(model: Any, tokenizer: Any) -> None:
    questions = [("Q: 1?", ("a", "bcd", "ef")), ("A longer question", ("x", "y"))]
    found = choice_scores(model, tokenizer, questions, batch_size=2)
    for (prompt, choices), scores in zip(questions, found, strict=True):
        expected = [by_hand(model, tokenizer, prompt, c) for c in choices]
        assert scores == pytest.approx(expected, abs=1e-4)
    assert choice_scores(model, tokenizer, questions, batch_size=1)[1] == pytest.approx(found[1])


def test_a_prompt_that_does_not_fit_loses_its_beginning(model: Any, tokenizer: Any) -> None:
    long, short = (("x" * n + "the end?", ("yes", "no")) for n in (300, 300 - 65))
    assert choice_scores(model, tokenizer, [long]) == choice_scores(model, tokenizer, [short])
    with pytest.raises(UserError, match="a choice is longer than the 128 tokens"):
        choice_scores(model, tokenizer, [("Q", ("y" * 200, "no"))])


def test_the_best_choice_for_its_length_is_the_answer(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows: Rows = [
        {"question": f"{i}?", "choices": ["a", "a long one", "b"], "answer": i % 3}
        for i in range(9)
    ]
    found = MultipleChoice(write(tmp_path / "q.jsonl", rows)).evaluate(model, tokenizer)
    totals = 0
    for row, item in zip(rows, found.items, strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        scores = [by_hand(model, tokenizer, prompt, choice) for choice in row["choices"]]
        each = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        assert item.answer == row["choices"][each.index(max(each))]
        assert item.expected == row["choices"][row["answer"]]
        assert item.score == (item.answer == item.expected)
        totals += scores.index(max(scores)) == row["answer"]
    assert found.value == sum(item.score for item in found.items) / 9
    assert found.extra["accuracy_total"] == pytest.approx(totals / 9)
    assert list(found.metrics) == ["accuracy", "accuracy_total"]
    assert found.metrics["accuracy_total"]["stderr"] == found.extra["accuracy_total_stderr"]


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, {"question": "Q", "choices": ["no", "yes"], "answer": 1}),
        ({}, {"question": "Q", "choices": ["no", "yes"], "answer": "B"}),
        ({}, {"question": "Q", "choices": ["no", "yes"], "answer": "yes"}),
        ({}, {"question": "Q", "choices": ["0", "yes"], "answer": "1"}),
        ({}, {"question": "Q", "choices": {"text": ["no", "yes"], "label": [1, 2]}, "answer": "2"}),
        ({"answer": "gold"}, {"question": "Q", "choices": ["no", "yes"], "gold": "B"}),
        ({"choices": ["x", "y"]}, {"question": "Q", "x": "no", "y": "yes", "answer": 1}),
        ({"choices": ["no", "yes"]}, {"question": "Q", "answer": "yes"}),
        ({"question": "goal"}, {"goal": "Q", "choices": ["no", "yes"], "answer": 1}),
    ],
)
def test_choices_and_answers_come_in_many_forms(
    settings: dict[str, Any], row: dict[str, Any], tmp_path: Path
) -> None:
    task = MultipleChoice(write(tmp_path / "q.jsonl", [row]), **settings)
    ((prompt, choices, right),) = task._asked
    assert prompt == "Question: Q\nAnswer:"
    assert right == 1
    assert choices[1] == "yes"


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {"question": "Q", "answer": 1}, "line 1: has no 'choices'; its fields are 'question'"),
        ({}, {"question": "Q", "choices": ["a"], "answer": 0}, "has 1 choices; give two or more"),
        (
            {},
            {"question": "Q", "choices": "ab", "answer": 0},
            "must be a list of choices, got 'ab'",
        ),
        ({}, {"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer 2 is no position 0..1"),
        (
            {},
            {"question": "Q", "choices": ["a", "b"], "answer": "C"},
            r"no label \(A, B\) and none",
        ),
        ({"prompt": "{topic}"}, {"question": "Q", "choices": ["a", "b"], "answer": 0}, "'topic'"),
        ({"prompt": "{"}, {"question": "Q"}, "write a brace of the text itself twice"),
        ({"prompt": "none"}, {"question": "Q"}, "has no field in braces, such as {question}"),
        ({"choices": []}, {"question": "Q"}, "choices must be a field or two and more"),
        ({"limit": 0}, {"question": "Q"}, "limit must be a whole number of at least 1"),
    ],
)
def test_what_is_wrong_with_a_file_of_choices_is_said(
    settings: dict[str, Any], row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "q.jsonl", [row])
    with pytest.raises(UserError, match=message):
        make_task({"kind": "multiple_choice", "path": str(path), **settings})


def test_four_lines_make_a_task_of_choices(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows: Rows = [{"q": f"{i}", "a": "x", "b": "y", "gold": i % 2} for i in range(6)]
    write(tmp_path / "mine.jsonl", rows)
    file = four_lines(
        tmp_path, "kind: multiple_choice", "path: mine.jsonl", "question: q", "choices: [a, b]",
        "answer: gold",
    )  # fmt: skip
    found = fl.evaluate(model, [file, {"kind": file, "name": "two", "limit": 2}], tokenizer)
    assert {task: result.n for task, result in found.items()} == {"mine": 6, "two": 2}


# ------------------------------------------------------------------------------- generated answers


class Says(nn.Module):
    """In place of a model: the answers that `generate` is patched to give."""


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the model write given texts; the prompts and settings that it got are kept."""
    asked: dict[str, Any] = {}

    def texts(*answers: str) -> dict[str, Any]:
        def generate(model: Any, tokenizer: Any, prompts: Any, **settings: Any) -> list[str]:
            asked.update(settings, prompts=list(prompts))
            return list(answers)

        monkeypatch.setattr("forgetless.tasks.generation.generate", generate)
        return asked

    return texts


def scores_of(path: Path, tokenizer: Any = None, **settings: Any) -> list[float]:
    words = tiny_tokenizer() if tokenizer is None else tokenizer
    found = ExactMatch(path, **settings).evaluate(Says(), words)
    return [item.score for item in found.items]


def test_an_answer_matches_any_accepted_one(says: Any, tmp_path: Path) -> None:
    rows: Rows = [
        {"question": "Capital of France?", "answer": "Paris"},
        {"question": "2+2?", "answer": 4},
        {"question": "UK?", "answer": ["the United Kingdom", "Britain"]},
        {"question": "Bird?", "answer": "owl", "also": ["an eagle"]},
    ]
    path = write(tmp_path / "q.jsonl", rows)
    asked = says(" paris.", "4!", "Britain", "Eagle")
    assert scores_of(path, aliases="also") == [1, 1, 1, 1]
    assert asked["prompts"][0] == "Question: Capital of France?\nAnswer:"
    assert (asked["stop"], asked["max_new_tokens"]) == ("\n", 32)
    assert scores_of(path) == [1, 1, 1, 0]
    says("Paris", "44", "UK", "owls")
    assert scores_of(path) == [1, 0, 0, 0]
    says(" paris", "4", "Britain", "owl")
    assert scores_of(path, normalise=False) == [0, 1, 1, 1]


def test_a_pattern_finds_the_answer(says: Any, tmp_path: Path) -> None:
    rows: Rows = [{"question": "3*6?", "answer": "3*6 is 18. #### 18"}] * 4
    path = write(tmp_path / "q.jsonl", rows)
    says("so #### 18", "so it is 18", "#### 1,8", "#### 18 or #### 19")
    assert scores_of(path, pattern=r"#### (\S+)") == [1, 0, 1, 1]
    says("18", "18", "18", "18")
    assert scores_of(path, pattern=r"\d+$") == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "said", "right"),
    [
        ("Paris", "The capital of France is Paris.", True),
        ("Paris", "It is PARIS, of course", True),
        ("Paris", "The parish of Lyon", False),
        ("the U.K.", "Somewhere in the U.K., I think", True),
        ("18", "so 3*6 is 18.", True),
        ("18", "so 3*6 is 180", False),
        ("18", "it costs $18.", True),
        ("18", "it is 18.5 or -18", False),
        ("1,000", "about 1000 people", True),
        ("3.5", "it is 13.5", False),
        ("owl", "no idea", False),
        ("巴黎", "法国的首都是巴黎。", True),
        ("!", "yes!", False),
    ],
)
def test_an_answer_may_contain_an_accepted_one(
    wanted: str, said: str, right: bool, says: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "?", "answer": ["zebra", wanted]}])
    says(said)
    assert scores_of(path, match="contains") == [float(right)]
    assert scores_of(path) == [0.0]


def test_as_it_stands_an_answer_contains_the_very_text(says: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "?", "answer": "Paris"}] * 2)
    says("In Paris.", "in paris.")
    assert scores_of(path, match="contains", normalise=False) == [1.0, 0.0]


@pytest.mark.parametrize(("empty", "cut"), [(2, 0), (1, 1), (0, 2), (0, 4)])
@pytest.mark.parametrize("kind", ["generate", "pocket_problems"])
def test_answers_that_are_empty_or_cut_are_told(
    empty: int, cut: int, kind: str, says: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": f"{i}?", "answer": "x"} for i in range(4)])
    task = make_task(
        {"kind": kind, "limit": 4} | ({"path": str(path)} if kind == "generate" else {})
    )
    answers = [" "] * empty + [Written("and so", is_cut=True)] * cut
    says(*[*answers, *["x"] * 4][:4])
    with pytest.warns(UserWarning, match=rf"of 4 answers {empty} are empty and {cut} were cut off"):
        found = task.evaluate(Says(), tiny_tokenizer())
    assert found.extra == {"empty_answers": empty / 4, "cut_answers": cut / 4}


def test_of_fewer_nothing_is_said(says: Any, tmp_path: Path, recwarn: Any) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": f"{i}?", "answer": "x"} for i in range(3)])
    says("", Written("x", is_cut=False), "x")
    assert ExactMatch(path).evaluate(Says(), tiny_tokenizer()).extra == {}
    assert not recwarn.list


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Beatles", "beatles", True),
        ("New York, N.Y.", "new york n.y", True),
        ("$1,000", "1000", True),
        ("3.5", "35", False),
        ("-3", "3", False),
        ("U.S.", "us", False),
        ("A", "the", False),
        ("“Hamlet”", "Hamlet", True),
        ("é", "é", True),
        ("", "x", False),
    ],
)
def test_what_counts_as_the_same_answer(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) == same


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "("}, "is no regular expression"),
        ({"match": "contain"}, "unknown match 'contain'; did you mean 'contains'"),
        ({"stop": ""}, "stop must be the text that ends an answer, got ''"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"answer": "solution"}, "line 1: has no 'solution'"),
        ({"path": "absent.jsonl"}, "no such file: absent.jsonl"),
    ],
)
def test_what_is_wrong_with_questions_is_said(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "Q", "answer": "A"}])
    with pytest.raises(UserError, match=message):
        make_task({"kind": "generate", "path": str(path), **settings})


def test_everything_that_changes_a_question_changes_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "Q", "answer": "A", "more": ["B"]}] * 2)
    variants: Rows = [
        {},
        {"aliases": "more"},
        {"prompt": "{question}"},
        {"pattern": "."},
        {"normalise": False},
        {"match": "contains"},
        {"stop": "."},
        {"max_new_tokens": 3},
        {"limit": 1},
    ]
    found = {ExactMatch(path, **settings).fingerprint for settings in variants}
    assert len(found) == len(variants)
    assert ExactMatch(path, name="other", limit=9).fingerprint == ExactMatch(path).fingerprint


def test_four_lines_make_a_task_of_questions(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [{"q": f"{i}", "a": f"{i}"} for i in range(5)])
    file = four_lines(
        tmp_path, "kind: generate", "path: mine.jsonl", "question: q", "answer: a",
        "max_new_tokens: 3",
    )  # fmt: skip
    (found,) = fl.evaluate(model, file, tokenizer).values()
    assert (found.task, found.metric, found.n) == ("mine", "accuracy", 5)


# --------------------------------------------------------------------------------- a long document


def scored(result: TaskResult) -> list[tuple[str, float]]:
    return [(item.id, item.score) for item in result.items]


def test_a_limit_on_one_long_document_is_a_number_of_windows(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)
    whole = Perplexity(path, max_length=40).evaluate(model, tokenizer)
    three = Perplexity(path, max_length=40, limit=3).evaluate(model, tokenizer)
    assert scored(three) == scored(whole)[:3]
    assert three.extra["tokens"] == 79
    assert three.fingerprint != whole.fingerprint
    four_lines(tmp_path, "kind: perplexity", "path: long.txt", "limit: 2", "max_length: 40")
    (again,) = fl.evaluate(model, str(tmp_path / "mine.yaml"), tokenizer).values()
    assert scored(again) == scored(whole)[:2]
