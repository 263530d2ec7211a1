"""The first skill to learn: arithmetic word problems with worked steps and an exact answer."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from forgetless.data.pocket.splits import Split, different
from forgetless.data.pocket.words import CONTAINERS, NAMES, OBJECTS

__all__ = ["TEMPLATES", "Problem", "final_answer", "problems"]

_LARGEST = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its worked solution (with a leading space) and the number it ends in."""

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Cast:
    """What fills a template: two people, an object and a container."""

    name: str
    other: str
    thing: str
    container: str


Story = tuple[str, list[str], int]
Template = Callable[[random.Random, _Cast], Story]


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
    cast = _Cast(name, other, rng.choice(OBJECTS), rng.choice(CONTAINERS))
    while True:
        story, steps, answer = template(rng, cast)
        if 0 < answer <= _LARGEST:
            break
    completion = "".join(f" {step}." for step in steps) + f" The answer is {answer}."
    return Problem(f"Q: {story}\nA:", completion, str(answer))


def _gift(rng: random.Random, cast: _Cast) -> Story:
    a, b = rng.randint(2, 50), rng.randint(2, 50)
    story = f"{cast.name} has {a} {cast.thing} and gets {b} more. How many are there now?"
    return story, [f"{a} + {b} = {a + b}"], a + b


def _loss(rng: random.Random, cast: _Cast) -> Story:
    a, b = rng.randint(10, 90), rng.randint(2, 40)
    story = f"{cast.name} has {a} {cast.thing} and loses {b}. How many are left?"
    return story, [f"{a} - {b} = {a - b}"], a - b


def _containers(rng: random.Random, cast: _Cast) -> Story:
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    story = f"There are {a} {cast.container} with {b} {cast.thing} each. How many in all?"
    return story, [f"{a} * {b} = {a * b}"], a * b


def _sharing(rng: random.Random, cast: _Cast) -> Story:
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    story = (
        f"{cast.name} shares {a * b} {cast.thing} fairly among {a} friends. How many does each get?"
    )
    return story, [f"{a * b} / {a} = {b}"], b


def _more_containers(rng: random.Random, cast: _Cast) -> Story:
    a, b, c = rng.randint(2, 30), rng.randint(2, 8), rng.randint(2, 8)
    story = (
        f"{cast.name} has {a} {cast.thing} and buys {b} {cast.container} of {c} {cast.thing}. "
        "How many are there now?"
    )
    return story, [f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"], a + b * c


def _eaten(rng: random.Random, cast: _Cast) -> Story:
    a, b, c = rng.randint(2, 8), rng.randint(2, 8), rng.randint(2, 20)
    story = (
        f"{cast.name} fills {a} {cast.container} with {b} {cast.thing} each, then sells {c}. "
        "How many are left?"
    )
    return story, [f"{a} * {b} = {a * b}", f"{a * b} - {c} = {a * b - c}"], a * b - c


def _more_than(rng: random.Random, cast: _Cast) -> Story:
    a, b = rng.randint(2, 35), rng.randint(2, 25)
    story = (
        f"{cast.name} has {a} {cast.thing}. {cast.other} has {b} more than {cast.name}. "
        "How many together?"
    )
    return story, [f"{a} + {b} = {a + b}", f"{a} + {a + b} = {a + a + b}"], a + a + b


def _times_as_many(rng: random.Random, cast: _Cast) -> Story:
    a, b = rng.randint(2, 12), rng.randint(2, 5)
    story = (
        f"{cast.name} has {a} {cast.thing}. {cast.other} has {b} times as many. How many together?"
    )
    return story, [f"{b} * {a} = {b * a}", f"{a} + {b * a} = {a + b * a}"], a + b * a


def _change(rng: random.Random, cast: _Cast) -> Story:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.choice((20, 50, 100))
    story = (
        f"{cast.name} buys {a} {cast.thing} for {b} dollars each and pays with {c} dollars. "
        "How many dollars come back?"
    )
    return story, [f"{a} * {b} = {a * b}", f"{c} - {a * b} = {c - a * b}"], c - a * b


def _gift_and_loss(rng: random.Random, cast: _Cast) -> Story:
    a, b, c = rng.randint(5, 50), rng.randint(2, 40), rng.randint(2, 30)
    story = (
        f"{cast.name} has {a} {cast.thing}, finds {b} and gives {c} to {cast.other}. "
        "How many are left?"
    )
    return story, [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"], a + b - c


TEMPLATES: tuple[Template, ...] = (
    _gift,
    _loss,
    _containers,
    _sharing,
    _more_containers,
    _eaten,
    _more_than,
    _times_as_many,
    _change,
    _gift_and_loss,
)
