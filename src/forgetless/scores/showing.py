"""A comparison in a terminal: the table, what it says in words, and the items that changed."""

from __future__ import annotations

import io
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from forgetless.scores.averages import PaperAverage

if TYPE_CHECKING:
    from forgetless.scores.comparison import Change, Comparison, Row

__all__ = ["as_text", "question", "render", "sentence"]

ITEMS = 10
"""Lost and gained items of a task that are shown unless more are asked for."""

_WIDE = 116
_STYLES = {"worse": "red", "better": "green", "noise": "", "unknown": ""}
_LONGEST = 240


def as_text(comparison: Comparison, items: int = ITEMS, width: int | None = None) -> str:
    """`render` without colours, as wide as the terminal or 100 columns where there is none."""
    columns = width or shutil.get_terminal_size((100, 24)).columns
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(render(comparison, items, columns))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())


def render(comparison: Comparison, items: int = ITEMS, width: int = 80) -> RenderableType:
    """The table, a sentence a task, the papers' averages, and the first lost and gained items.

    Args:
        comparison: what `forgetless.compare` gives.
        items: how many of a task's lost, and of its gained, items to show.
        width: columns of the terminal; more columns of the table fit in a wide one.
    """
    parts: list[RenderableType] = [_table(comparison, wide=width >= _WIDE), Text()]
    parts += [_said(row) for row in comparison]
    if comparison.averages:
        parts += [Text(), _averages(comparison.averages, comparison.level)]
    parts += [part for row in comparison for part in _changed(row, items)]
    if comparison.unmatched:
        names = ", ".join(comparison.unmatched)
        parts += [Text(), Text(f"not compared, scored once only: {names}")]
    return Group(*parts)


# ------------------------------------------------------------------------------------ the table


def _table(comparison: Comparison, *, wide: bool) -> Table:
    table = _plain_table()
    table.add_column("task", ratio=None, overflow="fold")
    level = f"{comparison.level:.0%}".replace("%", " %")
    heads = ["before", "after", "change", f"{level} interval", "kept", "lost", "gained"]
    if wide:
        heads = ["metric", "n", *heads, "p", ""]
    for head in heads:
        left = head in ("metric", "")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    for row in comparison:
        table.add_row(row.task, *_cells(row, wide=wide), style=_STYLES[row.verdict])
    return table


def _cells(row: Row, *, wide: bool) -> list[str]:
    low, high = row.interval
    cells = [
        _score(row, row.base),
        _score(row, row.score),
        _change(row, row.difference),
        "unknown" if math.isnan(low) else f"{_change(row, low)} to {_change(row, high)}",
        "–" if math.isnan(row.retention) else _percent(row.retention),
        str(len(row.lost)) if row.counted else "–",
        str(len(row.gained)) if row.counted else "–",
    ]
    if not wide:
        return cells
    p = "–" if row.p_value is None else _p(row.p_value)
    return [row.metric.partition(",")[0], str(row.n), *cells, p, row.verdict]


def _score(row: Row, value: float) -> str:
    return f"{value:.3f}" if row.is_share or abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _change(row: Row, value: float) -> str:
    small = abs(value) < 0.001 and value != 0 and not row.is_share
    return f"{value:+.1e}" if small else f"{value:+.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.9995 else "100 %"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


# ------------------------------------------------------------------------------------ the words


def _said(row: Row) -> Text:
    return Text.assemble((f"{row.task}: ", "bold"), (sentence(row), _STYLES[row.verdict]))


def sentence(row: Row) -> str:
    """What a row says, in words: the verdict and what it rests on."""
    said = f"{_verdict(row)}{_counts(row)}{_token_measures(row)}"
    if row.verdict == "noise" and math.isfinite(row.detectable) and row.metric != "kl":
        least = f"{row.detectable:.3f}".rstrip("0") if row.is_share else f"{row.detectable:.2g}"
        said += f"; {row.n} items show a change of about {least} or more"
    return said


