"""How far long work is: counted where it is done, shown to whoever asked for it.

On a terminal that is a bar, elsewhere a plain line every half a minute, with the rate and the time
left. One at a time: work inside other work
that is shown is not. All goes to what standard error was when `draw` was called, also while it is
redirected.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

LOUDNESS = "FORGETLESS_LOUDNESS"
"""The environment variable of `loudness`, which the processes that a command starts inherit."""

_console: Console | None = None
_current: Bar | None = None

# Seconds between two plain lines.
_A_WHILE = 30.0


def duration(seconds: float) -> str:
    """A time as people say it: 41 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def draw() -> None:
    """From now on all long work of this process has a bar, unless it is to be quiet."""
    global _console
    _console = Console(file=sys.stderr)


def loudness() -> str:
    """How much is said of the work: quiet, usual or verbose; workers are told the same."""
    return os.environ.get(LOUDNESS, "usual")


def clear() -> None:
    """Take away a bar whose work ended before its time."""
    if _current is not None:
        _current.end()


class Bar:
    """One piece of work: a bar on a terminal; elsewhere, where it was asked for, lines.

    At the end of a `with` block the bar goes, whatever happens in it.

    Args:
        what: in a word or two.
        total: how many there are to do; None where nobody knows.
        unit: what is counted, for the rate; empty where the notes of `advance` say more.
        done: how many were done before.
        unasked: draw also where `draw` was not called; a bar, and no lines.
    """

    def __init__(
        self, what: str, total: int | None, unit: str = "", *, done: int = 0, unasked: bool = False
    ) -> None:
        global _current
        # Whoever redirected standard error may have closed what it was by then.
        is_open = _console is not None and not _console.file.closed
        self.console = _console if _console and is_open else Console(file=sys.stderr)
        self._left = None if total is None else total - done
        self._progress: Progress | None = None
        self._what, self._total, self._unit, self._first = what, total, unit, done
        self._done, self._began = done, time.monotonic()
        self._last = self._began
        self._note: str | None = None
        wanted = unasked or _console is not None
        if self._left == 0 or _current is not None or not wanted or loudness() == "quiet":
            return
        if not self.console.is_terminal:
            _current = None if _console is None else self
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
            refresh_per_second=2,
            # What goes to the terminal is printed above the bar; what goes elsewhere goes there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(what, total=total, completed=done, unit=unit, note="")
        self._progress.start()
        _current = self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """So many more are done; with the last, the bar goes. The last note is what is shown."""
        self._note = note or self._note
        if self._progress is not None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=count, **fields)
        elif _current is self:
            self._done += count
            self._say()
        if self._left is not None:
            self._left -= count
            if self._left <= 0:
                self.end()

    def end(self) -> None:
        """Take the bar away."""
        global _current
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if _current is self:
            _current = None

    def _say(self) -> None:
        """A plain line, if the last one was a while ago."""
        now = time.monotonic()
        if now - self._last < _A_WHILE:
            return
        self._last = now
        of = "" if self._total is None else f" of {self._total}"
        speed = (self._done - self._first) / max(now - self._began, 1e-9)
        words = [f"{self._what}: {self._done}{of} {self._unit}".rstrip(), _rate(speed, self._unit)]
        words.append(self._note or "")
        if self._total is not None and speed and self._done < self._total:
            words.append(f"{duration((self._total - self._done) / speed)} left")
        print(", ".join(filter(None, words)), file=self.console.file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def counted(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items one by one, each of which is done when the next is asked for.

    `total` is for items that have no length; `what` and `unit` are shown.
    """
    with Bar(what, total or length_hint(items) or None, unit) as shown:
        for item in items:
            yield item
            shown.advance()


class _Rate(ProgressColumn):
    """How many a second, or a minute."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed, task.fields["unit"]))


def _rate(speed: float | None, unit: str) -> str:
    """So many a second, or a minute."""
    if not (speed and unit):
        return ""
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{speed * 60:.1f} {unit}/min"
