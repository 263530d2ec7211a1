"""Runs grouped into arms: one arm is one recipe, whatever its seed and learning rate."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from forgetless.reports.compared import result_of
from forgetless.reports.evidence import Evidence, Run, Task, number
from forgetless.scores.files import PHASES, Phase
from forgetless.scores.seeds import Estimate, Sample, choose, estimate, retention
from forgetless.tasks.base import TaskResult

# The seed and the learning rate are the points of an arm; the rest does not decide the weights.
NOT_THE_ARM = (
    *("seed", "training.learning_rate", "name", "tasks.", "export."),
    *("training.checkpoint_every", "training.log_every", "training.report_to"),
    "training.measure_at",
)


@dataclass(frozen=True)
class Measured:
    """One task of one setting: the base, the start of training, the end, and the share kept.

    Attributes:
        samples: the scores of which these are estimates, by phase; without what was not measured.
    """

    base: Estimate | None = None
    step0: Estimate | None = None
    final: Estimate | None = None
    retention: Estimate | None = None
    samples: Mapping[Phase, Sample] = field(default_factory=dict)


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
        best: the setting at which it stands, see `seeds.choose`.
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


def signed(task: Task | None, value: float | None) -> float | None:
    """The value such that larger is better; None where it was not measured."""
    if task is None or value is None:
        return None
    return value if task.higher_is_better else -value


def value_of(estimate: Estimate | None) -> float | None:
    """The value; None where it was not measured."""
    return None if estimate is None else estimate.value


def is_of_arm(key: str) -> bool:
    """Whether a setting of the recipe tells one arm from another."""
    return not any(
        key == free or (free[-1] == "." and key.startswith(free)) for free in NOT_THE_ARM
    )


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
    bases = [setting.measured[learning.name].base for setting in settings] if learning else []
    best = choose(
        [signed(learning, value_of(setting.final(learning))) for setting in settings],
        [signed(forgetting, value_of(setting.kept(forgetting))) for setting in settings],
        signed(learning, next((base.value for base in bases if base), None)),
    )
    return Arm(label, settings, settings[best])


def _setting(rate: float | None, runs: Sequence[Run], tasks: Sequence[Task]) -> Setting:
    ordered = tuple(sorted(runs, key=lambda run: int(run.settings.get("seed") or 0)))
    return Setting(rate, ordered, {task.name: _measure(ordered, task) for task in tasks})


def _measure(runs: Sequence[Run], task: Task) -> Measured:
    """Only what is there is averaged: a run without this task leaves the mean to the others."""
    samples = {phase: sample for phase in PHASES if (sample := _sample(runs, task, phase))}
    base, step0, final = (samples.get(phase) for phase in PHASES)
    return Measured(
        estimate(base) if base else None,
        estimate(step0) if step0 else None,
        estimate(final) if final else None,
        retention(final, base) if final and base else None,
        samples,
    )


def _sample(runs: Sequence[Run], task: Task, phase: Phase) -> Sample | None:
    """The scores by seed; a score before training that every seed repeats is one measurement."""
    results: dict[Hashable, TaskResult] = {}
    for run in runs:
        if result := result_of(run, phase, task.name):
            seed = run.settings.get("seed")
            results[seed, sum(known[0] == seed for known in results)] = result  # type: ignore[index]
    if phase != "final" and len({result.value for result in results.values()}) == 1:
        results = dict([next(iter(results.items()))])
    return Sample.of(results, is_share=task.is_share) if results else None