def _verdict(row: Row) -> str:
    if row.metric == "kl":
        moved = f"moved {row.score:.3g} nats per token away from the base"
        return moved if row.score > 0 else "predicts exactly what the base predicts"
    if row.verdict == "unknown":
        return f"not to be told from {_items(row.n)}"
    if row.verdict == "noise":
        return "no change beyond noise"
    return "clearly worse" if row.verdict == "worse" else "clearly better"


def _items(n: int) -> str:
    return "one item" if n == 1 else f"{n} items"


def _counts(row: Row) -> str:
    if not row.counted:
        return ""
    known = len(row.lost) + len(row.kept)
    said = [f"of {known} right answers {len(row.lost)} lost"] if known else []
    if row.n > known:
        said.append(f"of {row.n - known} wrong ones {len(row.gained)} gained")
    test = "" if row.p_value is None else f" (McNemar's p {_equals(row.p_value)})"
    return f"; {', '.join(said)}{test}"


def _equals(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _token_measures(row: Row) -> str:
    """Perplexity and agreement, where they were measured."""
    extra = row.extra or {}
    parts = []
    if row.metric == "loss":
        parts.append(f"perplexity times {math.exp(min(row.difference, 700.0)):.3g}")
    elif "perplexity_ratio" in extra:
        parts.append(f"perplexity times {extra['perplexity_ratio']:.3g}")
    if "top1_agreement" in extra:
        parts.append(f"the likeliest next token agrees in {_percent(extra['top1_agreement'])}")
    return "".join(f"; {part}" for part in parts)


# --------------------------------------------------------------------------- the papers' averages


def _averages(averages: Sequence[PaperAverage], level: float) -> Table:
    table = _plain_table()
    table.add_column("average", overflow="fold")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(f"{level:.0%}".replace("%", " %") + " interval", overflow="fold")
    for average in averages:
        if average.missing:
            note = f"not measured: {', '.join(average.missing)}"
            table.add_row(average.name, "–", "–", "–", note)
            continue
        low, high = average.interval
        ends = "" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
        numbers = (average.base, average.score)
        cells = [f"{number:.4f}" for number in numbers]
        table.add_row(average.name, *cells, f"{average.score - average.base:+.4f}", ends)
    return table


# -------------------------------------------------------------------------------- the items


def _changed(row: Row, items: int) -> Iterator[RenderableType]:
    """What was lost and what was gained: question, answer before, answer after."""
    if items < 1:
        return
    for flip, style in (("lost", "red"), ("gained", "green")):
        changes = row.flips(flip)  # type: ignore[arg-type]
        if not changes:
            continue
        shown = changes[:items]
        count = (
            f"{len(changes)}" if len(shown) == len(changes) else f"{len(shown)} of {len(changes)}"
        )
        yield Text()
        yield Text.assemble((f"{row.task}: ", "bold"), (f"{flip} ({count})", f"bold {style}"))
        yield _items_table(shown)


def _items_table(changes: Sequence[Change]) -> Table:
    table = _plain_table()
    table.add_column("asked", ratio=5, overflow="fold")
    table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold")
    table.expand = True
    table.row_styles = ["", "dim"]  # tells neighbours apart where they take several lines
    for change in changes:
        before = change.before or (change.expected if change.flip == "lost" else "")
        after = change.after or (change.expected if change.flip == "gained" else "")
        table.add_row(
            Text(_line(question(change.prompt), keep_end=True)),
            Text(_line(before)),
            Text(_line(after) or "(nothing)"),
        )
    return table


def question(prompt: str) -> str:
    """What a prompt asks: its last paragraph, without the letters around question and answer."""
    last = prompt.strip().split("\n\n")[-1]
    return re.sub(r"^(Q|Question):\s*|\s*\b(A|Answer):?\s*$", "", last)


def _line(text: str, *, keep_end: bool = False) -> str:
    """A text on one line, without control characters, cut where it is very long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= _LONGEST:
        return line
    return "…" + line[1 - _LONGEST :] if keep_end else line[: _LONGEST - 1] + "…"


def _plain_table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
