"""Draws and planned estimators: what a draw is worth, the paper's rule, the rivals, curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from planted import course, step
from scipy.stats import binom

from ipo_lib.csr import CsrSettings, curve_rows, find_turning_point
from ipo_lib.records import SAFE, UNSAFE, BadInput, CsrPoint
from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points.curves import Curve, run_on_curves
from ipo_lib.turning_points.draws import (
    UNJUDGED,
    Drawing,
    DrawRequest,
    Draws,
    Search,
    Trace,
    check_departures,
    token_sentences,
)
from ipo_lib.turning_points.exhaustive import (
    PivotalSettings,
    choose_and_measure,
    exhaustive,
    isotonic,
    measure_at_cuts,
    measure_whole_curve,
    pivotal,
    probe_cuts,
    true_turn,
)

TOKEN, SENTENCE = CsrSettings(grain="token"), CsrSettings(grain="sentence")


def trace(p: list[float], ends: tuple[int, ...] = (), label: str | None = SAFE) -> Trace:
    return Trace("t", tuple(range(len(p))), ends or (len(p),), tuple(p), label)


def test_a_draw_counts_at_every_cut_it_passes_through() -> None:
    drawn = Draws(
        np.array([0, 0, 3]), np.array([0, 5, 4]), np.array([1, 0, UNJUDGED]), np.array([9, 9, 9])
    )
    expected = {0: (1, 1, 0), 1: (0, 1, 0), 3: (0, 1, 1), 4: (0, 1, 1), 5: (0, 1, 0), 6: (0, 0, 0)}
    assert {cut: drawn.counts_at(cut) for cut in expected} == expected
    assert drawn.counts_at(3, started_here=True) == (0, 0, 1)
    assert len((drawn + drawn).start) == 6


def test_reused_draws_are_fair() -> None:
    """Draws that start at 0 and reach a cut estimate S there as draws that start there do."""
    curve = step(0.3, 0.95, 20)
    drawn = curve.draw([DrawRequest(0, 40_000)], np.random.default_rng(1))
    for cut in (0, 2, 5, 8):
        safe, unsafe, _ = drawn.counts_at(cut)
        n = safe + unsafe
        assert n > 200
        assert abs(safe / n - curve.truth[cut]) < 4 * math.sqrt(0.25 / n)


def test_a_trace_says_what_is_wrong_with_it() -> None:
    with pytest.raises(BadInput, match="2 probabilities of 3 tokens"):
        Trace("t", (1, 2, 3), (3,), (0.5, 0.5), SAFE)
    with pytest.raises(BadInput, match="token 1 has probability 0"):
        trace([0.5, 0.0, 0.5])
    assert trace([0.5, 0.5], label=None).last == 2
    assert trace([0.5, 0.5, 1.0], (2,), None).last == 2
    assert trace([0.5, 0.5]).stays(0, 2) == 0.25


def test_draws_of_another_sampler_are_refused() -> None:
    curve = step(0.3, 0.95, 20)
    requests = [DrawRequest(0, 64), DrawRequest(30, 64)]
    drawn = curve.draw(requests, np.random.default_rng(0))
    check_departures(curve.trace, drawn)
    hotter = tuple(0.5 * p for p in curve.trace.p)
    colder = tuple(p**0.1 for p in curve.trace.p)
    for wrong in (hotter, colder):
        with pytest.raises(
            BadInput, match="continuations leave it, where its probabilities expect"
        ):
            check_departures(dataclasses.replace(curve.trace, p=wrong), drawn)


def test_the_exhaustive_protocol_is_the_papers_rule_on_its_counts() -> None:
    for curve in made_up.curves(12, 3, made_up.SHAPES[:6], 80):
        for csr in (TOKEN, SENTENCE):
            search = exhaustive(curve.trace, SAFE, csr)
            requests = next(search)
            assert {request.n for request in requests} == {csr.draws}
            drawn = curve.draw(requests, np.random.default_rng(0))
            with pytest.raises(StopIteration) as end:
                search.send(drawn)
            turn = end.value.value

            points = []
            for request in requests:
                counts = drawn.counts_at(request.cut, started_here=True)
                points.append(CsrPoint(curve.id, request.cut, *counts))
            sentences = token_sentences(curve.trace)
            length, label = curve.trace.ends[-1], curve.trace.label
            expected = find_turning_point(points, SAFE, csr, sentences, length, label)
            for field in ("token", "sentence", "interval", "flags"):
                assert getattr(turn, field) == getattr(expected, field)
            assert turn.rollouts == len(requests) * csr.draws
            assert turn.tokens == drawn.tokens.sum()


def test_truth_moves_with_the_threshold() -> None:
    curve = step(0.3, 0.92, 20)
    s = curve.truth.tolist()
    assert true_turn(curve.trace, SAFE, TOKEN, s).token == 21
    strict = true_turn(curve.trace, SAFE, CsrSettings(mu=0.94), s)
    assert strict.token is not None
    assert strict.token > 40


@pytest.mark.parametrize(
    "estimator",
    [
        lambda t: pivotal(t, SAFE, SENTENCE, PivotalSettings(200)),
        lambda t: isotonic(t, SAFE, TOKEN, 100),
        lambda t: isotonic(t, SAFE, SENTENCE, 200),
    ],
    ids=["pivotal", "isotonic", "sentences"],
)
def test_rivals_find_a_sharp_turn(estimator: Callable[[Trace], Search]) -> None:
    (turn,) = run_on_curves([step(0.2, 0.99, 20)], estimator, 2).values()
    assert turn.sentence == 3
    assert turn.rollouts > 0
    assert turn.judged == turn.rollouts


def test_isotonic_smoothing_falls_for_unsafe_turns() -> None:
    curve = step(0.9, 0.01, 20, label=UNSAFE)
    (turn,) = run_on_curves([curve], lambda t: isotonic(t, UNSAFE, SENTENCE, 200)).values()
    assert turn.sentence == 3


def test_a_pivotal_search_stops_where_nothing_moves() -> None:
    flat = step(0.5, 0.5, 20, label=UNSAFE)
    settings = PivotalSettings(32, 0.9)
    (turn,) = run_on_curves([flat], lambda t: pivotal(t, SAFE, SENTENCE, settings)).values()
    assert turn.rollouts == 64
    assert turn.token is None


def test_a_whole_curve_covers_everywhere_and_is_near_where_draws_pass() -> None:
    """The intervals of all points hold S.

    Where at least 20 draws pass, S is as near as 32 draws at a sentence end bring it.
    """
    curves = made_up.curves(90, 4, made_up.SHAPES[:6])
    csr = CsrSettings(draws=24)
    smooth = run_on_curves(curves, lambda t: measure_whole_curve(t, csr, probe_cuts(t, 12)), 3)
    plain = run_on_curves(curves, lambda t: measure_at_cuts(t, 32, [0, *t.ends]), 3)
    hits, smooth_errors, plain_errors, prices = [], [], [], []
    for curve in curves:
        s, points = curve.truth, {point.cut: point for point in smooth[curve.id]}
        for row in curve_rows(list(points.values())):
            hits.append(row["low"] - 1e-9 <= s[int(row["cut"])] <= row["high"] + 1e-9)
        assert len(points) == len(s)
        assert sum(point.n > 0 for point in points.values()) > 0.7 * len(s)
        ends = [cut for cut in curve.trace.ends if points[cut].n >= 20]
        smooth_errors.append(np.mean([abs(points[cut].s - s[cut]) for cut in ends] or [math.nan]))
        plain_errors.append(np.mean([abs(p.s - s[p.cut]) for p in plain[curve.id]]))
        prices.append((12 * 24) / (32 * (1 + len(curve.trace.ends))))
    assert np.mean(hits) > 0.93
    assert np.nanmean(smooth_errors) < 1.5 * np.mean(plain_errors)
    assert np.mean(prices) < 0.8


def test_probes_stand_at_equal_steps_of_hazard() -> None:
    uneven = trace([0.5] * 10 + [1.0] * 50 + [0.5] * 10)
    cuts = probe_cuts(uneven, 4, also=(70,))
    assert cuts == [0, 5, 10, 65, 70]
    assert all(0 <= cut <= uneven.last for cut in cuts)


def test_the_recursion_is_what_draws_show() -> None:
    """S_c = p_c S_{c+1} + (1 - p_c) D_c against direct draws, on every shape."""
    for curve in made_up.curves(8, 1, length=60):
        ends = curve.trace.ends
        for cut in (0, ends[len(ends) // 2]):
            drawn = curve.draw([DrawRequest(cut, 3000)], np.random.default_rng(0))
            safe = int((drawn.safe == 1).sum())
            assert binom.cdf(safe, 3000, curve.truth[cut]) > 1e-4
            assert binom.sf(safe - 1, 3000, curve.truth[cut]) > 1e-4


def test_measuring_draws_are_made_only_where_choosing_ones_saw_s_open() -> None:
    plain = course(0.5, 0.5, 0.0, 0.0, label=UNSAFE)
    curve = Curve(dataclasses.replace(plain.trace, settled=18), plain.ways)
    requested: list[DrawRequest] = []

    def spy(trace: Trace) -> Drawing[tuple[list[CsrPoint], list[CsrPoint]]]:
        inner = choose_and_measure(trace, 16, (0, *trace.ends))
        requests = next(inner)
        while True:
            requested.extend(requests)
            drawn = yield requests
            try:
                requests = inner.send(drawn)
            except StopIteration as end:
                return end.value

    choosing, measuring = run_on_curves([curve], spy)[curve.id]
    assert [point.cut for point in choosing] == [0, 6, 12, 18, 24]
    assert {point.cut for point in measuring} >= {0, 6, 12, 18}
    assert all(request.cut < 18 for request in requested)  # harm from there on: S is 0
    assert {point.s for point in choosing if point.cut >= 18} == {0.0}
    assert all(request.fresh for request in requested)
