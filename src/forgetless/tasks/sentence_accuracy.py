"""Sentences classified under the base's own head, or under the new one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetless.data.forms import Kind, Record
from forgetless.tasks.accuracy import HeadAccuracy

__all__ = ["SentenceAccuracy"]

_BEGINNING = 100
"""Characters of a sentence that an item shows."""


@dataclass(frozen=True)
class SentenceAccuracy(HeadAccuracy):
    """The share of sentences, or pairs, of which the model's head finds their class likeliest.

    Attributes:
        path: a file of rows with a sentence and its class, see docs/sentences.md.
        name: of the task.
        limit: the first so many rows only.
        head: own, new or all, of a model with a new head; its classes decide where it is not given.

    Raises:
        UserError: settings out of range, no such file, or rows of another form.
    """

    kind = "sentence_accuracy"
    summary = "sentences classified under the base's own head or the new one"
    modality = "sentences"
    kinds = frozenset[Kind]({"sentence", "text"})

    path: str | Path
    name: str = "sentence_accuracy"
    limit: int | None = None
    head: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of path, limit and head, as far as that shows without reading."""
        if not isinstance(self.path, str | Path) or not Path(self.path).exists():
            yield f"path must be a file of sentences with their classes, got {self.path!r}"
        yield from super().problems()

    def content(self) -> Sequence[object]:
        """The sentences and their classes, which may lie beside raw texts."""
        return (*super().content(), *map(str, self.examples.labels))

    def shown(self, place: str, record: Record) -> str:
        """The beginning of the sentence."""
        text = " ".join(str(record.get("sentence", record.get("text"))).split())
        return text if len(text) <= _BEGINNING else f"{text[: _BEGINNING - 1]}…"


TASK = SentenceAccuracy
