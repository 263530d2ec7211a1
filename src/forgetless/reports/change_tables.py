"""The tables of what changed: a score before and after, distances, averages, several tries."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from forgetless.core.metrics import Interval
from forgetless.reports.arms import Arm
from forgetless.reports.changes import Averages, Change, TaskChanges
from forgetless.reports.evidence import Task, number
from forgetless.reports.markup import arm_name, header, plain_cell, text, value_cell
from forgetless.reports.words import NOT_MEASURED, amount, percent
from forgetless.scores.comparison import Verdict
from forgetless.scores.files import Phase

VERDICTS: Mapping[Verdict, str] = {
    "worse": "clearly worse",
    "better": "clearly better",
    "noise": "no change beyond noise",
    "unknown": "cannot be told",
}

_TRIES = re.compile(r"pass@\d+|unique_(right|wrong)|distinct_\d+")


def changes_section(
    changes: Sequence[TaskChanges], averages: Sequence[Averages], places: Mapping[str, int]
) -> str:
    """The whole section without its heading; empty when nothing was measured both times."""
    scored = [of_task for of_task in changes if not of_task.task.is_distance]
    moved = [of_task for of_task in changes if of_task.task.is_distance]
    parts = []
    if scored:
        parts.append(f'<p class="about">{_ABOUT}</p>')
        parts += [_score_table(of_task, places) for of_task in scored]
    if averages:
        parts += [f'<h3>Averages of the papers</h3><p class="note">{_AVERAGES}</p>']
        parts.append(_averages_table(averages, places))
    if moved:
        parts += [f'<h3>Distance from the base</h3><p class="note">{_DISTANCES}</p>']
        parts += [_distance_table(of_task, places, len(moved) > 1) for of_task in moved]
    return "".join(parts)


def tries_section(arms: Sequence[Arm], tasks: Sequence[Task], places: Mapping[str, int]) -> str:
    """What several answers to each question gave; empty where a task asked once only."""
    tables = [_tries_table(arms, task, places) for task in tasks]
    shown = "".join(table for table in tables if table)
    return (
        f'<h3>Several answers to each question</h3><p class="note">{_TRIED}</p>{shown}'
        if (shown)
        else ""
    )


_ABOUT = (
    "The same questions before training and after. Under each change its 95 % interval: where it "
    "holds 0, chance alone could have done it. “p” is how often so one-sided a split of lost and "
    "gained would come about if nothing had changed; “shows from” is the smallest true change "
    "that so many questions bring to light four times out of five."
)
_AVERAGES = (
    "Under the names that the papers gave them. An average with a part missing is not computed."
)
_DISTANCES = (
    "How differently the trained model continues texts that it was not trained on, per token, 0 "
    "being not at all. “Same choice” is how often both find the same next token the likeliest; "
    "“perplexity” how many times more surprised the trained model is by the texts."
)
_TRIED = (
    "pass@k is the chance that at least one of k answers is right; unique and distinct count how "
    "many of the answers differ."
)


# ------------------------------------------------------------------------------ before and after


def _score_table(of_task: TaskChanges, places: Mapping[str, int]) -> str:
    task = of_task.task
    counted = any(change.counts for change in of_task.changes)
    alone = any(change.alone for change in of_task.changes)
    unit = "points" if task.is_share else task.metric
    heads = header("arm", is_number=False)
    heads += header("before → after", note="the base, and the trained model")
    heads += header(f"change, {unit}", note="after less before, over its 95 % interval")
    heads += header("in words", is_number=False)
    if task.kind == "forgetting":
        heads += header("kept", note="the score as a share of the base’s, at most 100 %")
    if counted:
        heads += header("lost", note="right before, wrong after")
        heads += header("gained", note="wrong before, right after")
        heads += header("p", note="McNemar’s exact test that nothing changed") if alone else ""
    if alone:
        heads += header("shows from", note="smallest true change found with a power of 80 %")
    rows = "".join(_score_row(change, task, counted, alone, places) for change in of_task.changes)
    better = "higher is better" if task.higher_is_better else "lower is better"
    about = f"{task.kind} · {task.metric}, {better} · {_questions(of_task.num_items)}"
    return f"<h3>{text(task.name)} <small>{text(about)}</small></h3>{_scrolled(heads, rows, task)}"


def _score_row(
    change: Change, task: Task, counted: bool, alone: bool, places: Mapping[str, int]
) -> str:
    cells = f'<th scope="row">{arm_name(change.label, places[change.label])}</th>'
    before = amount(task, change.base).replace("\N{NO-BREAK SPACE}%", "")
    cells += value_cell(change.score, f"{before} → {amount(task, change.score)}")
    shown, ends = _points(change.difference, task), _ends(change.interval, task)
    cells += value_cell(change.difference, shown, f'<span class="interval">{ends}</span>')
    cells += f'<td class="{change.verdict}">{VERDICTS[change.verdict]}</td>'
    if task.kind == "forgetting":
        cells += value_cell(change.kept, percent(change.kept or 0.0))
    if counted:
        for count in change.counts or (None, None):
            cells += value_cell(count, f"{count:,.0f}" if count is not None else "")
        if alone:
            cells += _p_cell(change)
    if alone:
        row = change.alone
        least = row.detectable if row is not None else math.nan
        cells += value_cell(_known(least), _points(least, task, signed=False))
    return f"<tr>{cells}</tr>"


def _p_cell(change: Change) -> str:
    p = change.alone.p_value if change.alone is not None else None
    return value_cell(p, "" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}"))


def _points(value: float, task: Task, *, signed: bool = True) -> str:
    """A difference: of shares in points of a hundred."""
    if math.isnan(value):
        return NOT_MEASURED
    sign = "+" if signed else ""
    shown = f"{100 * value:{sign}.1f}" if task.is_share else f"{value:{sign}.3f}"
    return shown.replace("-", "−")


def _ends(interval: Interval, task: Task) -> str:
    if any(math.isnan(end) for end in interval):
        return NOT_MEASURED
    return f"{_points(interval.low, task)} to {_points(interval.high, task)}"


def _questions(count: int) -> str:
    return f"{count:,} item{'' if count == 1 else 's'}"


# ------------------------------------------------------------------------------------ distances


def _distance_table(of_task: TaskChanges, places: Mapping[str, int], with_name: bool) -> str:
    columns = [
        ("the other way", "reverse_kl", "KL(trained ‖ base), nats per token", "{:.3f}"),
        ("same choice", "top1_agreement", "same likeliest next token", "percent"),
        ("perplexity", "perplexity_ratio", "trained over base", "× {:.2f}"),
    ]
    columns = [c for c in columns if any(ch.extra(c[1]) is not None for ch in of_task.changes)]
    heads = header("arm", is_number=False)
    heads += header("from the base", note="KL(base ‖ trained), nats per token, with its interval")
    heads += "".join(header(label, note=note) for label, _, note, _ in columns)
    rows = ""
    for change in of_task.changes:
        low, high = change.interval
        ends = [amount(of_task.task, end) for end in (low, high)]
        shown_ends = NOT_MEASURED if math.isnan(low + high) else " to ".join(ends)
        cells = f'<th scope="row">{arm_name(change.label, places[change.label])}</th>'
        shown = amount(of_task.task, change.score)
        cells += value_cell(change.score, shown, f'<span class="interval">{shown_ends}</span>')
        for _, name, _, form in columns:
            value = change.extra(name)
            known = value if value is not None else 0.0
            cells += value_cell(value, percent(known) if form == "percent" else form.format(known))
        rows += f"<tr>{cells}</tr>"
    title = f"<h4>{text(of_task.task.name)}</h4>" if with_name else ""
    return title + _scrolled(heads, rows, of_task.task)


# ------------------------------------------------------------------------- averages, several tries


def _averages_table(averages: Sequence[Averages], places: Mapping[str, int]) -> str:
    names = list(dict.fromkeys(a.name for of_arm in averages for a in of_arm.averages))
    heads = header("arm", is_number=False)
    heads += "".join(header(name) for name in names)
    base = {a.name: a for of_arm in reversed(averages) for a in of_arm.averages}
    cells = "".join(_average_cell(base[name].base, base[name].missing) for name in names)
    rows = f'<tr class="base"><th scope="row">base</th>{cells}</tr>'
    for of_arm in averages:
        own = {average.name: average for average in of_arm.averages}
        cells = f'<th scope="row">{arm_name(of_arm.label, places[of_arm.label])}</th>'
        for name in names:
            found = own.get(name)
            score, missing = (found.score, found.missing) if found else (math.nan, ())
            cells += _average_cell(score, missing)
        rows += f"<tr>{cells}</tr>"
    return _table(heads, rows, "Averages of the papers")


def _average_cell(value: float, missing: Sequence[str]) -> str:
    if math.isnan(value) and missing:
        return f'<td class="num none">{NOT_MEASURED} <small>no {text(", ".join(missing))}</small>'
    return value_cell(_known(value), f"{value:.4f}")


def _tries_table(arms: Sequence[Arm], task: Task, places: Mapping[str, int]) -> str:
    found = {arm.label: _tries(arm, "final", task) for arm in arms}
    names = sorted({name for of_arm in found.values() for name in of_arm}, key=_natural)
    if not names:
        return ""
    heads = header("arm", is_number=False)
    heads += "".join(header(name.replace("_", " ")) for name in names)
    base = next((values for arm in arms if (values := _tries(arm, "base", task))), {})
    rows = f'<tr class="base"><th scope="row">base</th>{_numbers(base, names)}</tr>' if base else ""
    for label, of_arm in found.items():
        if of_arm:
            name = arm_name(label, places[label])
            rows += f'<tr><th scope="row">{name}</th>{_numbers(of_arm, names)}</tr>'
    return f"<h4>{text(task.name)}</h4>{_scrolled(heads, rows, task)}"


def _numbers(values: Mapping[str, float], names: Sequence[str]) -> str:
    return "".join(plain_cell(values.get(name)) for name in names)


def _tries(arm: Arm, phase: Phase, task: Task) -> dict[str, float]:
    """The further numbers of the arm's first run that are about several answers."""
    extra = arm.best.runs[0].score(phase, task.name).get("extra") or {}
    known = {name: number(value) for name, value in extra.items() if _TRIES.fullmatch(name)}
    return {name: value for name, value in known.items() if value is not None}


def _natural(name: str) -> list[tuple[int, str]]:
    """pass@2 before pass@10."""
    return [(int(part or 0), part) if part.isdigit() else (-1, part)
            for part in re.split(r"(\d+)", name)]  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _scrolled(heads: str, rows: str, task: Task) -> str:
    return _table(heads, rows, f"Changes on {task.name}")


def _table(heads: str, rows: str, label: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
