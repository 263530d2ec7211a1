"""Learning and forgetting as numbers: means, differences, fronts and intervals. No torch.

Throughout, a *score* is the value of a task for one model, `base` is the same task's value for the
untouched base model, and an *item* is one question, prompt or document of a task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "Mean",
    "bootstrap_interval",
    "forgetting",
    "forgetting_at_matched_learning",
    "hypervolume",
    "mcnemar",
    "mean_stderr",
    "normal_interval",
    "paired_bootstrap_interval",
    "pareto_front",
    "retention",
]

Point = tuple[float, float]
_Floats = NDArray[np.float64]

# Resampled items held at once: 32 MB of indices.
_CHUNK = 4_000_000


class Mean(NamedTuple):
    """A mean over items.

    Attributes:
        value: the (weighted) mean, in the unit of the items.
        stderr: its standard error, in the same unit; nan for a single item.
        n: number of items.
    """

    value: float
    stderr: float
    n: int


class Interval(NamedTuple):
    """A confidence interval, `low <= high`."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        """Whether a number lies inside, ends included."""
        return isinstance(value, int | float) and self.low <= value <= self.high


def mean_stderr(values: ArrayLike, weights: ArrayLike | None = None) -> Mean:
    """Mean over items and its standard error.

        value  = sum_i w_i x_i / sum_i w_i
        stderr = sqrt( n / (n - 1) * sum_i w_i^2 (x_i - value)^2 ) / sum_i w_i

    With equal weights this is the sample standard deviation over sqrt(n); for right/wrong items
    (1 and 0) that is sqrt(p (1 - p) / (n - 1)). With weights it is the standard error of a ratio,
    such as a loss per token over documents of different lengths (weights = tokens).

    Args:
        values: one number an item.
        weights: one weight an item, above 0; None for equal weights.

    Returns:
        Value, standard error (nan when n = 1) and n. Where every item is the same the standard
        error is 0, which says that these items do not differ, not that the mean is certain.

    Raises:
        ValueError: no items, a number that is not finite, or weights of another length.
    """
    x, w = _items(values, weights)
    total = w.sum()
    # Shifted by one item, a constant is its own mean to the last bit.
    mean = float(x[0] + (w * (x - x[0])).sum() / total)
    if len(x) == 1:
        return Mean(mean, math.nan, 1)
    spread = np.square(w * (x - mean)).sum() * len(x) / (len(x) - 1)
    return Mean(mean, float(np.sqrt(spread) / total), len(x))


def retention(score: float, base: float, higher_is_better: bool = True) -> float:
    """Share of the base model's score that is left, gains not counted.

        min(1, score / base)   higher is better
        min(1, base / score)   lower is better (loss, perplexity)

    The mean of this over TriviaQA, NQ-open and WebQS is what LoRA-Null calls Avg1(Per).

    Args:
        score: after training, 0 or more.
        base: before training, 0 or more.
        higher_is_better: the task's direction.

    Returns:
        In 0..1; nan when `base` is 0 (nothing to keep, or a distance to the base itself such as
        KL), or when either number is nan (not measured stays not measured).

    Raises:
        ValueError: a negative score, whose ratio means nothing.
    """
    if score < 0 or base < 0:
        raise ValueError(
            f"retention needs scores of 0 or more, got score {score} and base {base}; "
            "use forgetting(), a difference, for scores with a sign"
        )
    if base == 0 or math.isnan(score) or math.isnan(base):
        return math.nan
    if higher_is_better:
        return min(1.0, score / base)
    return 1.0 if score <= base else base / score


def forgetting(score: float, base: float, higher_is_better: bool = True) -> float:
    """How much worse a task became; positive is worse in both directions, negative is a gain.

        base - score   higher is better (accuracy, recall)
        score - base   lower is better (loss, KL)

    Returns:
        In the unit of the task; nan when either number is nan.
    """
    return base - score if higher_is_better else score - base


def normal_interval(value: float, stderr: float, level: float = 0.95) -> Interval:
    """Interval value -/+ z * stderr of a normal distribution; nan ends for a nan `stderr`."""
    half = _z(level) * stderr
    return Interval(value - half, value + half)


def bootstrap_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the (weighted) mean from resampled items.

    Items are drawn with replacement `resamples` times, always the same way for a seed; the ends
    are percentiles of the means, moved away from the mean by sqrt(n / (n - 1)), without which the
    interval of a few items is too narrow.

    Args:
        values: one number an item.
        weights: as in `mean_stderr`; an item is drawn together with its weight.
        level: confidence, in (0, 1).
        resamples: number of draws, 1 or more.
        seed: of numpy's default generator, 0 or more.

    Returns:
        The interval; both ends nan for a single item.

    Raises:
        ValueError: as `mean_stderr`, or a level or number of resamples out of its range.

    Reference:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap" (percentile interval); the
        widening is ours.
    """
    x, w = _items(values, weights)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    n = len(x)
    if n == 1:
        return Interval(math.nan, math.nan)
    mean = mean_stderr(x, w).value
    means = _resampled_means(x - mean, w, resamples, np.random.default_rng(seed))
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail]) * math.sqrt(n / (n - 1))
    return Interval(float(mean + low), float(mean + high))


