"""Estimates over seeds and items: by hand, and by simulation."""

from __future__ import annotations

import pytest

from forgetless.core.metrics import wilson_interval
from forgetless.scores.seeds import Estimate, over_items, over_seeds


def test_seeds_get_students_t_interval() -> None:
    # Mean 0.8, standard deviation 0.1, t(2) = 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.2484.
    estimate = over_seeds([0.7, 0.8, 0.9], [0.01] * 3, 100, is_share=False)
    assert estimate.value == pytest.approx(0.8)
    assert estimate.ends == pytest.approx((0.5516, 1.0484), abs=1e-4)
    assert over_seeds([0.7, 0.8, 0.9], [None] * 3, 100, is_share=True).high == 1.0


def test_one_seed_gets_the_interval_over_items() -> None:
    assert over_seeds([0.5], [0.1], 100, is_share=True).ends == pytest.approx(
        (0.304, 0.696), abs=1e-3
    )
    assert over_seeds([0.5, 0.5], [0.1, 0.1], 100, is_share=True).seeds_agree


def test_no_error_is_known_where_none_is_told() -> None:
    estimate = over_seeds([2.5], [None], None, is_share=False)
    assert not estimate.has_error
    assert estimate.overlaps(Estimate(9.0, 8.9, 9.1, 1, 10))


def test_a_perfect_score_still_has_an_interval() -> None:
    # Wilson at 10 of 10: low = 1 / (1 + 1.96^2 / 10) = 0.7225.
    low, high = wilson_interval(1.0, 10)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert over_items(1.0, 0.0, 10, is_share=True) == (low, high)
