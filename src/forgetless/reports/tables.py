"""The tables of the page, all of one shape; the page draws each of them in the same way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forgetless.reports.arms import Arm, Setting
from forgetless.reports.changes import ArmChange, TaskChanges
from forgetless.reports.durations import Course, Matched
from forgetless.reports.evidence import Evidence, TaskInfo, number
from forgetless.reports.numbers import (
    NOT_MEASURED,
    amount,
    count_words,
    interval_words,
    level_words,
    percent,
    points,
    unit,
    unit_in_full,
    without_unit,
)
from forgetless.scores.averages import PaperAverage
from forgetless.scores.comparison import Verdict
from forgetless.scores.files import Phase
from forgetless.scores.seeds import MARGIN, Estimate
from forgetless.studies.folder import COLUMNS

VERDICTS: Mapping[Verdict, str] = {
    "worse": "clearly worse",
    "better": "clearly better",
    "noise": "no change beyond noise",
    "unknown": "cannot be told",
}
_TRIES = re.compile(r"pass@\d+|unique_(right|wrong)|distinct_\d+")


@dataclass(frozen=True)
class Head:
    """A column's head with an explanation of it."""

    label: str
    note: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
        shown: its text.
        value: with all digits, for sorting; None for text.
        kind: "num", "none" (not measured), a verdict, or nothing.
        under: the interval below it.
        note: a remark; with `is_best` the mark of the rate at which an arm stands.
        bar: a share of a hundred drawn in place of text.
    """

    shown: str = ""
    value: float | None = None
    kind: str = ""
    under: str = ""
    note: str = ""
    is_best: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Line:
    """A row: an arm by its label, a base or a run, with its cells."""

    head: str
    cells: Sequence[Cell]
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under heads.

    Attributes:
        label: what it shows, for those who hear the page.
        heads: one a column, that of the row heads first.
        lines: the rows, each with a cell fewer than there are heads.
        base: rows of untouched bases, which stand above the others.
        groups: heads over several columns: (name, explanation, number of columns).
        title: a heading above it, with `about` beside and `intro` below.
        subtitle: a smaller heading, where several tables stand under one title.
        kind: "sortable", "dense", "tall", "reasons" (the last column holds sentences).
        of_arms: whether the rows are arms, which get their symbols.
    """

    label: str
    heads: Sequence[Head]
    lines: Sequence[Line]
    base: Sequence[Line] = ()
    groups: Sequence[tuple[str, str, int]] = ()
    title: str = ""
    about: str = ""
    intro: str = ""
    subtitle: str = ""
    kind: str = ""
    of_arms: bool = True


def number_cell(value: float | None, shown: str = "", under: str = "") -> Cell:
    """A number; a dash where it was not measured."""
    if value is None or math.isnan(value):
        return Cell(NOT_MEASURED, kind="num none")
    return Cell(shown, value, "num", under)


def estimate_cell(estimate: Estimate | None, task: TaskInfo, *, is_best: bool = False) -> Cell:
    """A score over its 95 % interval."""
    if estimate is None:
        return Cell(NOT_MEASURED, kind="num none", is_best=is_best)
    shown, ends = amount(task, estimate.value), interval_words(estimate, task)
    return Cell(shown, estimate.value, "num", ends, is_best=is_best)


def plain_cell(value: Any) -> Cell:
    """A raw value: numbers to four digits, text as it is, a dash for nothing."""
    if (known := number(value)) is not None:
        shown = f"{value:,}" if isinstance(value, int) else f"{known:.4g}"
        return Cell(shown, value, "num")
    if value is None or isinstance(value, float):
        return Cell(NOT_MEASURED, kind="none")
    return Cell(str(value))


def count_cell(count: float | None) -> Cell:
    """A count; a mean of counts with a decimal where it has one."""
    whole = count is None or count == round(count)
    return number_cell(count, "" if count is None else f"{count:,.{0 if whole else 1}f}")


