"""What changed between two scorings: differences, intervals and flips, item by item. No torch."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from forgetless.core import metrics
from forgetless.core.errors import UserError
from forgetless.scores.averages import PaperAverage, paper_averages
from forgetless.scores.seeds import holm
from forgetless.tasks.base import Item, TaskResult

Flip = Literal["lost", "gained", "kept", "wrong"]
Verdict = Literal["worse", "better", "noise", "unknown"]

_FLIPS: Mapping[tuple[bool, bool], Flip] = {
    (True, False): "lost",
    (False, True): "gained",
    (True, True): "kept",
    (False, False): "wrong",
}

# Settings that do not make another task of it where its fingerprint is the same.
_HARMLESS = frozenset({"path", "lm_eval"})


@dataclass(frozen=True, slots=True)
class Change:
    """One question with the answers of both models.

    Attributes:
        id: the same for both.
        before: the base's answer.
        after: the other's.
        flip: "lost" (right before, wrong now), "gained", "kept" (right both times) or "wrong".
        picture: of an image that either did not recognise, as a data URI; else empty.
    """

    id: str
    prompt: str
    expected: str
    before: str
    after: str
    flip: Flip
    picture: str = ""

    def to_json(self) -> dict[str, str]:
        """The texts: without the flip, by which changes are grouped, and the picture."""
        return {n: value for n, value in asdict(self).items() if n not in ("flip", "picture")}


@dataclass
class ClassChange:
    """One class under the base model and under another.

    Attributes:
        before: how many the base got right.
        after: how many the other does.
        taken_for: the other model's wrong answers with their counts, the most frequent first.
    """

    name: str
    n: int = 0
    before: int = 0
    after: int = 0
    taken_for: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def by_class(changes: Iterable[Change]) -> list[ClassChange]:
    """The classes of a task's items, those that lost most first: the confusion, row by row.

    An answer is right where it is the item's own class.
    """
    found: dict[str, ClassChange] = {}
    wrong: dict[str, Counter[str]] = {}
    for change in changes:
        row = found.setdefault(change.expected, ClassChange(change.expected))
        row.n += 1
        row.before += change.before == change.expected
        row.after += change.after == change.expected
        if change.after != change.expected:
            wrong.setdefault(change.expected, Counter())[change.after] += 1
    for name, answers in wrong.items():
        found[name].taken_for = dict(answers.most_common())
    return sorted(found.values(), key=lambda row: ((row.after - row.before) / row.n, row.name))


@dataclass(frozen=True)
class TaskChange:
    """One task under the base model and under another.

    Attributes:
        interval: of the difference.
        paired: whether the interval comes from the same items under both models (see
            `metrics.paired_difference`) or, without items, from the two standard errors as if they
            were independent (wider).
        chance: p-value that nothing changed, of the test that goes with the interval; corrected
            by Holm's method for the other tasks of the comparison.
        p_value: of McNemar's exact test that nothing changed; None unless items are right or wrong.
        detectable: the smallest true change that so many items show with a power of 80 % (see
            `metrics.detectable_change`); nan where it is unknown.
        changes: every item with both answers, in the order of the task; empty unless items are
            right or wrong.
        extra: further numbers of the other model's result, such as the top-1 agreement.
    """

    task: str
    metric: str
    higher_is_better: bool
    n: int
    base: float
    score: float
    interval: metrics.Interval
    paired: bool
    chance: float
    verdict: Verdict = "unknown"
    p_value: float | None = None
    detectable: float = math.nan
    changes: tuple[Change, ...] = ()
    extra: Mapping[str, float] | None = None

    @property
    def difference(self) -> float:
        """The score less the base's."""
        return self.score - self.base

    @property
    def forgetting(self) -> float:
        """The difference with the sign that positive is worse."""
        return metrics.forgetting(self.score, self.base, self.higher_is_better)

    @property
    def retention(self) -> float:
        """Share of the base's score that is left, at most 1; nan where a ratio means nothing."""
        return metrics.retention(self.score, self.base, self.higher_is_better)

    @property
    def retention_uncapped(self) -> float:
        """As `retention`, with gains above 1."""
        return metrics.retention(self.score, self.base, self.higher_is_better, capped=False)

    @property
    def is_share(self) -> bool:
        """Whether the scores are shares of items, such as an accuracy."""
        return self.higher_is_better and 0 <= self.base <= 1 and 0 <= self.score <= 1

    @property
    def counted(self) -> bool:
        """Whether items are right or wrong, and so can be lost and gained."""
        return self.p_value is not None

    def flips(self, flip: Flip) -> tuple[Change, ...]:
        """The items of one kind, in the order of the task."""
        return tuple(change for change in self.changes if change.flip == flip)

    def _ids(self, flip: Flip) -> tuple[str, ...]:
        return tuple(change.id for change in self.flips(flip))

    @property
    def classes(self) -> list[ClassChange]:
        """Of a classifier's accuracy each class, those that lost most first; else none."""
        return by_class(self.changes) if "calibration_error" in (self.extra or {}) else []

    @property
    def lost(self) -> tuple[str, ...]:
        """Ids of the items right before and wrong now."""
        return self._ids("lost")

    @property
    def gained(self) -> tuple[str, ...]:
        """Ids of the items wrong before and right now."""
        return self._ids("gained")

    @property
    def kept(self) -> tuple[str, ...]:
        """Ids of the items right both times."""
        return self._ids("kept")

    @property
    def still_wrong(self) -> tuple[str, ...]:
        """Ids of the items wrong both times."""
        return self._ids("wrong")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is unknown is null. Lost and gained items with their texts."""
        numbers = {
            "low": self.interval.low,
            "high": self.interval.high,
            "retention": self.retention,
            "retention_uncapped": self.retention_uncapped,
            "detectable": self.detectable,
        }
        same = ("task", "metric", "higher_is_better", "n", "base", "score", "difference", "paired")
        return {
            **{name: getattr(self, name) for name in (*same, "chance", "verdict", "p_value")},
            **{name: _known(value) for name, value in numbers.items()},
            "lost": [change.to_json() for change in self.flips("lost")],
            "gained": [change.to_json() for change in self.flips("gained")],
            "kept": list(self.kept),
            "still_wrong": list(self.still_wrong),
            "extra": {key: _known(value) for key, value in (self.extra or {}).items()},
            **({"classes": [row.to_json() for row in self.classes]} if self.classes else {}),
        }


def verdict(
    interval: metrics.Interval, chance: float, worse: float, level: float = 0.95
) -> Verdict:
    """What an interval of a difference says.

    Args:
        interval: of the difference.
        chance: the p-value that nothing changed, corrected for the other tasks.
        worse: by how much the score became worse; negative for a gain.
        level: confidence of the interval.

    Returns:
        "worse" or "better" where a change is beyond chance, else "noise"; "unknown" where the
        interval is, for one item or a few that are not right or wrong.
    """
    if any(math.isnan(end) for end in interval):
        return "unknown"
    if chance > 1 - level:
        return "noise"
    return "worse" if worse > 0 else "better"


@dataclass(frozen=True)
class Comparison:
    """What changed on each task that both models were scored on.

    Attributes:
        rows: in the order of the second scores.
        level: confidence of the rows' intervals.
        unmatched: tasks that only one of the two was scored on, and that are not compared.
    """

    rows: tuple[TaskChange, ...]
    level: float
    unmatched: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[TaskChange]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, task: str) -> TaskChange:
        for row in self.rows:
            if row.task == task:
                return row
        raise KeyError(task)

    @property
    def averages(self) -> tuple[PaperAverage, ...]:
        """The papers' averages of which at least one task is here."""
        return paper_averages(
            {row.task: row.base for row in self.rows},
            {row.task: row.score for row in self.rows},
            {row.task: row.interval for row in self.rows},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "level": self.level,
            "rows": [row.to_json() for row in self.rows],
            "averages": [average.to_json() for average in self.averages],
            "unmatched": list(self.unmatched),
        }

    def __str__(self) -> str:
        """The table and the lost and gained items, for people."""
        from forgetless.scores.showing import as_text

        return as_text(self)


