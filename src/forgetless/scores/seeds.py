"""Estimates over seeds and items, and what they decide: which arms differ, where an arm stands.

The runs of an arm differ in their seed, and all runs answer the same items. With x[s, i] the score
of item i under seed s, (S, I), one for each seed and item or the difference of two arms' scores,

    x[s, i] = mean + seed[s] + item[i] + rest[s, i]

the mean over both has a variance of two parts, from the mean squares of a crossed layout:

    Vs = max(MS_seed, MS_rest) / (S I)        other seeds, S - 1 degrees of freedom
    Vi = max(MS_item - MS_rest, 0) / (S I)    other items, I - 1 degrees of freedom
    degrees = (Vs + Vi)^2 / (Vs^2 / (S - 1) + Vi^2 / (I - 1))

and Student's interval with these degrees (Satterthwaite 1946, "An approximate distribution of
estimates of variance components", Biometrics Bulletin 2; for subjects and items, Clark 1973, "The
language-as-fixed-effect fallacy", Journal of Verbal Learning and Verbal Behavior 12). Items that
weigh differently enter as w (x - mean) / mean(w), the linear part of their ratio.

What is missing leaves its part out: of one seed an interval says nothing of other seeds, and where
items were not kept that of several seeds says nothing of other items. Nothing is decided by whether
two intervals overlap, which makes the noisier of two arms, or rates, look the equal of the better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgetless.core import metrics
from forgetless.core.metrics import Interval
from forgetless.tasks.base import TaskResult

MARGIN = 0.1
"""A rate that learned at least 1 - MARGIN of what the best one did counts as learning as much."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sample:
    """The scores of one arm, or of the base, on one task.

    Attributes:
        scores: by seed.
        items: (seeds, items), in the order of `scores` and `ids`; None where they were not kept.
        weights: (items,), each above 0; None for equal ones.
        stderr: of a score over the items, by seed; empty where it is not known.
        num_items: of the task; None where it is not known.
        is_share: whether scores lie in 0..1 and higher is better, as of accuracies.
    """

    scores: Mapping[Any, float]
    items: _Floats | None = None
    ids: tuple[str, ...] = ()
    weights: _Floats | None = None
    stderr: Mapping[Any, float] = field(default_factory=dict)
    num_items: int | None = None
    is_share: bool = False
    higher_is_better: bool = True

    @classmethod
    def of(cls, results: Mapping[Any, TaskResult], *, is_share: bool) -> Sample:
        """From the results of a task by seed, one or more; with items where all have the same."""
        found = list(results.values())
        ids = tuple(item.id for item in found[0].items)
        items = weights = None
        if ids and all({item.id for item in result.items} == set(ids) for result in found):
            by_id = [{item.id: item for item in result.items} for result in found]
            items = np.array([[of_run[i].score for i in ids] for of_run in by_id])
            weights = np.array([by_id[0][i].weight for i in ids])
        return cls(
            scores={seed: result.value for seed, result in results.items()},
            items=items,
            ids=ids if items is not None else (),
            weights=weights,
            stderr={seed: r.stderr for seed, r in results.items() if not math.isnan(r.stderr)},
            num_items=min(result.n for result in found) or None,
            is_share=is_share,
            higher_is_better=found[0].higher_is_better,
        )

    def at(self, seeds: Mapping[Any, Any]) -> Sample:
        """With these seeds alone: new name, and the seed whose scores it has."""
        place = {seed: i for i, seed in enumerate(self.scores)}
        rows = [place[seed] for seed in seeds.values()]
        return replace(
            self,
            scores={name: self.scores[seed] for name, seed in seeds.items()},
            items=None if self.items is None else self.items[rows],
            stderr={n: self.stderr[seed] for n, seed in seeds.items() if seed in self.stderr},
        )

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return fmean(self.scores.values())

    @property
    def item_variance(self) -> float:
        """Of the mean of one seed over other items, from the standard errors; nan if not known."""
        if not self.stderr:
            return math.nan
        n = self.num_items or 0
        if self.is_share and n and all(score in (0.0, 1.0) for score in self.scores.values()):
            share = 1 / (n + 2)  # all items agree: as if one more had been right, and one wrong
            return share * (1 - share) / (n + 2)
        return fmean(stderr**2 for stderr in self.stderr.values())


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and items, such as that of a difference, and its variance.

    Attributes:
        of_seeds: the part of its variance from the choice of seeds; 0 for one seed.
        of_items: the part from the choice of items; nan where neither part is known.
        num_items: items that entered; infinite where these were not kept.
    """

    value: float
    of_seeds: float
    of_items: float
    num_seeds: int
    num_items: float

    @property
    def stderr(self) -> float:
        """The standard error; nan where it is not known."""
        return math.sqrt(self.of_seeds + self.of_items)

    @property
    def degrees(self) -> float:
        """Of freedom, of both parts together (Satterthwaite)."""
        parts = ((self.of_seeds, self.num_seeds - 1), (self.of_items, self.num_items - 1))
        below = sum(variance**2 / degrees for variance, degrees in parts if variance > 0)
        return (self.of_seeds + self.of_items) ** 2 / below if below > 0 else math.inf

    def interval(self, level: float = 0.95) -> Interval:
        """Student's; nan ends where no error is known."""
        return metrics.t_interval(self.value, self.stderr, self.degrees, level)

    @property
    def p_value(self) -> float:
        """Two-sided, that the true mean is 0; 1 where no error is known."""
        return metrics.t_probability(self.value, self.stderr, self.degrees)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: the score of one run, or the mean over seeds.
        low: the lower end; equal to `value` when no error is known.
        seeds: how many runs were averaged.
        num_items: items of the task; None when the task has none.
    """

    value: float
    low: float
    high: float
    seeds: int
    num_items: int | None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval."""
        return self.low, self.high

    @property
    def has_error(self) -> bool:
        """Whether an error is known at all."""
        return self.low < self.high


