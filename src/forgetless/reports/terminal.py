"""The report in a terminal: the answer, one table, and some facts lost and kept."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from forgetless.reports.arms import Arm
from forgetless.reports.changes import ArmChange, TaskChanges
from forgetless.reports.evidence import TaskInfo
from forgetless.reports.findings import Findings
from forgetless.reports.numbers import NOT_MEASURED, amount, arm_words, interval_words
from forgetless.reports.standing import Standing

NUM_EXAMPLES = 4


def render(found: Findings) -> RenderableType:
    """Everything of the page that fits in a terminal."""
    words = found.words
    parts: list[RenderableType] = [prose(words.title, "bold"), Text("")]
    parts += [prose(sentence) for sentence in words.sentences]
    if found.arms:
        parts += [Text(""), _table(found.evidence.tasks, found.arms, found.place)]
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


def _table(tasks: Sequence[TaskInfo], arms: Sequence[Arm], place: Standing) -> Table:
    """One row an arm and rate: every score with its interval, and the share kept."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    with_rates = any(len(arm.settings) > 1 for arm in arms)
    table.add_column("front")
    table.add_column("arm")
    if with_rates:
        table.add_column("rate", justify="right")
    for task in tasks:
        bases = [base for arm in arms if (base := arm.best.measured[task.name].base)]
        shown = amount(task, bases[0].value) if bases else NOT_MEASURED
        table.add_column(f"{task.name}\n{task.metric}, base {shown}", justify="right")
        if task.has_retention:
            table.add_column("\nkept", justify="right")
    for arm, setting in [(a, setting) for a in arms for setting in a.settings]:
        cells = [Text("●" if setting in place.front_settings else "", style="cyan")]
        cells.append(Text(arm.label, style="bold"))
        if with_rates:
            cells.append(Text(f"{setting.learning_rate:g}" if setting.learning_rate else ""))
        for task in tasks:
            for estimate in [setting.final(task), *[setting.kept(task)] * task.has_retention]:
                if estimate is None:
                    cells.append(Text(NOT_MEASURED, style="dim"))
                else:
                    ends = (f"  {interval_words(estimate, task)}", "dim")
                    cells.append(Text.assemble(amount(task, estimate.value), ends))
        table.add_row(*cells)
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
