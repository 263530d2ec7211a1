"""How far long work is: counted where it is done, drawn on a terminal for whoever asked for it.

One bar at a time: work inside other work that has a bar draws none. Bars go to the terminal that
standard error was when `draw` was called, also while it is redirected.
"""

from __future__ import annotations

import sys
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

_console: Console | None = None
_current: Bar | None = None


def draw() -> None:
    """From now on all long work of this process has a bar."""
    global _console
    _console = Console(file=sys.stderr)


def clear() -> None:
    """Take away a bar whose work ended before its time."""
    if _current is not None:
        _current.end()


class Bar:
    """One piece of work; nothing is seen of it on anything but a terminal.

    At the end of a `with` block the bar goes, whatever happens in it.

    Args:
        what: in a word or two.
        total: how many there are to do; None where nobody knows.
        unit: what is counted, for the rate; empty where the notes of `advance` say more.
        done: how many were done before.
        unasked: draw also where `draw` was not called.
    """

    def __init__(
        self, what: str, total: int | None, unit: str = "", *, done: int = 0, unasked: bool = False
    ) -> None:
        global _current
        self.console = _console or Console(file=sys.stderr)
        self._left = None if total is None else total - done
        self._progress: Progress | None = None
        asked = unasked or _console is not None
        if self._left == 0 or not (asked and _current is None and self.console.is_terminal):
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
        """So many more are done; with the last, the bar goes."""
        if self._progress is not None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=count, **fields)
        if self._left is not None:
            self._left -= count
            if self._left <= 0:
                self.end()

    def end(self) -> None:
        """Take the bar away."""
        global _current
        if self._progress is not None:
            self._progress.stop()
            self._progress, _current = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def counted(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items one by one, each of which is done when the next is asked for.

    Args:
        items: to work on.
        what: the work.
        unit: what an item is called, for the rate.
        total: how many they are; None for their own length, if they have one.
    """
    with Bar(what, total or length_hint(items) or None, unit) as shown:
        for item in items:
            yield item
            shown.advance()


class _Rate(ProgressColumn):
    """How many a second, or a minute."""

    def render(self, task: Task) -> Text:
        speed, unit = task.speed, task.fields["unit"]
        if not (speed and unit):
            return Text("")
        return Text(f"{speed:.1f} {unit}/s" if speed >= 1 else f"{speed * 60:.1f} {unit}/min")
