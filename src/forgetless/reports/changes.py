"""Every arm against its base, task by task and item by item; the papers' averages."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from statistics import fmean

from forgetless.core.metrics import Interval
from forgetless.reports.arms import Arm
from forgetless.reports.evidence import Evidence, TaskInfo, number
from forgetless.scores.averages import PaperAverage, paper_averages
from forgetless.scores.comparison import Flip, TaskChange, Verdict, verdict
from forgetless.scores.files import Phase
from forgetless.scores.seeds import Effect, from_base, holm
from forgetless.scores.showing import question

MAX_TEXT = 320
MAX_LISTED = {"forgetting": 1500, "learning": 60, "pictures": 400}
"""Changed items of an arm that the page lists; the rest stays in the items folder of the runs."""

MAX_PICTURES_BYTES = 1_200_000
"""Of all pictures of a page together."""

_PICTURE = re.compile(r"data:image/(png|webp|jpeg);base64,[A-Za-z0-9+/]+=*")
_LISTED: tuple[Flip, ...] = ("lost", "gained")
_TRIES = re.compile(r"pass@\d+|unique_(right|wrong)|distinct_\d+")


@dataclass(frozen=True)
class FlippedItem:
    """One question that changed sides.

    Attributes:
        answer: what the arm says now, in the first of its seeds in which the item changed.
        seeds: in how many of the arm's seeds it changed.
    """

    id: str
    answer: str
    seeds: int


@dataclass(frozen=True)
class ArmChange:
    """One arm on one task, at its best setting, against the base.

    Attributes:
        rows: the comparison of each of its seeds.
        effect: the mean difference over seeds and items.
        chance: p-value that nothing changed, by Holm's method for all tasks of the arm.
        score: after training; the mean over seeds.
    """

    label: str
    rows: tuple[TaskChange, ...]
    effect: Effect
    chance: float
    base: float
    score: float

    @property
    def alone(self) -> TaskChange | None:
        """The comparison, where there is one seed."""
        return self.rows[0] if len(self.rows) == 1 else None

    @property
    def difference(self) -> float:
        """Score less the base's; the mean over seeds."""
        return fmean(row.difference for row in self.rows)

    @property
    def interval(self) -> Interval:
        """Of the difference: over the same items, and the seeds where there are several."""
        return self.alone.interval if self.alone else self.effect.interval()

    @property
    def retention(self) -> float | None:
        """Share of the base's score that is left; None where a ratio means nothing."""
        shares = [row.retention for row in self.rows if not math.isnan(row.retention)]
        return fmean(shares) if shares else None

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the difference."""
        return verdict(self.interval, self.chance, fmean(row.forgetting for row in self.rows))

    def extra(self, name: str) -> float | None:
        """The mean of a further number; None where no seed has it."""
        values = [number((row.extra or {}).get(name)) for row in self.rows]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    @cached_property
    def counted(self) -> list[TaskChange]:
        """The seeds whose items are right or wrong, and so can be lost and gained."""
        return [row for row in self.rows if row.counted]

    def count(self, flip: Flip) -> float | None:
        """How many items were lost, gained, kept or wrong both times; the mean over seeds."""
        return fmean(len(row.flips(flip)) for row in self.counted) if self.counted else None

    def flipped(self, flip: Flip) -> list[FlippedItem]:
        """The items lost or gained, those of most seeds first."""
        changes = [change for row in self.counted for change in row.flips(flip)]
        first = {change.id: change for change in reversed(changes)}
        seeds = Counter(change.id for change in changes).most_common()  # equals in their order
        return [FlippedItem(id, _cut(first[id].after), count) for id, count in seeds]

    @cached_property
    def kept_items(self) -> list[str]:
        """The questions that no seed lost."""
        lost = {item.id for item in self.flipped("lost")}
        return [change.id for change in self.counted[0].flips("kept") if change.id not in lost]


@dataclass(frozen=True)
class TaskChanges:
    """One task: every arm that was measured on it and can be compared."""

    task: TaskInfo
    changes: tuple[ArmChange, ...]

    @cached_property
    def counted(self) -> list[ArmChange]:
        """The arms whose items are right or wrong."""
        return [change for change in self.changes if change.counted]

    @cached_property
    def questions(self) -> dict[str, tuple[str, str]]:
        """Question and right answer by the item's id."""
        asked = {c.id: c for arm in self.counted for row in arm.counted for c in row.changes}
        return {id: (_cut(question(c.prompt)), _cut(c.expected)) for id, c in asked.items()}

    @cached_property
    def pictures(self) -> dict[str, str]:
        """By the item's id, the image that was asked about, as a data URI."""
        changes = (c for arm in self.counted for row in arm.counted for c in row.changes)
        return {c.id: c.picture for c in changes if _PICTURE.fullmatch(c.picture)}

    @property
    def most_listed(self) -> int:
        """How many changed items of an arm the page lists."""
        most = MAX_LISTED[self.task.kind]
        return min(most, MAX_LISTED["pictures"]) if self.pictures else most


