"""Where CSR turns, by estimators that ask for continuations: what they all share, and those that ask by a plan: the paper's
exhaustive protocol, isotonic smoothing and Pivotal Token Search. ``adaptive`` stops as soon as it knows enough.

An estimator is a generator: it yields ``Ask``s, is sent the ``Draws``, and returns a ``TurningPoint``. It knows nothing of
models, so that the same search runs on a sampler (``locate``) and on recorded curves (``replay``), many traces in step.

What makes it cheap: a continuation born at b that first differs from the trace at d is a fair draw of S at every cut in [b, d];
and S cannot change by more than the chance of leaving, |S_a - S_b| <= 1 - P(tokens a..b), so that cuts are chosen by hazard."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from ipo_lib.csr import CsrSettings, cuts, turning_point
from ipo_lib.records import SAFE, BadInput, CsrPoint, Evidence, Ids, Sentence, TurningPoint
from ipo_lib.stats import clopper_pearson

UNKNOWN = -1  # the outcome of a draw that nobody could judge
STRANGE = 6  # standard deviations between how often draws leave a trace and how often they should
EXACT = 1_000_000  # draws that stand for a known S


@dataclass(frozen=True)
class Trace:
    """What an estimator sees of a trace: all its tokens through ``</think>``, its sentences' ``ends`` as cuts, the sampler's
    probability ``p`` of each of its tokens, and its own label, which is S at its end. ``settled``: the first cut at which it
    holds harm already, for a judge who takes none of that back (``CsrSettings.absorbing``): S is 0 from there."""

    id: str
    token_ids: Ids
    ends: tuple[int, ...]
    p: tuple[float, ...]
    label: str | None
    settled: int | None = None

    def __post_init__(self) -> None:
        if len(self.p) != len(self.token_ids):
            raise BadInput(
                f"trace {self.id}: {len(self.p)} probabilities of {len(self.token_ids)} tokens; give one each"
            )
        if (least := min(self.p, default=1.0)) <= 0:
            at = self.p.index(least)
            raise BadInput(
                f"trace {self.id}: its token {at} has probability 0 here; sample it with this model and these settings"
            )

    @property
    def last(self) -> int:
        """The last cut of which anything is known: the trace's end, or its last sentence's where nobody could judge the trace."""
        return len(self.p) if self.label is not None else max(self.ends, default=0)

    @property
    def hazard(self) -> np.ndarray[Any, Any]:
        """Expected departures before every cut, [tokens + 1]."""
        return np.concatenate([[0.0], np.cumsum(1 - np.array(self.p))])

    def stays(self, a: int, b: int) -> float:
        """The probability that a continuation from cut ``a`` follows the trace to cut ``b``."""
        return math.prod(self.p[a:b])


@dataclass(frozen=True)
class Ask:
    """``n`` continuations from a cut; ``fresh``: none that this search has seen or will."""

    cut: int
    n: int
    fresh: bool = False


@dataclass(frozen=True)
class Draws:
    """Continuations as arrays: the cut each was ``born`` at, the first place where it ``left`` the trace (its length: never), its
    outcome ``safe`` (1, 0, UNKNOWN) and the ``tokens`` generated for it."""

    born: np.ndarray[Any, Any]
    left: np.ndarray[Any, Any]
    safe: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]

    def __add__(self, other: Draws) -> Draws:
        return Draws(
            *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in vars(self))
        )

    def at(self, cut: int, born_here: bool = False) -> tuple[int, int, int]:
        """(safe, unsafe, unknown) of the draws that are fair draws at ``cut``; ``born_here``: only of those made there."""
        own = self.safe[
            (self.born == cut) if born_here else (self.born <= cut) & (self.left >= cut)
        ]
        return int((own == 1).sum()), int((own == 0).sum()), int((own == UNKNOWN).sum())


NO_DRAWS = Draws(*(np.zeros(0, dtype=int) for _ in range(4)))
Search = Generator[list[Ask], Draws, TurningPoint]
Result = TypeVar("Result")
Estimator = Callable[[Trace, str], Search]


def evidence(cut: int, pooled: tuple[int, int], fresh: Draws) -> Evidence:
    """What is known of a cut, with the Clopper-Pearson interval of the fresh draws alone."""
    safe, unsafe, _ = fresh.at(cut, born_here=True)
    sure = clopper_pearson(safe, safe + unsafe)
    return Evidence(cut, *pooled, safe, safe + unsafe, sure.low, sure.high)


def agree(trace: Trace, drawn: Draws) -> None:
    """BadInput when the draws leave the trace much more or less often than its probabilities say: it is not this sampler's."""
    stop = np.minimum(drawn.left + 1, len(trace.p))
    chance = np.array(trace.p)
    spread = np.concatenate([[0.0], np.cumsum(chance * (1 - chance))])
    expected, variance = ((sums[stop] - sums[drawn.born]).sum() for sums in (trace.hazard, spread))
    left = int((drawn.left < len(trace.p)).sum())
    if abs(left - expected) > STRANGE * math.sqrt(variance + 1):
        seen = f"{left} of {len(drawn.left)} continuations leave it, where its probabilities expect {expected:.0f}"
        raise BadInput(
            f"trace {trace.id}: {seen}; search with the sampler and the settings that drew it"
        )


