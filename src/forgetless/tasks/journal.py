"""What a task measures, batch by batch: kept on disk, and shared by processes. No torch.

Inside `resuming(path, key)` every batch of texts that is generated or scored is appended to a file
of JSON lines as soon as it is done. When the process dies and the same evaluation starts again,
finished batches are read and not computed: the numbers are those of a run that was not interrupted,
because every batch has the same texts in it.

Inside `sharing(processes)` each process computes some of the batches and learns the values of the
others, so that all of them get what one alone would get, by whatever the task makes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from forgetless.core.files import is_as_written, with_checksum
from forgetless.core.progress import Bar

if TYPE_CHECKING:
    from forgetless.core.processes import Processes


T = TypeVar("T")


class _Journal:
    """What an evaluation has found, in memory and in a file: its key, then one line a batch."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.done: dict[str, list[Any]] = {}
        self.passes = 0
        self.file: IO[str] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+", encoding="utf-8")
            self._read(self.file, key)

    def _read(self, file: IO[str], key: str) -> None:
        """Take over the lines of the same evaluation, up to one that is cut off or damaged."""
        file.seek(0)
        kept = [json.dumps({"key": key})]
        try:
            lines = file.read().split("\n")[:-1]
            for line in lines[1:] if lines[:1] == kept else []:
                entry = json.loads(line)
                if not is_as_written(entry):
                    break
                self.done[entry["batch"]] = entry["values"]
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass  # what follows is measured again
        file.seek(0)
        file.truncate()
        file.write("\n".join([*kept, ""]))
        file.flush()

    def names(self, batches: Sequence[Sequence[int]], *asked: Any) -> list[str]:
        """What the batches of the next pass are called, which asks this."""
        self.passes += 1
        name = f"{self.passes}:{_hash(asked)}"
        return [f"{name}:{_hash([len(places), *places])}" for places in batches]

    def add(self, batch: str, values: Sequence[Any]) -> None:
        self.done[batch] = list(values)
        if self.file is not None:
            entry = with_checksum({"batch": batch, "values": list(values)})
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()


_active: ContextVar[_Journal | None] = ContextVar("active", default=None)
_processes: ContextVar[Processes | None] = ContextVar("processes", default=None)


@contextmanager
def sharing(processes: Processes | None) -> Iterator[None]:
    """Let these processes, all of which ask the same of equal models, do every batch once.

    None is for this one alone.
    """
    token = _processes.set(processes if processes and processes.count > 1 else None)
    try:
        yield
    finally:
        _processes.reset(token)


@contextmanager
def resuming(path: Path, key: str) -> Iterator[None]:
    """Keep what is measured inside this block in a file, and take over what it has already.

    The key is what decides the numbers, the model's content above all: a file with another key is
    started anew. The file stays, also when the block raises; delete it when the result is kept. Of
    processes that share the work the first one writes it.
    """
    processes = _processes.get()
    if processes is None:
        journal = _Journal(path, key)
    else:
        journal = _Journal(path if processes.is_first else None, key)
        journal.done = processes.first(lambda: journal.done)
    token = _active.set(journal)
    try:
        yield
    finally:
        _active.reset(token)
        if journal.file is not None:
            journal.file.close()


def in_batches(
    kind: str,
    texts: Sequence[Any],
    batches: Iterable[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[T]],
    *settings: Any,
    divisible: bool = False,
) -> list[T]:
    """One value for each text, in their order: computed batch by batch, or read where it is done.

    Outside of `resuming` nothing is kept, and outside of `sharing` this process computes all.

    Args:
        kind: of pass.
        texts: what is asked of the model, JSON-ready: texts or token ids.
        batches: positions of the texts, each once.
        compute: gives one value for each position: a string, a number, or a list of these.
        settings: with which the model is asked, JSON-ready. Passes are told apart by all of this
            and by their order, so that two models may be asked the same.
        divisible: whether processes may have a part of a batch each, where there are too few
            batches to go round. Else the values are to the last bit those of one process.
    """
    batches = [list(places) for places in batches]
    journal, names, done = _active.get(), [""] * len(batches), dict[str, list[Any]]()
    if journal is not None:
        names, done = journal.names(batches, kind, texts, *settings), journal.done
    found: list[Any] = [None] * len(texts)
    shown = Bar("evaluation", len(texts), "texts")

    def take(number: int, values: Sequence[Any]) -> None:
        for place, value in zip(batches[number], values, strict=True):
            found[place] = value
        shown.advance(len(values))

    left = []
    for number, name in enumerate(names):
        if name in done:
            take(number, done[name])
        else:
            left.append(number)
    computed = _computed([batches[number] for number in left], compute, divisible)
    for number, values in zip(left, computed, strict=True):
        if journal is not None:
            journal.add(names[number], values)
            values = done[names[number]]
        take(number, values)
    return found


def _computed(
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[T]],
    divisible: bool,
) -> Iterator[Sequence[T]]:
    """The values of each batch in turn, by this process or by those that share the work."""
    processes = _processes.get()
    if processes is None:
        yield from map(compute, batches)
        return
    whole = len(batches) - (len(batches) % processes.count if divisible else 0)
    for start in range(0, whole, processes.count):
        yield from _one_each(batches[start : start + processes.count], compute, processes)
    for places in batches[whole:]:
        size = -(-len(places) // processes.count)
        parts = [places[start : start + size] for start in range(0, len(places), size)]
        yield [value for values in _one_each(parts, compute, processes) for value in values]


def _one_each(
    parts: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[T]],
    processes: Processes,
) -> list[Sequence[T]]:
    """The values of at most as many parts as there are processes, each computed by one."""
    with processes.failing_together():
        mine = [compute(part) for part in parts[processes.index :][:1]]
    return [values for own in processes.gather(mine) for values in own]


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=list)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
