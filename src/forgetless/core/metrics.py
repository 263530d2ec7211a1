"""Learning and forgetting as numbers: means, differences, fronts and intervals. No torch.

Throughout, a *score* is the value of a task for one model, `base` is the same task's value for the
untouched base model, and an *item* is one question, prompt or document of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "Mean",
    "bootstrap_interval",
    "detectable_change",
    "forgetting",
    "forgetting_at_matched_learning",
    "hypervolume",
    "mcnemar",
    "mean_stderr",
    "normal_interval",
    "paired_bootstrap_interval",
    "paired_interval",
    "paired_proportions_interval",
    "pareto_front",
    "pass_at_k",
    "retention",
    "retention_uncapped",
]

Point = tuple[float, float]
_Floats = NDArray[np.float64]

# Resampled items held at once: 32 MB of indices.
_CHUNK = 4_000_000

# Below, a resampled standard error is often 0 and a studentised interval has no ends.
_FEWEST = 5

# Each halves the bracket: from a width of 2 to 1e-18.
_BISECTIONS = 61


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
    share = retention_uncapped(score, base, higher_is_better)
    return share if math.isnan(share) else min(1.0, share)


def retention_uncapped(score: float, base: float, higher_is_better: bool = True) -> float:
    """As `retention`, with gains above 1: score / base, or base / score where lower is better.

    Returns:
        0 or more; infinite where a loss fell to 0; nan and errors as `retention`.
    """
    if score < 0 or base < 0:
        raise ValueError(
            f"retention needs scores of 0 or more, got score {score} and base {base}; "
            "use forgetting(), a difference, for scores with a sign"
        )
    if base == 0 or math.isnan(score) or math.isnan(base):
        return math.nan
    if higher_is_better:
        return score / base
    return base / score if score > 0 else math.inf


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
    """Interval of the (weighted) mean from resampled items, studentised.

        t_b = (mean_b - mean) / stderr_b      ends: mean - t_high * stderr, mean - t_low * stderr

    Items are drawn with replacement `resamples` times, always the same way for a seed; t_low and
    t_high are quantiles of t_b. Dividing by each draw's own standard error is what makes the
    interval hold for few items and for skewed ones, where percentiles of the means are too narrow.

    Where half of the items or more are the same, as when few of many changed, many draws are all
    alike and have no error to divide by. The interval is then the normal one after one item as far
    from these as the farthest was added on either side.

    Args:
        values: one number an item.
        weights: as in `mean_stderr`; an item is drawn together with its weight.
        level: confidence, in (0, 1).
        resamples: number of draws, 1 or more.
        seed: of numpy's default generator, 0 or more.

    Returns:
        The interval; the one point where all items are the same; else both ends nan for fewer than
        5 items, from which no error can be told this way.

    Raises:
        ValueError: as `mean_stderr`, or a level or number of resamples out of its range.

    Reference:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5 (bootstrap-t);
        Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
        proportions", Statistics in Medicine 24 (added items).
    """
    x, w = _items(values, weights)
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    mean, stderr, n = mean_stderr(x, w)
    if n > 1 and stderr == 0:
        return Interval(mean, mean)
    if n < _FEWEST:
        return Interval(math.nan, math.nan)
    if (common := _most_common(x)) is not None:
        return _with_extremes(x, w, common, float(np.abs(x - common).max()), level)
    t = _studentised(x - mean, w, resamples, np.random.default_rng(seed))
    tail = (1 - level) / 2
    low, high = np.quantile(t, [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(mean - high * stderr), float(mean - low * stderr))


def paired_bootstrap_interval(
    base: ArrayLike,
    score: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`bootstrap_interval` of mean(score - base) over the same items under two models.

    Pairing takes out what makes items hard or easy for both models, so the interval is narrower
    than that of two separate means.

    Raises:
        ValueError: as `bootstrap_interval`, and when the two have different lengths.
    """
    return bootstrap_interval(
        _differences(base, score), weights, level=level, resamples=resamples, seed=seed
    )