def raw_table(
    label: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], kind: str
) -> Table:
    """Rows as they are; the first column has their names."""
    name, *rest = columns
    heads = [text_head(name.replace("_", " "))]
    for key in rest:
        is_number = any(number(row.get(key)) is not None for row in rows)
        heads.append(Head(key.replace("_", " "), is_number=is_number))
    lines = [Line(str(row[name]), [plain_cell(row.get(key)) for key in rest]) for row in rows]
    return Table(label, heads, lines, kind=kind, of_arms=False)


def text_head(label: str, note: str = "") -> Head:
    """The head of a column of text."""
    return Head(label, note, is_number=False)


# ------------------------------------------------------------------------------ every number


def arms_table(evidence: Evidence, arms: Sequence[Arm]) -> Table:
    """One row an arm and learning rate, after one row a base model."""
    tasks = evidence.tasks
    heads, groups = [text_head("arm"), Head("rate", "learning rate")], [("", "", 2)]
    for task in tasks:
        columns = [Head("score", "after training, over its 95 % interval")]
        if has_retention(task):
            columns.append(Head("kept", "score as a share of the base's, at most 100 %"))
        columns += [Head("step 0", "before the first step of training")]
        columns += [Head("n", "items of the task")]
        heads += columns
        groups.append((task.name, _direction(task), len(columns)))
    heads += [Head("seeds", "finished runs")]
    heads += [Head("update", "‖ΔW‖ / ‖W‖ over the adapted layers")]
    heads += [Head("time", "seconds of training, mean")]
    bases = {arm.best.runs[0].base: arm.best for arm in reversed(arms)}
    return Table(
        "Scores of every arm",
        heads,
        [_setting_line(arm, setting, tasks) for arm in arms for setting in arm.settings],
        [_base_line(name, setting, tasks) for name, setting in bases.items()],
        [*groups, ("", "", 3)],
        kind="sortable",
    )


def has_retention(task: TaskInfo) -> bool:
    """Whether what is kept of the task is a share of the base's score."""
    return task.kind == "forgetting" and task.is_share


def _direction(task: TaskInfo) -> str:
    better = "higher" if task.higher_is_better else "lower"
    return f"{task.kind} · {task.metric}, {better} is better"


def _base_line(name: str, setting: Setting, tasks: Sequence[TaskInfo]) -> Line:
    cells = [Cell()]
    for task in tasks:
        base = setting.measured[task.name].base
        cells += [estimate_cell(base, task), *([Cell()] * (1 + has_retention(task)))]
        cells.append(plain_cell(base.num_items if base else None))
    return Line("base", [*cells, Cell(), Cell(), Cell()], name)


def _setting_line(arm: Arm, setting: Setting, tasks: Sequence[TaskInfo]) -> Line:
    cells = [plain_cell(setting.learning_rate)]
    for task in tasks:
        measured = setting.measured[task.name]
        kept = [measured.retention] if has_retention(task) else []
        scores = [measured.final, *kept, measured.step0]
        cells += [estimate_cell(estimate, task) for estimate in scores]
        cells.append(plain_cell(measured.final.num_items if measured.final else None))
    seconds = setting.mean_of("train_seconds")
    cells += [plain_cell(len(setting.runs)), plain_cell(setting.mean_of("relative_update"))]
    cells.append(number_cell(seconds, f"{seconds or 0:.0f} s"))
    return Line(arm.label, cells, is_best=setting is arm.best and len(arm.settings) > 1)


def runs_table(evidence: Evidence) -> Table:
    """The rows of results.csv, number for number."""
    columns = [column for column in COLUMNS if column != "study"]
    return raw_table("Scores of every run", columns, evidence.rows, "sortable dense tall")


# ------------------------------------------------------------------------- over steps and rates


