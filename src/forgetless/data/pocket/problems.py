"""The first skill to learn: arithmetic word problems with worked steps and an exact answer."""

import operator
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from forgetless.data.pocket.splits import Split, different
from forgetless.data.pocket.words import CONTAINERS, NAMES, OBJECTS

_LARGEST = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its worked solution (with a leading space) and the number it ends in."""

    prompt: str
    completion: str
    answer: str


class Template(NamedTuple):
    """A kind of problem.

    Attributes:
        story: with a name and another's, a thing, a container and the numbers to put in.
        numbers: what each of them is drawn from; `product` is that of a and b.
        sums: the steps, in which `_` is the result of the step before.
    """

    story: str
    numbers: Mapping[str, Sequence[int]]
    sums: Sequence[str]


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

TEMPLATES = (
    Template(
        "{name} has {a} {thing} and gets {b} more. How many are there now?",
        {"a": range(2, 51), "b": range(2, 51)},
        ("a + b",),
    ),
    Template(
        "{name} has {a} {thing} and loses {b}. How many are left?",
        {"a": range(10, 91), "b": range(2, 41)},
        ("a - b",),
    ),
    Template(
        "There are {a} {container} with {b} {thing} each. How many in all?",
        {"a": range(2, 11), "b": range(2, 11)},
        ("a * b",),
    ),
    Template(
        "{name} shares {product} {thing} fairly among {a} friends. How many does each get?",
        {"a": range(2, 11), "b": range(2, 11)},
        ("product / a",),
    ),
    Template(
        "{name} has {a} {thing} and buys {b} {container} of {c} {thing}. How many are there now?",
        {"a": range(2, 31), "b": range(2, 9), "c": range(2, 9)},
        ("b * c", "a + _"),
    ),
    Template(
        "{name} fills {a} {container} with {b} {thing} each, then sells {c}. How many are left?",
        {"a": range(2, 9), "b": range(2, 9), "c": range(2, 21)},
        ("a * b", "_ - c"),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} more than {name}. How many together?",
        {"a": range(2, 36), "b": range(2, 26)},
        ("a + b", "a + _"),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} times as many. How many together?",
        {"a": range(2, 13), "b": range(2, 6)},
        ("b * a", "a + _"),
    ),
    Template(
        "{name} buys {a} {thing} for {b} dollars each and pays with {c} dollars. "
        "How many dollars come back?",
        {"a": range(2, 10), "b": range(2, 10), "c": (20, 50, 100)},
        ("a * b", "c - _"),
    ),
    Template(
        "{name} has {a} {thing}, finds {b} and gives {c} to {other}. How many are left?",
        {"a": range(5, 51), "b": range(2, 41), "c": range(2, 31)},
        ("a + b", "_ - c"),
    ),
)


def problems(count: int, seed: int, split: Split = "train") -> list[Problem]:
    """`count` different problems, always the same for a seed.

    No text is in both splits, whatever the seeds: a hash of the text decides where it belongs.

    Raises:
        ValueError: an unknown split, or a negative count.
    """
    rng = random.Random(f"{split} {seed}")
    found = different(
        count,
        split,
        lambda made: _problem(TEMPLATES[made % len(TEMPLATES)], rng),
        lambda problem: problem.prompt,
    )
    rng.shuffle(found)
    return found


def final_answer(text: str) -> str | None:
    """The number that a solution ends in, or None where it names none."""
    found = re.search(r"The answer is (\d+)\.(?!\d)", text)
    return found.group(1) if found else None


def _problem(template: Template, rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other}
    words |= {"thing": rng.choice(OBJECTS), "container": rng.choice(CONTAINERS)}
    while True:
        numbers = {letter: rng.choice(values) for letter, values in template.numbers.items()}
        numbers["product"] = numbers["a"] * numbers["b"]
        completion = ""
        for sum_ in template.sums:
            left, sign, right = sum_.split()
            x, y = numbers[left], numbers[right]
            numbers["_"] = OPERATIONS[sign](x, y)
            completion += f" {x} {sign} {y} = {numbers['_']}."
        answer = numbers["_"]
        if 0 < answer <= _LARGEST:
            story = template.story.format(**words, **numbers)
            return Problem(f"Q: {story}\nA:", f"{completion} The answer is {answer}.", str(answer))
