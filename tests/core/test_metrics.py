"""The measures of learning and forgetting: by hand, by property, and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetless.core.metrics import (
    Interval,
    bootstrap_mean,
    detectable_change,
    forgetting,
    forgetting_at_matched_learning,
    hypervolume,
    mcnemar,
    mean_stderr,
    mean_with_extremes,
    paired_difference,
    paired_proportions_interval,
    pareto_front,
    retention,
    t_interval,
    t_probability,
    wilson_interval,
)

# Loaded before the first example of a test, for which hypothesis has a limit of time.
assert scipy.optimize
assert scipy.special


def bootstrap_interval(*arguments: Any, **options: Any) -> Interval:
    return bootstrap_mean(*arguments, **options).interval


def paired_interval(*arguments: Any, **options: Any) -> Interval:
    return paired_difference(*arguments, **options).interval


numbers = st.floats(-1e3, 1e3)
scores = st.floats(0, 1e3)
points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12)


class TestMeanStderr:
    def test_right_and_wrong_by_hand(self) -> None:
        mean = mean_stderr([1, 1, 1, 0])
        assert mean.value == 0.75
        assert mean.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
        assert mean.n == 4

    def test_equal_weights_give_the_sample_deviation_over_root_n(self) -> None:
        values = [1.0, 2.5, -3.0, 4.0, 0.25]
        expected = np.std(values, ddof=1) / math.sqrt(5)
        assert mean_stderr(values, [7.0] * 5).stderr == pytest.approx(expected)
        assert mean_stderr(values).stderr == pytest.approx(expected)

    def test_weights_by_hand(self) -> None:
        mean = mean_stderr([1.0, 4.0], [1, 2])
        assert mean.value == pytest.approx(3.0)
        assert mean.stderr == pytest.approx(math.sqrt(2 * (4 + 4)) / 3)

    def test_the_stderr_of_a_ratio_is_the_spread_over_samples(self) -> None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(5, 200, size=(2000, 60))
        losses = 2 + rng.normal(size=tokens.shape) * 5 / np.sqrt(tokens) + 20 / tokens
        means = [mean_stderr(x, w) for x, w in zip(losses, tokens, strict=True)]
        spread = np.std([mean.value for mean in means])
        assert np.mean([mean.stderr for mean in means]) == pytest.approx(spread, rel=0.05)

    def test_one_item_has_no_known_error(self) -> None:
        mean = mean_stderr([0.5])
        assert mean.value == 0.5
        assert math.isnan(mean.stderr)

    @given(st.lists(numbers, min_size=2, max_size=20), numbers)
    def test_shift_moves_the_mean_and_not_its_error(self, values: list[float], c: float) -> None:
        before, after = mean_stderr(values), mean_stderr([x + c for x in values])
        assert after.value == pytest.approx(before.value + c, abs=1e-9)
        assert after.stderr == pytest.approx(before.stderr, abs=1e-9)

    @given(numbers, st.lists(st.floats(0.01, 100), min_size=2, max_size=20))
    def test_a_constant_is_its_own_mean(self, value: float, weights: list[float]) -> None:
        mean = mean_stderr([value] * len(weights), weights)
        assert mean.value == value
        assert mean.stderr == 0

    @pytest.mark.parametrize(
        ("values", "weights", "message"),
        [
            ([], None, "at least one item"),
            ([[1.0]], None, "one number an item"),
            ([1.0, math.nan], None, "1 of 2 items are not finite"),
            ([math.inf], None, "not finite"),
            ([1.0, 2.0], [1.0], "one weight an item"),
            ([1.0, 2.0], [1.0, 0.0], "above 0"),
        ],
    )
    def test_refuses(self, values: list[float], weights: list[float] | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mean_stderr(values, weights)


class TestRetentionAndForgetting:
    @pytest.mark.parametrize(
        ("score", "base", "higher", "expected"),
        [
            (0.4, 0.8, True, 0.5),
            (0.9, 0.8, True, 1.0),
            (0.0, 0.8, True, 0.0),
            (4.0, 2.0, False, 0.5),
            (1.0, 2.0, False, 1.0),
            (0.0, 2.0, False, 1.0),
        ],
    )
    def test_by_hand(self, score: float, base: float, higher: bool, expected: float) -> None:
        assert retention(score, base, higher) == expected

    def test_lora_null_table(self) -> None:
        # LoRA's row of the paper: 45.95, 1.16 and 6.64 from 52.50, 18.84 and 5.91.
        rows = [(45.95, 52.50), (1.16, 18.84), (6.64, 5.91)]
        mean = np.mean([retention(score, base) for score, base in rows])
        assert 100 * mean == pytest.approx(64.56, abs=0.01)

    def test_nothing_to_keep_or_not_measured(self) -> None:
        assert math.isnan(retention(0.3, 0.0))
        assert math.isnan(retention(0.0, 0.0, higher_is_better=False))
        assert math.isnan(retention(math.nan, 0.5))
        assert math.isnan(retention(0.5, math.nan, higher_is_better=False))
        assert math.isnan(forgetting(math.nan, 0.5))
        assert math.isnan(retention(0.3, 0.0, capped=False))

    def test_gains_count_only_uncapped(self) -> None:
        assert retention(0.9, 0.6, capped=False) == pytest.approx(1.5)
        assert retention(1.0, 2.0, higher_is_better=False, capped=False) == 2
        assert retention(0.0, 2.0, higher_is_better=False, capped=False) == math.inf

    def test_a_score_with_a_sign_has_no_share(self) -> None:
        assert math.isnan(retention(-0.1, 0.5))
        assert math.isnan(retention(0.1, -0.5, capped=False))

    @given(scores, scores, st.booleans())
    def test_both_agree_on_worse(self, score: float, base: float, higher: bool) -> None:
        kept, lost = retention(score, base, higher), forgetting(score, base, higher)
        assert forgetting(base, score, higher) == -lost
        if base > 0:
            assert 0 <= kept <= 1
            assert kept == 1 if lost <= 0 else kept <= 1


class TestIntervals:
    def test_student_s_and_wilson_s_by_hand(self) -> None:
        # t(2) = 4.3027, t(40) = 2.0211; 10 right of 10: 1 / (1 + 1.96^2 / 10).
        assert t_interval(0.0, 1.0, 2).high == pytest.approx(4.3027, abs=1e-4)
        assert t_interval(0.0, 1.0, 40).high == pytest.approx(2.0211, abs=1e-4)
        assert tuple(wilson_interval(1.0, 10)) == pytest.approx((0.7225, 1.0), abs=1e-4)
        assert wilson_interval(0.5, 100, 0.9).high == pytest.approx(0.5812, abs=1e-4)

    @given(numbers, st.floats(1e-3, 1e3), st.floats(0.5, 100), st.floats(0.5, 0.99))
    def test_a_p_value_goes_with_its_interval(
        self, value: float, stderr: float, degrees: float, level: float
    ) -> None:
        p = t_probability(value, stderr, degrees)
        if abs(p - (1 - level)) > 1e-6:
            assert (0 in t_interval(value, stderr, degrees, level)) == (p > 1 - level)

    def test_a_probability_without_an_error(self) -> None:
        assert t_probability(0.3, math.nan) == t_probability(0.0, 0.0) == 1.0
        assert t_probability(0.3, 0.0) == 0.0

    def test_items_are_added_where_most_are_alike(self) -> None:
        changed = [0.0] * 8 + [0.5, -0.25]
        mean = mean_with_extremes(changed, distance=1.0)
        assert mean == (*mean_stderr([*changed, -1.0, 1.0])[:2], 10)
        assert mean_with_extremes(changed) == (*mean_stderr([*changed, -0.5, 0.5])[:2], 10)
        spread = [0.1, 0.2, 0.4, 0.1]
        assert mean_with_extremes([*spread, 0.7]) == mean_stderr([*spread, 0.7])

    def test_normal(self) -> None:
        low, high = t_interval(1.0, 2.0)
        assert (low, high) == pytest.approx((1 - 3.919928, 1 + 3.919928), abs=1e-6)
        assert 1.0 in t_interval(1.0, 2.0)
        assert 5.0 not in t_interval(1.0, 2.0)

    @given(st.lists(st.integers(-9, 9), min_size=5, max_size=15), st.integers(0, 5))
    @settings(max_examples=30)
    def test_holds_its_order_is_seeded_and_moves_with_the_items(
        self, values: list[int], seed: int
    ) -> None:
        interval = bootstrap_interval(values, seed=seed, resamples=100)
        assert interval.low <= interval.high
        assert interval == bootstrap_interval(values, seed=seed, resamples=100)
        moved = bootstrap_interval([2 * x + 1 for x in values], seed=seed, resamples=100)
        assert tuple(moved) == pytest.approx([2 * end + 1 for end in interval])

    def test_draws_of_one_item_alone_have_no_error_at_any_mean(self) -> None:
        """Their spread around a mean that was rounded is not 0."""
        for values in ([-1, -8, 0, -5, -8], [0.1, 0.7, 0.3, 0.2, 0.7]):
            for seed in range(20):
                drawn = bootstrap_interval(values, seed=seed, resamples=100)
                assert all(math.isinf(end) or abs(end) < 1e3 for end in drawn)

    def test_a_constant_difference_is_certain(self) -> None:
        base = np.random.default_rng(0).normal(size=50)
        low, high = paired_interval(base, base + 0.25)
        assert (low, high) == pytest.approx((0.25, 0.25))
        assert paired_interval(base, base) == (0, 0)
        assert paired_interval(base, base) == (0, 0)

    def test_pairing_is_narrower_than_two_means(self) -> None:
        rng = np.random.default_rng(0)
        base = rng.normal(size=200)
        tuned = base + rng.normal(0.1, 0.1, size=200)
        low, high = paired_interval(base, tuned)
        apart = math.hypot(mean_stderr(base).stderr, mean_stderr(tuned).stderr)
        assert high - low < 0.2 * 2 * 1.96 * apart

    def test_weights_are_drawn_with_their_items(self) -> None:
        low, high = bootstrap_interval([0.0] * 40 + [1.0] * 40, [1.0] * 40 + [3.0] * 40)
        assert low < 0.75 < high
        assert high - low < 0.3

    @pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 4.0, 5.0]])
    def test_a_few_items_tell_nothing(self, values: list[float]) -> None:
        assert all(math.isnan(end) for end in bootstrap_interval(values))

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.random.default_rng(0).normal(size=37)
        whole = bootstrap_interval(values, resamples=101)
        monkeypatch.setattr("forgetless.core.metrics._CHUNK", 100)
        assert bootstrap_interval(values, resamples=101) == pytest.approx(whole)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"level": 1.0}, "level must be between 0 and 1"),
            ({"resamples": 0}, "resamples must be 1 or more"),
        ],
    )
    def test_refuses(self, arguments: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            bootstrap_interval([1.0, 2.0], **arguments)
        with pytest.raises(ValueError, match="same items, got 2 for the base and 3"):
            paired_interval([1, 2], [1, 2, 3])


class TestPairedProportions:
    @pytest.mark.parametrize(("lost", "gained", "n"), [(3, 8, 30), (0, 4, 25), (12, 1, 90)])
    def test_its_ends_are_where_the_score_test_turns(self, lost: int, gained: int, n: int) -> None:
        for D in paired_proportions_interval(lost, gained, n):
            q = np.linspace(max(0, -D), (1 - D) / 2, 2_000_001)[1:-1]
            likelihood = gained * np.log(q + D) + lost * np.log(q)
            likelihood += (n - lost - gained) * np.log(1 - 2 * q - D)
            most_likely = q[likelihood.argmax()]
            deviation = math.sqrt(n * (2 * most_likely + D - D * D))
            assert abs(gained - lost - n * D) / deviation == pytest.approx(1.959964, abs=1e-3)

    def test_without_any_change_it_is_wilsons(self) -> None:
        low, high = paired_proportions_interval(0, 0, 50)
        z2 = 1.959964**2
        assert (low, high) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-6)

    @given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60))
    def test_is_a_symmetric_interval_around_the_change(
        self, lost: int, gained: int, n: int
    ) -> None:
        if lost + gained > n:
            with pytest.raises(ValueError, match="no counts of items"):
                paired_proportions_interval(lost, gained, n)
            return
        low, high = paired_proportions_interval(lost, gained, n)
        assert -1 <= low <= (gained - lost) / n <= high <= 1
        assert low < high
        mirrored = paired_proportions_interval(gained, lost, n)
        assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low), abs=1e-12)

    @pytest.mark.parametrize("n", [400, 4000])
    def test_of_many_items_it_is_the_normal_one(self, n: int) -> None:
        lost, gained = n // 5, n // 10
        change = (gained - lost) / n
        half = 1.959964 * math.sqrt((0.3 - change**2) / n)
        found = paired_proportions_interval(lost, gained, n)
        assert tuple(found) == pytest.approx((change - half, change + half), abs=1 / n)


class TestPairedDifference:
    @pytest.mark.parametrize("kind", ["right or wrong", "shares", "losses", "few"])
    def test_its_test_goes_with_its_interval(self, kind: str) -> None:
        rng = np.random.default_rng(3)
        said = set()
        for seed in range(60):
            n = 4 if kind == "few" else 40
            base = rng.integers(0, 2, n) if kind == "right or wrong" else rng.random(n)
            after = base + rng.normal(-0.1 * (seed % 3), 0.3, n)
            if kind == "shares":
                after = np.where(rng.random(n) < 0.6, base, after)
            if kind == "right or wrong":
                after = np.where(rng.random(n) < 0.1 * (seed % 3), 0, base)
            found = paired_difference(base, after, shares=kind != "losses", seed=seed)
            outside = found.interval.low > 0 or found.interval.high < 0
            assert outside == (found.p_value <= 0.05)
            said.add(outside)
        assert said == ({False} if kind == "few" else {False, True})

    def test_right_and_wrong_items_have_tangos(self) -> None:
        base, tuned = [1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]
        found = paired_interval(base, tuned, shares=True)
        assert found == paired_proportions_interval(2, 1, 6)

    def test_other_items_have_the_bootstrap_s(self) -> None:
        base, tuned = np.random.default_rng(0).normal(size=(2, 20))
        assert paired_interval(base, tuned) == paired_interval(base, tuned)
        half = np.random.default_rng(0).random(size=(2, 20))
        assert paired_interval(*half, shares=True) == paired_interval(*half)

    def test_few_changed_items_of_many_do_not_look_certain(self) -> None:
        base = np.full(40, 0.5)
        tuned = base.copy()
        tuned[0] = 0.25
        found = paired_interval(base, tuned, shares=True)
        assert found.high > 0.04
        unbounded = paired_interval(base, tuned)
        assert 0 < unbounded.high < found.high
        assert unbounded.low < -0.25 / 40
        unchanged = paired_interval(base, base, shares=True)
        assert unchanged.low == pytest.approx(-unchanged.high)
        assert unchanged.high > 0.04


# (n, lost, gained): small and large n, even and one-sided changes, common and rare ones.
RIGHT_OR_WRONG = [
    *[(20, 0.3, 0.2), (20, 0.05, 0.3), (30, 0.16, 0.02), (30, 0.2, 0.0), (50, 0.2, 0.0)],
    *[(50, 0.3, 0.05), (100, 0.02, 0.16), (100, 0.0, 0.05), (150, 0.16, 0.02), (200, 0.01, 0.01)],
    *[
        (200, 0.9, 0.0),
        (500, 0.005, 0.02),
        (500, 0.02, 0.0),
        (1000, 0.1, 0.1),
        (1000, 0.005, 0.005),
    ],
]


class TestCoverage:
    """How often 95 % intervals hold the true difference, over 1 000 simulated pairs or more."""

    @pytest.mark.parametrize(("n", "lost", "gained"), RIGHT_OR_WRONG)
    def test_right_or_wrong_items(self, n: int, lost: float, gained: float) -> None:
        rng = np.random.default_rng(0)
        counts = rng.multinomial(n, [lost, gained, 1 - lost - gained], size=2000)
        kinds, times = np.unique(counts[:, :2], axis=0, return_counts=True)
        covered = sum(
            int(many)
            for (gone, new), many in zip(kinds.tolist(), times, strict=True)
            if gained - lost in paired_proportions_interval(gone, new, n)
        )
        assert 0.93 <= covered / 2000 <= 0.97

    @pytest.mark.parametrize("n", [5, 10, 20, 50, 100])
    def test_right_or_wrong_items_of_any_rates(self, n: int) -> None:
        # Where hardly any item changes no interval of counts can be as narrow as 95 %, so rates
        # differ from pair to pair; few items are judged with care: never below 93 %.
        rng = np.random.default_rng(0)
        covered = 0
        for lost, gained, _ in rng.dirichlet([1, 1, 2], size=2000):
            gone, new, _ = rng.multinomial(n, [lost, gained, 1 - lost - gained])
            covered += gained - lost in paired_proportions_interval(int(gone), int(new), n)
        assert 0.93 <= covered / 2000 <= (0.97 if n >= 10 else 1)

    @pytest.mark.parametrize(
        ("kind", "n"),
        [("normal", 6), ("tokens", 20), ("tokens", 60), ("skewed", 40)],
    )
    def test_losses(self, kind: str, n: int) -> None:
        rng = np.random.default_rng(1)
        covered = 0
        for seed in range(1000):
            base = rng.normal(3.0, 1.0, size=n)
            tokens = rng.integers(20, 200, size=n) if kind == "tokens" else None
            change = rng.gamma(0.5, 0.4, n) if kind == "skewed" else rng.normal(0.2, 0.5, size=n)
            interval = paired_interval(base, base + change, tokens, resamples=400, seed=seed)
            covered += 0.2 in interval
        assert 0.93 <= covered / 1000 <= 0.97

    @pytest.mark.parametrize("n", [60, 200])
    def test_shares_of_samples_that_mostly_stay(self, n: int) -> None:
        rng = np.random.default_rng(2)
        covered = 0
        for _ in range(1000):
            change = rng.choice([-1, -0.5, 0, 0.5], n, p=[0.1, 0.15, 0.7, 0.05])
            base = np.where(change < 0, 1.0, 0.5)
            covered += -0.15 in paired_interval(base, base + change, shares=True)
        assert 0.93 <= covered / 1000 <= 0.97


class TestDetectableChange:
    @pytest.mark.parametrize(("n", "discordance"), [(100, 0.2), (500, 0.1), (1000, 0.5)])
    def test_is_seen_four_times_in_five(self, n: int, discordance: float) -> None:
        rng = np.random.default_rng(0)
        d = detectable_change(n, discordance)
        shares = [(discordance + d) / 2, (discordance - d) / 2, 1 - discordance]
        seen = [
            0.0 not in paired_proportions_interval(int(lost), int(gained), n)
            for lost, gained, _ in rng.multinomial(n, shares, size=1000)
        ]
        assert np.mean(seen) == pytest.approx(0.8, abs=0.04)

    def test_is_larger_than_the_discordance_where_that_was_small(self) -> None:
        d = detectable_change(100, 0.0)
        assert d == pytest.approx(detectable_change(100, d))
        assert 0.05 < d < 0.12
        assert detectable_change(1, 0.0) == 1

    def test_of_other_items_by_hand(self) -> None:
        assert detectable_change(100, spread=0.5) == pytest.approx((1.959964 + 0.841621) * 0.05)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "give either"),
            ({"discordance": 0.1, "spread": 0.1}, "give either"),
            ({"discordance": 1.1}, "discordance must be in"),
            ({"spread": 1.0, "power": 1.0}, "power in"),
        ],
    )
    def test_refuses(self, arguments: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            detectable_change(10, **arguments)


class TestMcNemar:
    @pytest.mark.parametrize(
        ("lost", "gained", "expected"),
        [(0, 0, 1.0), (5, 0, 2 / 32), (1, 4, 12 / 32), (3, 3, 1.0), (10, 2, 2 * 79 / 4096)],
    )
    def test_by_hand(self, lost: int, gained: int, expected: float) -> None:
        assert mcnemar(lost, gained) == pytest.approx(expected)
        assert mcnemar(gained, lost) == pytest.approx(expected)

    @given(st.integers(0, 300), st.integers(0, 300))
    def test_is_the_binomial_tail(self, lost: int, gained: int) -> None:
        n = lost + gained
        tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
        assert mcnemar(lost, gained) == pytest.approx(min(1, 2 * tail / 2**n))

    def test_refuses_negative_counts(self) -> None:
        with pytest.raises(ValueError, match="0 or more"):
            mcnemar(-1, 2)


class TestParetoAndHypervolume:
    def test_by_hand(self) -> None:
        plane = [(0.2, 0.9), (0.5, 0.5), (0.4, 0.6), (0.5, 0.4), (0.1, 0.9), (0.5, 0.5)]
        assert pareto_front(plane) == [0, 2, 1, 5]
        assert hypervolume(plane) == pytest.approx(0.2 * 0.9 + 0.2 * 0.6 + 0.1 * 0.5)
        assert hypervolume(plane, (0.3, 0.45)) == pytest.approx(0.1 * 0.15 + 0.1 * 0.05)
        assert pareto_front([]) == []
        assert hypervolume([]) == 0

    @given(points)
    def test_the_front_is_what_no_point_beats(self, plane: list[tuple[float, float]]) -> None:
        def beaten(i: int) -> bool:
            x, y = plane[i]
            return any((a, b) != (x, y) and a >= x and b >= y for a, b in plane)

        expected = [i for i in range(len(plane)) if not beaten(i)]
        front = pareto_front(plane)
        assert sorted(front) == expected
        assert [plane[i][0] for i in front] == sorted(plane[i][0] for i in front)

    @given(points)
    def test_the_hypervolume_counts_the_unit_squares(self, plane: list[tuple[int, int]]) -> None:
        squares = sum(any(x > i and y > j for x, y in plane) for i in range(8) for j in range(8))
        assert hypervolume(plane) == squares
        front = [plane[i] for i in pareto_front(plane)]
        assert hypervolume(front) == squares

    def test_a_missing_number_is_not_averaged_away(self) -> None:
        with pytest.raises(ValueError, match=r"point 1 is \(0\.5, nan\)"):
            pareto_front([(0.1, 0.2), (0.5, math.nan)])
        with pytest.raises(ValueError, match="not measured"):
            hypervolume([(math.nan, 0.2)])


class TestMatchedLearning:
    def test_by_hand(self) -> None:
        curve = [(0.2, 0.9), (0.8, 0.3)]
        assert forgetting_at_matched_learning(curve, 0.5) == pytest.approx(0.6)
        assert forgetting_at_matched_learning(curve, 0.2) == 0.9
        assert forgetting_at_matched_learning(curve, 0.8) == 0.3

    def test_never_extrapolates(self) -> None:
        curve = [(0.2, 0.9), (0.8, 0.3)]
        assert math.isnan(forgetting_at_matched_learning(curve, 0.81))
        assert math.isnan(forgetting_at_matched_learning(curve, 0.19))
        assert math.isnan(forgetting_at_matched_learning([], 0.5))
        assert forgetting_at_matched_learning([(0.5, 0.7)], 0.5) == 0.7

    def test_too_high_a_rate_that_learns_less_again_counts_by_its_best_side(self) -> None:
        curve = [(0.2, 0.9), (0.8, 0.5), (0.4, 0.1)]
        assert forgetting_at_matched_learning(curve, 0.6) == pytest.approx(0.9 - 0.4 * 4 / 6)
        loses = [(x, 1 - y) for x, y in curve]
        assert forgetting_at_matched_learning(loses, 0.6, False) == pytest.approx(0.1 + 0.4 * 4 / 6)

    @given(
        st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6),
        st.floats(0, 1),
    )
    def test_stays_inside_the_curve(self, curve: list[tuple[float, float]], x: float) -> None:
        value = forgetting_at_matched_learning(curve, x)
        inside = min(a for a, _ in curve) <= x <= max(a for a, _ in curve)
        assert math.isnan(value) != inside
        if inside:
            lows, highs = min(b for _, b in curve), max(b for _, b in curve)
            assert lows - 1e-12 <= value <= highs + 1e-12

    def test_refuses_nan(self) -> None:
        with pytest.raises(ValueError, match="learning must be a number"):
            forgetting_at_matched_learning([(0.1, 0.2)], math.nan)


def test_inputs_are_not_changed() -> None:
    values = np.array([1.0, 2.0, 4.0])
    plane = [(0.5, 0.5), (0.1, 0.9)]
    bootstrap_interval(values, values, resamples=10)
    mean_stderr(values, values)
    pareto_front(plane)
    hypervolume(plane)
    assert values.tolist() == [1.0, 2.0, 4.0]
    assert plane == [(0.5, 0.5), (0.1, 0.9)]
