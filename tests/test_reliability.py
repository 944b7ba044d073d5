"""How well turning points are known: two halves of a recording against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ipo_lib.csr import CsrSettings
from ipo_lib.records import SAFE
from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points.curves import Curve, Way
from ipo_lib.turning_points.reliability import split_in_halves, turn_reliability

CSR = CsrSettings()


def recorded(count: int, draws: int) -> list[Curve]:
    """Invented traces that turn, each with ``draws`` continuations at a token that may be left."""
    random = np.random.default_rng(5)
    curves = []
    for curve in made_up.curves(count, 3, ["sharp", "gradual"], 60):
        ways: list[list[Way]] = []
        for entry in curve.ways:
            safe_share = entry[0][0] if entry else 0.0
            safe = int(random.binomial(draws, safe_share)) if entry else 0
            some: list[Way] = [(float(safe), 1.0, 9), (float(draws - safe), 0.0, 9)]
            ways.append([way for way in some if way[0]] if entry else [])
        curves.append(Curve(curve.trace, ways))
    return curves


def test_each_half_has_half_of_the_continuations() -> None:
    (curve,) = recorded(1, 12)
    first, second = split_in_halves(curve, np.random.default_rng(0))
    for ways, some, others in zip(curve.ways, first.ways, second.ways, strict=True):
        total, safe = sum(w for w, _, _ in ways), sum(w for w, s, _ in ways if s)
        assert sum(w for w, _, _ in some) == sum(w for w, _, _ in others) == total / 2
        assert sum(w for w, s, _ in (*some, *others) if s) == safe
    assert first.trace == second.trace == curve.trace
    assert first.ways != second.ways


def test_many_draws_know_the_turn_and_few_do_not() -> None:
    few, many = (turn_reliability(recorded(60, draws), SAFE, CSR) for draws in (4, 400))
    assert 0.95 < many.value <= 1
    assert few.value < many.value - 0.05
    assert few.low < few.value < few.high < many.low
    assert many.n > 50


def test_without_a_turn_nothing_is_known() -> None:
    for curves in ([], made_up.curves(3, 0, ["never"])):
        unknown = turn_reliability(curves, SAFE, CSR, resamples=10)
        assert math.isnan(unknown.value)
        assert (unknown.low, unknown.high, unknown.n) == pytest.approx((-1, 1, 0))
