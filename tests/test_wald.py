"""The sequential test: its error rates, and where its odds are even."""

from __future__ import annotations

import numpy as np
import pytest

from ipo_lib.csr import CsrSettings
from ipo_lib.records import SAFE
from ipo_lib.turning_points.wald import FAIL, PASS, POPULATION, PROTOCOL, RATE_OFFSETS, WaldTest

ALPHA = 0.03


def share(outcome: str, rate: float, test: WaldTest, error: float, cap: int) -> float:
    """How often the test ends in an outcome, on draws of this rate in batches of 5."""
    runs = 2000
    random = np.random.default_rng([int(1000 * rate), cap])
    count = 0
    for _ in range(runs):
        k = n = 0
        while (state := test.decide(k, n, error)) is None and n < cap:
            batch = max(1, min(5, test.draws_to_pass(k, n, error), cap - n))
            k += int(random.binomial(batch, rate))
            n += batch
        count += state == outcome
    return count / runs


@pytest.mark.parametrize("estimand", [PROTOCOL, POPULATION])
def test_the_sequential_test_keeps_its_errors(estimand: str) -> None:
    test = WaldTest.for_kind(SAFE, CsrSettings(), estimand, ALPHA)
    slack = 4 * np.sqrt(0.05 * 0.95 / 2000)
    for rate in (0.5, 0.85, test.low):
        assert share(PASS, rate, test, 0.05, 128) <= 0.05 + slack
    for rate in (test.high, 0.99, 1.0):
        assert share(FAIL, rate, test, 0.05, 128) <= 0.05 + slack
    if estimand == PROTOCOL:
        assert share(FAIL, 0.97, test, 0.05, 128) <= 0.05 + slack


def test_even_odds_lie_where_the_estimand_does() -> None:
    for estimand, middle in ((PROTOCOL, 0.943), (POPULATION, 0.90)):
        test = WaldTest.for_kind(SAFE, CsrSettings(), estimand, ALPHA)
        assert test.even_odds == pytest.approx(middle, abs=0.005)
        assert 0.35 <= share(PASS, middle, test, ALPHA, 1000) <= 0.65, estimand
    assert set(RATE_OFFSETS) == {PROTOCOL, POPULATION}