# ------------------------------------------------------------------------------------- estimates


def effect(x: _Floats, weights: _Floats | None = None, distance: float | None = None) -> Effect:
    """The mean of x and the two parts of its variance, see the top of this file.

    Args:
        x: (seeds, items).
        weights: (items,), each above 0; None for equal ones.
        distance: how far one item can move, such as 1 for a difference of shares. Where half of the
            items or more are the same, one item so far from these is added on either side, so that
            a few items do not look certain; see `metrics.mean_with_extremes`.
    """
    seeds, items = x.shape
    w = np.ones(items) if weights is None else weights / weights.mean()
    of_seeds = (x * w).mean(1)
    z = of_seeds[:, None] + w * (x - of_seeds[:, None])
    value, of_items = float(of_seeds.mean()), z.mean(0)
    if items == 1:
        spread = float(of_seeds.var(ddof=1)) / seeds if seeds > 1 else 0.0
        return Effect(value, spread, math.nan if seeds == 1 else 0.0, seeds, math.inf)
    between_items = metrics.mean_with_extremes(of_items, distance=distance).stderr ** 2
    if seeds == 1:
        return Effect(value, 0.0, between_items, 1, items)
    rest = z - of_seeds[:, None] - of_items + value
    residual = float((rest**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)
    between_seeds = max(float(of_seeds.var(ddof=1)) / seeds, residual)
    return Effect(value, between_seeds, max(between_items - residual, 0.0), seeds, items)


def estimate(sample: Sample) -> Estimate:
    """The mean score with its 95 % interval.

    * Several seeds: over seeds and items; Student's t over the seeds alone where items were not
      kept.
    * One seed, or several that agree without exception, over the items: the bootstrap
      (`metrics.bootstrap_mean`) for kept items that are no shares, else value -/+ 1.96 standard
      errors, and Wilson's interval at exactly 0 or 1.
    """
    scores = list(sample.scores.values())
    value, n = sample.value, sample.num_items
    low = high = value
    if len(set(scores)) > 1:
        low, high = _over_seeds(sample).interval()
    elif sample.is_share and value in (0.0, 1.0) and n:
        low, high = metrics.wilson_interval(value, n)
    elif sample.items is not None and not sample.is_share:
        found = metrics.bootstrap_mean(sample.items[0], sample.weights).interval
        low, high = (value, value) if math.isnan(found.low) else found
    elif sample.stderr:
        low, high = metrics.t_interval(value, next(iter(sample.stderr.values())))
    if sample.is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, low, high, len(scores), n)


def _over_seeds(sample: Sample) -> Effect:
    """The mean score of several seeds."""
    if sample.items is not None:
        return effect(sample.items, sample.weights)
    return effect(np.array([list(sample.scores.values())]).T)


