"""Every arm against its base, task by task: differences, distances, the papers' averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from forgetless.core.metrics import Interval
from forgetless.reports.arms import Arm
from forgetless.reports.compared import compared
from forgetless.reports.evidence import Evidence, Task, number
from forgetless.scores.averages import PaperAverage, paper_averages
from forgetless.scores.comparison import Row, Verdict
from forgetless.scores.seeds import over_seeds


@dataclass(frozen=True)
class Change:
    """One arm on one task, at its best setting, against the base.

    Attributes:
        label: of the arm.
        rows: the comparison of each of its seeds.
    """

    label: str
    rows: tuple[Row, ...]

    @property
    def alone(self) -> Row | None:
        """The comparison, where there is one seed."""
        return self.rows[0] if len(self.rows) == 1 else None

    @property
    def base(self) -> float:
        """The base's score."""
        return fmean(row.base for row in self.rows)

    @property
    def score(self) -> float:
        """The score after training; the mean over seeds."""
        return fmean(row.score for row in self.rows)

    @property
    def difference(self) -> float:
        """Score less the base's."""
        return fmean(row.difference for row in self.rows)

    @property
    def interval(self) -> Interval:
        """Of the difference: over the same items, or over the seeds where there are several."""
        differences = [row.difference for row in self.rows]
        spread = over_seeds(differences, [None], None, is_share=False)
        if spread.seeds_agree:
            return self.rows[0].interval
        return Interval(spread.low, spread.high)

    @property
    def kept(self) -> float | None:
        """Share of the base's score that is left; None where a ratio means nothing."""
        shares = [row.retention for row in self.rows if not math.isnan(row.retention)]
        return fmean(shares) if shares else None

    @property
    def counts(self) -> tuple[float, float] | None:
        """Items lost and gained; None unless they are right or wrong."""
        if not all(row.counted for row in self.rows):
            return None
        return fmean(len(row.lost) for row in self.rows), fmean(len(r.gained) for r in self.rows)

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the difference."""
        low, high = self.interval
        if math.isnan(low) or math.isnan(high):
            return "unknown"
        if low <= 0 <= high:
            return "noise"
        return "worse" if fmean(row.forgetting for row in self.rows) > 0 else "better"

    def extra(self, name: str) -> float | None:
        """The mean of a further number; None where no seed has it."""
        values = [number((row.extra or {}).get(name)) for row in self.rows]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None


@dataclass(frozen=True)
class TaskChanges:
    """One task: every arm that was measured on it and can be compared."""

    task: Task
    num_items: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Averages:
    """The papers' averages of one arm."""

    label: str
    averages: tuple[PaperAverage, ...]


def find_changes(evidence: Evidence, arms: Sequence[Arm]) -> list[TaskChanges]:
    """What every arm changed, in the order of the tasks; only what was measured both times."""
    found = []
    for task in evidence.tasks:
        changes = []
        for arm in arms:
            rows = [row for run in arm.best.runs if (row := compared(run, task.name)) is not None]
            if rows:
                changes.append(Change(arm.label, tuple(rows)))
        if changes:
            found.append(TaskChanges(task, changes[0].rows[0].n, tuple(changes)))
    return found


def find_averages(changes: Sequence[TaskChanges]) -> list[Averages]:
    """The papers' averages of every arm of which at least one part was measured."""
    of_arms: dict[str, dict[str, Change]] = {}
    for of_task in changes:
        for change in of_task.changes:
            of_arms.setdefault(change.label, {})[of_task.task.name] = change
    found = []
    for label, of_arm in of_arms.items():
        averages = paper_averages(
            {task: change.base for task, change in of_arm.items()},
            {task: change.score for task, change in of_arm.items()},
            {task: change.interval for task, change in of_arm.items()},
        )
        if averages:
            found.append(Averages(label, averages))
    return found
