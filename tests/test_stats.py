"""Intervals against published formulas and against planted truth, and at their edges."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib.records import BadInput
from ipo_lib.stats import (
    HOLDS,
    OTHER_WAY,
    UNDECIDED,
    WITHIN,
    Interval,
    clopper_pearson,
    format_interval,
    kappa,
    mean,
    needed_for_correlation,
    needed_for_mean,
    needed_for_rate,
    no_difference,
    paired_difference,
    pearson,
    pooled_rate,
    power_of_mean,
    seed_p,
    two_way,
    verdict,
    wilson,
)

counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_single_rates_agree_with_scipy(k_n: tuple[int, int], confidence: float) -> None:
    for ours, name in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = scipy.stats.binomtest(*k_n).proportion_ci(confidence, method=name)
        i = ours(*k_n, confidence)
        assert (i.low, i.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        assert 0 <= i.low <= i.value <= i.high <= 1
        assert i.n == k_n[1]


def test_known_values() -> None:
    i, z = wilson(8, 10), NormalDist().inv_cdf(0.975)
    middle, half = (
        (0.8 + z**2 / 20) / (1 + z**2 / 10),
        z * math.sqrt(0.16 / 10 + z**2 / 400) / (1 + z**2 / 10),
    )
    assert (i.low, i.high) == pytest.approx((middle - half, middle + half))
    assert clopper_pearson(0, 32).high == pytest.approx(1 - 0.025 ** (1 / 32))
    assert clopper_pearson(32, 32).low == pytest.approx(0.025 ** (1 / 32))


def test_nothing_counted_says_so() -> None:
    for i in (wilson(0, 0), clopper_pearson(0, 0), pooled_rate([]), pooled_rate([(0, 0), (0, 0)])):
        assert math.isnan(i.value)
        assert (i.low, i.high, i.n) == (0.0, 1.0, 0)
    i = paired_difference([(1, 2), (0, 0)], [(0, 0), (1, 1)])
    assert math.isnan(i.value)
    assert (i.low, i.high, i.n) == (-1.0, 1.0, 0)


def test_impossible_counts_are_refused_in_one_line() -> None:
    calls = [
        lambda: wilson(3, 2),
        lambda: clopper_pearson(-1, 2),
        lambda: wilson(1, 2, confidence=95),
        lambda: pooled_rate([(1, 2), (3, 2)]),
        lambda: pooled_rate([(1, 2)], confidence=95),
        lambda: paired_difference([(1, 2)], []),
        lambda: kappa(["safe"], []),
        lambda: pearson([1.0], []),
    ]
    for call in calls:
        with pytest.raises(BadInput) as error:
            call()
        assert "\n" not in str(error.value)
        assert "give" in str(error.value)


def planted(
    seed: int, prompts: int, draws: int, rate: float, spread: float
) -> list[tuple[int, int]]:
    """Counts of prompts whose rates are Beta around ``rate``.

    With a small ``spread`` the rates are nearly all 0 or 1.
    """
    rng = np.random.default_rng(seed)
    rates = rng.beta(rate * spread, (1 - rate) * spread, prompts)
    return [(int(k), draws) for k in rng.binomial(draws, rates)]


@pytest.mark.parametrize("prompts", [6, 15, 29, 30, 100, 300])
@pytest.mark.parametrize(("rate", "spread"), [(0.5, 3.0), (0.5, 0.3), (0.2, 3.0), (0.85, 1.0)])
def test_pooled_rate_covers_about_as_often_as_it_says(
    prompts: int, rate: float, spread: float
) -> None:
    runs = 300
    intervals = [
        pooled_rate(planted(s, prompts, 8, rate, spread), resamples=500, seed=s)
        for s in range(runs)
    ]
    covered = sum(i.low <= rate <= i.high for i in intervals) / runs
    floor = (
        0.9 if prompts >= 30 or rate == 0.5 else 0.8
    )  # few prompts with skewed rates: t is known to fall short
    assert floor <= covered <= 0.995, covered


def test_treating_draws_as_independent_would_fail_where_pooled_rate_does_not() -> None:
    runs, ours, naive = 200, 0, 0
    for seed in range(runs):
        cells = planted(seed, 40, 32, 0.5, 0.5)
        i, flat = pooled_rate(cells, resamples=500), wilson(sum(k for k, _ in cells), 40 * 32)
        ours += i.low <= 0.5 <= i.high
        naive += flat.low <= 0.5 <= flat.high
    assert ours / runs >= 0.9
    assert naive / runs <= 0.5


def test_pooled_rate_at_its_edges() -> None:
    for n in (1, 5, 30, 200):
        none, every = pooled_rate([(0, 8)] * n), pooled_rate([(8, 8)] * n)
        exact = clopper_pearson(0, n)
        assert (none.value, none.low, none.high, none.n) == pytest.approx((0.0, 0.0, exact.high, n))
        assert (every.value, every.low, every.high) == pytest.approx((1.0, 1 - exact.high, 1.0))
    one = pooled_rate([(5, 8)])
    assert one.value == 0.625
    assert one.low < 0.05
    assert one.high > 0.95
    same = pooled_rate([(1, 2)] * 10)
    assert same.value == 0.5
    assert same.low < 0.4
    assert same.high > 0.6
    rare = pooled_rate([(1, 8)] + [(0, 8)] * 4)
    assert rare.low == 0.0
    assert rare.method == "t on prompts"


def test_every_prompt_has_the_same_weight_and_unjudged_prompts_none() -> None:
    i = pooled_rate([(8, 8), (0, 2), (0, 0)])
    assert (i.value, i.n) == (0.5, 2)


def test_methods_follow_the_number_of_prompts() -> None:
    cells = planted(0, 30, 8, 0.5, 1.0)
    assert pooled_rate(cells).method == "bootstrap over prompts"
    few = pooled_rate(cells[:29])
    rates = np.array([k / n for k, n in cells[:29]])
    low, high = scipy.stats.t.interval(0.95, 28, rates.mean(), scipy.stats.sem(rates))
    assert (few.low, few.high) == pytest.approx((low, high))
    assert few.method == "t on prompts"


def test_bootstrap_is_scipys_bca_and_knows_no_order() -> None:
    cells = planted(3, 60, 8, 0.1, 1.0)
    ours = pooled_rate(cells, resamples=20_000)
    rates = [k / n for k, n in cells]
    theirs = scipy.stats.bootstrap(
        (rates,), np.mean, n_resamples=20_000, rng=1, method="BCa"
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert (
        pooled_rate(cells)
        == pooled_rate(cells)
        == pooled_rate(random.Random(0).sample(cells, len(cells)))
    )
    assert pooled_rate(cells, seed=1) != pooled_rate(cells)
    wide, narrow = pooled_rate(cells, confidence=0.99), pooled_rate(cells, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@given(st.lists(counts, min_size=1, max_size=60))
def test_pooled_rate_stays_in_bounds(cells: list[tuple[int, int]]) -> None:
    i = pooled_rate(cells, resamples=100)
    assert 0 <= i.low <= i.value + 1e-12
    assert i.value - 1e-12 <= i.high <= 1
    assert i.value == pytest.approx(np.mean([k / n for k, n in cells]))


def test_paired_difference_is_after_minus_before() -> None:
    before, after = planted(1, 50, 8, 0.8, 2.0), planted(2, 50, 8, 0.3, 2.0)
    down, up = paired_difference(before, after), paired_difference(after, before)
    assert down.high < 0 < up.low
    assert (up.value, up.low, up.high) == pytest.approx(
        (-down.value, -down.high, -down.low), abs=0.03
    )
    assert down.value == pytest.approx(pooled_rate(after).value - pooled_rate(before).value)


def test_pairing_by_prompt_is_sharper_than_two_rates() -> None:
    rng = np.random.default_rng(0)
    rates = rng.beta(0.3, 0.3, 60)
    before, after = (
        [(int(k), 32) for k in rng.binomial(32, share * rates)] for share in (1.0, 0.8)
    )
    i, one, two = paired_difference(before, after), pooled_rate(before), pooled_rate(after)
    assert i.high < 0
    assert one.low < two.high


@pytest.mark.parametrize("prompts", [8, 29, 30, 120])
def test_paired_difference_covers(prompts: int) -> None:
    runs, covered = 300, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        rates = rng.beta(0.6, 0.6, prompts)
        before, after = (
            [(int(k), 4) for k in rng.binomial(4, share * rates)] for share in (1.0, 0.6)
        )
        i = paired_difference(before, after, resamples=500, seed=seed)
        covered += i.low <= -0.4 * 0.5 <= i.high
    assert 0.9 <= covered / runs <= 0.99, covered / runs


def test_paired_difference_at_its_edges() -> None:
    seen = clopper_pearson(0, 30).high
    still = paired_difference([(0, 4)] * 30, [(0, 4)] * 30)
    assert (still.value, still.low, still.high) == pytest.approx((0.0, -seen, seen))
    flip = paired_difference([(4, 4)] * 30, [(0, 4)] * 30)
    assert (flip.value, flip.low, flip.high) == pytest.approx((-1.0, -1.0, 2 * seen - 1))
    thirds = paired_difference([(1, 3)] * 2 + [(2, 3)] * 2, [(2, 3)] * 2 + [(3, 3)] * 2)
    assert (
        thirds.method == "clopper-pearson on prompts"
    )  # 2/3 - 1/3 and 1 - 2/3 differ only in the last bit


def test_kappa() -> None:
    a = ["safe"] * 20 + ["safe"] * 5 + ["unsafe"] * 10 + ["unsafe"] * 15
    b = ["safe"] * 20 + ["unsafe"] * 5 + ["safe"] * 10 + ["unsafe"] * 15
    assert kappa(a, b) == pytest.approx(0.4)
    assert kappa(a, a) == 1.0
    assert kappa(["safe", "unsafe"], ["unsafe", "safe"]) == -1.0
    assert math.isnan(kappa(["safe"] * 3, ["safe"] * 3))
    assert math.isnan(kappa([], []))


def test_pearson_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = 0.7 * x + rng.normal(size=40)
    theirs = scipy.stats.pearsonr(x, y)
    low, high = theirs.confidence_interval(0.95)
    i = pearson(list(x), list(y))
    assert (i.value, i.low, i.high, i.n) == pytest.approx((theirs.statistic, low, high, 40))


def test_pearson_at_its_edges() -> None:
    assert math.isnan(pearson([1, 1, 1, 1], [1, 2, 3, 4]).value)
    assert math.isnan(pearson([], []).value)
    line = pearson([1, 2, 3, 4, 5], [-2, -4, -6, -8, -10])
    assert line.value == pytest.approx(-1)
    assert line.low == pytest.approx(-1)
    three = pearson([1, 2, 3], [1, 3, 2])
    assert (three.value, three.low, three.high) == pytest.approx((0.5, -1, 1))


def test_formatting() -> None:
    i = Interval(0.625, 0.5514, 0.6922, 128, "wilson")
    assert format_interval(i) == "62.5 % [55.1, 69.2], n=128"
    assert format_interval(i, percent=False) == "0.625 [0.551, 0.692], n=128"
    assert format_interval(Interval(-0.0001, -0.3, 0.0, 9, "t")) == "0.0 % [-30.0, 0.0], n=9"
    assert format_interval(wilson(0, 0)) == "unknown, n=0"


def test_a_mean_is_a_pooled_rate_of_any_number() -> None:
    values = [0.1, -0.2, 0.4, 0.4, math.nan]
    found = mean(values)
    assert found.value == pytest.approx(0.175)
    assert (found.n, found.method) == (4, "t on prompts")
    assert -1 <= found.low < found.value < found.high <= 1
    assert mean([1.0, 0.0, 0.5], (0, 1)) == pooled_rate([(2, 2), (0, 2), (1, 2)])


@pytest.mark.parametrize(
    ("low", "high", "above", "says"),
    [
        (0.1, 0.2, True, HOLDS),
        (-0.1, 0.2, True, UNDECIDED),
        (-0.2, -0.1, True, OTHER_WAY),
        (-0.2, -0.1, False, HOLDS),
        (0.1, 0.2, False, OTHER_WAY),
        (-0.2, 0.1, False, UNDECIDED),
        (0.0, 0.1, True, UNDECIDED),
        (math.nan, 1.0, True, UNDECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    low: float, high: float, above: bool, says: str
) -> None:
    """An interval with 0 in it says that nothing is known, not that the claim is wrong."""
    assert verdict(Interval((low + high) / 2, low, high, 9, "t"), above) == says


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-0.05, 0.08, HOLDS),
        (-0.3, 0.4, UNDECIDED),
        (0.05, 0.2, UNDECIDED),
        (0.15, 0.2, OTHER_WAY),
        (-0.3, -0.12, OTHER_WAY),
        (math.nan, 1.0, UNDECIDED),
    ],
)
def test_no_difference_has_to_be_shown(low: float, high: float, says: str) -> None:
    """A null world confirms nothing with few prompts: a wide interval around 0 is undecided."""
    assert no_difference(Interval((low + high) / 2, low, high, 9, "t"), 0.1) == says


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.82, 0.95, WITHIN),
        (0.82, 1.01, UNDECIDED),
        (0.79, 0.95, UNDECIDED),
        (0.91, 0.95, HOLDS),
        (0.84, 0.89, OTHER_WAY),
        (math.nan, 1.0, UNDECIDED),
    ],
)
def test_within_the_margin_is_a_verdict(low: float, high: float, says: str) -> None:
    """Only where the interval cannot say on which side the number is, and says that it is near.

    A number that is surely above 0.9, but near, still ``holds``.
    """
    value = Interval((low + high) / 2, low, high, 9, "t")
    assert verdict(value, than=0.9, small=0.1) == says
    assert verdict(value, than=0.9) == (UNDECIDED if says == WITHIN else says)


def test_a_range_of_a_few_seeds_decides_nothing() -> None:
    few = two_way([[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])
    assert (few.method, few.low, few.high) == (
        "range of 2 seeds",
        pytest.approx(0.2),
        pytest.approx(0.4),
    )
    assert verdict(few) == no_difference(few, 1.0) == UNDECIDED
    assert format_interval(few) == "30.0 % (20.0 to 40.0 in 2 seeds), n=3"


def test_over_prompts_and_seeds_both_count() -> None:
    random = np.random.default_rng(0)
    of_prompts, noise = random.normal(0, 0.1, 40), random.normal(0, 0.02, (8, 40))
    alike = two_way((of_prompts + noise).tolist())
    apart = two_way((of_prompts + noise + np.linspace(-0.1, 0.1, 8)[:, None]).tolist())
    alone = mean((of_prompts + noise).mean(axis=0).tolist())
    assert alike.high - alike.low == pytest.approx(alone.high - alone.low, rel=0.25)
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)
    assert apart.n == 40
    one = two_way([of_prompts.tolist()])
    assert one == mean(of_prompts.tolist())
    assert two_way([[0.25] * 5] * 6).method == mean([0.25] * 5).method  # nothing varies
    assert math.isnan(two_way([]).value)


def test_holes_are_filled_from_their_row_and_column() -> None:
    table = [
        [0.1, 0.5, math.nan],
        [0.3, 0.7, math.nan],
        [0.2, math.nan, math.nan],
        [0.2, 0.6, math.nan],
        [0.2, 0.6, math.nan],
        [0.2, 0.6, math.nan],
    ]
    found = two_way(table)
    assert found.n == 2  # a prompt that no seed has is none
    assert found.value == pytest.approx(0.4, abs=0.02)


def test_p_over_seeds_is_student_s_t() -> None:
    values = [0.1, 0.2, 0.15, 0.3, -0.05, 0.12]
    assert seed_p(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    assert seed_p([0.1]) == seed_p([]) == seed_p([0.0, 0.0]) == 1.0
    assert seed_p([0.1, 0.1]) == 0.0


def test_power_is_what_simulated_studies_find() -> None:
    random, spread, n, effect = np.random.default_rng(0), 0.3, 25, 0.15
    draws = random.normal(effect, spread, (4000, n))
    t = draws.mean(1) / (draws.std(1, ddof=1) / n**0.5)
    found = (np.abs(t) > scipy.stats.t.ppf(0.975, n - 1)).mean()
    assert power_of_mean(spread, n, effect) == pytest.approx(found, abs=0.02)
    needed = needed_for_mean(spread, effect)
    assert needed is not None
    assert power_of_mean(spread, needed, effect) >= 0.8 > power_of_mean(spread, needed - 1, effect)
    assert needed_for_mean(10.0, 1e-4) is None


def test_sample_sizes_of_fig_5() -> None:
    assert needed_for_rate(0.9) == 36
    assert clopper_pearson(36, 36).low > 0.9 > clopper_pearson(35, 35).low
    assert needed_for_correlation(0.85, 0.53) == 21
    assert needed_for_correlation(0.5, 0.5) is None
    with pytest.raises(BadInput, match="rate above 1"):
        needed_for_rate(1)