def paired_bootstrap_interval(
    base: ArrayLike,
    score: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(score - base) over the same items under two models.

    Pairing takes out what makes items hard or easy for both models, so the interval is narrower
    than that of two separate means. See `bootstrap_interval` for arguments and errors.

    Raises:
        ValueError: also when the two have different lengths.
    """
    before, after = np.asarray(base, np.float64), np.asarray(score, np.float64)
    if before.shape != after.shape:
        raise ValueError(
            f"paired scores need the same items, got {before.size} for the base and {after.size}"
        )
    return bootstrap_interval(after - before, weights, level=level, resamples=resamples, seed=seed)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value that as many items are lost as gained, from the exact binomial.

        p = min(1, 2 * P(X <= min(lost, gained))),   X ~ Binomial(lost + gained, 1/2)

    Items that stayed right or stayed wrong say nothing about a change and do not enter.

    Args:
        lost: items right before and wrong after, 0 or more.
        gained: items wrong before and right after, 0 or more.

    Returns:
        In (0, 1]; 1 when nothing changed.

    Raises:
        ValueError: a negative count.

    Reference:
        McNemar 1947, Psychometrika 12; the exact form, as in Agresti, "Categorical Data Analysis".
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"counts must be 0 or more, got lost {lost} and gained {gained}")
    n = lost + gained
    ways = term = 1
    for k in range(min(lost, gained)):
        term = term * (n - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / (1 << n))


def pareto_front(points: Iterable[Point]) -> list[int]:
    """Positions of the points that no other point beats, both coordinates to be maximised.

    A point is beaten when another is at least as good in both and better in one; equal points
    are all kept.

    Returns:
        Positions in `points`, by ascending first coordinate; empty for no points.

    Raises:
        ValueError: a coordinate is nan; leave out, and name, what was not measured.
    """
    xy = _points(points)
    order = sorted(range(len(xy)), key=lambda i: (-xy[i][0], -xy[i][1], i))
    front: list[int] = []
    best = -math.inf
    for i in order:
        if xy[i][1] > best or (front and xy[i] == xy[front[-1]]):
            front.append(i)
            best = xy[i][1]
    return sorted(front, key=lambda i: (xy[i], i))


def hypervolume(points: Iterable[Point], reference: Point = (0.0, 0.0)) -> float:
    """Area of the plane that the points dominate above a reference, both to be maximised.

    Args:
        points: such as (learning, retention) of each run.
        reference: the corner that counts as worthless; points not above it in both coordinates
            add nothing.

    Returns:
        0 or more, in the product of the two units: 1 for a perfect run on two scales of 0..1.

    Raises:
        ValueError: a coordinate is nan.

    Reference:
        Zitzler and Thiele 1999, "Multiobjective evolutionary algorithms", IEEE TEC 3(4).
    """
    xy = _points(points)
    (left, bottom), *_ = _points([reference])
    area = 0.0
    for x, y in (xy[i] for i in pareto_front(xy)):
        if x > left and y > bottom:
            area += (x - left) * (y - bottom)
            left = x
    return area


def forgetting_at_matched_learning(
    curve: Sequence[Point], learning: float, higher_is_better: bool = True
) -> float:
    """What a method keeps (or loses) at a given amount of learning, along its own curve.

    The curve is the polygon through a method's runs in the order of what was varied: learning
    rate, duration or the dial. It is cut at `learning`; where several pieces are cut, as when too
    high a rate learns less again, the best of them counts.

    Args:
        curve: (learning, kept) of each run, in the order of the varied setting.
        learning: where to compare methods, in the unit of the first coordinate.
        higher_is_better: True when the second coordinate is retention, False when it is
            forgetting or KL; it decides which cut is best.

    Returns:
        The second coordinate at `learning`, in its own unit; nan outside the range of the curve
        (never extrapolated) and for an empty curve.

    Raises:
        ValueError: a nan in the curve or in `learning`.
    """
    xy = _points(curve)
    if math.isnan(learning):
        raise ValueError("learning must be a number, got nan")
    cuts = [y for x, y in xy if x == learning]
    for (x0, y0), (x1, y1) in pairwise(xy):
        if min(x0, x1) < learning < max(x0, x1):
            share = (learning - x0) / (x1 - x0)
            cuts.append((1 - share) * y0 + share * y1)
    if not cuts:
        return math.nan
    return max(cuts) if higher_is_better else min(cuts)


def _items(values: ArrayLike, weights: ArrayLike | None) -> tuple[_Floats, _Floats]:
    """Both as float64 vectors of one length, checked."""
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"need one number an item and at least one item, got shape {x.shape}")
    if w.shape != x.shape:
        raise ValueError(f"need one weight an item, got {w.size} weights for {x.size} items")
    if bad := int((~np.isfinite(x)).sum()):
        raise ValueError(
            f"{bad} of {x.size} items are not finite numbers; a mean over the others would hide "
            "it: leave out what was not measured, and look for a training run that diverged"
        )
    if not (np.isfinite(w).all() and (w > 0).all()):
        raise ValueError("weights must be finite and above 0")
    return x, w


def _resampled_means(x: _Floats, w: _Floats, resamples: int, rng: np.random.Generator) -> _Floats:
    """Weighted means of `resamples` draws of len(x) items with replacement."""
    n = len(x)
    weighted = w * x
    rows = max(1, _CHUNK // n)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, n, size=(min(rows, resamples - start), n))
        means.append(weighted[drawn].sum(axis=1) / w[drawn].sum(axis=1))
    return np.concatenate(means)


def _points(points: Iterable[Point]) -> list[Point]:
    """As floats, without nan."""
    xy = [(float(x), float(y)) for x, y in points]
    for i, point in enumerate(xy):
        if any(math.isnan(value) for value in point):
            raise ValueError(f"point {i} is {point}: leave out, and name, what was not measured")
    return xy


def _z(level: float) -> float:
    """Two-sided normal quantile: 1.96 for a level of 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
