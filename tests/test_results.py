"""Rates of rows over prompts and seeds, paired differences, and the tables made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_cells import HARM, PROMPTS, made_cells
from scipy import stats as scipy_stats

from ipo_lib.experiments import results, study
from ipo_lib.experiments.study_cells import Cell
from ipo_lib.stats import RANGE


def test_a_rate_is_the_mean_over_prompts_and_seeds() -> None:
    first_seed = {"x: harm": ((1, 2), (0, 0)), "y: harm": ((2, 2),), "y: other": ((9, 9),)}
    second_seed = {"x: harm": ((2, 2), (0, 0)), "y: harm": ((0, 2),), "y: other": ((0, 9),)}
    cell = Cell("a", 0, 1, 2, 3.0, 4.0, "", {}, first_seed)
    cells = [cell, replace(cell, seed=1, measured=second_seed)]
    first, second = results.rates_by_seed(cells, "a", "harm")
    assert (first[0], first[2], second[0], second[2]) == (0.5, 1.0, 1.0, 0.0)
    assert np.isnan([first[1], second[1]]).all()
    assert results.rates_by_seed(cells, "a", "harm", [1])[0][0] == 1.0
    assert results.rates_by_seed(cells, "a", "harm", []) == []
    rate = results.rate(cells, "a", "harm")
    assert (rate.value, rate.n) == (0.625, 2)
    assert (rate.low, rate.high) == (0.5, 0.75)  # of two seeds the range
    assert rate.method == f"{RANGE}2 seeds"
    assert results.rates_by_seed(cells, "b", "harm") == []
    assert results.rate(cells, "b", "harm").n == 0


def test_bounds_count_what_was_not_judged_out_and_in() -> None:
    counts = {"x: harm": ((2, 4), (1, 4))}  # 3 of 8 judged, 10 asked
    cell = Cell("a", 0, 1, 2, 3.0, 4.0, "", {}, counts, coverage={"x: harm": 0.8})
    assert results.bounds([cell], "a", "harm") == pytest.approx((0.3, 0.5))
    assert results.bounds([], "a", "harm") == (0.0, 1.0)


def test_a_method_s_interval_knows_that_trainings_differ() -> None:
    """Seeds 12, 21, 25 % and so on are not told apart by any number of prompts."""
    apart = made_cells("apart", 0.15, drift=0.06)
    rate = results.rate(apart, "apart", HARM)
    rate_alike = results.rate(made_cells("alike", 0.3), "alike", HARM)
    assert rate.high - rate.low > 2 * (rate_alike.high - rate_alike.low)
    by_seed = np.nanmean(results.rates_by_seed(apart, "apart", HARM), axis=1)
    assert rate.high - rate.value > np.std(by_seed) / 6**0.5


def test_a_comparison_is_paired_by_prompt_on_common_seeds() -> None:
    rows = [*made_cells("less", 0.2, seeds=6), *made_cells("more", 0.5, seeds=8)]
    difference = results.compare(rows, "less", "more", HARM)
    assert len(difference.by_seed) == 6
    assert difference.change.n == PROMPTS
    assert difference.change.high < -0.2 < 0 < difference.p < 0.001
    back = results.compare(rows, "more", "less", HARM)
    assert back.change.value == pytest.approx(-difference.change.value)
    assert results.compare(rows, "less", "less", HARM).p == 1.0


def test_a_comparison_among_a_stratum_leaves_the_other_prompts_out() -> None:
    """The row helps on prompts where the base is always unsafe, and on no others."""
    always, mixed = (((8, 8),) * 10, ((4, 8),) * 20)
    base = Cell("base", 0, 0, 0, 1.0, 1.0, "", {}, {f"x: {HARM}": (*always, *mixed)})
    other = replace(base, row="other")
    row = replace(base, row="row", measured={f"x: {HARM}": (*(((0, 8),) * 10), *mixed)})
    cells = [base, other, row]
    for among, change, n in (
        (results.HOPELESS, -1.0, 10),
        (results.OTHERS, 0.0, 20),
        ("", -1 / 3, 30),
    ):
        difference = results.compare(cells, "row", "other", HARM, among=among)
        assert difference.change.value == pytest.approx(change)
        assert difference.change.n == n


def test_rows_without_a_common_seed_have_no_difference() -> None:
    failed = [replace(cell, failed="no pairs") for cell in made_cells("more", 0.5)]
    nothing = results.compare([*made_cells("less", 0.2), *failed], "less", "more", HARM)
    assert (nothing.change.n, nothing.by_seed, nothing.p) == (0, (), 1.0)


def test_failed_cells_count_in_no_rate_and_two_tables_may_hold_a_row() -> None:
    low, high = made_cells("low", 0.2), made_cells("high", 0.5)
    broken = [replace(cell, failed="no pairs") for cell in made_cells("low", 0.9)]
    assert results.rate([*broken, *high], "low", HARM).n == 0
    (line,) = results.summary(broken, [HARM])
    assert line["seeds"] == 0
    assert "seed 4: no pairs" in line["failed"]
    once = results.compare([*low, *high], "low", "high", HARM)
    assert results.compare([*low, *low, *high], "low", "high", HARM) == once


def test_tables_have_a_line_for_each_row() -> None:
    rows = [
        *made_cells("DPO on Part", 0.2),
        *made_cells("SFT, intervened", 0.5),
        *made_cells("DPO on Full", 0.2),
    ]
    lines = results.markdown(rows)
    assert len(lines) == 5
    assert lines[2].startswith("| DPO on Part | 2")
    assert lines[2].count("|") == lines[0].count("|") == lines[1].count("|")
    assert 25 < float(lines[3].split("|")[6].split()[0]) < 35  # SFT minus Part, in points
    table = results.summary(rows, [HARM])
    assert [line["row"] for line in table] == ["DPO on Part", "SFT, intervened", "DPO on Full"]
    assert table[0]["seeds"] == 6
    assert table[0]["generated"] == round(1002.5)
    assert results.trace_statistics(rows)[1]["traces with a cue"] == 0.5
    assert results.reward_steps(rows)["DPO on Part"][:2] == 2 * [[(10, 0.5), (20, 0.7)]]


def test_the_token_curve_reads_the_budgets_that_were_run() -> None:
    counts = {"direct: trace harm": ((1, 2), (2, 2))}
    budgets = {"GRPO, I[z], 8x": 800, "GRPO, I[z], 1x": 100, "DPO on Part": 100}
    cells = [Cell(row, 0, 1, tokens, 1.0, 1.0, "", {}, counts) for row, tokens in budgets.items()]
    multiples = ["GRPO, I[z], 1x", "GRPO, I[z], 3x", "GRPO, I[z], 8x"]
    points = results.against_tokens(cells, multiples, "trace harm")
    assert [(tokens, rate.value) for tokens, rate in points] == [(100, 0.75), (800, 0.75)]
    assert {*multiples} <= study.read_tables()["grpo_budget"].keys()
    for name in study.read_studies()["claims"]:
        same_tokens = "GRPO at the same generated tokens" in name
        assert not same_tokens or "first few steps" in name


def test_an_interval_over_seeds_alone_says_so() -> None:
    values = [0.80, 0.84, 0.83, 0.86, 0.82, 0.85]
    found = results.over_seeds(values)
    expected = scipy_stats.t.interval(0.95, 5, np.mean(values), scipy_stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), *expected))
    assert (found.n, found.method) == (6, "t over seeds")
