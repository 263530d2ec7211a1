"""A run's scores, and what changed against its base's."""

from __future__ import annotations

from forgetless.core.errors import UserError
from forgetless.reports.evidence import Run, number
from forgetless.scores.comparison import TaskChange, compare
from forgetless.scores.files import Phase
from forgetless.tasks.base import Item, TaskResult


def compared(
    run: Run, task: str, phase: Phase = "final", step: int | None = None
) -> TaskChange | None:
    """The comparison of a run's scores with its base's; None where that cannot be made.

    Args:
        run: a run.
        task: its name.
        phase: which scores.
        step: on the way, where these are final scores; None for the run's end.
    """
    base, score = result_of(run, "base", task), result_of(run, phase, task, step)
    if base is None or score is None:
        return None
    try:
        return compare({task: base}, {task: score}).rows[0]
    except UserError:  # two versions of the task; the other tables still show both scores
        return None


def result_of(run: Run, phase: Phase, task: str, step: int | None = None) -> TaskResult | None:
    """The score of a run with its items, where these were kept; None where it was not measured."""
    score = run.score(phase, task, step)
    if number(score.get("value")) is None:
        return None
    try:
        items = [Item.from_json(line) for line in run.items(phase, task, step)]
        return TaskResult.from_json(score, items)
    except (KeyError, TypeError, ValueError):  # a file that somebody else has written
        return None