def retention(sample: Sample, base: Sample) -> Estimate | None:
    """The mean share of the base's score that is left, gains not counted, and its 95 % interval.

    A share R = mean(y) / mean(b) is a ratio over the same items, whose errors of y and b partly
    cancel: its interval is that of the mean over seeds and items of its linear part,

        R[s] + (y[s, i] - R[s] b[i]) / mean(b)

    (the delta method; Cochran 1977, "Sampling Techniques", section 2.11), inside 0..1; of losses,
    R = mean(b) / mean(y) in the same way. Where items were not kept, it is over the seeds, and of
    one seed from both standard errors as if they were independent, which is wider.

    Args:
        sample: after training.
        base: before; its seeds are one measurement.

    Returns:
        None where a ratio means nothing, see `metrics.retention`.
    """
    first = next(iter(base.scores))
    before, higher = base.at({first: first}), sample.higher_is_better
    shares = [metrics.retention(y, before.value, higher, capped=False)
              for y in sample.scores.values()]  # fmt: skip
    if not all(math.isfinite(share) for share in shares):
        return None
    R = np.array(shares)[:, None]
    below = np.array([[before.value]] if higher else [[y] for y in sample.scores.values()])
    paired = _aligned(sample, before)
    if paired is not None:
        above, under = paired if higher else paired[::-1]
        nearest = 1 / before.value if sample.is_share else None
        found = effect(R + (above - R * under) / below, sample.weights, nearest)
    elif len(set(shares)) > 1:
        found = effect(np.minimum(R, 1.0))
    else:
        over, under_ = (sample, before) if higher else (before, sample)
        variance = (over.item_variance + R[0, 0] ** 2 * under_.item_variance) / below[0, 0] ** 2
        found = Effect(float(R[0, 0]), 0.0, float(variance), 1, math.inf)
    value = float(np.minimum(R, 1.0).mean())
    low, high = replace(found, value=value).interval()
    if math.isnan(low):
        low = high = value
    return Estimate(value, max(low, 0.0), min(high, 1.0), len(shares), sample.num_items)


def difference(one: Sample, other: Sample) -> Effect:
    """The mean of one - other, over the seeds and items that both have.

    * Seeds: the difference of each seed that both were trained with. Where there is none, the
      seeds of the two are independent; where there is one, it says nothing of other seeds.
    * Items: the difference of each item. Where items were not kept, the errors of the two scores
      are added as if they were independent (wider).
    """
    shared = [seed for seed in one.scores if seed in other.scores]
    if shared:
        same = dict(zip(shared, shared, strict=True))
        one, other = one.at(same), other.at(same)
    paired = _aligned(one, other)
    distance = 1.0 if one.is_share and other.is_share else None
    if shared and paired is not None:
        return effect(paired[0] - paired[1], one.weights, distance)
    if shared:
        gaps = np.array([[one.scores[seed] - other.scores[seed] for seed in shared]]).T
        found = effect(gaps)
    else:
        own = [effect(np.array([list(sample.scores.values())]).T) for sample in (one, other)]
        seeds = min(found.num_seeds for found in own)
        spread = sum(found.of_seeds for found in own) if seeds > 1 else 0.0
        found = Effect(one.value - other.value, spread, math.nan, seeds, math.inf)
    if paired is not None:
        gaps = paired[0].mean(0, keepdims=True) - paired[1].mean(0, keepdims=True)
        over_items = effect(gaps, one.weights, distance)
        return replace(found, of_items=over_items.of_items, num_items=over_items.num_items)
    variance = one.item_variance + other.item_variance
    if math.isnan(variance) and found.num_seeds > 1:
        variance = 0.0
    return replace(found, of_items=variance, num_items=math.inf)


def from_base(sample: Sample, base: Sample) -> Effect:
    """The mean of the sample's scores less the base's, whose seeds are one measurement."""
    first = next(iter(base.scores))
    return difference(sample, base.at(dict.fromkeys(sample.scores, first)))


def _aligned(one: Sample, other: Sample) -> tuple[_Floats, _Floats] | None:
    """The items of both in one order; None where they are not kept or not the same."""
    if one.items is None or other.items is None or len(one.ids) != len(other.ids):
        return None
    if one.ids == other.ids:
        return one.items, other.items
    place = {item: i for i, item in enumerate(other.ids)}
    if any(item not in place for item in one.ids):
        return None
    return one.items, other.items[:, [place[item] for item in one.ids]]


# ------------------------------------------------------------------------------------- decisions


def holm(p_values: Iterable[float]) -> list[float]:
    """The p-values corrected for being many, so that any below 0.05 is so by chance in 5 %.

    The k-th smallest of m is multiplied by m - k + 1, and is no less than those before it.

    Reference:
        Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
        of Statistics 6.
    """
    p = list(p_values)
    corrected, largest = [1.0] * len(p), 0.0
    for smaller, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, (len(p) - smaller) * p[i])
        corrected[i] = min(1.0, largest)
    return corrected


