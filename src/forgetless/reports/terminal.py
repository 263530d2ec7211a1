"""The report in a terminal: the answer, one table, and some facts lost and kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from forgetless.reports.arms import Arm
from forgetless.reports.changes import ArmChange, TaskChanges
from forgetless.reports.evidence import TaskInfo
from forgetless.reports.findings import Findings
from forgetless.reports.numbers import NOT_MEASURED, amount, arm_words, interval_words
from forgetless.reports.standing import Standing
from forgetless.scores.seeds import Estimate

NUM_EXAMPLES = 4

_NAME = 16
"""Characters of an arm's name on one line, where there is room for no more."""


def render(found: Findings) -> RenderableType:
    """Everything of the page that fits in a terminal."""
    words = found.words
    parts: list[RenderableType] = [prose(words.title, "bold"), Text("")]
    parts += [prose(sentence) for sentence in words.sentences]
    if found.arms:
        parts += [Text(""), _Scores(found.evidence.tasks, found.arms, found.place)]
    parts += [prose(f"• {caveat}", "dim") for caveat in words.caveats]
    forgotten = [c for c in found.changes if c.counted and c.task.kind == "forgetting"]
    if forgotten:
        parts += [Text(""), *_examples(forgotten[0], found.place)]
    return Group(*parts)


def prose(sentence: str, style: str = "") -> Text:
    """A sentence with its arms in colour."""
    line = Text(style=style)
    for i, part in enumerate(sentence.split("`")):
        line.append(arm_words(part) if i % 2 else part, style="bold cyan" if i % 2 else "")
    return line


class _Column(NamedTuple):
    head: str
    cells: list[Text]
    is_number: bool = True

    @property
    def width(self) -> int:
        """Of its longest line, with the blanks behind it."""
        lines = [
            *self.head.splitlines(),
            *(line for c in self.cells for line in c.plain.splitlines()),
        ]
        widest = max(map(len, lines), default=0)
        return (widest if self.is_number else min(widest, _NAME)) + 2


@dataclass(frozen=True)
class _Scores:
    """One row an arm and rate: every score with its interval, and the share kept.

    Where not all tasks fit beside each other intervals stand below their scores, and the tasks in
    several tables.
    """

    tasks: Sequence[TaskInfo]
    arms: Sequence[Arm]
    place: Standing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = self._names()
        room = options.max_width - _width(names)
        for between in ("  ", "\n"):
            blocks = [self._scores(task, between) for task in self.tasks]
            if sum(map(_width, blocks)) <= room:
                break
        shown: list[_Column] = []
        for block in blocks:
            if shown and _width([*shown, *block]) > room:
                yield _table([*names, *shown])
                yield Text()
                shown = []
            shown += block
        yield _table([*names, *shown])

    def _names(self) -> list[_Column]:
        """What tells the rows apart."""
        rows = [(arm, setting) for arm in self.arms for setting in arm.settings]
        front = self.place.front_settings
        columns = [
            _Column(
                "front", [Text("●" if s in front else "", style="cyan") for _, s in rows], False
            ),
            _Column("arm", [Text(arm.label, style="bold") for arm, _ in rows], False),
        ]
        if any(len(arm.settings) > 1 for arm in self.arms):
            rates = [f"{s.learning_rate:g}" if s.learning_rate else "" for _, s in rows]
            columns.append(_Column("rate", list(map(Text, rates))))
        return columns

    def _scores(self, task: TaskInfo, between: str) -> list[_Column]:
        """A task's scores and what was kept of it, with something between score and interval."""

        def cell(estimate: Estimate | None) -> Text:
            if estimate is None:
                return Text(NOT_MEASURED, style="dim")
            ends = f"{between}{interval_words(estimate, task)}"
            return Text.assemble(amount(task, estimate.value), (ends, "dim"))

        settings = [setting for arm in self.arms for setting in arm.settings]
        bases = [base for arm in self.arms if (base := arm.best.measured[task.name].base)]
        shown = amount(task, bases[0].value) if bases else NOT_MEASURED
        head = f"{task.name}\n{task.metric}, base {shown}"
        columns = [_Column(head, [cell(setting.final(task)) for setting in settings])]
        if task.has_retention:
            columns.append(_Column("\nkept", [cell(setting.kept(task)) for setting in settings]))
        return columns


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns)


def _table(columns: Sequence[_Column]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for head, _, is_number in columns:
        justify: Any = "right" if is_number else "left"
        table.add_column(head, justify=justify, no_wrap=is_number, overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _examples(forgotten: TaskChanges, place: Standing) -> list[RenderableType]:
    """Some facts that the arm that lost most gets wrong now, and some that the best kept.

    Of the lost ones those that the other arm kept come first: they show the difference.
    """
    worst = max(forgotten.counted, key=lambda change: change.count("lost") or 0.0)
    keeper = place.keepers[0].label if place.keepers else worst.label
    best = next((change for change in forgotten.counted if change.label == keeper), worst)
    kept, lost = best.kept_items, worst.flipped("lost")
    parts: list[RenderableType] = []
    if lost:
        rows = []
        for item in sorted(lost, key=lambda item: item.id not in kept)[:NUM_EXAMPLES]:
            question, expected = forgotten.questions[item.id]
            said = ((_line(expected), "green"), "  now says ", (_line(item.answer), "red"))
            rows.append((Text(_line(question)), Text.assemble(*said)))
        parts += [_count("Lost", worst), Padding(_rows(rows), (0, 0, 1, 2))]
    if kept:
        shown = [item for item in kept if item not in {lost.id for lost in lost[:NUM_EXAMPLES]}]
        shown = shown[:: max(1, len(shown) // NUM_EXAMPLES)][:NUM_EXAMPLES]
        asked = [forgotten.questions[item] for item in shown]
        rows = [(Text(_line(question)), Text(_line(a), style="green")) for question, a in asked]
        parts += [_count("Kept", best), Padding(_rows(rows), (0, 0, 0, 2))]
    return parts


def _count(verb: str, change: ArmChange) -> Text:
    lost, kept = change.count("lost") or 0.0, change.count("kept") or 0.0
    count = lost if verb == "Lost" else kept
    return prose(f"{verb} by `{change.label}`: {count:,.0f} of {lost + kept:,.0f}, such as", "bold")


def _rows(rows: Sequence[tuple[Text, Text]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _line(text: str) -> str:
    """Text on one line, short enough for a terminal; control characters do nothing."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 90 else line[:89] + "…"