def paired_proportions_interval(lost: int, gained: int, n: int, *, level: float = 0.95) -> Interval:
    """Interval of the change (gained - lost) / n of a share of right answers over the same items.

    Its ends are the changes D that a score test does not reject:

        |gained - lost - n D| = z * sqrt(n * (2 q + D (1 - D)))

    with q the most likely share of lost items, given D. Unlike a bootstrap it does not collapse to
    a point when no item, or every one, changed.

    Args:
        lost: items right before and wrong after, 0 or more.
        gained: items wrong before and right after, 0 or more.
        n: all items, 1 or more, at least lost + gained.
        level: confidence, in (0, 1).

    Returns:
        The interval, inside -1..1.

    Raises:
        ValueError: counts that cannot be, or a level out of its range.

    Reference:
        Tango 1998, "Equivalence test and confidence interval for the difference in proportions for
        the paired-sample design", Statistics in Medicine 17.
    """
    if lost < 0 or gained < 0 or n < 1 or lost + gained > n:
        raise ValueError(f"no counts of items: lost {lost} and gained {gained} of {n}")
    z = _z(level)
    change = (gained - lost) / n

    def accepted(D: float) -> bool:
        return abs(_tango_score(gained, lost, n, D)) <= z

    return Interval(_last_accepted(accepted, change, -1.0), _last_accepted(accepted, change, 1.0))


