"""95 % intervals: over seeds where there are several, over a task's items where there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Z_95 = 1.959964
# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom.
T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: the score of one run, or the mean over seeds.
        low: the lower end; equal to `value` when no error is known.
        high: the upper end.
        seeds: how many runs were averaged.
        num_items: items of the task; None when the task has none.
        seeds_agree: there is no spread over seeds, so the interval is the one over items.
    """

    value: float
    low: float
    high: float
    seeds: int
    num_items: int | None
    seeds_agree: bool = True

    @property
    def ends(self) -> tuple[float, float]:
        """The interval."""
        return self.low, self.high

    @property
    def has_error(self) -> bool:
        """Whether an error is known at all."""
        return self.low < self.high

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two cannot be told apart: intervals share a point, or one has no error."""
        if not (self.has_error and other.has_error):
            return True
        return self.low <= other.high and other.low <= self.high


def over_seeds(
    values: Sequence[float],
    stderrs: Sequence[float | None],
    num_items: int | None,
    *,
    is_share: bool,
) -> Estimate:
    """The mean of the seeds with Student's t interval; of one seed, the interval over items.

    Seeds that agree exactly have no spread to judge by, so then it is the interval over items too.
    """
    mean = fmean(values)
    spread = stdev(values) if len(values) > 1 else 0.0
    if spread > 0:
        half = t_95(len(values) - 1) * spread / math.sqrt(len(values))
        low, high = mean - half, mean + half
    else:
        low, high = over_items(mean, stderrs[0], num_items, is_share=is_share)
    if is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, low, high, len(values), num_items, seeds_agree=spread == 0)


def over_items(
    value: float, stderr: float | None, num_items: int | None, *, is_share: bool
) -> tuple[float, float]:
    """The interval of one score: value ± 1.96 standard errors; Wilson's at exactly 0 or 1.

    At 0 or 1 every item agrees, so the standard error is 0 although the true share is not known
    exactly; Wilson's score interval has no such hole.
    """
    if is_share and value in (0.0, 1.0) and num_items:
        return wilson(value, num_items)
    half = Z_95 * (stderr or 0.0)
    return value - half, value + half


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share seen in `count` items.

    Reference:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    square = Z_95 * Z_95
    centre = (share + square / (2 * count)) / (1 + square / count)
    root = math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half = Z_95 * root / (1 + square / count)
    return centre - half, centre + half


def t_95(degrees: int) -> float:
    """Student's two-sided 95 % quantile, to 4 digits up to 30 degrees of freedom, 3 above."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    return Z_95 + (Z_95**3 + Z_95) / (4 * degrees)
