"""Estimators that draw by a plan: the paper's protocol and two published rivals; and whole curves.

- ``exhaustive``: the paper's protocol, the same number of continuations at every cut (Eq. 1-3).
- ``isotonic``: fewer draws at every cut, smoothed to a monotone curve.
- ``pivotal``: Pivotal Token Search (arXiv 2412.08905, section 4.3), which halves segments.
- ``measure_...`` and ``choose_and_measure`` return CSR points in place of a turning point.
- ``true_turn``: where a curve that is known exactly turns.

``adaptive`` is the estimator that stops as soon as it knows enough. Terms are defined in ``draws``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from ipo_lib.csr import CsrSettings, cuts_to_measure, find_turning_point
from ipo_lib.records import SAFE, CsrPoint, TurningPoint
from ipo_lib.turning_points.draws import (
    NO_DRAWS,
    Array,
    Drawing,
    DrawRequest,
    Draws,
    Search,
    Trace,
    evidence_at,
    summed_before,
    token_sentences,
    with_costs,
)

EXACT_DRAWS = 1_000_000  # draws that stand for a known value of S


# Estimators of a turning point.


def exhaustive(trace: Trace, kind: str, csr: CsrSettings) -> Search:
    """The paper's protocol: ``csr.draws`` continuations at every cut of ``csr.grain``."""
    places = cuts_to_measure(trace.length, token_sentences(trace), csr)
    drawn = yield [DrawRequest(cut, csr.draws) for cut in places]
    points = drawn.points(trace, places, started_here=True)
    return _find_turn(trace, kind, csr, points, drawn)


def isotonic(trace: Trace, kind: str, csr: CsrSettings, draws: int) -> Search:
    """Eq. 2 or 3 on a monotone curve, by pooling adjacent violators. It cannot see a re-crossing.

    Args:
        trace: the trace.
        kind: ``safe`` (Eq. 2, S rises) or ``unsafe`` (Eq. 3, S falls).
        csr: the rule, and the grain of the cuts.
        draws: continuations at every cut.
    """
    from scipy.optimize import isotonic_regression

    places = cuts_to_measure(trace.length, token_sentences(trace), csr)
    drawn = yield [DrawRequest(cut, draws) for cut in places]
    points = drawn.points(trace, places, started_here=True)
    judged = [point for point in points if point.n]
    if judged:
        rates = [point.s for point in judged]
        weights = [point.n for point in judged]
        smooth = isotonic_regression(rates, weights=weights, increasing=kind == SAFE).x
        judged_cuts = [point.cut for point in judged]
        points = exact_points(trace, dict(zip(judged_cuts, smooth, strict=True)))
    return _find_turn(trace, kind, csr, points, drawn)


@dataclass(frozen=True)
class PivotalSettings:
    """Settings of Pivotal Token Search."""

    draws: int = 32  # continuations at a cut
    gap: float = 0.2  # a segment whose ends differ in S by less is not split


def pivotal(trace: Trace, kind: str, csr: CsrSettings, settings: PivotalSettings) -> Search:
    """Split segments of the trace as long as S differs at their ends; then Eq. 2 or 3.

    Args:
        trace: the trace.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule; it is applied to the cuts that were measured.
        settings: how many draws, and which segments are split.
    """
    drawn = NO_DRAWS
    log_loss = summed_before(-np.log(trace.p))
    rates: dict[int, float] = {}  # S by cut; nan where nothing was judged
    segments = [(0, trace.length)]
    while segments:
        # 1. Measure the ends that are new.
        new_cuts = sorted(set(chain.from_iterable(segments)) - rates.keys())
        if new_cuts:
            drawn += yield [DrawRequest(cut, settings.draws) for cut in new_cuts]
            for point in drawn.points(trace, new_cuts, started_here=True):
                rates[point.cut] = point.s
        # 2. Split where S moves, at half of the segment's log-probability.
        halves = []
        for start, stop in segments:
            if stop - start > 1 and abs(rates[stop] - rates[start]) >= settings.gap:
                middle = _middle(log_loss, start, stop)
                halves += [(start, middle), (middle, stop)]
        segments = halves
    points = drawn.points(trace, sorted(rates), started_here=True)
    return _find_turn(trace, kind, replace(csr, grain="token"), points, drawn)


def _middle(log_loss: Array, start: int, stop: int) -> int:
    """The cut strictly between two that is nearest to half of their log-probability."""
    half = (log_loss[start] + log_loss[stop]) / 2
    distances = np.abs(log_loss[start + 1 : stop] - half)
    return start + 1 + int(distances.argmin())


