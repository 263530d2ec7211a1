"""A run's scores against its base's, and the interval of a distance, which is found there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from forgetless.core.errors import UserError
from forgetless.reports.evidence import Run, Task, number
from forgetless.scores.comparison import Row, compare
from forgetless.scores.files import Phase
from forgetless.scores.seeds import Estimate
from forgetless.tasks.base import Item, TaskResult


def compared(run: Run, task: str, phase: Phase = "final", step: int | None = None) -> Row | None:
    """The comparison of a run's scores with its base's; None where that cannot be made.

    Args:
        run: a run.
        task: its name.
        phase: which scores.
        step: on the way, where these are final scores; None for the run's end.
    """
    base, score = _result(run, "base", task), _result(run, phase, task, step)
    if base is None or score is None:
        return None
    try:
        return compare({task: base}, {task: score}).rows[0]
    except UserError:  # two versions of the task; the other tables still show both scores
        return None


def as_compared(
    estimate: Estimate,
    task: Task,
    runs: Iterable[Run],
    phase: Phase = "final",
    step: int | None = None,
) -> Estimate:
    """The estimate; of a distance with the interval of the comparison with the base.

    A distance's base is 0, so score and difference are one quantity, which has one interval.
    Several seeds keep the interval over them.
    """
    if not (task.is_distance and estimate.seeds_agree):
        return estimate
    row = next((row for run in runs if (row := compared(run, task.name, phase, step))), None)
    if row is None:
        return estimate
    is_known = not any(math.isnan(end) for end in row.interval)
    low, high = row.interval if is_known else (estimate.value, estimate.value)
    return replace(estimate, low=low, high=high)


def _result(run: Run, phase: Phase, task: str, step: int | None = None) -> TaskResult | None:
    score = run.score(phase, task, step)
    if number(score.get("value")) is None:
        return None
    try:
        items = [Item.from_json(line) for line in run.items(phase, task, step)]
        return TaskResult.from_json(score, items)
    except (KeyError, TypeError, ValueError):  # a file that somebody else has written
        return None
