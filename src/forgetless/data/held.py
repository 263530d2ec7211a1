"""Examples in two parts: one to learn from, and one held out, on which a choice is measured."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from forgetless.core.errors import UserError
from forgetless.core.files import write_jsonl
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import TEXTS, Kind, Record
from forgetless.data.texts import read_examples

EVERY = 5
"""One record in so many is held out."""

_CHARACTERS = 4096
"""Raw texts are cut into pieces of at most so many characters before they are shared out."""


class HeldOut(NamedTuple):
    """Two JSON-lines files of the same form."""

    rest: Path
    held: Path


def hold_out(
    source: str | Path, folder: Path, limit: int | None = None, kinds: Collection[Kind] = TEXTS
) -> HeldOut:
    """Share the examples of a source out between two files: one in five is held out.

    Of examples with a class it is one in five of each class, and the classes come in turn. Raw
    texts without are cut into pieces at white space first, into ten at the least, so that a single
    document has two parts too. The source is what `forgetless.data.texts.read_examples` reads, not
    "self"; `folder` takes the two files.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a broken file, examples of another kind, or too few to share out.
    """
    examples = read_examples(source, limit)
    require_kind(examples, kinds)
    rows, by_class = list(_rows(examples)), defaultdict(list)
    _require_enough(source, len(rows))
    for row in rows:
        by_class[str(row.get("label"))].append(row)
    parts = list(by_class.values())
    if max(map(len, parts)) < EVERY:  # of many classes with few examples, some have none held out
        parts = [rows]
    held = _in_turn([part[EVERY - 1 :: EVERY] for part in parts])
    rest = _in_turn([[row for n, row in enumerate(part, 1) if n % EVERY] for part in parts])
    found = HeldOut(folder / "rest.jsonl", folder / "held.jsonl")
    for path, part in zip(found, (rest, held), strict=True):
        write_jsonl(path, part)
    return found


def require_two_parts(source: str | Path, limit: int | None = None) -> None:
    """Raise what `hold_out` would, as far as that shows without sharing the examples out."""
    examples = read_examples(source, limit)
    count = len(examples)
    if examples.kind == "text":  # which is cut into pieces
        count = sum(1 for _ in islice(_rows(examples), EVERY))
    _require_enough(source, count)


def _require_enough(source: str | Path, examples: int) -> None:
    if examples < EVERY:
        raise UserError(
            f"{source} has {examples} examples, too few to hold some out: give at least {EVERY}, "
            "or more of a text"
        )


def _rows(examples: Examples) -> Iterator[Record]:
    """The examples as rows of a file of the same form, raw texts in pieces."""
    if examples.kind == "image":
        from forgetless.data.pictures import cell_of  # loads PIL

        for record in examples:
            yield {**record, "image": cell_of(record["image"])}
    elif examples.kind == "sentence":
        for record in examples:
            pair = {"sentence1": record["sentence"], "sentence2": record.get("pair")}
            sentence = pair if "pair" in record else {"sentence": record["sentence"]}
            # A row without a label is read, and one whose label is nothing is not.
            yield sentence if record["label"] is None else {**sentence, "label": record["label"]}
    elif any(label is not None for label in examples.labels):
        for record, label in zip(examples, examples.labels, strict=True):
            yield {**record, "label": label}
    elif examples.kind == "text":
        total = sum(len(record["text"]) for record in examples)
        length = min(_CHARACTERS, max(1, total // (2 * EVERY)))
        for record in examples:
            yield from ({"text": piece} for piece in _pieces(record["text"], length))
    else:
        yield from examples


def _in_turn(parts: Sequence[Sequence[Record]]) -> list[Record]:
    """One of each part in turn."""
    return [row for row in chain.from_iterable(zip_longest(*parts)) if row is not None]


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
