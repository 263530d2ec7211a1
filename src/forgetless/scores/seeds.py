"""95 % intervals: over seeds where there are several, over a task's items where there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from forgetless.core.metrics import t_interval, wilson_interval

__all__ = ["Estimate", "over_items", "over_seeds"]


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
        stderr = spread / math.sqrt(len(values))
        low, high = t_interval(mean, stderr, len(values) - 1)
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
        return wilson_interval(value, num_items)
    return t_interval(value, stderr or 0.0)
