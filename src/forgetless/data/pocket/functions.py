"""The second skill to learn: small Python functions from a sentence, run against tests.

A function is put together from parts, each with its words, its code and its meaning, so that there
are thousands of them and every one has tests.
"""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.data.pocket.problems import OPERATIONS
from forgetless.data.pocket.splits import Split, different

_TESTS = 6

Part = tuple[str, str, Callable[[Any], Any]]
"""Words, code with `{}` for what it works on, and what it does."""


@dataclass(frozen=True, slots=True)
class Function:
    """A sentence and the function's head, its body (with a leading line end), and its tests."""

    prompt: str
    completion: str
    tests: tuple[str, ...]

    @property
    def head(self) -> str:
        """The line that the body follows."""
        return self.prompt.rpartition("A: ")[2]

    def program(self, body: str) -> str:
        """The function with a body, and its tests."""
        return "\n".join((self.head + body, *self.tests, ""))


def functions(count: int, seed: int, split: Split = "train") -> list[Function]:
    """`count` different functions, always the same for a seed.

    No sentence is in both splits, whatever the seeds: a hash of the sentence decides where it
    belongs.

    Raises:
        ValueError: an unknown split, or a negative count.
    """
    rng = random.Random(f"functions {split} {seed}")
    found = different(
        count,
        split,
        lambda _: rng.choice(_KINDS)(rng),
        lambda function: function.prompt.partition("\n")[0],
    )
    rng.shuffle(found)
    return found


def _function(
    sentence: str,
    name: str,
    variable: str,
    body: Sequence[str],
    meaning: Callable[[Any], Any],
    inputs: Sequence[Any],
) -> Function:
    prompt = f"Q: Write a function that takes {variable} and returns {sentence}.\nA: "
    head = f"def {name}({variable}):"
    tests = tuple(f"assert {name}({given!r}) == {meaning(given)!r}" for given in inputs)
    return Function(prompt + head, "".join(f"\n    {line}" for line in body), tests)


# ---- numbers -------------------------------------------------------------------------------------


def _step(rng: random.Random, largest: int = 9) -> Part:
    """What is done to a number; `{}` is written without brackets where that is right."""
    k = rng.randint(2, largest)
    words, sign = rng.choice((("plus", "+"), ("minus", "-"), ("times", "*")))
    return f"{words} {k}", f"{{}} {sign} {k}", lambda x: OPERATIONS[sign](x, k)


def _calculation(rng: random.Random) -> Function:
    first, second = _step(rng, 20), _step(rng, 20)
    inner = first[1].format("n")
    body = second[1].format(inner if "*" not in second[1] or "*" in inner else f"({inner})")
    return _function(
        f"n {first[0]}, then {second[0]}",
        rng.choice(("find", "count", "swap", "square")),
        "n",
        [f"return {body}"],
        lambda x: second[2](first[2](x)),
        [0, 1, *rng.sample(range(2, 60), _TESTS - 2)],
    )


_COMPARISONS: tuple[tuple[str, str, Callable[[int, int], bool]], ...] = (
    ("greater than", ">", operator.gt),
    ("less than", "<", operator.lt),
    ("equal to", "==", operator.eq),
    ("not equal to", "!=", operator.ne),
)


def _condition(rng: random.Random) -> Part:
    words, sign, holds = rng.choice(_COMPARISONS)
    k = rng.randint(2, 9)
    return f"{words} {k}", f"{{}} {sign} {k}", lambda x: holds(x, k)


def _border(condition: Part) -> list[int]:
    """The numbers that tell one comparison from another."""
    border = int(condition[1].split()[-1])
    return [border, border - 1, border + 1]


def _numbers_around(rng: random.Random, condition: Part) -> list[int]:
    """Numbers for which the condition holds and others."""
    return [*_border(condition), *rng.sample(range(25, 60), _TESTS - 3)]


def _case(rng: random.Random) -> Function:
    condition, first, second = _condition(rng), _step(rng), _step(rng)
    while any(first[2](x) == second[2](x) for x in _border(condition)):
        second = _step(rng)
    return _function(
        f"n {first[0]} if it is {condition[0]}, or else n {second[0]}",
        rng.choice(("check", "find", "swap")),
        "n",
        [
            f"if {condition[1].format('n')}:",
            f"    return {first[1].format('n')}",
            f"return {second[1].format('n')}",
        ],
        lambda x: first[2](x) if condition[2](x) else second[2](x),
        _numbers_around(rng, condition),
    )


# ---- lists of numbers ----------------------------------------------------------------------------

_WHOLE: tuple[tuple[str, str, Callable[[list[int]], Any]], ...] = (
    ("the sum of", "sum({})", sum),
    ("a list of", "{}", list),
    ("the sorted", "sorted({})", sorted),
    ("the reversed", "{}[::-1]", lambda given: given[::-1]),
)


def _lists(rng: random.Random, condition: Part) -> list[list[int]]:
    """Lists of numbers, for some of which the condition holds."""
    near = _numbers_around(rng, condition)
    return [near, *([x] for x in near[:3]), [], rng.choices(range(25), k=rng.randint(4, 7))]


def _selected(rng: random.Random) -> tuple[Part, Part]:
    """A condition, and a step after which the numbers at its border still count in a sum."""
    condition, step = _condition(rng), _step(rng)
    while 0 in map(step[2], _border(condition)):
        step = _step(rng)
    return condition, step


def _selection(rng: random.Random) -> Function:
    (condition, step), (words, code, total) = _selected(rng), rng.choice(_WHOLE)
    changed = f"[{step[1].format('x')} for x in numbers if {condition[1].format('x')}]"
    return _function(
        f"{words} numbers {condition[0]}, each {step[0]}",
        rng.choice(("double", "combine", "count", "find")),
        "numbers",
        [f"return {code.format(changed)}"],
        lambda given: total([step[2](x) for x in given if condition[2](x)]),
        _lists(rng, condition),
    )


def _loop(rng: random.Random) -> Function:
    condition, step = _selected(rng)
    return _function(
        f"the total of numbers {condition[0]}, each {step[0]}",
        rng.choice(("total", "add", "combine")),
        "numbers",
        [
            "total = 0",
            "for x in numbers:",
            f"    if {condition[1].format('x')}:",
            f"        total += {step[1].format('x')}",
            "return total",
        ],
        lambda given: sum(step[2](x) for x in given if condition[2](x)),
        _lists(rng, condition),
    )


_KINDS: tuple[Callable[[random.Random], Function], ...] = (_calculation, _case, _selection, _loop)