def course_table(found: Course) -> Table:
    """One row an arm, two columns a step: the first learning task, and what is kept."""
    pair = found.learning[0], found.forgetting[0]
    base = next((m.scores for t in found.tracks for m in t.moments if m.step == 0), {})
    about = [
        f"{word}: {unit_in_full(task)}"
        + (f", base {amount(task, base[task.name].value)}" if task.name in base else "")
        for word, task in zip(("learned", "kept"), pair, strict=True)
    ]
    lines = []
    for track in found.tracks:
        at = {
            (moment.step, name): e for moment in track.moments for name, e in moment.scores.items()
        }
        cells = [estimate_cell(at.get((step, t.name)), t) for step in found.steps for t in pair]
        lines.append(Line(track.label, cells))
    table = _pairs_table("Scores over the training", pair, lines)
    groups = [("", "", 1), *((f"step {step:,}", "", 2) for step in found.steps)]
    return replace(table, groups=groups, title="Step by step", about=" · ".join(about))


def rates_table(evidence: Evidence, arms: Sequence[Arm]) -> Table | None:
    """Every arm at every learning rate, the one it stands at marked; None with one rate an arm."""
    learning, forgetting = evidence.first("learning"), evidence.first("forgetting")
    if learning is None or forgetting is None or all(len(arm.settings) < 2 for arm in arms):
        return None
    rates = sorted({s.learning_rate for arm in arms for s in arm.settings if s.learning_rate})
    lines = []
    for arm in arms:
        at = {setting.learning_rate: setting for setting in arm.settings}
        cells = []
        for rate in rates:
            found = at.get(rate)
            learned = found.final(learning) if found else None
            cells.append(estimate_cell(learned, learning, is_best=found is arm.best))
            cells.append(estimate_cell(found.kept(forgetting) if found else None, forgetting))
        lines.append(Line(arm.label, cells))
    return replace(
        _pairs_table("Scores over the learning rates", (learning, forgetting), lines),
        groups=[("", "", 1), *((f"{rate:g}", "", 2) for rate in rates)],
        title="Learning rates",
        intro="Learned and kept at each rate tried. An arm stands at the rate marked: of those "
        f"with at least {100 * (1 - MARGIN):.0f} % of the best one’s gain in learning, the one "
        "that kept most.",
    )


