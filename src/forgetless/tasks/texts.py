"""Tasks over a text of the user's, or of the pocket world: what they read and what they add up.

No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from forgetless.core.errors import unknown
from forgetless.core.files import not_there
from forgetless.core.metrics import mean_stderr
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import TEXTS
from forgetless.data.sources import Source
from forgetless.data.texts import POCKET_TEXTS, SELF, read_examples
from forgetless.tasks.asking import Asking
from forgetless.tasks.base import Item, whole_number

if TYPE_CHECKING:
    from forgetless.tasks.base import Tokenizer


LARGEST_LOSS = 700.0
"""Beyond it, exp() of a loss is no longer a float64."""

# Tokens of a text that are enough for its beginning, and characters of it that are shown.
_HEAD, _BEGINNING = 48, 100


class TextTask(Asking):
    """A task over the examples of a file, or over a text of the pocket world.

    Attributes:
        path: a file that `forgetless.data.load_examples` reads, or a key of `POCKET_TEXTS`.
        limit: read the first so many examples only.
    """

    path: str | Path
    limit: int | None

    def problems(self) -> Iterable[str | None]:
        """Of path and limit, as far as that shows without reading."""
        if not isinstance(self.path, str | Path) or not str(self.path):
            known = ", ".join(POCKET_TEXTS)
            yield f"path must be a file, a folder or one of {known}, got {self.path!r}"
        elif self.path == SELF:
            if not self.needs_reference:
                yield f"path {SELF!r} is text that the base writes, which kl alone reads"
        elif (name := Source.of(self.path).name).startswith("pocket:"):
            if name not in POCKET_TEXTS:
                yield str(unknown("pocket text", str(self.path), POCKET_TEXTS))
        elif not Source.of(self.path).is_here:
            yield not_there(self.path)
        yield whole_number("limit", self.limit, optional=True)
        yield from super().problems()

    @cached_property
    def examples(self) -> Examples:
        """What the task reads."""
        found = read_examples(self.path, self.limit)
        require_kind(found, TEXTS)
        said: Any = {"chat_template": self.chat_template, "system": self.system}
        return replace(found, **said)


class Piece(NamedTuple):
    """What was added up over the tokens of one piece of a text.

    Attributes:
        start: position of the piece's first token in the text.
        sums: of each quantity by its name, in nats; "tokens" says of how many tokens, 1 or more.
    """

    text: int
    start: int
    sums: Mapping[str, float]


def grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces of each item, which is a text.

    The pieces of a single text are items of their own, for an error cannot be told from one item.
    Neighbours resemble each other, so that error is rather too small than too large.
    """
    alone = len({piece.text for piece in pieces}) == 1
    groups: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((piece.text, piece.start if alone else 0), []).append(piece)
    return list(groups.values())


def items_of(
    pieces: Sequence[Piece], what: str, rows: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> list[Item]:
    """Every item with the mean of a quantity over its tokens, weighted by their number.

    `what` is the quantity; the tokenizer shows the beginning of a text.
    """
    alone = len({piece.text for piece in pieces}) == 1
    items = []
    for parts in grouped(pieces):
        text, start, _ = parts[0]
        ids = rows[text][start if alone else 0 :][:_HEAD]
        shown = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        if len(shown) > _BEGINNING:
            shown = f"{shown[: _BEGINNING - 1]}…"
        tokens = added(parts, "tokens")
        items.append(
            Item(
                id=f"{text}:{start}" if alone else str(text),
                prompt=shown,
                expected="",
                score=added(parts, what) / tokens,
                weight=tokens,
            )
        )
    return items


def added(pieces: Sequence[Piece], what: str) -> float:
    """The sum of a quantity over pieces."""
    return float(sum(piece.sums[what] for piece in pieces))


def per_token(
    name: str,
    pieces: Sequence[Piece],
    total: Callable[[Sequence[Piece]], float],
    count: str = "tokens",
) -> dict[str, float]:
    """The mean of a quantity per token and, as `<name>_stderr`, its standard error over items.

    `total` sums the quantity over the pieces of an item, and `count` over how many tokens.

    Returns:
        Nothing where an item's mean is not finite; items without tokens do not count.
    """
    sums = [(total(parts), added(parts, count)) for parts in grouped(pieces)]
    values = [value / tokens for value, tokens in sums if tokens]
    if not all(map(math.isfinite, values)):
        return {}
    mean = mean_stderr(values, [tokens for _, tokens in sums if tokens])
    return {name: mean.value, f"{name}_stderr": mean.stderr}