def find_changes(evidence: Evidence, arms: Sequence[Arm]) -> list[TaskChanges]:
    """What every arm changed, in the order of the tasks; only what was measured both times."""
    of_arms = [_changes(arm, evidence.tasks) for arm in arms]
    return [
        TaskChanges(task, changes)
        for task in evidence.tasks
        if (changes := tuple(found[task.name] for found in of_arms if task.name in found))
    ]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a page, each once, whichever arms lost or gained its item.

    Attributes:
        sources: data URIs.
        places: of them, by task and item.
    """

    sources: tuple[str, ...]
    places: Mapping[tuple[str, str], int]


def find_pictures(changes: Sequence[TaskChanges]) -> Pictures:
    """Pictures of what the page lists, first those at the heads of the lists, up to a bound."""
    lists = [
        [(of_task, item.id) for item in change.flipped(flip)[: of_task.most_listed]]
        for of_task in changes
        if of_task.pictures
        for change in of_task.counted
        for flip in _LISTED
    ]
    places: dict[tuple[str, str], int] = {}
    sources: list[str] = []
    left = MAX_PICTURES_BYTES
    for of_task, item in filter(None, chain.from_iterable(zip_longest(*lists))):
        key, source = (of_task.task.name, item), of_task.pictures.get(item, "")
        if source and key not in places and len(source) <= left:
            places[key] = len(sources)
            sources.append(source)
            left -= len(source)
    return Pictures(tuple(sources), places)


def _changes(arm: Arm, tasks: Sequence[TaskInfo]) -> dict[str, ArmChange]:
    """What an arm changed, by task."""
    found = {}
    for task in tasks:
        compared = (run.compared(task.name) for run in arm.best.runs)
        rows = tuple(row for row in compared if row is not None)
        samples = arm.best.measured[task.name].samples
        # A run that is being measured may have a score by now that it had not when arms were read.
        if rows and {"base", "final"} <= samples.keys():
            effect = from_base(samples["final"], samples["base"])
            # One seed has the test that goes with its interval.
            chance = rows[0].chance if len(rows) == 1 else effect.p_value
            base, score = fmean(row.base for row in rows), fmean(row.score for row in rows)
            found[task.name] = ArmChange(arm.label, rows, effect, chance, base, score)
    chances = holm(change.chance for change in found.values())
    pairs = zip(found.items(), chances, strict=True)
    return {name: replace(change, chance=chance) for (name, change), chance in pairs}


def find_averages(changes: Sequence[TaskChanges]) -> dict[str, tuple[PaperAverage, ...]]:
    """The papers' averages of every arm of which at least one part was measured."""
    of_arms: dict[str, dict[str, ArmChange]] = {}
    for of_task in changes:
        for change in of_task.changes:
            of_arms.setdefault(change.label, {})[of_task.task.name] = change
    found = {
        label: paper_averages(
            {task: change.base for task, change in of_arm.items()},
            {task: change.score for task, change in of_arm.items()},
            {task: change.interval for task, change in of_arm.items()},
        )
        for label, of_arm in of_arms.items()
    }
    return {label: averages for label, averages in found.items() if averages}


Tries = tuple[TaskInfo, list[str], dict[str, float], dict[str, dict[str, float]]]
"""A task with the names of its further numbers, the base's, and every arm's."""


def find_tries(tasks: Sequence[TaskInfo], arms: Sequence[Arm]) -> list[Tries]:
    """What several answers to each question gave, of the tasks that asked for several."""
    found = []
    for task in tasks:
        rows = {arm.label: tried for arm in arms if (tried := _tries(arm, "final", task))}
        base = next((tried for arm in arms if (tried := _tries(arm, "base", task))), {})
        if rows:
            names = sorted({name for row in rows.values() for name in row}, key=_natural)
            found.append((task, names, base, rows))
    return found


def _tries(arm: Arm, phase: Phase, task: TaskInfo) -> dict[str, float]:
    """The further numbers of the arm's first run that are about several answers."""
    extra = arm.best.runs[0].score(phase, task.name).get("extra") or {}
    known = {name: number(value) for name, value in extra.items() if _TRIES.fullmatch(name)}
    return {name: value for name, value in known.items() if value is not None}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts pass@2 before pass@10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdigit() else -1, part) for part in parts]


def _cut(text: str) -> str:
    """A text of a length that can be read."""
    text = text.strip()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
