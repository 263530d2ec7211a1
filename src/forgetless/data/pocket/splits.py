"""Training and test split of what the pocket world makes: a hash of a text decides for good."""

import hashlib
from collections.abc import Callable
from typing import Literal, TypeVar

Split = Literal["train", "test"]
Made = TypeVar("Made")

_TEST_SHARE = 5


def different(
    count: int, split: Split, make: Callable[[int], Made], text: Callable[[Made], str]
) -> list[Made]:
    """`count` things of a split whose texts differ, in the order in which they were made.

    No text is in both splits, whatever made it; a fifth of all are of the test split. `make` is
    given how many there are already.

    Raises:
        ValueError: an unknown split, or a negative count.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    found: dict[str, Made] = {}
    while len(found) < count:
        made = make(len(found))
        digest = hashlib.sha256(text(made).encode()).digest()
        if (digest[0] % _TEST_SHARE == 0) == (split == "test"):
            found.setdefault(text(made), made)
    return list(found.values())
