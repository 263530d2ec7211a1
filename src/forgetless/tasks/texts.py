"""The texts of a user's file, or of the pocket world, as tasks read them. No torch."""

from __future__ import annotations

from pathlib import Path

from forgetless.core.errors import unknown
from forgetless.data.texts import read_examples as read_texts
from forgetless.data.texts import spread

__all__ = ["POCKET_TEXTS", "beginning", "read_texts", "source_problem", "spread"]

POCKET_TEXTS = {
    "pocket:knowledge": "every fact as a sentence, in the phrasings that the base was trained on",
    "pocket:held": "every fact as a question, in a phrasing that the base never saw",
    "pocket:problems": "the word problems for training",
    "pocket:problems:test": "the word problems for testing",
    "pocket:functions": "the small functions for training",
    "pocket:functions:test": "the small functions for testing",
    "pocket:series": "the series of numbers for training",
    "pocket:series:test": "the series of numbers for testing",
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


def beginning(text: str) -> str:
    """The first words of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _BEGINNING else line[: _BEGINNING - 1] + "…"
