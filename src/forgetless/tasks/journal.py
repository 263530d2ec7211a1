"""What a task has measured so far, kept on disk batch by batch. No torch.

Inside `resuming(path, key)` every batch of texts that is generated or scored is appended to a file
of JSON lines as soon as it is done. When the process dies and the same evaluation starts again,
finished batches are read and not computed: the numbers are those of a run that was not interrupted,
because every batch has the same texts in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, TypeVar

from forgetless.core.progress import bar

__all__ = ["Section", "resuming", "section"]

T = TypeVar("T")


class _Journal:
    """The file of one evaluation: its key, then one line a batch."""

    def __init__(self, path: Path, key: str) -> None:
        self.done: dict[str, list[Any]] = {}
        self.sections = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = path.open("a+", encoding="utf-8")
        self._read(key)

    def _read(self, key: str) -> None:
        """Take over the lines of the same evaluation; a half-written last line is cut off."""
        self.file.seek(0)
        whole, newline, _ = self.file.read().rpartition("\n")
        lines = whole.split("\n") if newline else []
        same = bool(lines) and json.loads(lines[0]) == {"key": key}
        self.file.seek(0)
        self.file.truncate()
        self.file.write("\n".join([*lines, ""]) if same else json.dumps({"key": key}) + "\n")
        self.file.flush()
        for line in lines[1:] if same else []:
            entry = json.loads(line)
            self.done[entry["batch"]] = entry["values"]

    def add(self, batch: str, values: Sequence[Any]) -> None:
        self.done[batch] = list(values)
        entry = {"batch": batch, "values": list(values)}
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()


_active: ContextVar[_Journal | None] = ContextVar("active", default=None)


@contextmanager
def resuming(path: Path, key: str) -> Iterator[None]:
    """Keep what is measured inside this block in a file, and take over what it has already.

    Args:
        path: the file; it stays, also when the block raises. Delete it when the result is kept.
        key: what decides the numbers, the model's content above all. A file with another key is
            started anew.
    """
    journal = _Journal(path, key)
    token = _active.set(journal)
    try:
        yield
    finally:
        _active.reset(token)
        journal.file.close()


class Section:
    """The batches of one pass of a model over one set of texts."""

    def __init__(self, journal: _Journal | None, name: str, texts: int) -> None:
        self._journal, self._name = journal, name
        self._bar = bar("evaluation", texts, "texts")

    def batch(self, places: Sequence[int], compute: Callable[[], Sequence[T]]) -> Sequence[T]:
        """The values of a batch: those on disk, or computed now and written down.

        Args:
            places: which texts are in the batch.
            compute: gives one value a text: a string, a number, or a list of these.
        """
        values = self._values(places, compute)
        self._bar.advance(len(places))
        return values

    def _values(self, places: Sequence[int], compute: Callable[[], Sequence[T]]) -> Sequence[T]:
        if self._journal is None:
            return compute()
        name = f"{self._name}:{_hash([len(places), *places])}"
        if name not in self._journal.done:
            self._journal.add(name, compute())
        return self._journal.done[name]


def section(kind: str, texts: Sequence[Any] = (), *settings: Any) -> Section:
    """The next pass of the evaluation that is under way; outside of `resuming` nothing is kept.

    Args:
        kind: of pass.
        texts: what is asked of the model, JSON-ready: texts or token ids.
        settings: with which it is asked, likewise. Passes are told apart by all three and by their
            order, so that two models may be asked the same.
    """
    journal = _active.get()
    if journal is None:
        return Section(None, "", len(texts))
    journal.sections += 1
    return Section(journal, f"{journal.sections}:{_hash((kind, texts, *settings))}", len(texts))


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=list)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
