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
    from forgetless.scores.comparison import Comparison, Flip, TaskChange


ITEMS = 10
"""Lost and gained items of a task that are shown unless more are asked for."""

_SPARED = (("",), ("p", "n", "metric"), ("lost", "gained"), ("kept",), ("before", "after"))
"""Columns that a narrow terminal does without, those first that are said elsewhere too."""
_NAME = 10
"""Characters of the longest line of a task's name in a narrow terminal."""
_STYLES = {"worse": "red", "better": "green", "noise": "", "unknown": ""}
_LONGEST = 240


def as_text(comparison: Comparison, items: int = ITEMS, width: int | None = None) -> str:
    """`render` without colours, as wide as the terminal or 100 columns where there is none."""
    columns = width or shutil.get_terminal_size((100, 24)).columns
    written = io.StringIO()
    console = Console(file=written, width=columns, color_system=None)
    console.print(render(comparison, items, columns))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def render(comparison: Comparison, items: int = ITEMS, width: int = 80) -> RenderableType:
    """The table, a sentence a task, the papers' averages, and the first lost and gained items.

    Of a task so many lost and as many gained items are shown; the table has as many columns as fit.
    """
    parts: list[RenderableType] = [_table(comparison, width), Text()]
    for row in comparison:
        said = (sentence(row), _STYLES[row.verdict])
        parts.append(Text.assemble((f"{row.task}: ", "bold"), said))
    if comparison.averages:
        parts += [Text(), _averages(comparison.averages, comparison.level)]
    if items > 0:
        parts += [
            part
            for row in comparison
            for each in (_by_class(row, items), _changed(row, items))
            for part in each
        ]
    if comparison.unmatched:
        names = ", ".join(comparison.unmatched)
        parts += [Text(), Text(f"not compared, scored once only: {names}")]
    return Group(*parts)


def _table(comparison: Comparison, width: int) -> Table:
    """One row a task; without some of the numbers where the terminal is narrow."""
    interval = f"{100 * comparison.level:g} % interval"
    heads = ["task", "metric", "n", "before", "after", "change", interval]
    heads += ["kept", "lost", "gained", "p", ""]
    columns: dict[str, list[str]] = {head: [] for head in heads}
    for row in comparison:
        low, high = (_signed(row, end) for end in row.interval)
        p = "–" if row.p_value is None else _p_value(row.p_value).removeprefix("= ")
        cells = [
            row.task,
            row.metric.partition(",")[0],
            str(row.n),
            *(_score(row, score) for score in (row.base, row.score)),
            _signed(row, row.difference),
            "unknown" if math.isnan(row.interval.low) else f"{low} to {high}",
            "–" if math.isnan(row.retention) else _percent(row.retention),
            str(len(row.lost)) if row.counted else "–",
            str(len(row.gained)) if row.counted else "–",
            p.replace("< ", "<"),
            row.verdict,
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    for spared in _SPARED:
        widths = {head: max(map(len, [head, *cells])) for head, cells in columns.items()}
        if sum(widths.values()) - max(widths["task"] - _NAME, 0) + 2 * len(widths) - 2 <= width:
            break
        for head in spared:
            del columns[head]
    table = _plain_table(*columns)
    for number, row in enumerate(comparison):
        shown = (cells[number] for cells in columns.values())
        table.add_row(*shown, style=_STYLES[row.verdict])
    return table


def _score(row: TaskChange, value: float) -> str:
    return f"{value:.3f}" if row.is_share or abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _signed(row: TaskChange, value: float) -> str:
    small = abs(value) < 0.001 and value != 0 and not row.is_share
    return f"{value:+.1e}" if small else f"{value:+.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.9995 else "100 %"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


# ------------------------------------------------------------------------------------ the words


def sentence(row: TaskChange) -> str:
    """What a change says, in words: the verdict and what it rests on."""
    said = _verdict(row)
    if row.counted:
        known = len(row.lost) + len(row.kept)
        counts = [f"of {known} right answers {len(row.lost)} lost"] if known else []
        if row.n > known:
            counts.append(f"of {row.n - known} wrong ones {len(row.gained)} gained")
        assert row.p_value is not None
        said += f"; {', '.join(counts)} (McNemar's p {_p_value(row.p_value)})"
    extra = row.extra or {}
    if row.metric == "loss":
        said += f"; perplexity times {math.exp(min(row.difference, 700.0)):.3g}"
    elif "perplexity_ratio" in extra:
        said += f"; perplexity times {extra['perplexity_ratio']:.3g}"
    if "top1_agreement" in extra:
        what = "class" if "examples" in extra else "next token"
        said += f"; the likeliest {what} agrees in {_percent(extra['top1_agreement'])}"
    if "calibration_error" in extra:
        said += f"; calibration error {extra['calibration_error']:.3g}"
    if row.verdict == "noise" and math.isfinite(row.detectable) and row.metric != "kl":
        least = f"{row.detectable:.3f}".rstrip("0") if row.is_share else f"{row.detectable:.2g}"
        said += f"; {row.n} items show a change of about {least} or more"
    return said


def _verdict(row: TaskChange) -> str:
    if row.metric == "kl":
        each = "example" if "examples" in (row.extra or {}) else "token"
        moved = f"moved {row.score:.3g} nats per {each} away from the base"
        return moved if row.score > 0 else "predicts exactly what the base predicts"
    if row.verdict == "unknown":
        return f"not to be told from {'one item' if row.n == 1 else f'{row.n} items'}"
    if row.verdict == "noise":
        alone = row.interval.low <= 0 <= row.interval.high
        return f"no change beyond {'noise' if alone else 'what chance does to one of many tasks'}"
    return f"clearly {row.verdict}"


def _averages(averages: Sequence[PaperAverage], level: float) -> Table:
    """The papers' averages, with what was not measured."""
    table = _plain_table("average", "before", "after", "change", f"{100 * level:g} % interval")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for average in averages:
        if average.missing:
            note = f"not measured: {', '.join(average.missing)}"
            table.add_row(average.name, "–", "–", "–", note)
            continue
        low, high = average.interval
        table.add_row(
            average.name,
            f"{average.base:.4f}",
            f"{average.score:.4f}",
            f"{average.score - average.base:+.4f}",
            "" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}",
        )
    return table