def _pairs_table(label: str, pair: tuple[TaskInfo, TaskInfo], lines: Sequence[Line]) -> Table:
    heads = [Head("learned", unit(pair[0])), Head("kept", unit(pair[1]))]
    return Table(label, [text_head("arm"), *heads * (len(lines[0].cells) // 2)], lines)


def matched_table(matched: Matched) -> Table:
    """What the arms keep where they have learned equally much."""
    learning, kept = matched.learning, matched.kept
    several = any(e and e.seeds > 1 for at in matched.kept_at.values() for e in at)
    if several:
        interval = "Under each mean its 95 % interval over the seeds."
    else:
        interval = "With one seed an arm there is no interval: small differences say nothing."
    return Table(
        "Forgetting at matched learning",
        [text_head("arm"), *(Head(level_words(learning, level)) for level in matched.levels)],
        [
            Line(label, [estimate_cell(estimate, kept) for estimate in at])
            for label, at in matched.kept_at.items()
        ],
        title="Forgetting at matched learning",
        about=f"{unit_in_full(kept)} · by {unit(learning)}",
        intro=f"Each seed is followed in straight lines between the {matched.along} at which it "
        "was scored; where it passes a level more than once, the pass at which it kept most "
        f"counts. {interval} A dash in place of a score is a level that not every seed of the arm "
        "reached: nothing is extrapolated.",
    )


# ------------------------------------------------------------------------------ before and after


def changes_tables(
    changes: Sequence[TaskChanges], averages: Mapping[str, Sequence[PaperAverage]]
) -> list[Table]:
    """Scores before and after, the papers' averages, distances from the base."""
    scored = [_score_table(of_task) for of_task in changes if not of_task.task.is_distance]
    moved = [of_task for of_task in changes if of_task.task.is_distance]
    distances = [_distance_table(of_task) for of_task in moved]
    if distances:
        distances[0] = replace(
            distances[0],
            title="Distance from the base",
            intro="How differently the trained model continues texts that it was not trained on, "
            "per token, 0 being not at all. “Same choice” is how often both find the same next "
            "token the likeliest; “perplexity” how many times more surprised the trained model is "
            "by the texts.",
        )
    if len(distances) > 1:
        distances = [
            replace(t, subtitle=m.task.name) for t, m in zip(distances, moved, strict=True)
        ]
    return [*scored, *([_averages_table(averages)] if averages else []), *distances]


def _score_table(of_task: TaskChanges) -> Table:
    task = of_task.task
    counted, alone = bool(of_task.counted), any(change.alone for change in of_task.changes)
    heads = [text_head("arm"), Head("before → after", "the base, and the trained model")]
    change_head = f"change, {'points' if task.is_share else task.metric}"
    heads += [Head(change_head, "after less before, over its 95 % interval")]
    heads += [text_head("in words")]
    if task.kind == "forgetting":
        heads += [Head("kept", "the score as a share of the base’s, at most 100 %")]
    if counted:
        heads += [Head("lost", "right before, wrong after")]
        heads += [Head("gained", "wrong before, right after")]
        heads += [Head("p", "McNemar’s exact test that nothing changed")] if alone else []
    if alone:
        heads += [Head("shows from", "smallest true change found with a power of 80 %")]
    return Table(
        f"Changes on {task.name}",
        heads,
        [_score_line(change, task, counted, alone) for change in of_task.changes],
        title=task.name,
        about=f"{_direction(task)} · {count_words(of_task.changes[0].rows[0].n, 'item')}",
    )


def _score_line(change: ArmChange, task: TaskInfo, counted: bool, alone: bool) -> Line:
    before, after = without_unit(amount(task, change.base)), amount(task, change.score)
    low, high = (points(end, task) for end in change.interval)
    ends = NOT_MEASURED if NOT_MEASURED in (low, high) else f"{low} to {high}"
    cells = [
        number_cell(change.score, f"{before} → {after}"),
        number_cell(change.difference, points(change.difference, task), ends),
        Cell(VERDICTS[change.verdict], kind=change.verdict),
    ]
    if task.kind == "forgetting":
        cells.append(number_cell(change.retention, percent(change.retention or 0.0)))
    row = change.alone
    if counted:
        for flip in ("lost", "gained"):
            count = change.count(flip)
            cells.append(number_cell(count, f"{count or 0:,.0f}"))
        if alone:
            p = row.p_value if row else None
            cells.append(number_cell(p, "< 0.001" if p is None or p < 0.001 else f"{p:.3f}"))
    if alone:
        least = row.detectable if row else math.nan
        cells.append(number_cell(least, points(least, task, "")))
    return Line(change.label, cells)


def _distance_table(of_task: TaskChanges) -> Table:
    columns = [
        (
            Head("the other way", "KL(trained ‖ base), nats per token"),
            "reverse_kl",
            "{:.3f}".format,
        ),
        (Head("same choice", "same likeliest next token"), "top1_agreement", percent),
        (Head("perplexity", "trained over base"), "perplexity_ratio", "× {:.2f}".format),
    ]
    columns = [c for c in columns if any(ch.extra(c[1]) is not None for ch in of_task.changes)]
    lines = []
    for change in of_task.changes:
        ends = [amount(of_task.task, end) for end in change.interval]
        under = NOT_MEASURED if math.isnan(sum(change.interval)) else " to ".join(ends)
        cells = [number_cell(change.score, amount(of_task.task, change.score), under)]
        for _, name, show in columns:
            value = change.extra(name)
            cells.append(number_cell(value, "" if value is None else show(value)))
        lines.append(Line(change.label, cells))
    first = Head("from the base", "KL(base ‖ trained), nats per token, with its interval")
    heads = [text_head("arm"), first, *(head for head, _, _ in columns)]
    return Table(f"Changes on {of_task.task.name}", heads, lines)


def _averages_table(averages: Mapping[str, Sequence[PaperAverage]]) -> Table:
    names = list(dict.fromkeys(a.name for of_arm in averages.values() for a in of_arm))
    base = {a.name: a for of_arm in reversed(list(averages.values())) for a in of_arm}

    def cell(found: PaperAverage | None, value: float) -> Cell:
        missing = f"no {', '.join(found.missing)}" if found and found.missing else ""
        return replace(number_cell(value, f"{value:.4f}"), note=missing)

    lines = []
    for label, of_arm in averages.items():
        own = {average.name: average for average in of_arm}
        scores = [(found := own.get(name), found.score if found else math.nan) for name in names]
        lines.append(Line(label, [cell(*score) for score in scores]))
    return Table(
        "Averages of the papers",
        [text_head("arm"), *map(Head, names)],
        lines,
        [Line("base", [cell(base[name], base[name].base) for name in names])],
        title="Averages of the papers",
        intro="Under the names that the papers gave them. An average with a part missing is not "
        "computed.",
    )


def tries_tables(arms: Sequence[Arm], tasks: Sequence[TaskInfo]) -> list[Table]:
    """What several answers to each question gave, of the tasks that asked for several."""
    tables = [table for task in tasks if (table := _tries_table(arms, task))]
    if tables:
        tables[0] = replace(
            tables[0],
            title="Several answers to each question",
            intro="pass@k is the chance that at least one of k answers is right; unique and "
            "distinct count how many of the answers differ.",
        )
    return tables


def _tries_table(arms: Sequence[Arm], task: TaskInfo) -> Table | None:
    found = {arm.label: _tries(arm, "final", task) for arm in arms}
    names = sorted({name for of_arm in found.values() for name in of_arm}, key=_natural)
    if not names:
        return None
    base = next((values for arm in arms if (values := _tries(arm, "base", task))), {})

    def line(head: str, values: Mapping[str, float]) -> Line:
        return Line(head, [plain_cell(values.get(name)) for name in names])

    return Table(
        f"Several answers on {task.name}",
        [text_head("arm"), *(Head(name.replace("_", " ")) for name in names)],
        [line(label, values) for label, values in found.items() if values],
        [line("base", base)] if base else [],
        subtitle=task.name,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts pass@2 before pass@10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdigit() else -1, part) for part in parts]


def _tries(arm: Arm, phase: Phase, task: TaskInfo) -> dict[str, float]:
    """The further numbers of the arm's first run that are about several answers."""
    extra = arm.best.runs[0].score(phase, task.name).get("extra") or {}
    known = {name: number(value) for name, value in extra.items() if _TRIES.fullmatch(name)}
    return {name: value for name, value in known.items() if value is not None}


def flips_table(of_task: TaskChanges) -> Table:
    """How many items each arm kept, lost and gained, with a bar."""
    heads = [
        text_head("arm"),
        Head("kept", "right before and after"),
        Head("lost", "right before, wrong after"),
        Head("gained", "wrong before, right after"),
        Head("never", "wrong before and after"),
    ]
    is_old = of_task.task.kind == "forgetting"
    lines = []
    for change in of_task.counted:
        kept, lost, *others = (change.count(f) or 0.0 for f in ("kept", "lost", "gained", "wrong"))
        bar = [Cell(kind="bar", bar=100 * kept / (kept + lost or 1.0))] if is_old else []
        lines.append(Line(change.label, [*map(count_cell, (kept, lost, *others)), *bar]))
    heads += [text_head("of what the base knew")] if is_old else []
    return Table(f"Counts, {of_task.task.name}", heads, lines)
