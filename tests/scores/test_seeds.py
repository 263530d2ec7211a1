"""Estimates over seeds and items: by hand, and by simulation; what they decide, and how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from forgetless.core.metrics import bootstrap_mean, mean_stderr, wilson_interval
from forgetless.scores.seeds import (
    Estimate,
    Ranking,
    Sample,
    choose,
    difference,
    effect,
    estimate,
    from_base,
    holm,
    improved,
    rank,
    retention,
)
from forgetless.tasks.base import Item, TaskResult

Floats = NDArray[np.float64]


def sample(
    x: Floats | Sequence[Sequence[float]],
    seeds: Sequence[int] | None = None,
    *,
    kept: bool = True,
    higher: bool = True,
) -> Sample:
    """Scores of shares in (seeds, items), with their items or without."""
    items = np.asarray(x, np.float64)
    names = list(range(len(items))) if seeds is None else list(seeds)
    means = [mean_stderr(of_seed) for of_seed in items]
    return Sample(
        {seed: mean.value for seed, mean in zip(names, means, strict=True)},
        items if kept else None,
        tuple(f"q{i}" for i in range(items.shape[1])) if kept else (),
        stderr={seed: m.stderr for seed, m in zip(names, means, strict=True) if m.n > 1},
        num_items=items.shape[1],
        is_share=higher,
        higher_is_better=higher,
    )


def scores(*values: float, stderr: float | None = None, n: int | None = None) -> Sample:
    """Shares of which the items were not kept."""
    errors = {} if stderr is None else dict.fromkeys(range(len(values)), stderr)
    return Sample(dict(enumerate(values)), stderr=errors, num_items=n, is_share=True)


def answers(
    rng: np.random.Generator,
    arms: int,
    seeds: int,
    items: int,
    *,
    between_seeds: float = 0.3,
    skill: Sequence[float] | None = None,
    noise: Sequence[float] | None = None,
) -> list[Floats]:
    """Right and wrong answers of arms that differ in nothing but their `skill`, in logits.

    Items are hard or easy for all, harder for some arms than for others, and every seed moves all
    items of its arm together and each a little on its own.
    """
    hard = rng.normal(0, 1.5, items)
    made = []
    for arm in range(arms):
        own = between_seeds * (noise[arm] if noise else 1)
        logits = hard + rng.normal(0, 0.7, items) + (skill[arm] if skill else 0)
        logits = logits + rng.normal(0, own, (seeds, 1)) + rng.normal(0, 0.5, (seeds, items))
        made.append((rng.random((seeds, items)) < 1 / (1 + np.exp(-logits))).astype(float))
    return made


# ------------------------------------------------------------------------------- seeds x items


class TestEffect:
    def test_the_two_parts_by_hand(self) -> None:
        # Seed means 2, 6; item means 1, 4, 7; the rest is 0 but for +-1 in the first two items.
        x = np.array([[0.0, 1.0, 5.0], [2.0, 7.0, 9.0]])
        rest = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
        found = effect(x)
        ms_seed, ms_item, ms_rest = 3 * 8.0, 2 * 9.0, (rest**2).sum() / 2
        assert found.value == 4
        assert found.of_seeds == pytest.approx(ms_seed / 6)
        assert found.of_items == pytest.approx((ms_item - ms_rest) / 6)
        parts = (ms_seed / 6, (ms_item - ms_rest) / 6)
        assert found.degrees == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2 / 2))
        assert found.stderr == pytest.approx(math.sqrt(sum(parts)))

    def test_seeds_that_agree_by_luck_have_the_spread_of_the_rest(self) -> None:
        x = np.array([[0.0, 4.0, 0.0, 3.0], [4.0, 0.0, 3.0, 0.0]])
        found = effect(x)
        residual = ((x - x.mean(0)) ** 2).sum() / 3 / 8
        assert np.ptp(x.mean(1)) == 0
        assert found.of_seeds == pytest.approx(residual)
        assert residual > 0

    def test_one_seed_is_a_mean_over_items(self) -> None:
        x = np.random.default_rng(0).normal(size=9)
        w = np.arange(1.0, 10.0)
        found, mean = effect(x[None], w), mean_stderr(x, w)
        assert (found.value, found.stderr) == pytest.approx(mean[:2])
        assert found.degrees == 8
        assert found.of_seeds == 0

    def test_one_item_is_a_mean_over_seeds(self) -> None:
        found = effect(np.array([[0.7], [0.8], [0.9]]))
        # t(2) = 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.2484.
        assert tuple(found.interval()) == pytest.approx((0.5516, 1.0484), abs=1e-4)

    def test_one_score_has_no_known_error(self) -> None:
        found = effect(np.array([[0.7]]))
        assert math.isnan(found.interval().low)
        assert found.p_value == 1

    def test_heavier_items_count_more(self) -> None:
        x, w = np.random.default_rng(1).normal(size=(3, 8)), np.array([1.0] * 4 + [3.0] * 4)
        found = effect(x, w)
        assert found.value == pytest.approx(np.average(x, axis=1, weights=w).mean())
        doubled = effect(x, 2 * w)
        assert doubled.stderr == pytest.approx(found.stderr)

    def test_a_few_items_that_all_changed_do_not_look_certain(self) -> None:
        assert effect(np.ones((1, 3))).p_value == 0
        assert effect(np.ones((1, 3)), distance=1.0).p_value > 0.05
        assert effect(np.ones((1, 40)), distance=1.0).p_value < 1e-9

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    @pytest.mark.parametrize(
        ("of_seeds", "of_items", "rest"),
        [(0.0, 1.0, 0.2), (0.05, 0.5, 0.5), (0.3, 0.0, 0.3), (0.2, 0.3, 1.0)],
    )
    def test_its_interval_holds(
        self, seeds: int, of_seeds: float, of_items: float, rest: float
    ) -> None:
        rng = np.random.default_rng(7)
        held = 0
        for _ in range(400):
            x = of_seeds * rng.normal(size=(seeds, 1)) + of_items * rng.normal(size=(1, 60))
            held += 0.0 in effect(x + rest * rng.normal(size=(seeds, 60))).interval()
        assert held / 400 >= 0.93


class TestEstimate:
    def test_seeds_without_items_get_students_t_interval(self) -> None:
        found = estimate(scores(0.7, 0.8, 0.9, stderr=0.01, n=100))
        assert found.ends == pytest.approx((0.5516, 1.0), abs=1e-4)
        assert found.value == pytest.approx(0.8)
        assert (found.seeds, found.num_items) == (3, 100)

    def test_one_seed_gets_the_interval_over_items(self) -> None:
        for same in (scores(0.5, stderr=0.1, n=100), scores(0.5, 0.5, stderr=0.1, n=100)):
            assert estimate(same).ends == pytest.approx((0.304, 0.696), abs=1e-3)

    def test_several_seeds_with_items_get_the_interval_over_both(self) -> None:
        x = answers(np.random.default_rng(0), 1, 3, 50)[0]
        found = estimate(sample(x))
        assert found.ends == pytest.approx(effect(x).interval())
        # Seeds that agree closely say nothing of other questions.
        close = np.tile(x[0], (3, 1))
        close[1, 0] = 1 - close[1, 0]
        mean = mean_stderr(close[0])
        assert estimate(sample(close)).low < mean.value - 1.5 * mean.stderr

    def test_no_error_is_known_where_none_is_told(self) -> None:
        found = estimate(Sample({0: 2.5}))
        assert found == Estimate(2.5, 2.5, 2.5, 1, None)
        assert not found.has_error

    def test_a_perfect_score_still_has_an_interval(self) -> None:
        found = estimate(scores(1.0, stderr=0.0, n=10))
        assert found.ends == pytest.approx(wilson_interval(1.0, 10))

    def test_kept_items_that_are_no_shares_have_the_bootstrap_s(self) -> None:
        losses = np.random.default_rng(0).gamma(1.0, 1.0, (1, 30))
        found = estimate(sample(losses, higher=False))
        assert found.ends == pytest.approx(bootstrap_mean(losses[0]).interval)
        assert not estimate(sample(losses[:, :4], higher=False)).has_error

    def test_results_become_a_sample_by_seed_and_item(self) -> None:
        def result(order: Sequence[int], right: Sequence[int]) -> TaskResult:
            items = tuple(Item(f"q{i}", "", "", "", float(i in right)) for i in order)
            value = len(right) / len(order)
            return TaskResult("t", "accuracy", value, 0.1, len(order), True, "f", 0.0, items)

        results = {0: result([0, 1, 2], [0]), 1: result([2, 1, 0], [0, 2])}
        found = Sample.of(results, is_share=True)
        assert found.items is not None
        assert found.items.tolist() == [[1, 0, 0], [1, 0, 1]]
        assert found.scores == {0: 1 / 3, 1: 2 / 3}
        other = results | {2: result([0, 1], [0])}
        assert Sample.of(other, is_share=True).items is None
        assert Sample.of(other, is_share=True).num_items == 2


class TestRetention:
    def test_is_the_mean_of_the_seeds_shares_gains_not_counted(self) -> None:
        base = sample([[1, 1, 1, 1, 0]])
        found = retention(sample([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]), base)
        assert found is not None
        assert found.value == pytest.approx((0.5 + 1.0) / 2)
        assert 0 <= found.low <= found.value <= found.high <= 1

    def test_its_error_is_that_of_the_ratio_and_not_of_the_score(self) -> None:
        # The base knows half of the items, of which a few were lost.
        before = np.array([1.0] * 200 + [0.0] * 200)
        after = before.copy()
        after[:10] = 0
        found = retention(sample(after[None]), sample(before[None]))
        assert found is not None
        half = 1.96 * math.sqrt(0.05 * 0.95 / 200)
        assert found.ends == pytest.approx((0.95 - half, 0.95 + half), abs=0.004)
        of_the_score = 1.96 * mean_stderr(after).stderr / 0.5
        assert found.high - found.low < 0.4 * 2 * of_the_score

    def test_what_lost_nothing_is_not_certain_to_lose_nothing(self) -> None:
        known = sample([[1.0] * 90 + [0.0] * 10])
        found = retention(known, known)
        assert found is not None
        assert found.high == 1
        assert 0.95 < found.low < 0.985

    def test_of_losses_it_is_the_base_s_share(self) -> None:
        rng = np.random.default_rng(0)
        before = rng.gamma(4.0, 0.5, (1, 200))
        after = before * rng.normal(1.25, 0.1, before.shape)
        found = retention(sample(after, higher=False), sample(before, higher=False))
        assert found is not None
        assert found.value == pytest.approx(before.mean() / after.mean())
        assert found.value == pytest.approx(0.8, abs=0.02)
        assert found.high - found.low < 0.03

    def test_without_items_both_errors_count(self) -> None:
        found = retention(scores(0.4, stderr=0.03, n=100), scores(0.8, stderr=0.04, n=100))
        assert found is not None
        half = 1.96 * math.hypot(0.03, 0.5 * 0.04) / 0.8
        assert found.ends == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
        several = retention(scores(0.4, 0.5, 0.6), scores(0.8))
        assert several is not None
        assert several.value == pytest.approx(0.625)
        assert several.low < 0.4

    @pytest.mark.parametrize("base", [0.0, -1.0])
    def test_of_nothing_to_keep_there_is_none(self, base: float) -> None:
        assert retention(scores(0.4), scores(base)) is None

    @pytest.mark.parametrize(
        ("seeds", "known", "lost"), [(1, 0.9, 0.1), (1, 0.5, 0.03), (3, 0.6, 0.3)]
    )
    def test_its_interval_holds(self, seeds: int, known: float, lost: float) -> None:
        rng = np.random.default_rng(3)
        held = 0
        for _ in range(500):
            before = (rng.random(200) < known).astype(float)
            keeps = rng.random(200) < (1 - lost)
            after = [before * (keeps ^ (rng.random(200) < 0.02)) for _ in range(seeds)]
            found = retention(sample(np.array(after)), sample(before[None]))
            assert found is not None
            true = (1 - lost) * 0.98 + lost * 0.02
            held += found.low <= true <= found.high
        assert held / 500 >= 0.93


class TestDifference:
    def test_is_paired_over_seeds_and_items(self) -> None:
        one, other = answers(np.random.default_rng(0), 2, 3, 40)
        found = difference(sample(one), sample(other))
        assert found == effect(one - other, distance=1.0)
        apart = math.hypot(effect(one).stderr, effect(other).stderr)
        assert found.stderr < apart

    def test_items_are_matched_by_their_names(self) -> None:
        one, other = (sample(x) for x in answers(np.random.default_rng(0), 2, 2, 9))
        assert other.items is not None
        turned = replace(other, items=other.items[:, ::-1], ids=other.ids[::-1])
        assert difference(one, turned) == difference(one, other)
        renamed = replace(other, ids=tuple(f"p{i}" for i in range(9)))
        assert difference(one, renamed).num_items == math.inf

    def test_a_missing_seed_leaves_the_others(self) -> None:
        one, other = answers(np.random.default_rng(0), 2, 3, 40)
        whole = sample(one, [0, 1, 2])
        found = difference(whole, sample(other[:2], [2, 0]))
        assert found == effect(one[[0, 2]] - other[[1, 0]], distance=1.0)
        alone = difference(whole, sample(other[:1], [1]))
        assert alone == effect(one[[1]] - other[[0]], distance=1.0)

    def test_other_seeds_are_independent_and_the_items_still_shared(self) -> None:
        one, other = answers(np.random.default_rng(0), 2, 3, 40)
        found = difference(sample(one, [0, 1, 2]), sample(other, [3, 4, 5]))
        assert found.value == pytest.approx(one.mean() - other.mean())
        assert found.of_seeds == pytest.approx(sum(x.mean(1).var(ddof=1) / 3 for x in (one, other)))
        gaps = one.mean(0) - other.mean(0)
        assert found.of_items == pytest.approx(effect(gaps[None], distance=1.0).of_items)

    def test_without_items_the_two_errors_are_added(self) -> None:
        one, other = scores(0.5, 0.6, stderr=0.03, n=99), scores(0.4, 0.3, stderr=0.04, n=99)
        found = difference(one, other)
        assert found.value == pytest.approx(0.2)
        assert found.of_seeds == pytest.approx(0.1**2)
        assert found.of_items == pytest.approx(0.05**2)
        single = difference(scores(1.0, stderr=0.0, n=8), scores(0.8, stderr=0.1, n=8))
        assert 0.1**2 < single.of_items < 0.1**2 + 0.1**2
        assert difference(scores(0.5, 0.7), scores(0.3, 0.4)).of_items == 0
        assert difference(scores(0.5), scores(0.3)).p_value == 1

    def test_the_base_is_one_measurement(self) -> None:
        x, base = answers(np.random.default_rng(0), 2, 3, 40)
        found = from_base(sample(x), sample(base[:1]))
        assert found == effect(x - base[0], distance=1.0)


# --------------------------------------------------------------------------------- decisions


class TestHolm:
    def test_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([]) == []
        assert holm([0.5, 0.9]) == [1.0, 1.0]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
    def test_is_between_none_and_bonferroni(self, p_values: list[float]) -> None:
        corrected = holm(p_values)
        for p, q in zip(p_values, corrected, strict=True):
            assert p <= q <= min(1.0, len(p_values) * p) + 1e-12
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        assert [corrected[i] for i in order] == sorted(corrected)


class TestChoose:
    def test_a_rate_that_scatters_does_not_pass_for_one_that_learns(self) -> None:
        noisy, steady = scores(0.30, 0.90, 0.60), scores(0.95, 0.96, 0.94)
        assert estimate(noisy).high > estimate(steady).low  # today's intervals overlap
        assert choose([noisy.value, steady.value], [0.9, 0.2], base=0.0) == 1

    def test_of_rates_that_learned_as_much_the_one_that_kept_most(self) -> None:
        # The largest gain from 0.2 is 0.7, of which 0.84 has more than 90 %, and 0.82 less.
        assert choose([0.82, 0.84, 0.9], [0.99, 0.8, 0.1], base=0.2) == 1
        assert choose([0.82, 0.84, 0.9], [0.99, 0.8, 0.1], base=0.2, margin=0.0) == 2
        assert choose([0.85, 0.9, 0.85], [0.7, 0.7, 0.7], base=0.2) == 1

    def test_losses_are_given_with_their_sign_turned(self) -> None:
        assert choose([-2.4, -2.0, -6.0], [-1.0, -1.5, -0.1], base=-7.0) == 0
        assert choose([-2.6, -2.0, -6.0], [-1.0, -1.5, -0.1], base=-7.0) == 1

    def test_where_nothing_was_gained_the_rate_that_learned_most(self) -> None:
        assert choose([0.1, 0.19, 0.2], [0.9, 0.8, 0.1], base=0.2) == 2
        assert choose([0.1, 0.19, 0.2], [0.9, 0.8, 0.1], base=None) == 2

    def test_what_was_not_measured_is_not_chosen(self) -> None:
        assert choose([None, 0.8, 0.9], [0.9, None, 0.5], base=0.0) == 2
        assert choose([None, None], [0.4, 0.5]) == 1
        assert choose([0.4, 0.5], [None, None]) == 1


class TestRank:
    def test_who_is_better_and_who_leads(self) -> None:
        rng = np.random.default_rng(0)
        made = answers(rng, 3, 1, 400, skill=[0.0, 2.0, 2.0], between_seeds=0.0)
        ranking = rank(([x.mean() for x in made], [sample(x) for x in made]))[0]
        assert ranking.better == {(1, 0), (2, 0)}
        best, tied = ranking.leaders()
        assert {best, tied} == {1, 2}
        assert ranking.leaders([0]) == (0,)
        assert Ranking((None, None)).leaders() == ()

    def test_losses_are_ranked_by_their_turned_sign(self) -> None:
        rng = np.random.default_rng(0)
        losses = [rng.normal(mean, 0.2, (3, 60)) for mean in (2.0, 1.0)]
        samples = [sample(x, higher=False) for x in losses]
        assert rank(([-s.value for s in samples], samples))[0].better == {(1, 0)}

    def test_many_tasks_and_arms_are_corrected_for(self) -> None:
        other = answers(np.random.default_rng(5), 1, 1, 200)[0]
        one = other.copy()
        one[0, np.flatnonzero(one == 0)[:10]] = 1
        one[0, np.flatnonzero(one)[-2:]] = 0
        values, pair = [one.mean(), other.mean()], [sample(one), sample(other)]
        assert 0.005 < difference(*pair).p_value < 0.05
        assert rank((values, pair))[0].better
        same = ([one.mean(), one.mean() + 1e-9], [pair[0], pair[0]])
        assert not any(ranking.better for ranking in rank((values, pair), *[same] * 9))

    def test_shared_seeds_that_say_the_opposite_decide_nothing(self) -> None:
        rng = np.random.default_rng(0)
        low, high = (rng.random((1, 200)) < p for p in (0.2, 0.9))
        one = sample(np.vstack([low, high, high]).astype(float), [0, 1, 2])
        other = sample(np.array(rng.random((1, 200)) < 0.5, float), [0])
        assert one.value > other.value
        assert difference(one, other).value < 0
        assert not rank(([one.value, other.value], [one, other]))[0].better

    def test_which_arms_learned(self) -> None:
        made = answers(
            np.random.default_rng(0), 3, 2, 200, skill=[0.0, 0.0, 2.5], between_seeds=0.1
        )
        base, *arms = (sample(x) for x in made)
        assert improved(arms, base) == [False, True]
        losses = [replace(s, higher_is_better=False) for s in (base, *arms)]
        assert improved(losses[1:], losses[0]) == [False, False]


def study(rng: np.random.Generator, rates: int = 1, **setting: object) -> tuple[Ranking, Ranking]:
    """How the arms of a study rank in learning and in keeping, each at its chosen rate."""
    at_rates = [[answers(rng, **setting) for _ in range(rates)] for _ in range(2)]  # type: ignore[arg-type]
    learned, kept = [], []
    for arm in range(len(at_rates[0][0])):
        of_arm = [[task[rate][arm] for rate in range(rates)] for task in at_rates]
        means = [[float(x.mean()) for x in task] for task in of_arm]
        best = choose(means[0], means[1], base=0.0)
        learned.append(of_arm[0][best])
        kept.append(of_arm[1][best])
    ranked = [([float(x.mean()) for x in task], [sample(x) for x in task])
              for task in (learned, kept)]  # fmt: skip
    return tuple(rank(*ranked))  # type: ignore[return-value]


class TestStudiesWithoutAnyDifference:
    """How often a study tells arms apart that differ by nothing but chance: in at most 5 %."""

    @pytest.mark.parametrize(
        ("setting", "studies"),
        [
            # One seed says nothing of others: the arms answer alike but for chance.
            ({"arms": 2, "seeds": 1, "items": 60, "between_seeds": 0.0}, 1000),
            ({"arms": 6, "seeds": 1, "items": 150, "between_seeds": 0.0}, 150),
            ({"arms": 2, "seeds": 2, "items": 100}, 400),
            ({"arms": 2, "seeds": 3, "items": 100, "between_seeds": 0.5}, 600),
            ({"arms": 4, "seeds": 3, "items": 100, "rates": 3}, 200),
            ({"arms": 4, "seeds": 3, "items": 100, "noise": [3.0, 1.0, 1.0, 0.3]}, 250),
            ({"arms": 3, "seeds": 5, "items": 60, "between_seeds": 0.6}, 250),
        ],
    )
    def test_names_a_winner_in_one_of_twenty(
        self, setting: dict[str, object], studies: int
    ) -> None:
        rng = np.random.default_rng(11)
        named = sum(
            any(ranking.better for ranking in study(rng, **setting))  # type: ignore[arg-type]
            for _ in range(studies)
        )
        assert named / studies <= 0.05

    def test_and_names_the_better_one_where_there_is_one(self) -> None:
        rng = np.random.default_rng(12)
        for setting in (
            {"arms": 2, "seeds": 1, "items": 200, "skill": [0.0, 1.2], "between_seeds": 0.1},
            {"arms": 2, "seeds": 3, "items": 200, "skill": [0.0, 2.5], "between_seeds": 0.1},
            {"arms": 4, "seeds": 3, "items": 200, "skill": [0.0, 0.0, 0.0, 3.5], "rates": 2},
            {"arms": 7, "seeds": 3, "items": 200, "skill": [0.0] * 6 + [4.0]},
        ):
            wins = [study(rng, **setting)[1].leaders() for _ in range(40)]  # type: ignore[arg-type]
            best = len(setting["skill"]) - 1  # type: ignore[arg-type]
            assert all(leader == best for leader, *_ in wins)
            assert sum(len(tied) == 1 for tied in wins) >= 36