def _find_turn(
    trace: Trace, kind: str, csr: CsrSettings, points: Sequence[CsrPoint], drawn: Draws
) -> TurningPoint:
    """Eq. 2 or 3 on points, with what was drawn at both sides of the turn and the cost of all."""
    sentences = token_sentences(trace)
    turn = find_turning_point(points, kind, csr, sentences, trace.length, trace.label)
    before = after = None
    if turn.interval is not None:
        counts = drawn.counts_at(turn.interval[0], started_here=True)
        before = evidence_at(turn.interval[0], counts, NO_DRAWS)
    if turn.token is not None:
        counts = drawn.counts_at(turn.token, started_here=True)
        after = evidence_at(turn.token, counts, NO_DRAWS)
    return with_costs(replace(turn, before=before, after=after), drawn)


# Curves that are known exactly.


def exact_points(trace: Trace, curve: Mapping[int, float]) -> list[CsrPoint]:
    """Points that stand for known values of S, by cut; nan: nothing is known there."""
    points = []
    for cut, s in curve.items():
        n = 0 if math.isnan(s) else EXACT_DRAWS
        n_safe = round(s * EXACT_DRAWS) if n else 0
        points.append(CsrPoint(trace.id, cut, n_safe, n - n_safe, 0))
    return points


def true_turn(trace: Trace, kind: str, csr: CsrSettings, curve: Sequence[float]) -> TurningPoint:
    """Eq. 2 or 3 at every token of a known curve.

    Args:
        trace: the trace.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule. With the paper's mu this is where S itself turns; with mu near 0.94, where
            the paper's protocol of 32 draws a token does.
        curve: S at every cut.
    """
    by_token = replace(csr, grain="token", stride=1)
    rates = {cut: float(curve[cut]) for cut in range(trace.length + 1)}
    points = exact_points(trace, rates)
    sentences = token_sentences(trace)
    return find_turning_point(points, kind, by_token, sentences, trace.length, trace.label)


# Plans that measure CSR.


def probe_cuts(trace: Trace, count: int, also: Sequence[int] = ()) -> list[int]:
    """``count`` cuts at equal steps of hazard from the start on, and those in ``also``."""
    hazard = trace.hazard
    places = np.linspace(0, hazard[trace.last], count, endpoint=False)
    return sorted({*np.searchsorted(hazard, places).tolist(), *also})


def measure_whole_curve(
    trace: Trace, csr: CsrSettings, cuts: Sequence[int]
) -> Drawing[list[CsrPoint]]:
    """A point at every cut, from ``csr.draws`` fresh draws at each of a few cuts.

    How many draws pass through a cut is chance, but not how they end; so each point's interval
    holds. It is wide where few pass.
    """
    drawn = yield [DrawRequest(cut, csr.draws, fresh=True) for cut in cuts]
    return drawn.points(trace, range(trace.last + 1))


def measure_at_cuts(trace: Trace, draws: int, cuts: Sequence[int]) -> Drawing[list[CsrPoint]]:
    """CSR at some cuts, from ``draws`` fresh draws that start at each."""
    drawn = yield [DrawRequest(cut, draws, fresh=True) for cut in cuts]
    return drawn.points(trace, cuts, started_here=True)


def choose_and_measure(
    trace: Trace, draws: int, cuts: Sequence[int]
) -> Drawing[tuple[list[CsrPoint], list[CsrPoint]]]:
    """CSR at both ends of sentences, from draws that choose and from others that measure.

    A sentence can move S only where S is open, between 0 and 1. A sentence chosen by the same draws
    that measure it would look as if it moved S, since both share one error.

    Args:
        trace: its sentences lie between neighbouring ``cuts``.
        draws: continuations at each cut, of either kind.
        cuts: rising. From ``Trace.settled`` on, S is 0 and nothing is drawn.

    Returns:
        Points to choose by, at every cut, and points to measure with, at both ends of the sentences
        that begin where the first ones saw S open.
    """
    settled = math.inf if trace.settled is None else trace.settled
    settled_points = [CsrPoint(trace.id, cut, 0, draws, 0) for cut in cuts if cut >= settled]
    free_cuts = [cut for cut in cuts if cut < settled]

    # 1. Choose.
    choosing = yield from measure_at_cuts(trace, draws, free_cuts)
    open_cuts = {point.cut for point in choosing if 0 < point.n_safe < point.n}

    # 2. Measure both ends of the sentences that begin at an open cut.
    ends: set[int] = set()
    for start, stop in pairwise(cuts):
        if start in open_cuts:
            ends |= {start, stop}
    chosen_cuts = [cut for cut in free_cuts if cut in ends]
    measuring: list[CsrPoint] = []
    if chosen_cuts:
        measuring = yield from measure_at_cuts(trace, draws, chosen_cuts)
    return choosing + settled_points, measuring + settled_points