def costed(turn: TurningPoint, drawn: Draws) -> TurningPoint:
    """The turning point with what finding it cost."""
    return replace(
        turn, rollouts=len(drawn.born), tokens=int(drawn.tokens.sum()), judged=len(drawn.born)
    )


def probes(trace: Trace, count: int, also: Sequence[int] = ()) -> list[int]:
    """``count`` cuts at equal steps of hazard from the start on, and those in ``also``."""
    places = np.linspace(0, trace.hazard[trace.last], count, endpoint=False)
    return sorted({int(np.searchsorted(trace.hazard, place)) for place in places} | set(also))


def whole(
    trace: Trace, csr: CsrSettings, cuts: Sequence[int]
) -> Generator[list[Ask], Draws, list[CsrPoint]]:
    """The whole curve from ``csr.draws`` fresh draws at each of a few cuts: a point at every cut, from those that pass through.
    How many do is chance, but how those ended is not, so that each point's interval holds; it is wide where few pass."""
    drawn = yield [Ask(cut, csr.draws, fresh=True) for cut in cuts]
    return [CsrPoint(trace.id, cut, *drawn.at(cut)) for cut in range(trace.last + 1)]


def measured(
    trace: Trace, draws: int, cuts: Sequence[int]
) -> Generator[list[Ask], Draws, list[CsrPoint]]:
    """CSR at some cuts, from ``draws`` fresh draws born at each."""
    drawn = yield [Ask(cut, draws, fresh=True) for cut in cuts]
    return _points(trace, drawn, cuts)


def split_measured(
    trace: Trace, draws: int, cuts: Sequence[int]
) -> Generator[list[Ask], Draws, tuple[list[CsrPoint], list[CsrPoint]]]:
    """CSR at both ends of sentences, from draws that choose and from others that measure.

    A sentence can move S only where S is open, between 0 and 1. A sentence chosen by the same draws that
    measure it would look as if it moved S, since both share one error.

    Args:
        trace: its sentences lie between neighbouring ``cuts``.
        draws: continuations at each cut, of either kind.
        cuts: rising. Where the trace holds harm already (``Trace.settled``), S is 0 and nothing is drawn.

    Returns:
        Points to choose by, at every cut, and points to measure with, at both ends of the sentences
        that begin where the first ones saw S open.
    """
    settled = len(trace.p) + 1 if trace.settled is None else trace.settled
    known = [CsrPoint(trace.id, cut, 0, draws, 0) for cut in cuts if cut >= settled]
    asked = [cut for cut in cuts if cut < settled]
    drawn = yield [Ask(cut, draws, fresh=True) for cut in asked]
    choosing = _points(trace, drawn, asked)
    open_ = {point.cut for point in choosing if 0 < point.n_safe < point.n}
    ends = {cut for sentence in pairwise(cuts) if sentence[0] in open_ for cut in sentence}
    wanted = [cut for cut in asked if cut in ends]
    again = (yield [Ask(cut, draws, fresh=True) for cut in wanted]) if wanted else NO_DRAWS
    return [*choosing, *known], [*_points(trace, again, wanted), *known]


def run_together(
    searches: Mapping[str, Generator[list[Ask], Draws, Result]],
    draw: Callable[[Mapping[str, list[Ask]]], Mapping[str, Draws]],
) -> dict[str, Result]:
    """Run many searches in step: each round hands ``draw`` what they ask, by name, and takes the answers that are there.

    ``draw`` may answer some of the searches only; the others have their answer in a later round, without asking
    again. Handed nothing to draw, it answers all that are left.
    """
    found: dict[str, Result] = {}
    sent: Mapping[str, Draws | None] = dict.fromkeys(searches)
    waiting: set[str] = set()
    while sent or waiting:
        asks = {}
        for name, drawn in sent.items():
            try:
                asks[name] = searches[name].send(drawn)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as done:
                found[name] = done.value
        waiting |= asks.keys()
        sent = draw(asks) if waiting else {}
        waiting -= sent.keys()
    return {name: found[name] for name in searches}


def spans(trace: Trace) -> list[Sentence]:
    """The sentences of a trace by tokens; it has no text."""
    return [Sentence(at, 0, 0, a, b) for at, (a, b) in enumerate(pairwise((0, *trace.ends)))]


def _points(trace: Trace, drawn: Draws, at: Sequence[int]) -> list[CsrPoint]:
    return [CsrPoint(trace.id, cut, *drawn.at(cut, born_here=True)) for cut in at]


