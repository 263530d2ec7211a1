"""Learning and forgetting as numbers: means, differences, fronts and intervals. No torch.

Throughout, a *score* is the value of a task for one model, `base` is the same task's value for the
untouched base model, and an *item* is one question, prompt or document of a task.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Point = tuple[float, float]
_Floats = NDArray[np.float64]

# Resampled items held at once: 8 MB of indices.
_CHUNK = 1_000_000

# Below, a resampled standard error is often 0 and a studentised interval has no ends.
_FEWEST = 5


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


class Finding(NamedTuple):
    """A confidence interval of a mean, and the test of 0 that goes with it.

    Attributes:
        interval: nan ends where no error can be told.
        p_value: two-sided, that the true mean is 0: below 1 - level where 0 is outside `interval`;
            1 where no error can be told.
    """

    interval: Interval
    p_value: float


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


def retention(
    score: float, base: float, higher_is_better: bool = True, *, capped: bool = True
) -> float:
    """Share of the base model's score that is left.

        score / base   higher is better
        base / score   lower is better (loss, perplexity)

    The mean of the capped share over TriviaQA, NQ-open and WebQS is what LoRA-Null calls Avg1(Per).

    Args:
        score: after training.
        base: before training.
        higher_is_better: the task's direction.
        capped: count a gain as 1, nothing lost.

    Returns:
        0 or more, at most 1 where capped; infinite where a loss fell to 0 and is not capped. nan
        where a ratio means nothing: `base` is 0 (nothing to keep, or a distance to the base itself
        such as KL), a score has a sign (use `forgetting`, a difference), or one was not measured.
    """
    if math.isnan(score) or math.isnan(base) or score < 0 or base <= 0:
        return math.nan
    above, below = (score, base) if higher_is_better else (base, score)
    share = above / below if below > 0 else math.inf
    return min(1.0, share) if capped else share


def forgetting(score: float, base: float, higher_is_better: bool = True) -> float:
    """How much worse a task became; positive is worse in both directions, negative is a gain.

        base - score   higher is better (accuracy, recall)
        score - base   lower is better (loss, KL)

    Returns:
        In the unit of the task; nan when either number is nan.
    """
    return base - score if higher_is_better else score - base


def t_interval(
    value: float, stderr: float, degrees: float = math.inf, level: float = 0.95
) -> Interval:
    """Student's interval, value -/+ t * stderr; the normal one by default.

    Args:
        value: the middle.
        stderr: its standard error; nan gives nan ends.
        degrees: of freedom, above 0; may be broken, as those of Satterthwaite are.
        level: confidence, in (0, 1).
    """
    # Loaded where it is used: scipy takes longer than all else that light commands import.
    from scipy.special import stdtrit

    _check_level(level)
    half = float(stdtrit(degrees, (1 + level) / 2)) * stderr
    return Interval(value - half, value + half)


def t_probability(value: float, stderr: float, degrees: float = math.inf) -> float:
    """Two-sided p-value of a value where nothing but its error moves it from 0.

    Returns:
        In 0..1, below 1 - level where 0 is outside `t_interval`; 1 where the error is not known.
    """
    from scipy.special import stdtr  # see `t_interval`

    if math.isnan(stderr) or value == 0:
        return 1.0
    return 2 * float(stdtr(degrees, -abs(value) / stderr)) if stderr > 0 else 0.0


def wilson_interval(share: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share seen in n items; no point at a share of 0 or 1.

    Reference:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference",
        Journal of the American Statistical Association 22.
    """
    square = _z(level) ** 2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = math.sqrt(square * (share * (1 - share) / n + square / (4 * n * n))) / (1 + square / n)
    # At a share of 0 or 1 that is one of the ends, but for rounding.
    return Interval(max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0))


def mean_with_extremes(
    values: ArrayLike, weights: ArrayLike | None = None, distance: float | None = None
) -> Mean:
    """As `mean_stderr`, with an error also where hardly any item differs from the others.

    Where half of the items or more are the same, as when few of many changed, an item is added on
    either side of these, as far from them as the farthest, or `distance`. Otherwise nothing is.

    Args:
        values: one number an item.
        weights: one weight an item, above 0; None for equal weights.
        distance: of the added items; None for the farthest that was seen.

    Returns:
        Value and standard error with the added items, and n without them.

    Reference:
        Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
        proportions", Statistics in Medicine 24.
    """
    x, w = _items(values, weights)
    common = _most_common(x)
    if common is None:
        return mean_stderr(x, w)
    away = float(np.abs(x - common).max()) if distance is None else distance
    mean = mean_stderr([*x, common - away, common + away], [*w, w.mean(), w.mean()])
    return mean._replace(n=len(x))


