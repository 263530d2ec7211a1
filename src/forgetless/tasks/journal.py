"""What a task has measured so far, kept on disk batch by batch. No torch.

Inside `resuming(path, key)` every batch of texts that is generated or scored is appended to a file
of JSON lines as soon as it is done. When the process dies and the same evaluation starts again,
finished batches are read and not computed: the numbers are those of a run that was not interrupted,
because every batch has the same texts in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, TypeVar

from forgetless.core.files import is_as_written, with_checksum
from forgetless.core.progress import Bar

__all__ = ["in_batches", "resuming"]

T = TypeVar("T")


class _Journal:
    """The file of one evaluation: its key, then one line a batch."""

    def __init__(self, path: Path, key: str) -> None:
        self.done: dict[str, list[Any]] = {}
        self.passes = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = path.open("a+", encoding="utf-8")
        self._read(key)

    def _read(self, key: str) -> None:
        """Take over the lines of the same evaluation, up to one that is cut off or damaged."""
        self.file.seek(0)
        kept = [json.dumps({"key": key})]
        try:
            lines = self.file.read().split("\n")[:-1]
            for line in lines[1:] if lines[:1] == kept else []:
                entry = json.loads(line)
                if not is_as_written(entry):
                    break
                self.done[entry["batch"]] = entry["values"]
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass  # what follows is measured again
        self.file.seek(0)
        self.file.truncate()
        self.file.write("\n".join([*kept, ""]))
        self.file.flush()

    def add(self, batch: str, values: Sequence[Any]) -> None:
        self.done[batch] = list(values)
        entry = with_checksum({"batch": batch, "values": list(values)})
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


def in_batches(
    kind: str,
    texts: Sequence[Any],
    batches: Iterable[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[T]],
    *settings: Any,
) -> list[T]:
    """One value for each text, in their order: computed batch by batch, or read where it is done.

    Outside of `resuming` nothing is kept.

    Args:
        kind: of pass.
        texts: what is asked of the model, JSON-ready: texts or token ids.
        batches: positions of the texts, each once.
        compute: gives one value for each position: a string, a number, or a list of these.
        settings: with which the model is asked, JSON-ready. Passes are told apart by all of this
            and by their order, so that two models may be asked the same.
    """
    journal = _active.get()
    found: list[Any] = [None] * len(texts)
    shown = Bar("evaluation", len(texts), "texts")
    if journal is not None:
        journal.passes += 1
        name = f"{journal.passes}:{_hash((kind, texts, *settings))}"
    for places in batches:
        if journal is None:
            values = compute(places)
        else:
            batch = f"{name}:{_hash([len(places), *places])}"
            if batch not in journal.done:
                journal.add(batch, compute(places))
            values = journal.done[batch]
        for place, value in zip(places, values, strict=True):
            found[place] = value
        shown.advance(len(places))
    return found


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=list)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
