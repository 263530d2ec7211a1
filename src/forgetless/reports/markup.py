"""Small pieces of HTML; every piece of text that comes from outside passes `text` first."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

from forgetless.reports.evidence import Task, number
from forgetless.reports.words import NOT_MEASURED, amount, arm_words, interval_words
from forgetless.scores.seeds import Estimate

NUM_MARKS = 8
NUM_ON_ONE_LINE = 24


def text(value: Any) -> str:
    """A value as text that HTML shows as it is."""
    return html.escape(str(value), quote=True)


def mark(index: int) -> str:
    """The symbol of an arm: colour and shape tell arms apart, each on its own."""
    colour, shape = index % NUM_MARKS, (index + index // NUM_MARKS) % NUM_MARKS
    return (
        f'<svg class="mark c{colour}" viewBox="-8 -8 16 16" aria-hidden="true">'
        f'<use href="#mark-{shape}" x="-8" y="-8" width="16" height="16"/></svg>'
    )


def arm_name(label: str, index: int) -> str:
    """An arm's symbol and name: on one line, of a long name as much as `NUM_ON_ONE_LINE` signs."""
    head = label
    if len(label) > NUM_ON_ONE_LINE:
        head = label[:NUM_ON_ONE_LINE].rpartition(" ")[0] or label[:NUM_ON_ONE_LINE]
    rest = text(label[len(head) :])
    return f'<span class="arm"><span>{mark(index)}{text(head)}</span>{rest}</span>'


def prose(sentence: str, places: Mapping[str, int]) -> str:
    """A sentence in which arms between backticks get their symbols."""
    parts = re.split(r"`([^`]*)`", sentence)
    return "".join(_named(part, places) if i % 2 else text(part) for i, part in enumerate(parts))


def _named(part: str, places: Mapping[str, int]) -> str:
    if part not in places:
        return f"<code>{text(part)}</code>"
    return arm_name(arm_words(part), places[part])


def value_cell(value: float | None, shown: str, extra: str = "") -> str:
    """A right-aligned number; `data-v` holds all of its digits for sorting."""
    if value is None:
        return f'<td class="num none">{NOT_MEASURED}</td>'
    return f'<td class="num" data-v="{value!r}">{text(shown)}{extra}</td>'


def estimate_cell(estimate: Estimate | None, task: Task) -> str:
    """A score over its 95 % interval."""
    if estimate is None:
        return value_cell(None, "")
    interval = f'<span class="interval">{interval_words(estimate, task)}</span>'
    return value_cell(estimate.value, amount(task, estimate.value), interval)


def plain_cell(value: Any) -> str:
    """A cell of a raw table: numbers to four digits, text as it is, a dash for nothing."""
    known = number(value)
    if known is not None:
        is_whole = isinstance(value, int)
        shown = f"{value:,}" if is_whole else f"{known:.4g}"
        return f'<td class="num" data-v="{value!r}">{shown}</td>'
    if value is None or isinstance(value, float):
        return f'<td class="none">{NOT_MEASURED}</td>'
    return f"<td>{text(value)}</td>"


def header(label: str, *, note: str = "", is_number: bool = True, column: int | None = None) -> str:
    """A column's head; with `column` it is a button that sorts by that column."""
    kind = ' class="num"' if is_number else ""
    title = f' title="{text(note)}"' if note else ""
    if column is None:
        return f'<th scope="col"{kind}{title}>{text(label)}</th>'
    return (
        f'<th scope="col"{kind} aria-sort="none"{title}>'
        f'<button type="button" class="sort" data-column="{column}">{text(label)}</button></th>'
    )


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """A list of terms with their values, both plain text."""
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in items)
    return f'<dl class="pairs">{rows}</dl>'


def details(label: str, content: str) -> str:
    """Content that is folded under a label."""
    return f"<details><summary>{text(label)}</summary>{content}</details>"
