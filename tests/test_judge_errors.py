"""A judge's errors at known rates, put upon exact outcomes: when they can be corrected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points.draws import UNJUDGED, DrawRequest, Draws
from ipo_lib.turning_points.judge_errors import (
    Calibration,
    LabelNoise,
    calibrate,
    correct_rate,
    effect_of_errors,
)


def with_errors(noise: LabelNoise, exact: Draws, seed: int) -> Draws:
    return noise(exact, np.random.default_rng(seed), {})


@pytest.mark.parametrize("shared", [False, True])
def test_errors_come_at_their_rates_singly_or_by_prefix(shared: bool) -> None:
    (curve,) = made_up.curves(1, 3, ["locked"], 60)
    ends = curve.trace.ends
    exact = curve.draw([DrawRequest(cut, 200) for cut in ends], np.random.default_rng(0))
    noise = LabelNoise(0.9, 0.8, shared)
    rates, spreads = [], []
    for seed in range(200):
        wrong = with_errors(noise, exact, seed).safe != exact.safe
        rates.append(wrong[exact.safe == 1].mean())
        spreads.append(wrong[exact.start == ends[0]].std())
    assert np.mean(rates) == pytest.approx(0.2, abs=0.03)
    assert bool(np.mean(spreads) < 0.2) is shared


def test_a_shared_error_is_remembered() -> None:
    (curve,) = made_up.curves(1, 3, ["locked"], 60)
    requests = [DrawRequest(cut, 200) for cut in curve.trace.ends]
    exact = curve.draw(requests, np.random.default_rng(0))
    errors: dict[int, float] = {}
    noise = LabelNoise(0.5, 0.5, shared=True)
    first, second = (noise(exact, np.random.default_rng(seed), errors) for seed in (0, 1))
    assert (first.safe == second.safe).all()


def test_what_is_unjudged_stays_so() -> None:
    (curve,) = made_up.curves(1, 3, ["locked"], 60)
    drawn = curve.draw([DrawRequest(0, 100)], np.random.default_rng(0))
    hidden = replace(drawn, safe=np.full(100, UNJUDGED))
    assert (with_errors(LabelNoise(0.5, 0.5), hidden, 0).safe == UNJUDGED).all()


def test_a_calibration_finds_the_rates() -> None:
    sensitivity, specificity = calibrate(LabelNoise(0.97, 0.96), 1000).rates()
    assert sensitivity.n == specificity.n == 1000
    assert sensitivity.low <= 0.97 <= sensitivity.high
    assert specificity.low <= 0.96 <= specificity.high


def test_corrected_intervals_cover_where_errors_come_singly_and_not_where_they_are_shared() -> None:
    curves = made_up.curves(360, 11, made_up.SHAPES[:6])
    single = effect_of_errors(curves, LabelNoise(0.9, 0.9), 400, 64)
    judged, corrected = single["as judged"], single["corrected"]
    assert judged["coverage"].high < 0.9
    assert corrected["coverage"].value >= 0.95
    assert abs(corrected["error"].value) < abs(judged["error"].value) + 0.01
    shared = effect_of_errors(curves, LabelNoise(0.8, 0.8, shared=True), 400, 64)
    assert shared["corrected"]["coverage"].high < 0.9  # no rate undoes them


def test_a_correction_carries_the_uncertainty_of_the_rates() -> None:
    wide, narrow = (
        correct_rate(50, 64, Calibration(9 * n, 10 * n, 9 * n, 10 * n)) for n in (4, 4000)
    )
    assert narrow.value == wide.value == pytest.approx((50 / 64 - 0.1) / 0.8)
    assert wide.low < narrow.low < narrow.value < narrow.high <= wide.high
