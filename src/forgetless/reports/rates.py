"""The learning rates tried and which stands for an arm, from the rows of results.csv alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from forgetless.reports.arms import signed
from forgetless.reports.durations import arm_of_row, result_of_row
from forgetless.reports.evidence import Row, Task, number, tasks_of
from forgetless.scores.seeds import Estimate, Sample, choose, estimate

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

    It is found by the rule by which the report places an arm, `seeds.choose`, from the means over
    the seeds. The second study needs other seeds, since the scores that chose a rate flatter it.

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
        rates = sorted(at)
        of_arm = [row for rate in rates for row in at[rate]]
        kept = "retention" if forgetting and forgetting.is_share else "score"
        best = choose(
            [signed(learning, _mean(at[rate], learning, "score")) for rate in rates],
            [signed(forgetting, _mean(at[rate], forgetting, kept)) for rate in rates],
            signed(learning, _mean(of_arm, learning, "base_score")),
        )
        for place, rate in enumerate(rates):
            scores = {task.name: _estimate(at[rate], task) for task in tasks}
            known = {name: score for name, score in scores.items() if score}
            found.append(Rate(arm, rate, known, place == best))
    return found


def _mean(rows: Sequence[Row], task: Task | None, column: str) -> float | None:
    values = [number(row[column]) for row in rows if task and row["task"] == task.name]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _estimate(rows: Sequence[Row], task: Task) -> Estimate | None:
    of_task = [row for row in rows if row["task"] == task.name]
    found = {i: result for i, row in enumerate(of_task) if (result := result_of_row(row))}
    return estimate(Sample.of(found, is_share=task.is_share)) if found else None
