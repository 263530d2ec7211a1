"""Says on standard error what runs are doing: bars on a terminal, lines anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from forgetless.core.progress import loudness

if TYPE_CHECKING:
    from forgetless.studies.stages import Event, Listener

_ENDS = ("done", "failed")


@contextmanager
def watch(*, several: bool) -> Iterator[Listener]:
    """A listener for runs; for several at a time it draws one bar each.

    A single run needs no bar here: training draws its own.
    """
    console, said = Console(stderr=True), loudness()
    if said == "quiet":
        yield lambda event: _print(console, event) if event.stage == "failed" else None
    elif not several or said == "verbose":
        yield lambda event: _print(console, event)
    elif not console.is_terminal:
        yield lambda event: _print(console, event) if event.stage in _ENDS else None
    else:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, *times, console=console, transient=True) as bars:
            yield _Bars(bars).show


def _print(console: Console, event: Event) -> None:
    if event.message:
        style = "red" if event.stage == "failed" else None
        text = f"{event.name}  {event.stage}: {event.message}"
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class _Bars:
    """One bar for each run that is being done, with its stage; a line for each that has ended."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.of_run: dict[str, TaskID] = {}

    def show(self, event: Event) -> None:
        """Move the run's bar."""
        if event.stage in _ENDS:
            if event.run_id in self.of_run:
                self.bars.remove_task(self.of_run.pop(event.run_id))
            _print(self.bars.console, event)
            return
        if event.run_id not in self.of_run:
            self.of_run[event.run_id] = self.bars.add_task("", total=None)
        bar, words = self.of_run[event.run_id], f"{event.name}  {event.stage}"
        self.bars.update(bar, description=words)
        if event.steps:
            self.bars.update(bar, completed=event.step, total=event.steps)
