"""The texts of a user's file, or of the pocket world, as tasks read them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from forgetless.data import Examples, from_rows, read_rows
from forgetless.errors import unknown

__all__ = ["POCKET_TEXTS", "beginning", "read_texts", "source_problem", "spread"]

T = TypeVar("T")

POCKET_TEXTS = {
    "pocket:knowledge": "every fact as a sentence, in the phrasings that the base was trained on",
    "pocket:held": "every fact as a question, in a phrasing that the base never saw",
    "pocket:problems": "the word problems for training",
    "pocket:problems:test": "the word problems for testing",
}

_BEGINNING = 100


def source_problem(path: object) -> str | None:
    """Why a source cannot be read, as far as that shows without reading it; None if it may."""
    if not isinstance(path, str | Path) or not str(path):
        return f"path must be a file, a folder or one of {', '.join(POCKET_TEXTS)}, got {path!r}"
    if str(path).startswith("pocket:"):
        if path in POCKET_TEXTS:
            return None
        return str(unknown("pocket text", str(path), POCKET_TEXTS))
    return None if Path(path).exists() else f"no such file: {path}"


def read_texts(path: str | Path, limit: int | None = None) -> Examples:
    """The texts of a source: as training examples, and rows that hold nothing but a prompt.

    Args:
        path: what `forgetless.data.load_examples` reads, or a key of `POCKET_TEXTS`.
        limit: the first so many examples of a file; so many facts, evenly spread, of the pocket
            world's.

    Raises:
        FileNotFoundError: no such file.
        UserError: an empty or broken file, or a row that holds no text.
    """
    if path in ("pocket:knowledge", "pocket:held"):
        from forgetless.pocket import knowledge

        texts = (
            knowledge.knowledge_text()
            if path == "pocket:knowledge"
            else [question.prompt for question in knowledge.questions("held_out")]
        )
        return Examples("text", [{"text": text} for text in spread(texts, limit)], str(path))
    return from_rows(_prompts_as_texts(read_rows(path, limit=limit)), source=str(path))


def spread(values: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the values, evenly spread over them, in their order."""
    count = len(values) if limit is None else min(limit, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def beginning(text: str) -> str:
    """The first words of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _BEGINNING else line[: _BEGINNING - 1] + "…"


def _prompts_as_texts(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        alone = isinstance(row, Mapping) and "prompt" in row and len(row.keys() & _ANSWERS) == 0
        yield place, {"text": row["prompt"]} if alone else row


_ANSWERS = {"completion", "response", "messages", "text"}
