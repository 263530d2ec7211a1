"""Runs grouped into arms: one arm is one recipe, whatever its seed and learning rate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from forgetless.core import metrics
from forgetless.reports.compared import as_compared
from forgetless.reports.evidence import Evidence, Run, Task, number
from forgetless.scores.files import Phase
from forgetless.scores.seeds import Estimate, over_seeds

# The seed and the learning rate are the points of an arm; the rest does not decide the weights.
NOT_THE_ARM = (
    *("seed", "training.learning_rate", "name", "tasks.", "export."),
    *("training.checkpoint_every", "training.log_every", "training.report_to"),
    "training.measure_at",
)


@dataclass(frozen=True)
class Measured:
    """One task of one setting: the base, the start of training, the end, and the share kept."""

    base: Estimate | None = None
    step0: Estimate | None = None
    final: Estimate | None = None
    retention: Estimate | None = None


@dataclass(frozen=True)
class Setting:
    """One arm at one learning rate: its finished runs, one a seed."""

    learning_rate: float | None
    runs: tuple[Run, ...]
    measured: Mapping[str, Measured]

    def final(self, task: Task | None) -> Estimate | None:
        """The score after training; None where it was not measured."""
        return self.measured[task.name].final if task else None

    def kept(self, task: Task | None) -> Estimate | None:
        """The place on the forgetting axis: retention of a share, else the score."""
        if task is None:
            return None
        measured = self.measured[task.name]
        return measured.retention if task.is_share else measured.final

    def mean_of(self, column: str) -> float | None:
        """The mean over the runs of a number that is the same for every task."""
        values = [value for run in self.runs if (value := number(run.column(column))) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Arm:
    """Settings that differ in nothing but the learning rate.

    Attributes:
        label: the method, followed by what tells this arm from others of the same method.
        settings: by rising learning rate.
        best: of the settings whose interval on the first learning task overlaps that of the best
            one, the one that kept most. A rate that learns a hair more and forgets everything is
            no way to use a method.
    """

    label: str
    settings: tuple[Setting, ...]
    best: Setting


def gather(evidence: Evidence) -> list[Arm]:
    """The arms with at least one finished run, in the order of the study."""
    groups: dict[str, list[Run]] = {}
    for run in evidence.with_status("done"):
        # What a study calls by two names are two arms, also where only the rate differs.
        own = f"{_given_name(run)} " if evidence.study_text else ""
        groups.setdefault(own + _identity(run), []).append(run)
    labels = _labels(groups, evidence.name)
    return [_arm(labels[key], runs, evidence) for key, runs in groups.items()]


def clearly_better(task: Task, one: Estimate, other: Estimate) -> bool:
    """Whether `one` is better and the two intervals do not overlap."""
    return _signed(task, one) > _signed(task, other) and not one.overlaps(other)


def best_of(task: Task, estimates: Sequence[Estimate]) -> int:
    """The position of the best value; the first of equals."""
    return max(range(len(estimates)), key=lambda i: _signed(task, estimates[i]))


def pareto(points: Sequence[tuple[Estimate, Estimate]], kept: Task, learned: Task) -> list[int]:
    """Positions of the (kept, learned) points that no other beats, by rising share kept."""
    return metrics.pareto_front((_signed(kept, x), _signed(learned, y)) for x, y in points)


def chosen(
    pairs: Sequence[tuple[Estimate | None, Estimate | None]],
    learning: Task | None,
    forgetting: Task | None,
) -> int:
    """The position of the (learned, kept) pair, one a learning rate, at which an arm stands.

    Of the rates whose 95 % interval on learning overlaps that of the rate that learned most, the
    one that kept most; of equals the one that learned more.
    """

    def signed(task: Task | None, estimate: Estimate | None) -> float:
        return _signed(task, estimate) if task and estimate else float("-inf")

    def is_level(learned: Estimate | None) -> bool:
        if learning is None or learned is None or top is None:
            return learned is top
        same = learned.value == top.value
        return same or (learned.has_error and top.has_error and learned.overlaps(top))

    first = max(range(len(pairs)), key=lambda i: signed(learning, pairs[i][0]))
    top = pairs[first][0]
    level = [i for i in range(len(pairs)) if i == first or is_level(pairs[i][0])]
    return max(
        level, key=lambda i: (signed(forgetting, pairs[i][1]), signed(learning, pairs[i][0]))
    )


def is_of_arm(key: str) -> bool:
    """Whether a setting of the recipe tells one arm from another."""
    return not any(
        key == free or (free[-1] == "." and key.startswith(free)) for free in NOT_THE_ARM
    )


def _signed(task: Task, estimate: Estimate) -> float:
    return estimate.value if task.higher_is_better else -estimate.value


def _identity(run: Run) -> str:
    if run.record.get("evaluation"):  # of an adapter whose training is not known
        return run.run_id
    kept = {key: run.settings[key] for key in _deciding(run)}
    return json.dumps(kept, sort_keys=True, default=str)


def _deciding(run: Run) -> list[str]:
    """The settings that tell a run's arm from others; probes only where a budget goes by them."""
    limits = (run.settings.get(f"probes.{limit}") for limit in ("max_kl", "max_drop"))
    has_budget = any(limit is not None for limit in limits)
    own = [key for key in run.settings if is_of_arm(key)]
    return own if has_budget else [key for key in own if not key.startswith("probes.")]


