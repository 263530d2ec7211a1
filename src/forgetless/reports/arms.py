"""Runs grouped into arms: one arm is one recipe, whatever its seed and learning rate."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from forgetless.reports.evidence import (
    Evidence,
    Row,
    RunFiles,
    TaskInfo,
    number,
    result_of_row,
    tasks_of,
)
from forgetless.scores.files import PHASES, Phase
from forgetless.scores.seeds import Estimate, Sample, choose, estimate, retention
from forgetless.tasks.base import TaskResult

# The seed and the learning rate are the points of an arm; the rest does not decide the weights.
NOT_THE_ARM = (
    *("seed", "training.learning_rate", "name", "tasks.", "export."),
    *("training.checkpoint_every", "training.log_every", "training.report_to"),
    *("training.measure_at", "repair", "repair.", "dial", "dial.", "residual", "spectra"),
    "comparators",
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
    runs: tuple[RunFiles, ...]
    measured: Mapping[str, Measured]

    def final(self, task: TaskInfo | None) -> Estimate | None:
        """The score after training; None where it was not measured."""
        return self.measured[task.name].final if task else None

    def kept(self, task: TaskInfo | None) -> Estimate | None:
        """The place on the forgetting axis: retention of a share, else the score."""
        if task is None:
            return None
        measured = self.measured[task.name]
        return measured.retention if task.is_share else measured.final

    def place(
        self, learning: TaskInfo | None, forgetting: TaskInfo | None
    ) -> tuple[float | None, float | None]:
        """(learned, kept) such that larger is better; None for what was not measured."""
        learned = _signed(learning, self.final(learning))
        return learned, _signed(forgetting, self.kept(forgetting))

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
    groups: dict[str, list[RunFiles]] = {}
    for run in evidence.with_status("done"):
        # What a study calls by two names are two arms, also where only the rate differs.
        own = f"{_given_name(run)} " if evidence.study_text else ""
        groups.setdefault(own + _identity(run), []).append(run)
    labels, arms = _labels(groups, evidence.name), []
    for key, runs in groups.items():
        by_rate: dict[float | None, list[RunFiles]] = {}
        for run in sorted(runs, key=lambda run: int(run.settings.get("seed") or 0)):
            by_rate.setdefault(number(run.settings.get("training.learning_rate")), []).append(run)
        settings = [_setting(rate, own, evidence.tasks) for rate, own in by_rate.items()]
        arms.append(_arm(labels[key], settings, evidence.tasks))
    return arms


def gather_rows(rows: Sequence[Row]) -> list[Arm]:
    """As `gather`, of the rows of a results.csv alone, see `evidence.read_csv`."""
    done = [row for row in rows if row["status"] == "done" and row["task"]]
    tasks = tasks_of(done)
    by_arm: dict[str, dict[float, list[Row]]] = {}
    for row in done:
        if rate := number(row["learning_rate"]):
            by_arm.setdefault(arm_of_row(row), {}).setdefault(rate, []).append(row)
    columns: Mapping[Phase, str] = {"base": "base_score", "final": "score"}
    arms = []
    for label, by_rate in by_arm.items():
        settings = []
        for rate, own in by_rate.items():
            measured = {}
            for task in tasks:
                of_task = [row for row in own if row["task"] == task.name]
                results = {phase: dict(enumerate(result_of_row(row, column) for row in of_task))
                           for phase, column in columns.items()}  # fmt: skip
                measured[task.name] = _measured(results, task)
            settings.append(Setting(rate, (), measured))
        arms.append(_arm(label, settings, tasks))
    return arms


def _setting(rate: float | None, runs: Sequence[RunFiles], tasks: Sequence[TaskInfo]) -> Setting:
    seeds = [run.settings.get("seed") for run in runs]
    keys = [(seed, seeds[:i].count(seed)) for i, seed in enumerate(seeds)]
    measured = {}
    for task in tasks:
        results = {
            phase: {key: run.result(phase, task.name) for key, run in zip(keys, runs, strict=True)}
            for phase in PHASES
        }
        measured[task.name] = _measured(results, task)
    return Setting(rate, tuple(runs), measured)


def _measured(results: Mapping[Phase, Mapping[Any, TaskResult | None]], task: TaskInfo) -> Measured:
    """Only what is there is averaged: a run without this task leaves the mean to the others."""
    samples = {}
    for phase, by_seed in results.items():
        known = {seed: result for seed, result in by_seed.items() if result}
        # A score before training that every seed repeats is one measurement.
        if phase != "final" and len({result.value for result in known.values()}) == 1:
            known = dict([next(iter(known.items()))])
        if known:
            samples[phase] = Sample.of(known, is_share=task.is_share)
    found = {phase: estimate(sample) for phase, sample in samples.items()}
    both = "base" in samples and "final" in samples
    kept = retention(samples["final"], samples["base"]) if both else None
    return Measured(found.get("base"), found.get("step0"), found.get("final"), kept, samples)


def _arm(label: str, settings: Sequence[Setting], tasks: Sequence[TaskInfo]) -> Arm:
    """The arm, standing at the rate that `seeds.choose` takes by the first task of either kind."""
    settings = sorted(settings, key=lambda s: (s.learning_rate is None, s.learning_rate or 0.0))
    learning, forgetting = (next((task for task in tasks if task.kind == kind), None)
                            for kind in ("learning", "forgetting"))  # fmt: skip
    places = [setting.place(learning, forgetting) for setting in settings]
    bases = [setting.measured[learning.name].base for setting in settings] if learning else []
    base = _signed(learning, next((base for base in bases if base), None))
    best = choose([learned for learned, _ in places], [kept for _, kept in places], base)
    return Arm(label, tuple(settings), settings[best])


def _signed(task: TaskInfo | None, found: Estimate | None) -> float | None:
    """The value such that larger is better; None where it was not measured."""
    if task is None or found is None:
        return None
    return found.value if task.higher_is_better else -found.value


# ------------------------------------------------------------------------------------------ names


def arm_of_row(row: Row) -> str:
    """The arm of a row of results.csv or curve.csv, without its learning rate."""
    return _without_rate(str(row.get("arm") or "")) or str(row.get("method"))


def _given_name(run: RunFiles) -> str:
    """The name that the study gave, without the learning rate."""
    return _without_rate(str(run.recipe.get("name") or ""))


def _without_rate(name: str) -> str:
    return " ".join(word for word in name.split() if not word.startswith("learning_rate="))


def _identity(run: RunFiles) -> str:
    if run.record.get("evaluation"):  # of an adapter whose training is not known
        return run.run_id
    return json.dumps(
        {key: run.settings[key] for key in _deciding(run)}, sort_keys=True, default=str
    )


def _deciding(run: RunFiles) -> list[str]:
    """The settings that tell a run's arm from others; probes only where a budget goes by them."""
    limits = (run.settings.get(f"probes.{limit}") for limit in ("max_kl", "max_drop"))
    has_budget = any(limit is not None for limit in limits)
    free = NOT_THE_ARM if has_budget else (*NOT_THE_ARM, "probes.")
    return [
        key
        for key in run.settings
        if not any(key == f or (f[-1] == "." and key.startswith(f)) for f in free)
    ]


