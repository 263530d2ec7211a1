"""The papers' averages over tasks, under their own names. No torch.

A number that was not measured is never averaged: an average of which a part is missing is nan and
names that part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from forgetless.core.metrics import Interval, retention

__all__ = ["PaperAverage", "paper_averages"]

_UNKNOWN = Interval(math.nan, math.nan)

_COMMONSENSE = ("hellaswag", "arc_challenge", "winogrande")
_WORLD = ("triviaqa", "nq_open", "webqs")
_SKILLS = {"math": ("gsm8k", "math"), "code": ("humaneval", "mbpp")}

# Further names under which lm-eval's versions of a task are known.
_ALSO = {"math": ("minerva_math", "hendrycks_math", "minerva_math500", "hendrycks_math500")}


@dataclass(frozen=True)
class PaperAverage:
    """One average of a paper, for the base model and for another.

    Attributes:
        name: the paper's.
        tasks: the tasks that enter.
        base: of the base model; nan when a task is missing.
        score: of the other.
        interval: of the difference, for plain means; nan ends for the others and when a task is
            missing.
        missing: tasks that were not measured.
    """

    name: str
    tasks: tuple[str, ...]
    base: float
    score: float
    interval: Interval = _UNKNOWN
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what was not measured is null."""
        numbers = {
            "base": self.base,
            "score": self.score,
            "low": self.interval.low,
            "high": self.interval.high,
        }
        return {
            "name": self.name,
            "tasks": list(self.tasks),
            **{key: None if math.isnan(value) else value for key, value in numbers.items()},
            "missing": list(self.missing),
        }


def paper_averages(
    base: Mapping[str, float],
    scores: Mapping[str, float],
    intervals: Mapping[str, Interval] | None = None,
) -> tuple[PaperAverage, ...]:
    """Every average of which at least one task was measured.

        Biderman mean        mean of HellaSwag, ARC-Challenge and WinoGrande
        LoRA-Null Avg1       mean of TriviaQA, NQ-open and WebQS
        LoRA-Null Avg1(Per)  mean over these of min(1, score / base); 1 for the base
        LoRA-Null Avg2       mean of GSM8K and MATH, or of HumanEval and MBPP
        LoRA-Null GM         sqrt(Avg1 * Avg2)

    Args:
        base: the base model's score of each task, by lm-eval's names, in 0..1.
        scores: the other model's.
        intervals: of each task's difference; they give the interval of a plain mean's.

    Reference:
        Biderman et al. 2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673; Tang et al.
        2025, "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models",
        arXiv:2503.02659.
    """
    known = {task: (base[task], scores[task]) for task in scores if task in base}
    given = intervals or {}
    avg1 = _mean("LoRA-Null Avg1", _WORLD, known, given)
    found = [_mean("Biderman mean", _COMMONSENSE, known, given), avg1, _kept(avg1, known)]
    for skill, parts in _SKILLS.items():
        avg2 = _mean(f"LoRA-Null Avg2 ({skill})", _named(parts, known), known, given)
        found.append(avg2)
        if len(avg2.missing) < len(avg2.tasks) and len(avg1.missing) < len(avg1.tasks):
            found.append(_geometric(f"LoRA-Null GM ({skill})", avg1, avg2))
    return tuple(average for average in found if len(average.missing) < len(average.tasks))


def _named(tasks: tuple[str, ...], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks under the names under which they were measured."""
    return tuple(
        next((name for name in (task, *_ALSO.get(task, ())) if name in known), task)
        for task in tasks
    )


def _mean(
    name: str,
    tasks: tuple[str, ...],
    known: Mapping[str, tuple[float, float]],
    intervals: Mapping[str, Interval],
) -> PaperAverage:
    missing = tuple(task for task in tasks if task not in known)
    if missing:
        return PaperAverage(name, tasks, math.nan, math.nan, missing=missing)
    base, score = (fmean(known[task][i] for task in tasks) for i in (0, 1))
    ends = _UNKNOWN
    if all(task in intervals for task in tasks):
        below, above = (
            math.hypot(*(known[t][1] - known[t][0] - intervals[t][i] for t in tasks)) / len(tasks)
            for i in (0, 1)
        )
        # Independent errors add in squares, on each side apart (Zou and Donner 2008).
        ends = Interval(score - base - below, score - base + above)
    return PaperAverage(name, tasks, base, score, ends)


def _kept(avg1: PaperAverage, known: Mapping[str, tuple[float, float]]) -> PaperAverage:
    name = "LoRA-Null Avg1(Per)"
    if avg1.missing:
        return PaperAverage(name, avg1.tasks, math.nan, math.nan, missing=avg1.missing)
    kept = fmean(retention(known[task][1], known[task][0]) for task in avg1.tasks)
    return PaperAverage(name, avg1.tasks, math.nan if math.isnan(kept) else 1.0, kept)


def _geometric(name: str, avg1: PaperAverage, avg2: PaperAverage) -> PaperAverage:
    tasks = (*avg1.tasks, *avg2.tasks)
    missing = (*avg1.missing, *avg2.missing)
    if missing:
        return PaperAverage(name, tasks, math.nan, math.nan, missing=missing)
    return PaperAverage(
        name, tasks, math.sqrt(avg1.base * avg2.base), math.sqrt(avg1.score * avg2.score)
    )
