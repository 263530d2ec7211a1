"""A text in two parts: one to learn from, and one held out, on which a choice is measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from forgetless.core.errors import UserError
from forgetless.core.files import write_jsonl
from forgetless.data.examples import require_kind
from forgetless.data.forms import TEXTS, Record
from forgetless.data.texts import read_examples

EVERY = 5
"""One record in so many is held out."""

_CHARACTERS = 4096
"""Raw texts are cut into pieces of at most so many characters before they are shared out."""


class HeldOut(NamedTuple):
    """Two JSON-lines files of the same form."""

    rest: Path
    held: Path


def hold_out(source: str | Path, folder: Path, limit: int | None = None) -> HeldOut:
    """Share the examples of a source out between two files: one in five is held out.

    Raw texts are cut into pieces at white space first, into ten at the least, so that a single
    document has two parts too.

    Args:
        source: what `forgetless.data.texts.read_examples` reads: a file, or one of the pocket
            world's; not "self".
        folder: where the two files go.
        limit: of the first so many examples only.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a broken file, or too little text to share out.
    """
    examples = read_examples(source, limit)
    require_kind(examples, TEXTS)
    records = list(examples)
    if examples.kind == "text":
        total = sum(len(record["text"]) for record in records)
        length = min(_CHARACTERS, max(1, total // (2 * EVERY)))
        pieces = [piece for record in records for piece in _pieces(record["text"], length)]
        records = [{"text": piece} for piece in pieces]
    held = records[EVERY - 1 :: EVERY]
    if not held:
        raise UserError(
            f"{source} has {len(records)} examples, too few to hold some out: give at least "
            f"{EVERY}, or a fixed strength or scale, which needs none"
        )
    rest = [record for number, record in enumerate(records, 1) if number % EVERY]
    found = HeldOut(folder / "rest.jsonl", folder / "held.jsonl")
    for path, part in zip(found, (rest, held), strict=True):
        write_jsonl(path, part)
    return found


def write_texts(texts: list[str], folder: Path) -> HeldOut:
    """The same of texts in memory."""
    records: list[Record] = [{"text": text} for text in texts if text.strip()]
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "all.jsonl", records)
    return hold_out(folder / "all.jsonl", folder)


def _pieces(text: str, length: int) -> list[str]:
    """The text in pieces of about this many characters, each of which ends at white space."""
    pieces, start = [], 0
    while start < len(text):
        space = re.compile(r"\s|$").search(text, min(start + length, len(text)))
        stop = space.end() if space else len(text)
        if piece := text[start:stop].strip():
            pieces.append(piece)
        start = max(stop, start + 1)
    return pieces