def bootstrap_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Finding:
    """Interval of the (weighted) mean from resampled items, studentised, and its test of 0.

        t_b = (mean_b - mean) / stderr_b      ends: mean - t_high * stderr, mean - t_low * stderr
        p = 2 min( share of t_b >= mean / stderr, share of t_b <= mean / stderr )

    Items are drawn with replacement `resamples` times, always the same way for a seed; t_low and
    t_high are quantiles of t_b. Dividing by each draw's own standard error is what makes the
    interval hold for few items and for skewed ones, where percentiles of the means are too narrow.

    Where half of the items or more are the same, as when few of many changed, many draws are all
    alike and have no error to divide by. The interval is then the normal one of
    `mean_with_extremes`.

    Args:
        values: one number an item.
        weights: as in `mean_stderr`; an item is drawn together with its weight.
        level: confidence, in (0, 1).
        resamples: number of draws, 1 or more.
        seed: of numpy's default generator, 0 or more.

    Returns:
        Interval and p-value; the one point where all items are the same; else an unknown interval
        for fewer than 5 items, from which no error can be told this way.

    Raises:
        ValueError: as `mean_stderr`, or a level or number of resamples out of its range.

    Reference:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5 (bootstrap-t).
    """
    x, w = _items(values, weights)
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    mean, stderr, n = mean_stderr(x, w)
    if n > 1 and stderr == 0:
        return Finding(Interval(mean, mean), t_probability(mean, stderr))
    if n < _FEWEST:
        return Finding(Interval(math.nan, math.nan), 1.0)
    if _most_common(x) is not None:
        return _normal(mean_with_extremes(x, w), level)
    t = _studentised(x - mean, w, resamples, np.random.default_rng(seed))
    tail = (1 - level) / 2
    low, high = np.quantile(t, [tail, 1 - tail], method="inverted_cdf")
    interval = Interval(float(mean - high * stderr), float(mean - low * stderr))
    beyond = min(np.mean(t >= mean / stderr), np.mean(t <= mean / stderr))
    # Of so many draws none says no more than that it is one in as many.
    return Finding(interval, min(1.0, 2 * max(float(beyond), 1 / resamples)))


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
    square = _z(level) ** 2
    change = (gained - lost) / n

    def beyond(D: float) -> float:
        """By how much the squared distance exceeds what is accepted; at most 0 inside."""
        p = -gained - lost + (2 * n - gained + lost) * D
        q = (math.sqrt(max(p * p + 8 * n * lost * D * (1 - D), 0.0)) - p) / (4 * n)
        variance = max(n * (2 * q + D * (1 - D)), 0.0)
        return float((gained - lost - n * D) ** 2 - square * variance)

    return Interval(_last_accepted(beyond, change, -1.0), _last_accepted(beyond, change, 1.0))


