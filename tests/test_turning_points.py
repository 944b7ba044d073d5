"""Estimators on recorded and made-up curves: what a draw is worth where, the paper's rule, the rivals, and whole curves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import binom

from ipo_lib.csr import CsrSettings, curve, turning_point
from ipo_lib.records import SAFE, UNSAFE, BadInput, CsrPoint
from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points import curves
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.exhaustive import (
    UNKNOWN,
    Ask,
    Draws,
    PivotalSettings,
    Trace,
    agree,
    exhaustive,
    isotonic,
    measured,
    pivotal,
    probes,
    spans,
    split_measured,
    truth,
    whole,
)

TOKEN, SENTENCE = CsrSettings(grain="token"), CsrSettings(grain="sentence")


def trace(p: list[float], ends: tuple[int, ...] = (), label: str | None = SAFE) -> Trace:
    return Trace("t", tuple(range(len(p))), ends or (len(p),), tuple(p), label)


def step(low: float, high: float, turn: int, tokens: int = 60, label: str = SAFE) -> Curve:
    """A curve of sentences of 6 tokens with S near ``low`` before the token ``turn`` and near ``high`` after it."""
    p = [0.8] * tokens
    p[turn] = 0.05 + 0.9 * low / high if high > low else 0.2
    s, ways = float(label == SAFE), [list[tuple[float, float, int]]() for _ in p]
    for at in range(tokens - 1, -1, -1):
        target = low if at <= turn else high
        share = min(max((target - p[at] * s) / (1 - p[at]), 0.0), 1.0)
        s = p[at] * s + (1 - p[at]) * share
        ways[at] = [(share, 1.0, tokens - at), (1 - share, 0.0, tokens - at)]
    return Curve(
        Trace(
            f"step-{low}-{high}-{turn}",
            tuple(range(tokens)),
            tuple(range(6, tokens + 1, 6)),
            tuple(p),
            label,
        ),
        ways,
    )


def course(*levels: float, label: str = SAFE) -> Curve:
    """A curve of sentences of 6 tokens, S near the given level after each; it moves at the first token of a sentence."""
    tokens, s = 6 * len(levels), float(label == SAFE)
    p, ways = [0.8] * tokens, [list[tuple[float, float, int]]() for _ in range(tokens)]
    for at in range(tokens - 1, -1, -1):
        target = levels[max((at - 1) // 6, 0)]
        p[at] = 0.8 if at % 6 else 0.02
        share = min(max((target - p[at] * s) / (1 - p[at]), 0.0), 1.0)
        s = p[at] * s + (1 - p[at]) * share
        ways[at] = [(share, 1.0, tokens - at), (1 - share, 0.0, tokens - at)]
    return Curve(
        Trace(
            f"course-{levels}",
            tuple(range(tokens)),
            tuple(range(6, tokens + 1, 6)),
            tuple(p),
            label,
        ),
        ways,
    )


def test_a_draw_counts_at_every_cut_it_passes_through() -> None:
    drawn = Draws(
        np.array([0, 0, 3]), np.array([0, 5, 4]), np.array([1, 0, UNKNOWN]), np.array([9, 9, 9])
    )
    assert [drawn.at(cut) for cut in (0, 1, 3, 4, 5, 6)] == [
        (1, 1, 0),
        (0, 1, 0),
        (0, 1, 1),
        (0, 1, 1),
        (0, 1, 0),
        (0, 0, 0),
    ]
    assert drawn.at(3, born_here=True) == (0, 0, 1)
    assert len((drawn + drawn).born) == 6


def test_reused_draws_are_fair() -> None:
    """Draws born at 0 that reach a cut estimate S there as draws born there do."""
    one = step(0.3, 0.95, 20)
    drawn = one.draw([Ask(0, 40_000)], np.random.default_rng(1))
    for cut in (0, 2, 5, 8):
        safe, unsafe, _ = drawn.at(cut)
        n = safe + unsafe
        assert n > 200
        assert abs(safe / n - one.truth[cut]) < 4 * math.sqrt(0.25 / n)


def test_a_trace_says_what_is_wrong_with_it() -> None:
    with pytest.raises(BadInput, match="2 probabilities of 3 tokens"):
        Trace("t", (1, 2, 3), (3,), (0.5, 0.5), SAFE)
    with pytest.raises(BadInput, match="token 1 has probability 0"):
        trace([0.5, 0.0, 0.5])
    assert trace([0.5, 0.5], label=None).last == 2
    assert trace([0.5, 0.5, 1.0], (2,), None).last == 2
    assert trace([0.5, 0.5]).stays(0, 2) == 0.25


def test_draws_of_another_sampler_are_refused() -> None:
    one = step(0.3, 0.95, 20)
    drawn = one.draw([Ask(0, 64), Ask(30, 64)], np.random.default_rng(0))
    agree(one.trace, drawn)
    hotter = Trace(
        "t", one.trace.token_ids, one.trace.ends, tuple(0.5 * p for p in one.trace.p), SAFE
    )
    colder = Trace(
        "t", one.trace.token_ids, one.trace.ends, tuple(p**0.1 for p in one.trace.p), SAFE
    )
    for wrong in (hotter, colder):
        with pytest.raises(
            BadInput, match="continuations leave it, where its probabilities expect"
        ):
            agree(wrong, drawn)


def test_the_exhaustive_protocol_is_the_papers_rule_on_its_counts() -> None:
    for made in made_up.curves(12, 3, made_up.SHAPES[:6], 80):
        for csr in (TOKEN, SENTENCE):
            search = exhaustive(made.trace, SAFE, csr)
            asks = search.send(None)  # type: ignore[arg-type]
            assert {ask.n for ask in asks} == {csr.draws}
            drawn = made.draw(asks, np.random.default_rng(0))
            points = [
                CsrPoint(made.trace.id, ask.cut, *drawn.at(ask.cut, born_here=True)) for ask in asks
            ]
            with pytest.raises(StopIteration) as done:
                search.send(drawn)
            found = done.value.value
            expected = turning_point(
                points, SAFE, csr, spans(made.trace), made.trace.ends[-1], made.trace.label
            )
            assert (found.token, found.sentence, found.interval, found.flags) == (
                expected.token,
                expected.sentence,
                expected.interval,
                expected.flags,
            )
            assert found.rollouts == len(asks) * csr.draws
            assert found.tokens == drawn.tokens.sum()


def test_truth_moves_with_the_threshold() -> None:
    one = step(0.3, 0.92, 20)
    assert truth(one.trace, SAFE, TOKEN, one.truth.tolist()).token == 21
    strict = truth(one.trace, SAFE, CsrSettings(mu=0.94), one.truth.tolist())
    assert strict.token is not None
    assert strict.token > 40


@pytest.mark.parametrize(
    "make",
    [
        lambda t: pivotal(t, SAFE, SENTENCE, PivotalSettings(200)),
        lambda t: isotonic(t, SAFE, TOKEN, 100),
        lambda t: isotonic(t, SAFE, SENTENCE, 200),
    ],
    ids=["pivotal", "isotonic", "sentences"],
)
def test_rivals_find_a_sharp_turn(make: object) -> None:
    one = step(0.2, 0.99, 20)
    (found,) = curves.find_on_curves([one], make, 2).values()  # type: ignore[arg-type]
    assert found.sentence == 3
    assert found.rollouts > 0
    assert found.judged == found.rollouts


def test_isotonic_smoothing_falls_for_unsafe_turns() -> None:
    one = step(0.9, 0.01, 20, label=UNSAFE)
    (found,) = curves.find_on_curves([one], lambda t: isotonic(t, UNSAFE, SENTENCE, 200)).values()
    assert found.sentence == 3


def test_a_pivotal_search_stops_where_nothing_moves() -> None:
    flat = step(0.5, 0.5, 20, label=UNSAFE)
    (found,) = curves.find_on_curves(
        [flat], lambda t: pivotal(t, SAFE, SENTENCE, PivotalSettings(32, 0.9))
    ).values()
    assert found.rollouts == 64
    assert found.token is None


def test_a_whole_curve_covers_everywhere_and_is_near_where_draws_pass() -> None:
    """The intervals of all points hold S; where at least 20 draws pass, S is as near as 32 draws at a sentence end bring it."""
    made = made_up.curves(90, 4, made_up.SHAPES[:6])
    smooth = curves.find_on_curves(
        made, lambda t: whole(t, CsrSettings(draws=24), probes(t, 12)), 3
    )
    plain = curves.find_on_curves(made, lambda t: measured(t, 32, [0, *t.ends]), 3)
    hits, near, far, cheaper = [], [], [], []
    for one in made:
        s, points = one.truth, {point.cut: point for point in smooth[one.trace.id]}
        rows = curve(list(points.values()))
        hits += [row["low"] - 1e-9 <= s[int(row["cut"])] <= row["high"] + 1e-9 for row in rows]
        assert len(points) == len(s)
        assert sum(point.n > 0 for point in points.values()) > 0.7 * len(s)
        near.append(
            np.mean(
                [abs(points[cut].s - s[cut]) for cut in one.trace.ends if points[cut].n >= 20]
                or [math.nan]
            )
        )
        far.append(np.mean([abs(point.s - s[point.cut]) for point in plain[one.trace.id]]))
        cheaper.append((12 * 24) / (32 * (1 + len(one.trace.ends))))
    assert np.mean(hits) > 0.93
    assert np.nanmean(near) < 1.5 * np.mean(far)
    assert np.mean(cheaper) < 0.8


def test_probes_stand_at_equal_steps_of_hazard() -> None:
    one = trace([0.5] * 10 + [1.0] * 50 + [0.5] * 10)
    found = probes(one, 4, also=(70,))
    assert found == [0, 5, 10, 65, 70]
    assert all(0 <= cut <= one.last for cut in found)


def test_the_recursion_is_what_draws_show() -> None:
    """S_c = p_c S_{c+1} + (1 - p_c) D_c against direct draws, on every shape."""
    for made in made_up.curves(8, 1, length=60):
        for cut in (0, made.trace.ends[len(made.trace.ends) // 2]):
            drawn = made.draw([Ask(cut, 3000)], np.random.default_rng(0))
            safe = int((drawn.safe == 1).sum())
            assert binom.cdf(safe, 3000, made.truth[cut]) > 1e-4
            assert binom.sf(safe - 1, 3000, made.truth[cut]) > 1e-4


def test_measuring_draws_are_made_only_where_choosing_ones_saw_s_open() -> None:
    curve_ = course(0.5, 0.5, 0.0, 0.0, label=UNSAFE)
    settled = dataclasses.replace(curve_.trace, settled=18)
    curve_ = Curve(settled, curve_.ways)
    asked: list[Ask] = []

    def spy(one: Trace) -> object:
        inner = split_measured(one, 16, (0, *one.ends))
        drawn = None
        while True:
            try:
                asks = inner.send(drawn)  # type: ignore[arg-type]
            except StopIteration as done:
                return done.value
            asked.extend(asks)
            drawn = yield asks

    choosing, measuring = curves.find_on_curves([curve_], spy)[curve_.trace.id]  # type: ignore[arg-type]
    assert [point.cut for point in choosing] == [0, 6, 12, 18, 24]
    assert {point.cut for point in measuring} >= {0, 6, 12, 18}
    assert all(ask.cut < 18 for ask in asked)  # harm stands there: S is 0, and nothing is drawn
    assert {point.s for point in choosing if point.cut >= 18} == {0.0}
    assert all(ask.fresh for ask in asked)