def _labels(groups: Mapping[str, Sequence[Run]], study: str) -> dict[str, str]:
    """One label an arm: the study's own names where they fit, else the method and what differs."""
    named = {key: {_given_name(run) for run in runs} for key, runs in groups.items()}
    names = [name for given in named.values() for name in given]
    if len(set(names)) == len(groups) == len(names) and not {"", study} & set(names):
        return {key: _plain(given.pop()) for key, given in named.items()}
    firsts = [runs[0] for runs in groups.values()]
    return {key: _plain(_described(runs[0], firsts)) for key, runs in groups.items()}


def _given_name(run: Run) -> str:
    """The name that the study gave, without the learning rate."""
    return without_rate(str(run.recipe.get("name") or ""))


def without_rate(name: str) -> str:
    """An arm's name in a study without its learning rate, which does not make another arm."""
    return " ".join(word for word in name.split() if not word.startswith("learning_rate="))


def _described(run: Run, firsts: Iterable[Run]) -> str:
    method = run.settings.get("adapter.method")
    rivals = [r for r in firsts if r is not run and r.settings.get("adapter.method") == method]
    keys = dict.fromkeys(key for other in (run, *rivals) for key in _deciding(other))
    parts = [str(method)]
    for key in keys:
        own = run.settings.get(key)
        if any(rival.settings.get(key) != own for rival in rivals):
            parts.append(f"{key.rpartition('.')[2].replace('_', ' ')} {_short(own)}")
    return ", ".join(parts)


def _plain(label: str) -> str:
    """A label that can stand between backticks in one line of text."""
    return " ".join(label.replace("`", "'").split())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(str(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _arm(label: str, runs: Sequence[Run], evidence: Evidence) -> Arm:
    by_rate: dict[float | None, list[Run]] = {}
    for run in runs:
        by_rate.setdefault(number(run.settings.get("training.learning_rate")), []).append(run)
    rates = sorted(by_rate, key=lambda rate: (rate is None, rate or 0.0))
    settings = tuple(_setting(rate, by_rate[rate], evidence.tasks) for rate in rates)
    learning, forgetting = evidence.first("learning"), evidence.first("forgetting")
    pairs = [(setting.final(learning), setting.kept(forgetting)) for setting in settings]
    return Arm(label, settings, settings[chosen(pairs, learning, forgetting)])


def _setting(rate: float | None, runs: Sequence[Run], tasks: Sequence[Task]) -> Setting:
    ordered = tuple(sorted(runs, key=lambda run: int(run.settings.get("seed") or 0)))
    return Setting(rate, ordered, {task.name: _measure(ordered, task) for task in tasks})


def _measure(runs: Sequence[Run], task: Task) -> Measured:
    """Only what is there is averaged: a run without this task leaves the mean to the others."""
    having = [run for run in runs if task.name in run.rows]
    final = _estimate(having, task, "final")
    before = [_once(_estimate(having, task, phase)) for phase in ("base", "step0")]
    return Measured(before[0], before[1], final, _retention(having, final, task))


_COLUMN: dict[Phase, str] = {"base": "base_score", "step0": "step0_score", "final": "score"}


def _estimate(runs: Sequence[Run], task: Task, phase: Phase) -> Estimate | None:
    values, errors, sizes = [], [], []
    for run in runs:
        value = number(run.rows[task.name].get(_COLUMN[phase]))
        if value is None:
            continue
        score = run.score(phase, task.name)
        values.append(value)
        errors.append(number(score.get("stderr")))
        sizes.append(number(score.get("n")))
    if not values:
        return None
    known = [int(size) for size in sizes if size is not None]
    found = over_seeds(values, errors, min(known, default=None), is_share=task.is_share)
    return found if phase == "base" else as_compared(found, task, runs, phase)


def _once(estimate: Estimate | None) -> Estimate | None:
    """A score before training that every seed repeats is one measurement, not several."""
    if estimate is None or not estimate.seeds_agree:
        return estimate
    return Estimate(estimate.value, estimate.low, estimate.high, 1, estimate.num_items)


def _retention(runs: Sequence[Run], final: Estimate | None, task: Task) -> Estimate | None:
    """The mean share kept; of seeds that agree, the interval of the score, as a share."""
    rows = [run.rows[task.name] for run in runs]
    pairs = [(number(row.get("retention")), number(row.get("base_score"))) for row in rows]
    values = [kept for kept, _ in pairs if kept is not None]
    base = next((base for _, base in pairs if base), None)
    if not values or final is None or base is None:
        return None
    estimate = over_seeds(values, [None], final.num_items, is_share=True)
    if not estimate.seeds_agree:
        return estimate
    ends = [metrics.retention(max(end, 0.0), base, task.higher_is_better) for end in final.ends]
    low, high = min(*ends, estimate.value), max(*ends, estimate.value)
    return Estimate(estimate.value, low, high, len(values), final.num_items)
