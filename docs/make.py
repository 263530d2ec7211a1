"""Writes what follows from the code and from committed results: methods.md, results pages.

A page of results is written by hand around its tables. These stand between two marks, one pair for
each CSV file, and are what this script writes; a file without marks gets them at the page's end.

python docs/make.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from forgetless.methods.table import as_markdown
from forgetless.reports.arms import gather_rows
from forgetless.reports.durations import Course, Matched, course_of_rows, matched_over_steps
from forgetless.reports.evidence import TaskInfo, read_csv, tasks_of
from forgetless.reports.figures import draw_pairs
from forgetless.reports.numbers import (
    NOT_MEASURED,
    amount,
    interval_words,
    level_words,
    unit,
    unit_in_full,
)
from forgetless.reports.payload import course_chart
from forgetless.reports.sequences import standings
from forgetless.scores.seeds import Estimate
from forgetless.studies.sequence import COMPARED, FORMULAS, MAIN_METRICS, mean_over, pairs

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
TIMES = RESULTS / "start.json"
"""What `benchmarks/start.py --full` writes; the column of times is empty without it."""

PAGES = {"pocket-curves.md": "pocket-curves-*.csv", "sequences.md": "sequences-*.csv"}
"""Pages of results, and the results.csv and curve.csv files of studies whose tables they hold."""


def seconds() -> dict[str, float]:
    """Method -> seconds of its start, where they were measured."""
    if not TIMES.is_file():
        return {}
    rows = json.loads(TIMES.read_text(encoding="utf-8"))["rows"]
    return {row["method"]: row["block s"] for row in rows if row["method"]}


def with_tables(page: str, files: Iterable[Path]) -> str:
    """The page with the tables of these files in their places."""
    for file in files:
        first, last = f"<!-- {file.name} -->", f"<!-- /{file.name} -->"
        part = f"{first}\n\n{tables(file)}\n\n{last}"
        if first in page:
            old = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
            page = old.sub(lambda _, part=part: part, page)
        else:
            page = f"{page.rstrip()}\n\n{part}\n"
    return page


def tables(file: Path) -> str:
    """The tables of a curve.csv, a results.csv (over the learning rates) or a sequences.csv."""
    rows = read_csv(file)
    if rows and "answers" in rows[0]:
        return _sequences(rows)
    if not rows or "step" not in rows[0]:
        return _rates(rows)
    course = course_of_rows(rows)
    if course is None:
        raise ValueError(f"{file.name} has no run with both kinds of task at two steps or more")
    matched = matched_over_steps(course)
    parts = [f"![Learned against kept, a line an arm]({file.with_suffix('.png').name})"]
    parts += [_by_step(course, task) for task in (*course.learning, *course.forgetting)]
    return "\n\n".join([*parts, *([_matched(matched)] if matched else [])])


def draw(file: Path) -> None:
    """The figure of a curve.csv, beside it."""
    rows = read_csv(file)
    course = course_of_rows(rows) if rows and "step" in rows[0] else None
    if course is not None:
        draw_pairs(course_chart(course), course.labels, file.with_suffix(".png"))


def _by_step(course: Course, task: TaskInfo) -> str:
    base = next((m for track in course.tracks for m in track.moments if m.step == 0), None)
    heads = ["arm", *(f"step {step}" for step in course.steps)]
    rows = []
    for track in course.tracks:
        at = {moment.step: moment.scores.get(task.name) for moment in track.moments}
        rows.append([track.label, *(_cell(at.get(step), task) for step in course.steps)])
    known = f"; base {_cell(base.scores.get(task.name), task)}" if base else ""
    return f"{task.kind.capitalize()}: {unit_in_full(task)}{known}.\n\n{_table(heads, rows)}"


def _matched(matched: Matched) -> str:
    heads = ["arm", *(level_words(matched.learning, level) for level in matched.levels)]
    rows = [[label, *(_cell(estimate, matched.kept) for estimate in at)]
            for label, at in matched.kept_at.items()]  # fmt: skip
    about = f"Kept at matched learning: {unit_in_full(matched.kept)}, by {unit(matched.learning)}."
    return f"{about}\n\n{_table(heads, rows)}"


def _rates(rows: Sequence[dict[str, object]]) -> str:
    tasks = tasks_of([row for row in rows if row["task"]])
    heads = ["arm", "learning rate", *(unit(task) for task in tasks)]
    lines = [
        [
            arm.label,
            f"{setting.learning_rate:g}{' **chosen**' if setting is arm.best else ''}",
            *(_cell(setting.final(task), task) for task in tasks),
        ]
        for arm in gather_rows(rows)
        for setting in arm.settings
    ]
    return _table(heads, lines)


def _sequences(rows: Sequence[dict[str, Any]]) -> str:
    """The metrics of every arm, and for two of them which others they are ahead of."""
    parts = []
    for answers in dict.fromkeys(row["answers"] for row in rows):
        found = [
            {**row, "metrics": {name: row[name] for name in FORMULAS}}
            for row in rows
            if row["answers"] == answers
        ]
        arms = list(dict.fromkeys(each["arm"] for each in found))
        lines = []
        for arm in arms:
            own = [each["metrics"] for each in found if each["arm"] == arm]
            means = [mean_over([each[name] for each in own]) for name in MAIN_METRICS]
            lines.append([arm, str(len(own)), *map(_with_half, means)])
        one_head = len({row["answers"] for row in rows}) > 1
        title = f"Answers {answers} classes:\n\n" if one_head and answers == "of all" else ""
        title = "Answers of the task's own classes:\n\n" if answers != "of all" else title
        parts.append(title + _table(["arm", "n", *MAIN_METRICS], lines))
        compared = pairs(found)
        # What is known beside the tasks is asked in one way alone.
        for metric in COMPARED[:2] if answers == "of all" else COMPARED[:1]:
            lines = [
                list(line)
                for line in standings(compared, metric)
                if line[0].startswith(("lora_null", "repair"))
            ]
            heads = [f"by {metric}", "ahead of", "no difference seen", "behind"]
            parts.append(_table(heads, lines, numbers=False))
    return "\n\n".join(parts)


def _with_half(mean: dict[str, Any]) -> str:
    """A mean with half of its interval."""
    if mean["mean"] is None:
        return NOT_MEASURED
    shown = f"{mean['mean']:.3f}"
    return shown if mean["low"] is None else f"{shown} ± {mean['high'] - mean['mean']:.3f}"


def _cell(estimate: Estimate | None, task: TaskInfo) -> str:
    if estimate is None:
        return NOT_MEASURED
    interval = f" ({interval_words(estimate, task)})" if estimate.has_error else ""
    return f"{amount(task, estimate.value)}{interval}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    rule = ["---", *["--:" if numbers else "---"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *rows))


def main() -> None:
    """Write the pages."""
    methods = DOCS / "methods.md"
    methods.write_text(as_markdown(seconds()), encoding="utf-8")
    print(methods)
    for name, pattern in PAGES.items():
        page, files = RESULTS / name, sorted(RESULTS.glob(pattern))
        if not files:
            continue
        for file in files:
            draw(file)
        text = page.read_text(encoding="utf-8") if page.is_file() else f"# {page.stem}\n"
        page.write_text(with_tables(text, files), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