def paired_difference(
    base: ArrayLike,
    score: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    shares: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Finding:
    """Interval and test of mean(score - base) over the same items, as suits the kind of items.

    * Right or wrong (1 and 0, equal weights): `paired_proportions_interval`, with the score test of
      the same name, z = (gained - lost) / sqrt(gained + lost).
    * Other shares, of which half or more did not change: the normal interval of
      `mean_with_extremes`, with items of the largest possible change, 1.
    * Otherwise: `bootstrap_mean` of the differences.

    Pairing takes out what makes items hard or easy for both models, so the interval is narrower
    than that of two separate means.

    Args:
        base: one number an item, under the base model.
        score: the same items under the other, in the same order.
        weights: as in `mean_stderr`.
        shares: whether scores lie in 0..1, as accuracies do.
        level: confidence, in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: as `bootstrap_mean`, and when the two have different lengths.
    """
    before, after = np.asarray(base, np.float64), np.asarray(score, np.float64)
    if before.shape != after.shape:
        raise ValueError(
            f"paired scores need the same items, got {before.size} for the base and {after.size}"
        )
    d, w = _items(after - before, weights)
    if shares and np.isin((before, after), (0.0, 1.0)).all() and (w == w[0]).all():
        lost, gained = int((d < 0).sum()), int((d > 0).sum())
        interval = paired_proportions_interval(lost, gained, len(d), level=level)
        return Finding(interval, t_probability(gained - lost, math.sqrt(gained + lost)))
    if shares and len(d) >= _FEWEST and _most_common(d) == 0:
        return _normal(mean_with_extremes(d, w, 1.0), level)
    return bootstrap_mean(d, w, level=level, resamples=resamples, seed=seed)


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
    from scipy.special import ndtri  # see `t_interval`

    z, z_power = _z(level), float(ndtri(power))
    if spread is not None:
        return (z + z_power) * spread / math.sqrt(n)
    share = float(discordance or 0.0)
    if not 0 <= share <= 1:
        raise ValueError(f"discordance must be in 0..1, got {share}")

    def excess(d: float) -> float:
        changed = max(share, d)
        return d * math.sqrt(n) - z * math.sqrt(changed) - z_power * math.sqrt(changed - d * d)

    return _last_accepted(excess, 0.0, 1.0)


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
    from scipy.special import bdtr  # see `t_interval`

    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def calibration_error(confidences: ArrayLike, right: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: how far the confidences are from the shares that are right.

        ECE = sum_b n_b / n * | mean of right in b - mean confidence in b |

    over bins b of equal width, ((b - 1) / bins, b / bins], on 0..1. It is biased upwards for few
    items a bin, so compare it at the same items.

    Args:
        confidences: p of each answer, in 0..1.
        right: 1 where the answer is right, 0 where it is wrong.
        bins: how many.

    Raises:
        ValueError: no items, or other counts of the two.

    Reference:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3,
        with their 15 bins.
    """
    p, hit = (np.asarray(values, dtype=np.float64) for values in (confidences, right))
    if not len(p) or p.shape != hit.shape:
        raise ValueError(f"need as many confidences as answers, got {len(p)} and {len(hit)}")
    place = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, hit - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


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
    front: list[int] = []
    for i in sorted(range(len(xy)), key=lambda i: (-xy[i][0], -xy[i][1], i)):
        if not front or xy[i][1] > xy[front[-1]][1] or xy[i] == xy[front[-1]]:
            front.append(i)
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


def _normal(mean: Mean, level: float) -> Finding:
    interval = t_interval(mean.value, mean.stderr, level=level)
    return Finding(interval, t_probability(mean.value, mean.stderr))


def _most_common(x: _Floats) -> float | None:
    """The number that half of the items or more are; None where there is none."""
    values, counts = np.unique(x, return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if 2 * counts[most] >= len(x) else None


def _studentised(x: _Floats, w: _Floats, resamples: int, rng: np.random.Generator) -> _Floats:
    """Mean over standard error of draws of n items with replacement, of items whose mean is 0.

    A draw of one item over and over has no error; it counts as infinitely far, or as 0 at the mean.
    """
    n, found = len(x), []
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, n, size=(min(rows, resamples - start), n))
        items, weights = x[drawn], w[drawn]
        total = weights.sum(1)
        mean = (weights * items).sum(1) / total
        spread = np.square(weights * (items - mean[:, None])).sum(1) * n / (n - 1)
        spread[(items == items[:, :1]).all(1)] = 0  # where rounding would leave 1e-32
        with np.errstate(divide="ignore", invalid="ignore"):
            t = mean * total / np.sqrt(spread)
        found.append(np.nan_to_num(t, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.concatenate(found)


def _last_accepted(beyond: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `beyond` rises above 0 on the way from `inside`; `outside` where it never does."""
    from scipy.optimize import brentq  # see `t_interval`

    if inside == outside or beyond(outside) <= 0:
        return outside
    # Where nothing changed `inside` is a root too, and not the one that is looked for.
    return float(brentq(beyond, inside + 1e-9 * (outside - inside), outside, xtol=1e-16))


def _points(points: Iterable[Point]) -> list[Point]:
    """As floats, without nan."""
    xy = [(float(x), float(y)) for x, y in points]
    for i, point in enumerate(xy):
        if any(math.isnan(value) for value in point):
            raise ValueError(f"point {i} is {point}: leave out, and name, what was not measured")
    return xy


def _z(level: float) -> float:
    """Two-sided normal quantile: 1.96 for a level of 0.95."""
    from scipy.special import ndtri  # see `t_interval`

    _check_level(level)
    return float(ndtri((1 + level) / 2))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
