"""What cells come to: pooling over seeds, paired comparisons, and the rule that marks claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ipo_lib.experiments import results, study
from ipo_lib.experiments.kl import Divergence
from ipo_lib.experiments.results import RowDifference
from ipo_lib.experiments.study import Cell
from ipo_lib.stats import HOLDS, OTHER_WAY, UNDECIDED, Interval, mean, two_way

HARM, PROMPTS = "trace harm", 60


def cells(row: str, rate: float, seeds: int = 6, draws: int = 8, drift: float = 0.0) -> list[Cell]:
    """Cells whose prompts are harmful at ``rate`` (a little apart from each other), in two sets."""
    found = []
    for seed in range(seeds):
        random = np.random.default_rng([seed, *row.encode()])
        own = np.clip(rate + drift * seed + random.normal(0, 0.1, PROMPTS), 0, 1)
        pairs = [(int(random.binomial(draws, p)), draws) for p in own]
        measured = {f"direct: {HARM}": tuple(pairs[:30]), f"wrapped: {HARM}": tuple(pairs[30:])}
        found.append(
            Cell(
                row,
                seed,
                10,
                1000 + seed,
                80.0,
                1.0,
                "a",
                {},
                measured,
                {"traces with a cue": rate},
                ((10, 0.5), (20, 0.7)),
            )
        )
    return found


def test_a_rate_is_the_mean_over_prompts_and_seeds() -> None:
    one = Cell(
        "a",
        0,
        1,
        2,
        3.0,
        4.0,
        "",
        {},
        {"x: harm": ((1, 2), (0, 0)), "y: harm": ((2, 2),), "y: other": ((9, 9),)},
    )
    both = [
        one,
        replace(
            one,
            seed=1,
            measured={"x: harm": ((2, 2), (0, 0)), "y: harm": ((0, 2),), "y: other": ((0, 9),)},
        ),
    ]
    first, second = results.by_seed(both, "a", "harm")
    assert (first[0], first[2], second[0], second[2]) == (0.5, 1.0, 1.0, 0.0)
    assert np.isnan([first[1], second[1]]).all()
    found = results.rate(both, "a", "harm")
    assert (found.value, found.low, found.high, found.n) == (
        0.625,
        0.5,
        0.75,
        2,
    )  # of two seeds the range
    assert found.method == "range of 2 seeds"
    assert results.by_seed(both, "b", "harm") == []
    assert results.rate(both, "b", "harm").n == 0


def test_bounds_count_what_was_not_judged_out_and_in() -> None:
    one = Cell(
        "a", 0, 1, 2, 3.0, 4.0, "", {}, {"x: harm": ((2, 4), (1, 4))}, coverage={"x: harm": 0.8}
    )
    assert results.bounds([one], "a", "harm") == pytest.approx(
        (0.3, 0.5)
    )  # 3 of 8 judged, 10 asked
    assert results.bounds([], "a", "harm") == (0.0, 1.0)


def test_a_method_s_interval_knows_that_trainings_differ() -> None:
    """Seeds 12, 21, 25 % and so on are not told apart by any number of prompts."""
    alike, apart = cells("alike", 0.3, drift=0.0), cells("apart", 0.15, drift=0.06)
    found = {
        name: results.rate(own, name, HARM) for name, own in (("alike", alike), ("apart", apart))
    }
    width = {name: one.high - one.low for name, one in found.items()}
    assert width["apart"] > 2 * width["alike"]
    by_seed = [float(np.nanmean(one)) for one in results.by_seed(apart, "apart", HARM)]
    assert found["apart"].high - found["apart"].value > np.std(by_seed) / 6**0.5


def test_a_comparison_is_paired_by_prompt_on_common_seeds() -> None:
    rows = [*cells("less", 0.2, seeds=6), *cells("more", 0.5, seeds=8)]
    found = results.compare(rows, "less", "more", HARM)
    assert len(found.by_seed) == 6
    assert found.change.n == PROMPTS
    assert found.change.high < -0.2 < 0 < found.p < 0.001
    back = results.compare(rows, "more", "less", HARM)
    assert back.change.value == pytest.approx(-found.change.value)
    assert results.compare(rows, "less", "less", HARM).p == 1.0


def test_claims_by_the_rule() -> None:
    rows = [
        *cells("low", 0.2),
        *cells("high", 0.5),
        *cells("high too", 0.5),
        *cells("seesaw", 0.05, drift=0.1),
    ]
    low, even, back = (
        results.compare(rows, a, b, HARM)
        for a, b in (("low", "high"), ("high too", "high"), ("high", "low"))
    )
    assert results.verdicts(
        {"a": [(low, True)], "b": [(even, True)], "c": [(back, True)], "d": [(back, False)]}
    ) == {"a": HOLDS, "b": UNDECIDED, "c": OTHER_WAY, "d": HOLDS}
    assert results.verdicts({"a": [(low, True), (even, True)]}) == {
        "a": UNDECIDED
    }  # every comparison must hold
    assert results.verdicts({"a": [(low, True), (back, True)]}) == {"a": OTHER_WAY}
    assert results.verdicts({"a": []}) == {"a": UNDECIDED}
    mixed = results.compare(
        rows, "low", "seesaw", HARM
    )  # lower in late seeds, higher in early ones
    assert {value > 0 for value in mixed.by_seed} == {True, False}
    assert results.verdicts({"a": [(mixed, True)], "b": [(mixed, False)]}) == {
        "a": UNDECIDED,
        "b": UNDECIDED,
    }


def test_holm_takes_the_number_of_comparisons_into_account() -> None:
    def claim(p: float) -> tuple[RowDifference, bool]:
        return RowDifference(
            "a", "b", HARM, Interval(-0.1, -0.2, -0.01, 50, "t"), (-0.1,) * 6, p
        ), True

    assert results.verdicts({"a": [claim(0.04)]})["a"] == HOLDS
    many = results.verdicts({"a": [claim(0.04)], "b": [claim(0.012)], "c": [claim(0.03)]})
    assert many == {"a": UNDECIDED, "b": HOLDS, "c": UNDECIDED}  # 0.012 < 0.05 / 3, 0.03 > 0.05 / 2


def test_few_seeds_few_judged_and_failed_cells_decide_nothing() -> None:
    for row, other, expected in (
        (cells("low", 0.2, seeds=5), cells("high", 0.5, seeds=5), UNDECIDED),
        (cells("low", 0.2, seeds=6), cells("high", 0.5, seeds=6), HOLDS),
        (
            [replace(one, coverage={f"direct: {HARM}": 0.8}) for one in cells("low", 0.2)],
            cells("high", 0.5),
            UNDECIDED,
        ),
        (
            [*cells("low", 0.2, seeds=5), replace(cells("low", 0.2)[5], failed="no pairs")],
            cells("high", 0.5),
            UNDECIDED,
        ),
    ):
        found = results.compare([*row, *other], "low", "high", HARM)
        assert results.verdicts({"a": [(found, True)]}) == {"a": expected}
    broken = [replace(one, failed="no pairs") for one in cells("low", 0.9)]
    assert results.rate([*broken, *cells("high", 0.5)], "low", HARM).n == 0
    (line,) = results.summary(broken, [HARM])
    assert line["seeds"] == 0
    assert "seed 4: no pairs" in line["failed"]
    twice = [*cells("low", 0.2), *cells("low", 0.2), *cells("high", 0.5)]  # two tables hold the row
    assert results.compare(twice, "low", "high", HARM) == results.compare(
        twice[6:], "low", "high", HARM
    )


def planted(
    random: np.random.Generator, of_prompts: Any, spread: float, seeds: int, draws: int = 2
) -> Any:
    """Rates by seed and prompt of a method whose trainings differ by ``spread``."""
    drift = random.normal(0, spread, seeds)[:, None]
    return random.binomial(draws, np.clip(of_prompts[None, :] + drift, 0, 1)) / draws


@pytest.mark.parametrize("spread", [0.0, 0.04, 0.06])
@pytest.mark.parametrize("seeds", [6, 8])
def test_intervals_over_prompts_and_seeds_cover(spread: float, seeds: int) -> None:
    """Two methods that are the same, 72 prompts, two draws: how often the interval of their difference holds 0.

    Of 3,000 trials of each case it was 93.0 to 97.1 %; here are 800, whose own error is 0.8 points.
    """
    random, trials = np.random.default_rng([seeds, int(100 * spread)]), 800
    covered = 0
    for _ in range(trials):
        of_prompts = random.beta(1.5, 4, 72)
        found = two_way(
            planted(random, of_prompts, spread, seeds) - planted(random, of_prompts, spread, seeds)
        )
        covered += found.low <= 0 <= found.high
    assert 0.93 - 0.015 <= covered / trials <= 0.97 + 0.015


def test_intervals_over_prompts_alone_do_not_cover_where_trainings_differ() -> None:
    """What the test above would find of intervals that ignore the seed."""
    random, trials, covered = np.random.default_rng(0), 200, 0
    for _ in range(trials):
        of_prompts = random.beta(1.5, 4, 72)
        change = planted(random, of_prompts, 0.06, 6) - planted(random, of_prompts, 0.06, 6)
        found = mean(change.mean(axis=0).tolist())
        covered += found.low <= 0 <= found.high
    assert covered / trials < 0.8


@pytest.mark.parametrize("spread", [0.0, 0.04, 0.06])
@pytest.mark.parametrize("seeds", [3, 6])
def test_under_the_null_few_claims_are_decided(spread: float, seeds: int) -> None:
    random, trials, decided = np.random.default_rng(int(100 * spread)), 80, 0
    for _ in range(trials):
        of_prompts = random.beta(1.5, 4, 72)
        change = planted(random, of_prompts, spread, seeds) - planted(
            random, of_prompts, spread, seeds
        )
        found = results.compared("one", "two", HARM, change)
        decided += results.verdicts({"a": [(found, True)]})["a"] != UNDECIDED
    assert decided <= 0.05 * trials
    if seeds == 3:
        assert decided == 0  # three seeds decide nothing


def test_kl_is_a_comparison_over_traces() -> None:
    moves = [
        Divergence(
            "DPO on Part",
            seed,
            (),
            (),
            (),
            tuple((f"{at:02}", 0.1 + 0.01 * at) for at in range(20)),
        )
        for seed in range(6)
    ]
    found = results.located(moves, "DPO on Part")
    assert found.change.value == pytest.approx(0.195)
    assert len(found.by_seed) == 6
    assert found.change.low > 0
    same = results.located(
        [*moves, *(replace(one, row="control") for one in moves)], "DPO on Part", "control"
    )
    assert (same.change.value, same.p) == (0.0, 1.0)
    assert results.verdicts({"kl": [(found, False)]}) == {"kl": HOLDS}
    assert results.located(moves, "another").change.n == 0


def test_the_papers_claims_are_read_and_those_without_rows_left_out() -> None:
    rows = [*cells("DPO on Part", 0.2), *cells("SFT, intervened", 0.5), *cells("DPO on Full", 0.2)]
    found = {one["claim"]: one["verdict"] for one in results.judged(rows, [])}
    assert found["part beats SFT"] == HOLDS
    assert found["full beats SFT"] == HOLDS
    assert "stage 2 restores compliance" not in found
    assert not any(name.startswith("KL") for name in found)  # nothing was measured
    assert {one["kind"] for one in results.judged(rows, [])} == {"harm after training"}
    assert [
        own[0].kind
        for name, own in results.claims().items()
        if name == "safe traces carry safe answers"
    ] == ["joint"]
    lines = results.markdown(rows)
    assert len(lines) == 5
    assert lines[2].startswith("| DPO on Part | 2")
    assert lines[2].count("|") == lines[0].count("|") == lines[1].count("|")
    assert 25 < float(lines[3].split("|")[6].split()[0]) < 35  # SFT minus Part, in points
    table = results.summary(rows, [HARM])
    assert [line["row"] for line in table] == ["DPO on Part", "SFT, intervened", "DPO on Full"]
    assert table[0]["seeds"] == 6
    assert table[0]["generated"] == round(1002.5)
    assert results.taught(rows)[1]["traces with a cue"] == 0.5
    assert results.steps(rows)["DPO on Part"][:2] == [(10, 0.5), (10, 0.5)]


@pytest.mark.parametrize("profile", ["tiny", "sandbox"])
def test_the_readme_shows_the_committed_table(profile: str) -> None:
    """``ipo table`` prints it; every line of a profile's main table stands in the README."""
    found, date = study.committed(profile, "table2", Cell)
    if not found:
        pytest.skip(f"no full run of {profile} is committed")
    readme = (study.house() / "README.md").read_text("utf-8")
    assert [line for line in results.markdown(found) if line not in readme] == []
    assert f"`{profile}`, full run of {date}" in readme