def paired_interval(
    base: ArrayLike,
    score: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    shares: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of mean(score - base) over the same items that suits the kind of items.

    * Right or wrong (1 and 0, equal weights): `paired_proportions_interval`.
    * Other shares, of which half or more did not change: the normal interval after an item of the
      largest possible change, 1, was added in either direction.
    * Otherwise: `paired_bootstrap_interval`.

    Args:
        base: one number an item, under the base model.
        score: the same items under the other, in the same order.
        weights: as in `mean_stderr`.
        shares: whether scores lie in 0..1, as accuracies do.
        level: confidence, in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The interval; nan ends and errors as `bootstrap_interval`.
    """
    before, after = np.asarray(base, np.float64), np.asarray(score, np.float64)
    d, w = _items(_differences(before, after), weights)
    if shares and np.isin((before, after), (0.0, 1.0)).all() and (w == w[0]).all():
        lost, gained = int((d < 0).sum()), int((d > 0).sum())
        return paired_proportions_interval(lost, gained, len(d), level=level)
    if shares and len(d) >= _FEWEST and _most_common(d) == 0:
        return _with_extremes(d, w, 0.0, 1.0, level)
    return bootstrap_interval(d, w, level=level, resamples=resamples, seed=seed)


def detectable_change(
    n: int,
    discordance: float | None = None,
    *,
    spread: float | None = None,
    level: float = 0.95,
    power: float = 0.8,
) -> float:
    """The smallest true change that n paired items would show, most of the time, as no noise.

    Right or wrong items, of which a share `discordance` changed (lost + gained, over n): the d in

        d = ( z_level * sqrt(discordance) + z_power * sqrt(discordance - d^2) ) / sqrt(n)

    Other items, whose differences have standard deviation `spread`:

        d = (z_level + z_power) * spread / sqrt(n)

    Args:
        n: items, 1 or more.
        discordance: in 0..1; at least the change itself, so where less was seen than d (none, for
            example) d counts as the discordance.
        spread: 0 or more; give one of the two.
        level: confidence of the test, in (0, 1).
        power: probability of seeing the change, in (0, 1).

    Returns:
        In the unit of the items; at most 1 for right or wrong ones.

    Raises:
        ValueError: neither or both of the two, or a number out of its range.

    Reference:
        Connor 1987, "Sample size for testing differences in proportions for the paired-sample
        design", Biometrics 43.
    """
    if (discordance is None) == (spread is None):
        raise ValueError("give either discordance or spread")
    if n < 1 or not 0 < power < 1:
        raise ValueError(f"need n of 1 or more and power in (0, 1), got n {n} and power {power}")
    z, z_power = _z(level), NormalDist().inv_cdf(power)
    if spread is not None:
        return (z + z_power) * spread / math.sqrt(n)
    share = float(discordance or 0.0)
    if not 0 <= share <= 1:
        raise ValueError(f"discordance must be in 0..1, got {share}")

    def too_small(d: float) -> bool:
        changed = max(share, d)
        return d * math.sqrt(n) < z * math.sqrt(changed) + z_power * math.sqrt(changed - d * d)

    return _last_accepted(too_small, 0.0, 1.0)


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


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated without bias from n of them.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1 .. n} (1 - k / i)

    Args:
        n: samples of one problem, 1 or more.
        correct: how many of them are right, 0..n.
        k: 1..n.

    Returns:
        In 0..1; 1 as soon as fewer than k samples are wrong.

    Raises:
        ValueError: counts that cannot be.

    Reference:
        Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"no pass@{k} from {correct} right samples of {n}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


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


def _differences(base: ArrayLike, score: ArrayLike) -> _Floats:
    before, after = np.asarray(base, np.float64), np.asarray(score, np.float64)
    if before.shape != after.shape:
        raise ValueError(
            f"paired scores need the same items, got {before.size} for the base and {after.size}"
        )
    differences: _Floats = after - before
    return differences


def _most_common(x: _Floats) -> float | None:
    """The number that half of the items or more are; None where there is none."""
    values, counts = np.unique(x, return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if 2 * counts[most] >= len(x) else None


def _with_extremes(
    x: _Floats, w: _Floats, centre: float, distance: float, level: float
) -> Interval:
    """The normal interval of the mean after an item was added on either side of a centre."""
    mean, stderr, _ = mean_stderr(
        [*x, centre - distance, centre + distance], [*w, w.mean(), w.mean()]
    )
    return normal_interval(mean, stderr, level)


def _studentised(x: _Floats, w: _Floats, resamples: int, rng: np.random.Generator) -> _Floats:
    """Mean over standard error of draws of n items with replacement, of items whose mean is 0.

    A draw of one item over and over has no error; it counts as infinitely far, or as 0 at the mean.
    """
    n = len(x)
    terms = np.stack([w, w * x, w * w, w * w * x, w * w * x * x], axis=1)
    rows = max(1, _CHUNK // n)
    found = []
    for start in range(0, resamples, rows):
        counts = _counts(n, min(rows, resamples - start), rng)
        total, first, w2, w2x, w2x2 = (counts @ terms).T
        mean = first / total
        # sum of (w (x - mean))^2; rounding leaves a trace of the terms where all items are one.
        squares = w2x2 - 2 * mean * w2x + mean * mean * w2
        spread = np.where(squares > 1e-12 * w2x2, squares, 0.0) * n / (n - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = mean * total / np.sqrt(spread)
        found.append(np.nan_to_num(t, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.concatenate(found)


def _counts(n: int, draws: int, rng: np.random.Generator) -> _Floats:
    """How often each of n items was drawn in n draws with replacement, (draws, n)."""
    drawn = rng.integers(0, n, size=(draws, n)) + n * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)
    return counts.astype(np.float64)


def _tango_score(gained: int, lost: int, n: int, D: float) -> float:
    """Standardised distance of the counts from a change of D; infinite where D cannot be."""
    p = -gained - lost + (2 * n - gained + lost) * D
    c = -lost * D * (1 - D)
    q = (math.sqrt(max(p * p - 8 * n * c, 0.0)) - p) / (4 * n)
    distance = gained - lost - n * D
    variance = n * (2 * q + D * (1 - D))
    if variance <= 1e-12:
        return 0.0 if abs(distance) < 1e-9 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _last_accepted(accepted: Callable[[float], bool], inside: float, outside: float) -> float:
    """The end, by bisection, of the stretch from `inside` in which all numbers are accepted."""
    if accepted(outside):
        return outside
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        if accepted(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _points(points: Iterable[Point]) -> list[Point]:
    """As floats, without nan."""
    xy = [(float(x), float(y)) for x, y in points]
    for i, point in enumerate(xy):
        if any(math.isnan(value) for value in point):
            raise ValueError(f"point {i} is {point}: leave out, and name, what was not measured")
    return xy


def _z(level: float) -> float:
    """Two-sided normal quantile: 1.96 for a level of 0.95."""
    _check_level(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
