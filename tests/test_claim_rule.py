"""The rule that decides claims: what it asks for, and how seldom it decides under the null."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_cells import HARM, made_cells

from ipo_lib.experiments import claim_rule, results
from ipo_lib.experiments.kl import Divergence
from ipo_lib.experiments.results import RowDifference
from ipo_lib.stats import HOLDS, OTHER_WAY, UNDECIDED, Interval, mean, two_way


def decide(difference: RowDifference, less: bool = True) -> str:
    return claim_rule.apply_rule({"a": [(difference, less)]})["a"]


def test_claims_by_the_rule() -> None:
    rows = [
        *made_cells("low", 0.2),
        *made_cells("high", 0.5),
        *made_cells("high too", 0.5),
        *made_cells("seesaw", 0.05, drift=0.1),
    ]
    low = results.compare(rows, "low", "high", HARM)
    even = results.compare(rows, "high too", "high", HARM)
    back = results.compare(rows, "high", "low", HARM)
    claims = {"a": [(low, True)], "b": [(even, True)], "c": [(back, True)], "d": [(back, False)]}
    verdicts = claim_rule.apply_rule(claims)
    assert verdicts == {"a": HOLDS, "b": UNDECIDED, "c": OTHER_WAY, "d": HOLDS}
    # Every comparison must hold.
    assert claim_rule.apply_rule({"a": [(low, True), (even, True)]}) == {"a": UNDECIDED}
    assert claim_rule.apply_rule({"a": [(low, True), (back, True)]}) == {"a": OTHER_WAY}
    assert claim_rule.apply_rule({"a": []}) == {"a": UNDECIDED}
    # Lower in late seeds, higher in early ones.
    mixed = results.compare(rows, "low", "seesaw", HARM)
    assert {value > 0 for value in mixed.by_seed} == {True, False}
    both_ways = {"a": [(mixed, True)], "b": [(mixed, False)]}
    assert claim_rule.apply_rule(both_ways) == {"a": UNDECIDED, "b": UNDECIDED}


def test_holm_takes_the_number_of_comparisons_into_account() -> None:
    def claim(p: float) -> list[tuple[RowDifference, bool]]:
        change = Interval(-0.1, -0.2, -0.01, 50, "t")
        return [(RowDifference("a", "b", HARM, change, (-0.1,) * 6, p), True)]

    assert claim_rule.apply_rule({"a": claim(0.04)})["a"] == HOLDS
    verdicts = claim_rule.apply_rule({"a": claim(0.04), "b": claim(0.012), "c": claim(0.03)})
    # 0.012 < 0.05 / 3, but 0.03 > 0.05 / 2
    assert verdicts == {"a": UNDECIDED, "b": HOLDS, "c": UNDECIDED}


def test_few_seeds_few_judged_and_failed_cells_decide_nothing() -> None:
    low, high = made_cells("low", 0.2), made_cells("high", 0.5)
    half_judged = [replace(cell, coverage={f"direct: {HARM}": 0.8}) for cell in low]
    one_failed = [*low[:5], replace(low[5], failed="no pairs")]
    for row, expected in [
        (low[:5], UNDECIDED),
        (low, HOLDS),
        (half_judged, UNDECIDED),
        (one_failed, UNDECIDED),
    ]:
        difference = results.compare([*row, *high], "low", "high", HARM)
        assert decide(difference) == expected


def planted(
    random: np.random.Generator, of_prompts: Any, spread: float, seeds: int, draws: int = 2
) -> Any:
    """Rates by seed and prompt of a method whose trainings differ by ``spread``."""
    drift = random.normal(0, spread, seeds)[:, None]
    return random.binomial(draws, np.clip(of_prompts[None, :] + drift, 0, 1)) / draws


def null_change(random: np.random.Generator, spread: float, seeds: int) -> Any:
    """The difference of two methods that are the same: 72 prompts, two draws."""
    of_prompts = random.beta(1.5, 4, 72)
    first = planted(random, of_prompts, spread, seeds)
    return first - planted(random, of_prompts, spread, seeds)


@pytest.mark.parametrize("spread", [0.0, 0.04, 0.06])
@pytest.mark.parametrize("seeds", [6, 8])
def test_intervals_over_prompts_and_seeds_cover(spread: float, seeds: int) -> None:
    """How often the interval of the difference of two equal methods holds 0.

    Of 3,000 trials of each case it was 93.0 to 97.1 %; here are 800, whose own error is 0.8 points.
    """
    random, trials = np.random.default_rng([seeds, int(100 * spread)]), 800
    covered = 0
    for _ in range(trials):
        interval = two_way(null_change(random, spread, seeds))
        covered += interval.low <= 0 <= interval.high
    assert 0.93 - 0.015 <= covered / trials <= 0.97 + 0.015


def test_intervals_over_prompts_alone_do_not_cover_where_trainings_differ() -> None:
    """What the test above would find of intervals that ignore the seed."""
    random, trials, covered = np.random.default_rng(0), 200, 0
    for _ in range(trials):
        interval = mean(null_change(random, 0.06, 6).mean(axis=0).tolist())
        covered += interval.low <= 0 <= interval.high
    assert covered / trials < 0.8


@pytest.mark.parametrize("spread", [0.0, 0.04, 0.06])
@pytest.mark.parametrize("seeds", [3, 6])
def test_under_the_null_few_claims_are_decided(spread: float, seeds: int) -> None:
    trials = 80 if seeds == 6 else 10
    random, decided = np.random.default_rng(int(100 * spread)), 0
    for _ in range(trials):
        change = null_change(random, spread, seeds)
        decided += decide(results.row_difference("one", "two", HARM, change)) != UNDECIDED
    assert decided <= 0.05 * trials
    if seeds == 3:
        assert decided == 0  # three seeds decide nothing


def test_kl_is_a_comparison_over_traces() -> None:
    where = tuple((f"{number:02}", 0.1 + 0.01 * number) for number in range(20))
    moves = [Divergence("DPO on Part", seed, (), (), (), where) for seed in range(6)]
    difference = claim_rule.compare_divergence(moves, "DPO on Part")
    assert difference.change.value == pytest.approx(0.195)
    assert len(difference.by_seed) == 6
    assert difference.change.low > 0
    controls = [replace(move, row="control") for move in moves]
    same = claim_rule.compare_divergence([*moves, *controls], "DPO on Part", "control")
    assert (same.change.value, same.p) == (0.0, 1.0)
    assert decide(difference, less=False) == HOLDS
    assert claim_rule.compare_divergence(moves, "another").change.n == 0
    assert claim_rule.compare_divergence(moves, "DPO on Part", "another").change.n == 0


def test_the_papers_claims_are_read_and_those_without_rows_left_out() -> None:
    rows = [
        *made_cells("DPO on Part", 0.2),
        *made_cells("SFT, intervened", 0.5),
        *made_cells("DPO on Full", 0.2),
    ]
    lines = claim_rule.decide_claims(rows, [])
    verdicts = {line["claim"]: line["verdict"] for line in lines}
    assert verdicts["part beats SFT"] == HOLDS
    assert verdicts["full beats SFT"] == HOLDS
    assert "stage 2 restores compliance" not in verdicts
    assert not any(name.startswith("KL") for name in verdicts)  # nothing was measured
    assert {line["kind"] for line in lines} == {"harm after training"}
    claims = claim_rule.read_claims()
    assert claims["safe traces carry safe answers"][0].kind == "joint"
