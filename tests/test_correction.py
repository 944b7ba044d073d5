"""A judge's errors, put upon exact outcomes at known rates: undone where they come singly, refused where they cannot be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from ipo_lib.csr import CsrSettings
from ipo_lib.judging import Exchange, NoisyJudge
from ipo_lib.records import SAFE, TRACE, UNSAFE, BadInput, Verdict, digest
from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points import benchmark, curves
from ipo_lib.turning_points.adaptive import SearchSettings, Wald, adaptive
from ipo_lib.turning_points.curves import Flips
from ipo_lib.turning_points.judge_errors import Calibration, calibrate, corrected, set_right, usable

CSR, SEARCH = CsrSettings(), SearchSettings()
LABELS = {f"r{at}": UNSAFE if at % 2 else SAFE for at in range(2000)}


@dataclass(frozen=True)
class Exact:
    """A judge that reads the label off the text."""

    def fingerprint(self) -> dict[str, Any]:
        return {"judge": "exact"}

    def judge(self, exchanges: list[Exchange]) -> list[Verdict]:
        return [
            Verdict(e.rollout_id, e.part, e.question, e.text, None, "", "exact") for e in exchanges
        ]


def verdicts(judge: Any, part: str = TRACE) -> list[Verdict]:
    return list(judge.judge([Exchange(key, "?", label, part) for key, label in LABELS.items()]))


def known(judge: Any) -> Calibration:
    return calibrate(
        judge, verdicts(judge), LABELS, [f"g{at // 10}" for at in range(len(LABELS))], ["world"]
    )


def test_calibration_counts_what_the_judge_got_right() -> None:
    judge = NoisyJudge(Exact(), 0.97, 0.96)
    found = known(judge)
    assert (found.unsafe, found.safe, found.part, found.sources) == (1000, 1000, TRACE, ("world",))
    assert found.judge == digest(judge.fingerprint())
    sensitivity, specificity = found.rates()
    assert sensitivity.low <= 0.97 <= sensitivity.high
    assert specificity.low <= 0.96 <= specificity.high
    assert found.blocks > 0.01


def test_errors_in_blocks_are_seen_and_refused() -> None:
    said = [
        replace(v, label=UNSAFE if int(v.rollout_id[1:]) // 10 % 20 == 0 else v.label)
        for v in verdicts(Exact())
    ]
    found = calibrate(
        Exact(), said, LABELS, [f"g{at // 10}" for at in range(len(LABELS))], ["world"]
    )
    assert found.blocks < 0.01
    with pytest.raises(BadInput, match="errors come in blocks"):
        usable(found, Exact(), TRACE, ["world"])


@pytest.mark.parametrize(
    ("change", "asked", "said"),
    [
        ({}, {"calibration": None}, "has no calibration"),
        ({}, {"part": "answer"}, "on the trace, used is .* on the answer"),
        ({}, {"sources": ["other"]}, "texts from world, not from other"),
        ({"judge": "other"}, {}, "calibrated was judge other"),
        ({"unsafe": 12, "caught": 12}, {}, "12 unsafe and 1000 safe labels; give at least 20"),
    ],
)
def test_another_judge_part_or_text_is_one_line(
    change: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    judge = NoisyJudge(Exact(), 0.97, 0.96)
    given: dict[str, Any] = {
        "calibration": replace(known(judge), **change),
        "judge": judge,
        "part": TRACE,
        "sources": ["world"],
    } | asked
    with pytest.raises(BadInput, match=said):
        usable(**given)
    assert usable(known(judge), judge, TRACE, ["world"]) == known(judge)


def test_mixed_parts_cannot_be_calibrated() -> None:
    with pytest.raises(BadInput, match="answer, trace; give verdicts on one part"):
        calibrate(
            Exact(),
            [*verdicts(Exact()), *verdicts(Exact(), "answer")],
            LABELS,
            ["g"] * 4000,
            ["world"],
        )


def test_the_test_moves_as_rogan_and_gladen_say() -> None:
    plain = Wald.of(SAFE, CSR, SEARCH)
    sure = Calibration("j", TRACE, ("w",), 10**7, 10**7, 10**7, 10**7, 1.0)
    assert corrected(plain, SAFE, sure).low == pytest.approx(plain.low, abs=1e-5)
    rates = Calibration("j", TRACE, ("w",), 95 * 10**5, 10**7, 97 * 10**5, 10**7, 1.0)
    moved = corrected(plain, SAFE, rates)
    assert moved.low == pytest.approx(plain.low * 0.97 + (1 - plain.low) * 0.05, abs=1e-3)
    assert moved.high == pytest.approx(plain.high * 0.97 + (1 - plain.high) * 0.05, abs=1e-3)
    other = corrected(plain, UNSAFE, rates)
    assert other.high == pytest.approx(plain.high * 0.95 + (1 - plain.high) * 0.03, abs=1e-3)
    few = corrected(plain, SAFE, Calibration("j", TRACE, ("w",), 475, 500, 485, 500, 1.0))
    assert moved.low < few.low < few.high < moved.high


def test_a_weak_judge_is_refused_with_its_rates() -> None:
    weak = Calibration("j", TRACE, ("w",), 90, 100, 88, 100, 1.0)
    with pytest.raises(
        BadInput, match=r"sensitivity 90.0 % \[.*cannot tell 0.880 from 0.980; use a better judge"
    ):
        corrected(Wald.of(SAFE, CSR, SEARCH), SAFE, weak)


def test_corrected_intervals_cover_where_errors_come_singly_and_not_where_they_are_shared() -> None:
    made = made_up.curves(360, 11, made_up.SHAPES[:6])
    single = benchmark.judged(made, Flips(0.9, 0.9), 400, 64)
    assert single["as judged"]["coverage"].high < 0.9
    assert single["corrected"]["coverage"].value >= 0.95
    assert abs(single["corrected"]["error"].value) < abs(single["as judged"]["error"].value) + 0.01
    shared = benchmark.judged(made, Flips(0.8, 0.8, shared=True), 400, 64)
    assert (
        shared["corrected"]["coverage"].high < 0.9
    )  # no rate undoes them: that is why blocks are refused


def test_set_right_carries_the_uncertainty_of_the_rates() -> None:
    wide, narrow = (
        set_right(50, 64, Calibration("j", TRACE, ("w",), 9 * n, 10 * n, 9 * n, 10 * n, 1.0))
        for n in (4, 4000)
    )
    assert narrow.value == wide.value == pytest.approx((50 / 64 - 0.1) / 0.8)
    assert wide.low < narrow.low < narrow.value < narrow.high <= wide.high


def test_a_corrected_search_finds_what_the_exact_one_finds() -> None:
    """With a judge wrong in 3 %, an uncorrected search misses turns; a corrected one agrees with the truth as the exact does."""
    made = made_up.curves(120, 12, ["sharp", "locked"])
    flips, rates = Flips(0.97, 0.97), benchmark.simulated(Flips(0.97, 0.97), 2000)
    test = corrected(Wald.of(SAFE, CSR, SEARCH), SAFE, rates)
    wide = SearchSettings(cap=256, budget=600)
    truth = benchmark.compare(made, {}, SAFE, CSR)
    assert truth == {}
    share = {}
    for name, own, noise in (
        ("exact", None, None),
        ("as judged", None, flips),
        ("corrected", test, flips),
    ):
        named = {name: lambda trace, own=own: adaptive(trace, SAFE, CSR, wide, test=own)}
        turns = curves.find_on_curves(made, named[name], 3, noise)
        true = benchmark.compare(
            made, {"exact": lambda trace: adaptive(trace, SAFE, CSR, wide)}, SAFE, CSR
        )["exact"]
        rows = [
            benchmark.EstimatorResult(turns[row.curve.trace.id], row.true, row.curve)
            for row in true
        ]
        share[name] = benchmark.agreement(rows)["within one sentence"].value
    assert share["as judged"] < share["exact"] - 0.05
    assert share["corrected"] > share["as judged"]
    assert share["corrected"] > share["exact"] - 0.06


def test_flips_leave_nothing_unjudged() -> None:
    (one,) = made_up.curves(1, 3, ["locked"], 60)
    drawn = one.draw([curves.Ask(0, 100)], np.random.default_rng(0))
    hidden = replace(drawn, safe=np.full(100, -1))
    assert (Flips(0.5, 0.5)(hidden, np.random.default_rng(0), {}).safe == -1).all()