def compare(
    base_scores: Mapping[str, TaskResult],
    scores: Mapping[str, TaskResult],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """What changed from the base's scores, task by task and item by item.

    Args:
        base_scores: of the base model.
        scores: of the model that was made from it.
        level: confidence of the intervals, in (0, 1).
        resamples: of the paired bootstrap, where the items are not right or wrong.
        seed: of the paired bootstrap.

    Raises:
        UserError: no task in common, or scores that must not be compared: the tasks differ in
            content, settings or version, or the texts were cut into different tokens.
    """
    common = [task for task in scores if task in base_scores]
    if not common:
        raise UserError(
            f"no task in common: the base has {', '.join(base_scores) or 'none'}, "
            f"the other {', '.join(scores) or 'none'}"
        )
    if problems := [p for t in common if (p := _mismatch(base_scores[t], scores[t]))]:
        raise UserError("; ".join(problems))
    changes = [_change(base_scores[t], scores[t], level, resamples, seed) for t in common]
    corrected = holm(change.chance for change in changes)
    return Comparison(
        rows=tuple(
            replace(row, chance=p, verdict=verdict(row.interval, p, row.forgetting, level))
            for row, p in zip(changes, corrected, strict=True)
        ),
        level=level,
        unmatched=tuple(
            task for task in dict.fromkeys([*base_scores, *scores]) if task not in common
        ),
    )


def _mismatch(base: TaskResult, score: TaskResult) -> str | None:
    """Why two results of one name must not be compared."""
    same = base.fingerprint == score.fingerprint
    keys = [key for key in base.settings if key in score.settings]
    pairs = [
        ("metric", base.metric, score.metric),
        *((key, base.settings[key], score.settings[key])
          for key in keys if not (same and key in _HARMLESS)),
        ("n", base.n, score.n),
    ]  # fmt: skip
    differing = [
        f"{name} {_setting(before)} against {_setting(after)}"
        for name, before, after in pairs
        if before != after
    ]
    if not (same or differing):
        differing = [
            "its texts, or the version of the task, changed "
            f"(fingerprint {base.fingerprint} against {score.fingerprint})"
        ]
    if differing:
        return (
            f"task {base.task!r} is not the same for the two: {', '.join(differing)}; "
            "evaluate both models with the same task"
        )
    return _mismatch_of_items(base, score) if base.items and score.items else None


def _setting(value: Any) -> str:
    """A setting's value in few words."""
    if value is None:
        return "none"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _mismatch_of_items(base: TaskResult, score: TaskResult) -> str | None:
    before, after = ({item.id: item for item in result.items} for result in (base, score))
    if before.keys() != after.keys():
        return f"task {base.task!r}: the items of the two are not the same; evaluate both again"
    if any(before[i].weight != after[i].weight for i in before):
        return (
            f"task {base.task!r}: the same texts have different numbers of tokens; "
            "score both models with the same tokenizer"
        )
    asked = [
        i
        for i, item in before.items()
        if (item.prompt, item.expected) != (after[i].prompt, after[i].expected)
    ]
    if asked:
        return (
            f"task {base.task!r}: {len(asked)} of {base.n} items have another prompt or another "
            f"right answer (first: {asked[0]!r}); evaluate both models with the same task"
        )
    return None


def _change(
    base: TaskResult, score: TaskResult, level: float, resamples: int, seed: int
) -> TaskChange:
    """The change of one task: paired where both have items, else from the two standard errors."""
    by_id = {item.id: item for item in score.items}
    pairs = [(item, by_id[item.id]) for item in base.items] if by_id else []
    before, after = ([pair[i].score for pair in pairs] for i in (0, 1))
    counted = base.right_or_wrong and score.right_or_wrong
    changes = tuple(_flipped(old, new) for old, new in pairs) if counted else ()
    lost, gained = (sum(change.flip == flip for change in changes) for flip in ("lost", "gained"))
    if pairs:
        weights = [old.weight for old, _ in pairs]
        in_0_to_1 = score.higher_is_better and all(0 <= x <= 1 for x in (*before, *after))
        interval, chance = metrics.paired_difference(
            before, after, weights, shares=in_0_to_1, level=level, resamples=resamples, seed=seed
        )
        gaps = [new - old for old, new in zip(before, after, strict=True)]
        stderr = metrics.mean_stderr(gaps, weights).stderr
    else:
        difference, stderr = score.value - base.value, math.hypot(base.stderr, score.stderr)
        interval = metrics.t_interval(difference, stderr, level=level)
        chance = metrics.t_probability(difference, stderr)
    return TaskChange(
        task=score.task,
        metric=score.metric,
        higher_is_better=score.higher_is_better,
        n=score.n,
        base=base.value,
        score=score.value,
        interval=interval,
        paired=bool(pairs),
        chance=chance,
        p_value=metrics.mcnemar(lost, gained) if counted else None,
        detectable=metrics.detectable_change(score.n, (lost + gained) / score.n, level=level)
        if counted
        else metrics.detectable_change(1, spread=stderr, level=level),
        changes=changes,
        extra=dict(score.extra),
    )


def _flipped(old: Item, new: Item) -> Change:
    flip = _FLIPS[old.score == 1.0, new.score == 1.0]
    picture = old.picture or new.picture
    return Change(old.id, old.prompt, old.expected, old.answer, new.answer, flip, picture)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
