"""Word problems: right arithmetic, separate splits, the same for the same seed."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter

import pytest

from forgetless.data.pocket.problems import TEMPLATES, Problem, final_answer, problems

TRAIN = problems(2_000, seed=0)
TEST = problems(500, seed=0, split="test")

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value(expression: str) -> float:
    """A sum, difference, product or quotient of two numbers, read by Python's own parser."""
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp)
    left, right = (ast.literal_eval(side) for side in (node.left, node.right))
    result: float = OPERATIONS[type(node.op)](left, right)
    return result


def test_every_step_is_right_and_the_last_one_is_the_answer() -> None:
    for problem in (*TRAIN, *TEST):
        *steps, conclusion = problem.completion.strip().removesuffix(".").split(". ")
        assert 1 <= len(steps) <= 2, problem
        for step in steps:
            expression, result = step.split(" = ")
            assert value(expression) == int(result), problem
        assert conclusion == f"The answer is {problem.answer}"
        assert steps[-1].endswith(f"= {problem.answer}")
        assert 1 <= int(problem.answer) <= 100


def test_steps_use_the_numbers_of_the_story_and_of_earlier_steps() -> None:
    for problem in TRAIN:
        known = set(re.findall(r"\d+", problem.prompt))
        assert len(known) >= 1
        for expression, result in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", problem.completion):
            assert set(re.findall(r"\d+", expression)) <= known, problem
            known.add(result)


def test_prompts_ask_and_completions_start_with_a_space() -> None:
    for problem in TRAIN:
        assert re.fullmatch(r"Q: [^\n]+\?\nA:", problem.prompt)
        assert problem.completion.startswith(" ")
        assert final_answer(problem.completion) == problem.answer


def test_all_templates_are_used_equally() -> None:
    assert len(TEMPLATES) >= 8
    stories = Counter(re.sub(r"\d+|[A-Z][a-z]+ ", "", p.prompt[3:20]) for p in TRAIN)
    assert len(stories) >= len(TEMPLATES)
    operations = Counter(re.sub(r"\d+|[^-+*/]", "", problem.completion) for problem in TRAIN)
    assert set(operations) == {"+", "-", "*", "/", "*+", "*-", "++", "+-"}
    assert min(operations.values()) >= 2_000 / len(TEMPLATES)


def test_problems_are_different_and_train_and_test_share_none() -> None:
    train = {p.prompt for seed in range(3) for p in problems(2_000, seed)}
    test = {p.prompt for seed in range(3) for p in problems(500, seed, split="test")}
    assert not train & test
    assert len({problem.prompt for problem in TRAIN}) == len(TRAIN) == 2_000
    assert len({problem.prompt for problem in TEST}) == len(TEST) == 500


def test_the_same_seed_gives_the_same_problems() -> None:
    assert problems(50, seed=3) == problems(50, seed=3)
    assert problems(50, seed=3) != problems(50, seed=4)
    # Pinned, so that scores stay comparable from version to version.
    assert problems(10, seed=0)[0] == Problem(
        prompt="Q: There are 2 boxes with 10 coins each. How many in all?\nA:",
        completion=" 2 * 10 = 20. The answer is 20.",
        answer="20",
    )


def test_no_problems_and_wrong_arguments() -> None:
    assert problems(0, seed=0) == []
    with pytest.raises(ValueError, match="'train' or 'test', got 'dev'"):
        problems(1, seed=0, split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more, got -1"):
        problems(-1, seed=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 * 5 = 15. The answer is 15.", "15"),
        (" The answer is 15", None),
        (" The answer is 15.5.", None),
        (" 3 * 5 = 15.", None),
        (" The answer is blue.", None),
        ("", None),
        (" The answer is 7. The answer is 9.", "7"),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer
