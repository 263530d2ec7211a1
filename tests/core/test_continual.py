"""Measures of a sequence of tasks: by hand, by property, and what is not measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import forgetless as fl
from forgetless.core.continual import continual_metrics

nan = math.nan

# Score on task j (column) after task i (row).
R = [
    [0.80, 0.10, 0.20],
    [0.60, 0.90, 0.30],
    [0.70, 0.50, 0.95],
]


def test_by_hand() -> None:
    found = continual_metrics(R, base=[0.05, 0.02, 0.10])
    assert list(found) == ["ACC", "BWT", "forgetting", "FWT"]
    assert found["ACC"] == pytest.approx((0.70 + 0.50 + 0.95) / 3)
    assert found["BWT"] == pytest.approx(((0.70 - 0.80) + (0.50 - 0.90)) / 2)
    assert found["forgetting"] == pytest.approx(((0.80 - 0.70) + (0.90 - 0.50)) / 2)
    assert found["FWT"] == pytest.approx(((0.10 - 0.02) + (0.30 - 0.10)) / 2)
    assert fl.continual_metrics is continual_metrics


def test_forgetting_is_against_the_best_earlier_score_not_the_first() -> None:
    later = [[0.5, nan, nan], [0.9, 0.4, nan], [0.7, 0.6, 0.8]]
    found = continual_metrics(later, variants=True)
    assert found["BWT"] == pytest.approx((0.2 + 0.2) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.4 - 0.6)) / 2)
    assert found["forgetting (Avalanche)"] == pytest.approx(-0.2)
    assert found["forgetting (Mammoth)"] == pytest.approx((0.2 + 0.0) / 2)


def test_what_was_known_before_a_task_was_learned_counts_as_earlier() -> None:
    # Chaudhry's maximum runs over every earlier row, those before the task's own included.
    knew = [[0.5, 0.9], [0.5, 0.6]]
    assert continual_metrics(knew)["forgetting"] == pytest.approx(0.0)
    three = [[0.9, 0.8, 0.1], [0.9, 0.5, 0.1], [0.9, 0.4, 0.1]]
    assert continual_metrics(three)["forgetting"] == pytest.approx((0.0 + (0.8 - 0.4)) / 2)


def test_forgetting_may_be_negative() -> None:
    found = continual_metrics([[0.6, nan], [0.8, 0.7]], variants=True)
    assert found["forgetting"] == pytest.approx(-0.2)
    assert found["forgetting (Mammoth)"] == 0.0
    assert math.isnan(found["FWT"])


def test_what_is_not_measured_is_not_averaged_away() -> None:
    for i, j, unknown in [
        (2, 0, {"ACC", "BWT", "forgetting"}),
        (2, 2, {"ACC"}),
        (1, 1, {"BWT", "forgetting"}),
        (1, 0, {"forgetting"}),
        (0, 1, {"FWT"}),
        (0, 2, set()),
    ]:
        holed = np.array(R)
        holed[i, j] = nan
        found = continual_metrics(holed, base=[0.0, 0.0, 0.0])
        assert {name for name, value in found.items() if math.isnan(value)} == unknown, (i, j)


def test_one_task_has_an_accuracy_and_nothing_else() -> None:
    found = continual_metrics([[0.9]], base=[0.1], variants=True)
    assert found.pop("ACC") == 0.9
    assert all(math.isnan(value) for value in found.values())


@given(arrays(np.float64, (4, 4), elements=st.floats(0, 1)), st.floats(-1, 1))
def test_properties(scores: np.ndarray, c: float) -> None:
    kept = scores.copy()
    found = continual_metrics(scores, base=scores[0], variants=True)
    assert np.array_equal(scores, kept)
    moved = continual_metrics(scores + c, base=scores[0] + c, variants=True)
    assert moved.pop("ACC") == pytest.approx(found["ACC"] + c)
    assert moved == pytest.approx({k: v for k, v in found.items() if k != "ACC"})
    # The best earlier score is at least the first, and at most the best of all.
    assert found["forgetting"] >= found["forgetting (Avalanche)"] - 1e-12
    assert found["forgetting (Mammoth)"] >= max(found["forgetting"], 0.0) - 1e-12


@pytest.mark.parametrize(
    ("R", "base", "message"),
    [
        ([[0.1, 0.2]], None, r"R must be \(K, K\).*got \(1, 2\)"),
        ([], None, "R must be"),
        (R, [0.1], r"base must have a score for each of 3 tasks, got shape \(1,\)"),
        ([[math.inf]], None, "scores must be finite"),
    ],
)
def test_refuses(R: list[list[float]], base: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continual_metrics(R, base)
