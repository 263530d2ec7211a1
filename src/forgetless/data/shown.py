"""Examples as a model meets them: what it is shown, and what of it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from forgetless.core.errors import UserError
from forgetless.data.chat import Chat, as_chat
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import TEXTS
from forgetless.data.packing import IGNORED
from forgetless.data.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A part of an example that is learned, or is shown only; special tokens by their names."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Shown:
    """One example.

    Attributes:
        tokens: how many it has, of all its rows.
        learned: how many of them are learned.
        rows: what the model sees at once; several where a chat template rewrites earlier turns, and
            of a raw text longer than ``max_length``.
        problem: why there is nothing to learn, where there is not.
    """

    where: str
    tokens: int
    learned: int
    rows: list[list[Piece]]
    problem: str | None = None


def shown(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, count: int, max_length: int = 512
) -> list[Shown]:
    """The first `count` examples, each as training would have it.

    Raises:
        UserError: they are no texts.
    """
    if examples.kind == "preference":
        chosen, rejected = (
            shown(examples.answers(which), tokenizer, count, max_length)
            for which in ("chosen", "rejected")
        )
        return [
            replace(one, where=f"{one.where}, {which}")
            for pair in zip(chosen, rejected, strict=True)
            for which, one in zip(("chosen", "rejected"), pair, strict=True)
        ]
    require_kind(examples, TEXTS)
    found = []
    for record, where in zip(examples.records[:count], examples.where, strict=False):
        place = where.removeprefix(f"{examples.source}, ")
        alone = replace(examples, records=[record], places=[place], labels=())
        try:
            rows = tokenize(alone, tokenizer, max_length=max_length, pack=False)
        except UserError as problem:
            found.append(Shown(where, 0, 0, [], str(problem)))
            continue
        learned = sum(label != IGNORED for row in rows for label in row["labels"])
        tokens = sum(len(row["input_ids"]) for row in rows)
        texts = [_pieces(row["input_ids"], row["labels"], tokenizer) for row in rows]
        found.append(Shown(where, tokens, learned, texts))
    return found


def _pieces(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """The text of a row, cut where learning begins and ends.

    A part alone would lose its first blank where the tokenizer puts one in front of every text.
    """
    pieces, said, end = [], "", 0
    for learned, part in groupby(label != IGNORED for label in labels):
        end += len(list(part))
        whole: str = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        pieces.append(Piece(whole.removeprefix(said), learned))
        said = whole
    return pieces


def template_of(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the examples are put into, in words."""
    if examples.kind == "preference":
        examples = examples.answers("chosen")
    if as_chat(examples, tokenizer).kind != "messages":
        return "as they are, no chat template"
    after = "" if examples.system is None else ", after a system prompt"
    is_own = Chat(tokenizer).is_own
    return f"by the tokenizer's chat template{after}" if is_own else "by a plain template"
