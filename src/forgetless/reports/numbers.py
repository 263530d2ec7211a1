"""Numbers as people read them, the same on the page, in a terminal and in figures."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.core.metrics import Interval
from forgetless.reports.evidence import TaskInfo, number
from forgetless.scores.comparison import Verdict
from forgetless.scores.seeds import Estimate

__all__ = [
    *("NOT_MEASURED", "VERDICTS", "amount", "arm_words", "count_words", "direction"),
    *("interval_words", "level_words", "listed", "percent", "points", "probe_words", "raw_words"),
    *("span_words", "three_decimals", "unit", "unit_in_full", "without_unit"),
]

NOT_MEASURED = "–"
VERDICTS: Mapping[Verdict, str] = {
    "worse": "clearly worse",
    "better": "clearly better",
    "noise": "no change beyond noise",
    "unknown": "cannot be told",
}


def amount(task: TaskInfo, value: float) -> str:
    """A score: a share as per cent, anything else to three decimals."""
    return percent(value) if task.is_share else three_decimals(value)


def three_decimals(value: float) -> str:
    """Three decimals, or a smaller number as it is."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def percent(share: float) -> str:
    """A share as per cent with one decimal."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def without_unit(shown: str) -> str:
    """A number without its sign for per cent."""
    return shown.removesuffix("\N{NO-BREAK SPACE}%")


def points(value: float, task: TaskInfo, sign: str = "+") -> str:
    """A difference: of shares in points of a hundred; without `sign` only a minus is written."""
    if math.isnan(value):
        return NOT_MEASURED
    shown = f"{100 * value:{sign}.1f}" if task.is_share else f"{value:{sign}.3f}"
    return shown.replace("-", "−")


def span_words(interval: Interval, task: TaskInfo) -> str:
    """The interval of a difference."""
    ends = [points(end, task) for end in interval]
    return NOT_MEASURED if NOT_MEASURED in ends else " to ".join(ends)


def raw_words(value: Any) -> str:
    """A raw value: numbers to four digits, text as it is, a dash for nothing."""
    if (known := number(value)) is not None:
        return f"{value:,}" if isinstance(value, int) else f"{known:.4g}"
    return NOT_MEASURED if value is None or isinstance(value, float) else str(value)


def interval_words(estimate: Estimate, task: TaskInfo) -> str:
    """The interval of a score without its unit; a dash when no error is known."""
    if not estimate.has_error:
        return NOT_MEASURED
    low, high = (without_unit(amount(task, end)) for end in estimate.ends)
    return f"{low} to {high}" if "-" in low + high else f"{low}–{high}"


def level_words(task: TaskInfo, level: float) -> str:
    """A round score: 80 % of a share, else the number."""
    return f"{100 * level:g}\N{NO-BREAK SPACE}%" if task.is_share else f"{level:g}"


def unit(task: TaskInfo) -> str:
    """What a score of the task is: its metric, its name, and whether lower is better."""
    return f"{task.metric} on {task.name}{'' if task.higher_is_better else ', lower is better'}"


def unit_in_full(task: TaskInfo) -> str:
    """As `unit`, with the tasks that an average is of."""
    return f"{unit(task)} ({', '.join(task.mean_of)})" if task.mean_of else unit(task)


def direction(task: TaskInfo) -> str:
    """The kind of the task, its metric, and which scores are better."""
    better = "higher" if task.higher_is_better else "lower"
    return f"{task.kind} · {task.metric}, {better} is better"


def count_words(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def probe_words(name: str) -> str:
    """The name of a probe as people read it: what it is about, and what it measures."""
    kind, _, measure = name.partition("/")
    known = {"kl": "distance from the base", "loss": "loss, lower is better"}
    return f"{kind.capitalize()}: {known.get(measure, measure.replace('_', ' '))}"


def arm_words(label: str) -> str:
    """An arm's name within a sentence: in quotes where its own words would run into the others."""
    return f"“{label}”" if re.search(r",|\band\b", label) else label
