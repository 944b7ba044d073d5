"""What cells come to: pooling over seeds, paired comparisons, and the rule that marks claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipo_lib import results, study
from ipo_lib.kl import Moved
from ipo_lib.results import Compared
from ipo_lib.stats import Interval
from ipo_lib.study import Cell

HARM, PROMPTS = "trace harm", 60


def cells(row: str, rate: float, seeds: int = 5, draws: int = 8, drift: float = 0.0) -> list[Cell]:
    """Cells whose prompts are harmful at ``rate`` (a little apart from each other), in two sets."""
    found = []
    for seed in range(seeds):
        random = np.random.default_rng([seed, *row.encode()])
        own = np.clip(rate + drift * seed + random.normal(0, 0.1, PROMPTS), 0, 1)
        pairs = [(int(random.binomial(draws, p)), draws) for p in own]
        measured = {f"direct: {HARM}": tuple(pairs[:30]), f"wrapped: {HARM}": tuple(pairs[30:])}
        found.append(
            Cell(row, seed, 10, 1000 + seed, 80.0, 1.0, "a", {}, measured, {"traces with a cue": rate}, ((10, 0.5), (20, 0.7)))
        )
    return found


def test_rates_pool_prompts_over_sets_and_seeds() -> None:
    one = Cell("a", 0, 1, 2, 3.0, 4.0, "", {}, {"x: harm": ((1, 2), (0, 0)), "y: harm": ((2, 2),), "y: other": ((9, 9),)})
    both = [one, replace(one, seed=1, measured={"x: harm": ((2, 2), (1, 2)), "y: harm": ((0, 2),), "y: other": ((0, 9),)})]
    assert results.pooled(both, "a", "harm") == [(3, 4), (1, 2), (2, 4)]
    assert results.pooled(both, "a", "harm", [0]) == [(1, 2), (0, 0), (2, 2)]
    assert results.rate(both, "a", "harm").value == pytest.approx((3 / 4 + 1 / 2 + 2 / 4) / 3)
    assert results.pooled(both, "b", "harm") == []
    assert results.rate(both, "b", "harm").n == 0


def test_a_comparison_is_paired_by_prompt_on_common_seeds() -> None:
    rows = [*cells("less", 0.2, seeds=3), *cells("more", 0.5, seeds=5)]
    found = results.compare(rows, "less", "more", HARM)
    assert len(found.by_seed) == 3
    assert found.change.n == PROMPTS
    assert found.change.high < -0.2 < 0 < found.p < 0.001
    back = results.compare(rows, "more", "less", HARM)
    assert back.change.value == pytest.approx(-found.change.value)
    assert results.compare(rows, "less", "less", HARM).p == 1.0


def test_claims_by_the_rule() -> None:
    rows = [*cells("low", 0.2), *cells("high", 0.5), *cells("high too", 0.5), *cells("seesaw", 0.05, drift=0.1)]
    low, even, back = (results.compare(rows, a, b, HARM) for a, b in (("low", "high"), ("high too", "high"), ("high", "low")))
    assert results.verdicts({"a": [(low, True)], "b": [(even, True)], "c": [(back, True)], "d": [(back, False)]}) == {
        "a": results.HOLDS, "b": results.UNDECIDED, "c": results.FAILS, "d": results.HOLDS,
    }  # fmt: skip
    assert results.verdicts({"a": [(low, True), (even, True)]}) == {"a": results.UNDECIDED}  # every comparison must hold
    assert results.verdicts({"a": [(low, True), (back, True)]}) == {"a": results.FAILS}
    assert results.verdicts({"a": []}) == {"a": results.UNDECIDED}
    mixed = results.compare(rows, "low", "seesaw", HARM)  # lower in late seeds, higher in early ones
    assert {value > 0 for value in mixed.by_seed} == {True, False}
    assert results.verdicts({"a": [(mixed, True)], "b": [(mixed, False)]}) == {"a": results.UNDECIDED, "b": results.UNDECIDED}


def test_holm_takes_the_number_of_comparisons_into_account() -> None:
    def claim(p: float) -> tuple[Compared, bool]:
        return Compared("a", "b", HARM, Interval(-0.1, -0.2, -0.01, 50, "t"), (-0.1, -0.1, -0.1), p), True

    assert results.verdicts({"a": [claim(0.04)]})["a"] == results.HOLDS
    many = results.verdicts({"a": [claim(0.04)], "b": [claim(0.012)], "c": [claim(0.03)]})
    assert many == {"a": results.UNDECIDED, "b": results.HOLDS, "c": results.UNDECIDED}  # 0.012 < 0.05 / 3, 0.03 > 0.05 / 2


def test_few_seeds_few_judged_and_failed_cells_decide_nothing() -> None:
    for row, other, expected in (
        (cells("low", 0.2, seeds=2), cells("high", 0.5, seeds=2), results.UNDECIDED),
        (cells("low", 0.2, seeds=3), cells("high", 0.5, seeds=3), results.HOLDS),
        ([replace(one, coverage={f"direct: {HARM}": 0.8}) for one in cells("low", 0.2)], cells("high", 0.5), results.UNDECIDED),
        (
            [*cells("low", 0.2, seeds=2), replace(cells("low", 0.2, seeds=3)[2], failed="no pairs")],
            cells("high", 0.5),
            results.UNDECIDED,
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
    assert results.compare(twice, "low", "high", HARM) == results.compare(twice[5:], "low", "high", HARM)


def test_under_the_null_few_claims_are_decided() -> None:
    decided = 0
    for trial in range(60):
        rows = [*cells(f"one {trial}", 0.4, seeds=3, draws=3), *cells(f"two {trial}", 0.4, seeds=3, draws=3)]
        found = results.compare(rows, f"one {trial}", f"two {trial}", HARM)
        decided += results.verdicts({"a": [(found, True)]})["a"] != results.UNDECIDED
    assert decided <= 6  # 3 expected at most: 5 % of 60


def test_kl_is_a_comparison_over_traces() -> None:
    moves = [
        Moved("DPO on Part", seed, (), (), (), tuple((f"{at:02}", 0.1 + 0.01 * at) for at in range(20))) for seed in range(3)
    ]
    found = results.located(moves, "DPO on Part")
    assert found.change.value == pytest.approx(0.195)
    assert len(found.by_seed) == 3
    assert found.change.low > 0
    assert results.verdicts({"kl": [(found, False)]}) == {"kl": results.HOLDS}
    assert results.located(moves, "another").change.n == 0


def test_the_papers_claims_are_read_and_those_without_rows_left_out() -> None:
    rows = [*cells("DPO on Part", 0.2), *cells("SFT, intervened", 0.5), *cells("DPO on Full", 0.2)]
    found = {one["claim"]: one["verdict"] for one in results.judged(rows, [])}
    assert found["part beats SFT"] == results.HOLDS
    assert found["full beats SFT"] == results.HOLDS
    assert "stage 2 restores compliance" not in found
    assert found["KL sits where S changes"] == results.UNDECIDED
    assert {one["kind"] for one in results.judged(rows, [])} == {"harm after training"}
    assert [own[0].kind for name, own in results.claims().items() if name == "safe traces carry safe answers"] == ["joint"]
    lines = results.markdown(rows)
    assert len(lines) == 5
    assert lines[2].startswith("| DPO on Part | 2")
    assert lines[2].count("|") == lines[0].count("|") == lines[1].count("|")
    assert 25 < float(lines[3].split("|")[6].split()[0]) < 35  # SFT minus Part, in points
    table = results.summary(rows, [HARM])
    assert [line["row"] for line in table] == ["DPO on Part", "SFT, intervened", "DPO on Full"]
    assert table[0]["seeds"] == 5
    assert table[0]["generated"] == 1002
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
