"""What changed item by item: answers that an arm lost, gained and kept, against the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from forgetless.reports.arms import Arm
from forgetless.reports.evidence import Evidence, Run, Task
from forgetless.scores.showing import question

# What the page holds; the rest stays in the items folder of the runs.
MAX_TEXT = 320
MAX_LISTED = {"forgetting": 1500, "learning": 60}
MAX_KEPT = 150

Answers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Flip:
    """One item that changed sides.

    Attributes:
        item: the id of the question.
        answer: what the arm says now, in the first of its seeds in which the item changed.
        seeds: in how many of the arm's seeds it changed.
    """

    item: str
    answer: str
    seeds: int


@dataclass(frozen=True)
class ArmFlips:
    """The items of one arm; counts are means over its seeds."""

    label: str
    seeds: int
    kept: float
    lost: float
    gained: float
    never: float
    lost_items: tuple[Flip, ...]
    gained_items: tuple[Flip, ...]
    kept_items: tuple[str, ...]


@dataclass(frozen=True)
class TaskFlips:
    """One task with right and wrong answers: its questions by id, and the flips of every arm."""

    task: Task
    questions: Mapping[str, tuple[str, str]]
    arms: tuple[ArmFlips, ...]


def find(evidence: Evidence, arms: Sequence[Arm]) -> list[TaskFlips]:
    """The flips of every task whose items are right or wrong, each arm at its best setting."""
    found = []
    for task in filter(lambda task: task.higher_is_better, evidence.tasks):
        questions: dict[str, tuple[str, str]] = {}
        of_arms = tuple(f for arm in arms if (f := _of_arm(arm, task.name, questions)) is not None)
        if of_arms:
            found.append(TaskFlips(task, questions, of_arms))
    return found


def _of_arm(arm: Arm, task: str, questions: dict[str, tuple[str, str]]) -> ArmFlips | None:
    pairs = [pair for run in arm.best.runs if (pair := _answers(run, task)) is not None]
    if not pairs:
        return None
    for base, _ in pairs:
        for item, record in base.items():
            asked = _text(question(str(record.get("prompt") or "")))
            questions.setdefault(item, (asked, _text(record.get("expected"))))
    lost = [_changed(base, final, was_right=True) for base, final in pairs]
    gained = [_changed(base, final, was_right=False) for base, final in pairs]
    known = [[item for item in base if _is_right(base[item])] for base, _ in pairs]
    sizes = [(len(base), len(right)) for (base, _), right in zip(pairs, known, strict=True)]
    ever_lost = {item for changed in lost for item in changed}
    return ArmFlips(
        label=arm.label,
        seeds=len(pairs),
        kept=fmean(right - len(gone) for (_, right), gone in zip(sizes, lost, strict=True)),
        lost=fmean(len(changed) for changed in lost),
        gained=fmean(len(changed) for changed in gained),
        never=fmean(
            size - right - len(new) for (size, right), new in zip(sizes, gained, strict=True)
        ),
        lost_items=_merged(lost),
        gained_items=_merged(gained),
        kept_items=tuple(item for item in known[0] if item not in ever_lost),
    )


def _answers(run: Run, task: str) -> tuple[Answers, Answers] | None:
    """The answers before and after, of the items asked both times; None unless right or wrong."""
    base, final = (_by_id(run.items(phase, task)) for phase in ("base", "final"))
    both = [item for item in base if item in final]
    scores = {record.get("score") for item in both for record in (base[item], final[item])}
    if not both or not scores <= {0, 1}:
        return None
    return {item: base[item] for item in both}, {item: final[item] for item in both}


def _by_id(items: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {str(item.get("id", place)): item for place, item in enumerate(items)}


def _is_right(record: Mapping[str, Any]) -> bool:
    return bool(record.get("score") == 1)


def _changed(base: Answers, final: Answers, *, was_right: bool) -> dict[str, str]:
    """The answer after training to each item that was right (or wrong) and is not any more."""
    return {
        item: _text(final[item].get("answer"))
        for item in base
        if _is_right(base[item]) == was_right and _is_right(final[item]) != was_right
    }


def _merged(seeds: Sequence[Mapping[str, str]]) -> tuple[Flip, ...]:
    """One flip an item, those that changed in most seeds first."""
    answers: dict[str, str] = {}
    counts: dict[str, int] = {}
    for changed in seeds:
        for item, answer in changed.items():
            answers.setdefault(item, answer)
            counts[item] = counts.get(item, 0) + 1
    order = sorted(answers, key=lambda item: -counts[item])
    return tuple(Flip(item, answers[item], counts[item]) for item in order)


def _text(value: Any) -> str:
    """Any answer as text of a length that can be read."""
    if isinstance(value, list):
        value = " / ".join(str(part) for part in value)
    text = "" if value is None else str(value).strip()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
