"""The learning rates tried and which stands for an arm, from the rows of results.csv alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forgetless.reports.arms import chosen
from forgetless.reports.durations import arm_of_row
from forgetless.reports.evidence import Row, Task, number, tasks_of
from forgetless.scores.seeds import Estimate, over_seeds

__all__ = ["Rate", "chosen_rates", "tried"]


@dataclass(frozen=True)
class Rate:
    """One arm at one learning rate.

    Attributes:
        scores: after training, by task; without what was not measured.
        is_chosen: whether the arm stands at this rate.
    """

    arm: str
    learning_rate: float
    scores: Mapping[str, Estimate]
    is_chosen: bool


def chosen_rates(rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate that stands for each arm, for a second study that has only these.

    Of the rates whose 95 % interval on the first learning task overlaps that of the rate that
    learned most, it is the one that kept most of the first forgetting task: the rule by which the
    report places an arm. Intervals are over the seeds, and over the questions where there is one.
    The second study needs other seeds, since the scores that chose a rate flatter it.

    Args:
        rows: of `store.results`, or of a results.csv read by `evidence.read_csv`.

    Returns:
        Rate by arm, in the order of the rows; without arms that have no finished run.
    """
    return {rate.arm: rate.learning_rate for rate in tried(rows) if rate.is_chosen}


def tried(rows: Sequence[Row]) -> list[Rate]:
    """Every arm at every rate of its finished runs, by rising rate; see `chosen_rates`."""
    done = [row for row in rows if row["status"] == "done" and row["task"]]
    tasks = tasks_of(done)
    learning = next((task for task in tasks if task.kind == "learning"), None)
    forgetting = next((task for task in tasks if task.kind == "forgetting"), None)
    by_arm: dict[str, dict[float, list[Row]]] = {}
    for row in done:
        rate = number(row["learning_rate"])
        if rate is not None:
            by_arm.setdefault(arm_of_row(row), {}).setdefault(rate, []).append(row)
    found = []
    for arm, at in by_arm.items():
        pairs = [(_final(at[rate], learning), _kept(at[rate], forgetting)) for rate in sorted(at)]
        best = chosen(pairs, learning, forgetting)
        for place, rate in enumerate(sorted(at)):
            finals = {task.name: _final(at[rate], task) for task in tasks}
            scores = {name: estimate for name, estimate in finals.items() if estimate}
            found.append(Rate(arm, rate, scores, place == best))
    return found


def _final(rows: Sequence[Row], task: Task | None) -> Estimate | None:
    return _mean(rows, task, "score")


def _kept(rows: Sequence[Row], task: Task | None) -> Estimate | None:
    return _mean(rows, task, "retention" if task and task.is_share else "score")


def _mean(rows: Sequence[Row], task: Task | None, column: str) -> Estimate | None:
    known = [row for row in rows if task and row["task"] == task.name]
    known = [row for row in known if number(row[column]) is not None]
    if task is None or not known:
        return None
    errors = [number(row["stderr"]) for row in known]
    sizes = [int(size) for row in known if (size := number(row["n"])) is not None]
    values = [float(row[column]) for row in known]
    return over_seeds(values, errors, min(sizes, default=None), is_share=task.is_share)