def _labels(groups: Mapping[str, Sequence[RunFiles]], study: str) -> dict[str, str]:
    """One label an arm: the study's own names where they fit, else the method and what differs."""
    named = {key: {_given_name(run) for run in runs} for key, runs in groups.items()}
    names = [name for given in named.values() for name in given]
    if len(set(names)) == len(groups) == len(names) and not {"", study} & set(names):
        labels = {key: given.pop() for key, given in named.items()}
    else:
        firsts = [runs[0] for runs in groups.values()]
        labels = {key: _described(runs[0], firsts) for key, runs in groups.items()}
        arms_of = Counter(labels.values())
        for key, label in labels.items():
            if arms_of[label] > 1:
                labels[key] = ": ".join([*sorted(filter(None, named[key])), label])
    # Labels stand between backticks in one line of text.
    return {key: " ".join(label.replace("`", "'").split()) for key, label in labels.items()}


def _described(run: RunFiles, firsts: Iterable[RunFiles]) -> str:
    method = run.settings.get("adapter.method")
    rivals = [r for r in firsts if r is not run and r.settings.get("adapter.method") == method]
    parts = [str(method)]
    for key in dict.fromkeys(key for other in (run, *rivals) for key in _deciding(other)):
        own = run.settings.get(key)
        if any(rival.settings.get(key) != own for rival in rivals):
            shown = f"{own:g}" if isinstance(own, float) else "none" if own is None else str(own)
            shown = "+".join(map(str, own)) if isinstance(own, list) else shown
            parts.append(f"{key.rpartition('.')[2].replace('_', ' ')} {shown}")
    return ", ".join(parts)
