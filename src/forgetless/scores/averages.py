"""The papers' averages over tasks, under their own names. No torch.

A number that was not measured is never averaged: an average of which a part is missing is nan and
names that part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from forgetless.core.metrics import Interval, retention

Pair = tuple[float, float]  # the base's score, and the other's

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
        base: of the base model; nan when a task is missing.
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
    found = [
        _average("Biderman mean", _COMMONSENSE, known, _means, given),
        _average("LoRA-Null Avg1", _WORLD, known, _means, given),
        _average("LoRA-Null Avg1(Per)", _WORLD, known, _kept),
    ]
    for skill, parts in _SKILLS.items():
        own = tuple(next((n for n in (task, *_ALSO.get(task, ())) if n in known), task)
                    for task in parts)  # fmt: skip
        found.append(_average(f"LoRA-Null Avg2 ({skill})", own, known, _means, given))
        if known.keys() & {*_WORLD} and known.keys() & {*own}:
            found.append(_average(f"LoRA-Null GM ({skill})", (*_WORLD, *own), known, _geometric))
    return tuple(average for average in found if len(average.missing) < len(average.tasks))


def _average(
    name: str,
    tasks: tuple[str, ...],
    known: Mapping[str, Pair],
    over: Callable[[Sequence[Pair]], Pair],
    intervals: Mapping[str, Interval] | None = None,
) -> PaperAverage:
    """Unknown where a task is missing; with an interval where `over` is a mean and all have one."""
    missing = tuple(task for task in tasks if task not in known)
    if missing:
        return PaperAverage(name, tasks, math.nan, math.nan, missing=missing)
    base, score = over([known[task] for task in tasks])
    ends = _UNKNOWN
    if intervals and all(task in intervals for task in tasks):
        below, above = (
            math.hypot(*(known[t][1] - known[t][0] - intervals[t][i] for t in tasks)) / len(tasks)
            for i in (0, 1)
        )
        # Independent errors add in squares, on each side apart (Zou and Donner 2008).
        ends = Interval(score - base - below, score - base + above)
    return PaperAverage(name, tasks, base, score, ends)


def _means(pairs: Sequence[Pair]) -> Pair:
    return fmean(before for before, _ in pairs), fmean(after for _, after in pairs)


def _kept(pairs: Sequence[Pair]) -> Pair:
    kept = fmean(retention(after, before) for before, after in pairs)
    return math.nan if math.isnan(kept) else 1.0, kept


def _geometric(pairs: Sequence[Pair]) -> Pair:
    world, skill = _means(pairs[: len(_WORLD)]), _means(pairs[len(_WORLD) :])
    return math.sqrt(world[0] * skill[0]), math.sqrt(world[1] * skill[1])