# -------------------------------------------------------------------------------- the items


def _changed(row: TaskChange, items: int) -> Iterator[RenderableType]:
    """What was lost and what was gained: question, answer before, answer after."""
    styles: dict[Flip, str] = {"lost": "red", "gained": "green"}
    for flip, style in styles.items():
        changes = row.flips(flip)
        if not changes:
            continue
        count = f"{items} of {len(changes)}" if len(changes) > items else f"{len(changes)}"
        yield Text()
        yield Text.assemble((f"{row.task}: ", "bold"), (f"{flip} ({count})", f"bold {style}"))
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for head, ratio in (("asked", 5), ("before", 3), ("after", 3)):
            table.add_column(head, ratio=ratio, overflow="fold")
        table.expand = True
        table.row_styles = ["", "dim"]  # tells neighbours apart where they take several lines
        for change in changes[:items]:
            before = change.before or (change.expected if flip == "lost" else "")
            after = change.after or (change.expected if flip == "gained" else "")
            table.add_row(
                Text(_line(question(change.prompt), keep_end=True)),
                Text(_line(before)),
                Text(_line(after) or "(nothing)"),
            )
        yield table


def _by_class(row: TaskChange, most: int) -> Iterator[RenderableType]:
    """The classes that lost most, with what they are now taken for."""
    hit = [each for each in row.classes if each.after < each.before]
    if not hit:
        return
    count = f"{most} of {len(hit)}" if len(hit) > most else f"{len(hit)}"
    yield Text()
    yield Text.assemble((f"{row.task}: ", "bold"), (f"classes that lost ({count})", "bold red"))
    table = _plain_table("class", "n", "before", "after", "")
    for each in hit[:most]:
        taken = [f"{_line(name)} ({n})" for name, n in list(each.taken_for.items())[:3]]
        shares = (_percent(right / each.n) for right in (each.before, each.after))
        table.add_row(_line(each.name), str(each.n), *shares, f"taken for {', '.join(taken)}")
    yield table


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


def _plain_table(first: str, *heads: str) -> Table:
    """A table without lines: words in the first column, numbers at the right of the others."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for head in heads:
        left = head in ("metric", "")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    return table