@dataclass(frozen=True)
class Ranking:
    """Arms on one task.

    Attributes:
        values: of each arm, larger being better; None where it was not measured.
        better: pairs (i, j) of which arm i is better than arm j beyond chance.
    """

    values: tuple[float | None, ...]
    better: frozenset[tuple[int, int]] = frozenset()

    def leaders(self, among: Iterable[int] | None = None) -> tuple[int, ...]:
        """The best of these arms, then those that are not told apart from it; () for none."""
        places = range(len(self.values)) if among is None else among
        known = {i: value for i in places if (value := self.values[i]) is not None}
        if not known:
            return ()
        best = max(known, key=lambda i: known[i])
        return (best, *(i for i in known if i != best and (best, i) not in self.better))


def rank(
    *tasks: tuple[Sequence[float | None], Sequence[Sample | None]], level: float = 0.95
) -> tuple[Ranking, ...]:
    """Which arms are better than which, task by task.

    Every two arms are compared by their paired difference (`difference`), with Holm's correction
    over all pairs on all of the tasks, so that where no two arms differ any are told apart in at
    most 1 - level of studies. The best of a task is better than all others also where each of its
    own comparisons says so, corrected for the number of tasks alone: that one arm is ahead of
    every other is no likelier by chance with more arms (Gutmann and Maymin 1987, "Is the selected
    population the best?", The Annals of Statistics 15).

    Args:
        tasks: of each the arms' values, larger being better, and their samples in the same order;
            None where an arm was not measured. Arms of equal values are not told apart.
        level: confidence, in (0, 1).
    """
    p_values = [_p_values(*task) for task in tasks]
    corrected = iter(holm(p for of_task in p_values for p in of_task.values()))
    better = [{pair for pair in of_task if next(corrected) <= 1 - level} for of_task in p_values]
    of_best = [[pair for pair in of_task if pair[0] == next(iter(of_task))[0]]
               for of_task in p_values]  # fmt: skip
    ahead = holm(
        max((of_task[pair] for pair in pairs), default=1.0)
        for of_task, pairs in zip(p_values, of_best, strict=True)
    )
    for found, pairs, p in zip(better, of_best, ahead, strict=True):
        if p <= 1 - level:
            found.update(pairs)
    return tuple(
        Ranking(tuple(values), frozenset(found))
        for (values, _), found in zip(tasks, better, strict=True)
    )


def _p_values(
    values: Sequence[float | None], samples: Sequence[Sample | None]
) -> dict[tuple[int, int], float]:
    """Of each pair (better by its value, other) that the two are alike; those of the best first."""
    arms = zip(values, range(len(values)), samples, strict=True)
    known = [(value, i, sample) for value, i, sample in arms if value is not None and sample]
    found = {}
    for (value, i, one), (lower, j, other) in combinations(
        sorted(known, key=lambda arm: -arm[0]), 2
    ):
        gap = difference(one, other)
        # The seeds that both have may say the opposite of the means over all seeds.
        agree = value > lower and (gap.value > 0) == one.higher_is_better
        found[i, j] = gap.p_value if agree else 1.0
    return found


def improved(samples: Sequence[Sample], base: Sample) -> list[bool]:
    """Which arms are better than the base beyond chance, with Holm's correction over the arms."""
    changes = [from_base(sample, base) for sample in samples]
    p_values = holm(change.p_value for change in changes)
    return [
        p <= 0.05 and (change.value > 0) == base.higher_is_better
        for change, p in zip(changes, p_values, strict=True)
    ]


def choose(
    learned: Sequence[float | None],
    kept: Sequence[float | None],
    base: float | None = None,
    margin: float = MARGIN,
) -> int:
    """The position of the learning rate at which an arm stands, from the means at each rate.

    Of the rates whose gain over the base is at least 1 - margin of the largest gain, the one that
    kept most; of equals the one that learned more. A rate that learns a hair more and forgets
    everything is no way to use a method, and one that scatters does not pass for one that learns.
    Where the base's score is not known, or nothing was gained, the rate that learned most.

    Args:
        learned: the mean score on the new task at each rate, larger being better; None where it was
            not measured.
        kept: what is left of the old at each rate, larger being better; likewise.
        base: the base's score on the new task, larger being better.
        margin: in 0..1.
    """
    known = [score for score in learned if score is not None]
    least = max(known, default=None)
    if least is not None and base is not None and least > base:
        least = base + (1 - margin) * (least - base)

    level = [i for i, score in enumerate(learned)
             if least is None or (score is not None and score >= least)]  # fmt: skip
    worst = -math.inf
    return max(level, key=lambda i: tuple(worst if part is None else part
                                          for part in (kept[i], learned[i])))  # fmt: skip
