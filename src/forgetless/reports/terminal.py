"""The report in a terminal: the answer, one table, and some facts lost and kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from forgetless.reports.arms import Arm, Setting
from forgetless.reports.evidence import Evidence, Task
from forgetless.reports.flips import ArmFlips, TaskFlips
from forgetless.reports.standing import Standing
from forgetless.reports.words import NOT_MEASURED, Answer, amount, arm_words, interval_words
from forgetless.scores.seeds import Estimate

NUM_EXAMPLES = 4


def render(
    evidence: Evidence,
    arms: Sequence[Arm],
    place: Standing,
    words: Answer,
    flips: Sequence[TaskFlips],
) -> RenderableType:
    """Everything of the page that fits in a terminal."""
    parts: list[RenderableType] = [prose(words.title, "bold"), Text("")]
    parts += [prose(sentence) for sentence in words.sentences]
    if arms:
        parts += [Text(""), _table(evidence, arms, place)]
    parts += [prose(f"• {caveat}", "dim") for caveat in words.caveats]
    forgotten = next((f for f in flips if f.task.kind == "forgetting"), None)
    if forgotten is not None:
        parts += [Text(""), *_examples(forgotten, place)]
    return Group(*parts)


def prose(sentence: str, style: str = "") -> Text:
    """A sentence with its arms in colour."""
    line = Text(style=style)
    for i, part in enumerate(re.split(r"`([^`]*)`", sentence)):
        line.append(arm_words(part) if i % 2 else part, style="bold cyan" if i % 2 else "")
    return line


def _table(evidence: Evidence, arms: Sequence[Arm], place: Standing) -> Table:
    """One row an arm and rate: every score with its interval, and the share kept."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    with_rates = any(len(arm.settings) > 1 for arm in arms)
    table.add_column("front")
    table.add_column("arm")
    if with_rates:
        table.add_column("rate", justify="right")
    for task in evidence.tasks:
        table.add_column(f"{task.name}\n{task.metric}, base {_base(arms, task)}", justify="right")
        if _has_retention(task):
            table.add_column("\nkept", justify="right")
    for arm in arms:
        for setting in arm.settings:
            is_front = setting in place.front_settings
            cells = [Text("●" if is_front else "", style="cyan"), Text(arm.label, style="bold")]
            if with_rates:
                cells.append(Text(f"{setting.learning_rate:g}" if setting.learning_rate else ""))
            table.add_row(*cells, *_scores(setting, evidence.tasks))
    return table


def _has_retention(task: Task) -> bool:
    return task.kind == "forgetting" and task.is_share


def _scores(setting: Setting, tasks: Sequence[Task]) -> list[Text]:
    cells = []
    for task in tasks:
        cells.append(_cell(setting.final(task), task))
        if _has_retention(task):
            cells.append(_cell(setting.kept(task), task))
    return cells


def _cell(estimate: Estimate | None, task: Task) -> Text:
    if estimate is None:
        return Text(NOT_MEASURED, style="dim")
    return Text.assemble(
        amount(task, estimate.value), (f"  {interval_words(estimate, task)}", "dim")
    )


def _base(arms: Sequence[Arm], task: Task) -> str:
    bases = [base for arm in arms if (base := arm.best.measured[task.name].base) is not None]
    return amount(task, bases[0].value) if bases else NOT_MEASURED


def _examples(forgotten: TaskFlips, place: Standing) -> list[RenderableType]:
    """Some facts that the arm that lost most gets wrong now, and some that the best kept."""
    worst = max(forgotten.arms, key=lambda arm: arm.lost)
    keeper = place.keepers[0].label if place.keepers else worst.label
    best = next((arm for arm in forgotten.arms if arm.label == keeper), worst)
    parts: list[RenderableType] = []
    if worst.lost_items:
        known = worst.kept + worst.lost
        head = f"Lost by `{worst.label}`: {worst.lost:,.0f} of {known:,.0f}, such as"
        parts += [prose(head, "bold"), _lost(worst, best, forgotten)]
    if best.kept_items:
        known = best.kept + best.lost
        head = f"Kept by `{best.label}`: {best.kept:,.0f} of {known:,.0f}, such as"
        parts += [prose(head, "bold"), _kept(best, worst, forgotten)]
    return parts


def _lost(worst: ArmFlips, best: ArmFlips, forgotten: TaskFlips) -> RenderableType:
    """Facts that the other arm kept come first: they show the difference."""
    kept = set(best.kept_items)
    chosen = sorted(worst.lost_items, key=lambda flip: flip.item not in kept)[:NUM_EXAMPLES]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for flip in chosen:
        question, expected = forgotten.questions[flip.item]
        said = Text.assemble((_line(expected), "green"), "  now says ", (_line(flip.answer), "red"))
        table.add_row(Text(_line(question)), said)
    return Padding(table, (0, 0, 1, 2))


def _kept(best: ArmFlips, worst: ArmFlips, forgotten: TaskFlips) -> RenderableType:
    lost = {flip.item for flip in worst.lost_items[:NUM_EXAMPLES]}
    items = [item for item in best.kept_items if item not in lost]
    step = max(1, len(items) // NUM_EXAMPLES)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for item in items[::step][:NUM_EXAMPLES]:
        question, expected = forgotten.questions[item]
        table.add_row(Text(_line(question)), Text(_line(expected), style="green"))
    return Padding(table, (0, 0, 0, 2))


def _line(text: str) -> str:
    """Text on one line, short enough for a terminal; control characters do nothing."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 90 else line[:89] + "…"