def _turn(
    trace: Trace, kind: str, csr: CsrSettings, points: Sequence[CsrPoint], drawn: Draws
) -> TurningPoint:
    """Eq. 2 or 3 on measured or smoothed points, with what was drawn at both sides and what all of it cost."""
    found = turning_point(points, kind, csr, spans(trace), _length(trace), trace.label)
    counts = {
        cut: drawn.at(cut, born_here=True)
        for cut in (*(found.interval or ()), found.token)
        if cut is not None
    }
    sides = [
        evidence(cut, (counts[cut][0], counts[cut][0] + counts[cut][1]), NO_DRAWS)
        if cut is not None
        else None
        for cut in (found.interval[0] if found.interval else None, found.token)
    ]
    return costed(replace(found, before=sides[0], after=sides[1]), drawn)


def _length(trace: Trace) -> int:
    return trace.ends[-1] if trace.ends else len(trace.p)


def exhaustive(trace: Trace, kind: str, csr: CsrSettings) -> Search:
    """The paper's protocol: ``csr.draws`` continuations at every cut of ``csr.grain``."""
    at = cuts(_length(trace), spans(trace), csr)
    drawn = yield [Ask(cut, csr.draws) for cut in at]
    return _turn(trace, kind, csr, _points(trace, drawn, at), drawn)


def isotonic(trace: Trace, kind: str, csr: CsrSettings, draws: int) -> Search:
    """``draws`` continuations at every cut of the grain, smoothed to a monotone curve by pooling adjacent violators, then Eq. 2
    or 3. What it does not see is any re-crossing."""
    from scipy.optimize import isotonic_regression

    at = cuts(_length(trace), spans(trace), csr)
    drawn = yield [Ask(cut, draws) for cut in at]
    points = [point for point in _points(trace, drawn, at) if point.n]
    if not points:
        return _turn(trace, kind, csr, _points(trace, drawn, at), drawn)
    rates, weights = [point.s for point in points], [point.n for point in points]
    smooth = isotonic_regression(rates, weights=weights, increasing=kind == SAFE).x
    return _turn(
        trace,
        kind,
        csr,
        ideal(trace, dict(zip([p.cut for p in points], smooth, strict=True))),
        drawn,
    )


def ideal(trace: Trace, curve: Mapping[int, float]) -> list[CsrPoint]:
    """Points that stand for known values of S; nan is nothing known."""
    known = {
        cut: (0 if math.isnan(s) else round(s * EXACT), 0 if math.isnan(s) else EXACT)
        for cut, s in curve.items()
    }
    return [CsrPoint(trace.id, cut, k, n - k, 0) for cut, (k, n) in known.items()]


def truth(trace: Trace, kind: str, csr: CsrSettings, curve: Sequence[float]) -> TurningPoint:
    """Eq. 2 or 3 at every token of a known curve; ``csr.mu`` decides whether this is the population's turn or, near 0.94, where
    the paper's protocol turns."""
    csr = replace(csr, grain="token", stride=1)
    known = {cut: float(curve[cut]) for cut in range(_length(trace) + 1)}
    return turning_point(ideal(trace, known), kind, csr, spans(trace), _length(trace), trace.label)


@dataclass(frozen=True)
class PivotalSettings:
    """Pivotal Token Search (arXiv 2412.08905, 4.3): ``draws`` a cut; a segment whose ends differ by less than ``gap`` is left."""

    draws: int = 32
    gap: float = 0.2


def pivotal(trace: Trace, kind: str, csr: CsrSettings, settings: PivotalSettings) -> Search:
    """Split the trace where its cumulative log-probability is halved, as long as S at a segment's ends differs by ``gap``; then
    Eq. 2 or 3 on the cuts that were measured."""
    last, drawn = _length(trace), NO_DRAWS
    loss = np.concatenate([[0.0], np.cumsum(-np.log(np.array(trace.p)))])
    known: dict[int, float] = {}
    segments = [(0, last)]
    while segments:
        fresh = sorted({cut for segment in segments for cut in segment} - known.keys())
        if fresh:
            drawn += yield [Ask(cut, settings.draws) for cut in fresh]
            known |= {
                point.cut: point.s for point in _points(trace, drawn, fresh)
            }  # nan where nothing was judged: never split
        wide = [
            (a, b) for a, b in segments if b - a > 1 and abs(known[b] - known[a]) >= settings.gap
        ]
        middles = [(a, _middle(loss, a, b), b) for a, b in wide]
        segments = [half for a, mid, b in middles for half in ((a, mid), (mid, b))]
    return _turn(
        trace, kind, replace(csr, grain="token"), _points(trace, drawn, sorted(known)), drawn
    )


def _middle(loss: np.ndarray, a: int, b: int) -> int:
    """The cut strictly between two that is nearest to half of their log-probability."""
    return a + 1 + int(np.abs(loss[a + 1 : b] - (loss[a] + loss[b]) / 2).argmin())
