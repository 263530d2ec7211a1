"""The third skill to learn: series of numbers, of which each comes from the one before."""

import random
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise

from forgetless.data.pocket.splits import Split, different

_LARGEST = 100


@dataclass(frozen=True, slots=True)
class Series:
    """An instruction, the sums that count the series (with a leading space), and alone."""

    prompt: str
    completion: str
    answer: str


def series(count: int, seed: int, split: Split = "train") -> list[Series]:
    """`count` different instructions, always the same for a seed.

    No instruction is in both splits, whatever the seeds: a hash of it decides where it belongs.

    Raises:
        ValueError: an unknown split, or a count below 0 or beyond what there is.
    """
    most = {"train": 4000, "test": 500}.get(split, count)
    if not 0 <= count <= most:
        raise ValueError(f"count must be 0 to {most} for {split!r}, got {count}")
    rng = random.Random(f"series {split} {seed}")
    return different(count, split, lambda _: _series(rng), lambda made: made.prompt)


def same_sums(text: str, answer: str) -> bool:
    """Whether the first line of a text is the answer's sums, every one of them, and no others."""
    line = text.strip().split("\n", 1)[0]
    return re.findall(r"\d+ [+-] \d+ = \d+", line) == answer.removesuffix(".").split(". ")


def _series(rng: random.Random) -> Series:
    """Three steps from a number: all up, all down, or up and down in turn."""
    a, b = rng.sample(range(2, 16), 2)
    first = rng.randint(1, _LARGEST)
    asked, steps = rng.choice(
        (
            (f"Count up from {first} in steps of {a}", (a, a, a)),
            (f"Count down from {first} in steps of {a}", (-a, -a, -a)),
            (f"From {first}, go up by {a} and down by {b} in turn", (a, -b, a)),
            (f"From {first}, go down by {a} and up by {b} in turn", (-a, b, -a)),
        )
    )
    numbers = list(accumulate(steps, initial=first))
    if not all(0 < number < _LARGEST for number in numbers):
        return _series(rng)
    sums = [f"{x} {'+' if y > x else '-'} {abs(y - x)} = {y}." for x, y in pairwise(numbers)]
    answer = " ".join(sums)
    return Series(f"Q: {asked}.\nA:", f" {answer}", answer)
