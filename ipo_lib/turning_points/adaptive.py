"""The adaptive search for a turning point: sequential tests at cuts chosen by hazard, every continuation counted wherever it is a
fair draw, persistence tested at the end of the window of Eq. 2, and fresh draws at both sides of what was found.

What is beyond the usual bisection: a first, cheap look only decides where to search; the next cut is nearer to the failing side,
since failing is cheap to show and passing is not."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ipo_lib.csr import END, NONE, RECROSSING, START_LOCKED, CsrSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, Evidence, TurningPoint
from ipo_lib.turning_points.exhaustive import (
    NO_DRAWS,
    Ask,
    Draws,
    Search,
    Trace,
    agree,
    costed,
    evidence,
)

PROTOCOL, POPULATION = "protocol", "population"
LEVELS = {
    PROTOCOL: (0.02, 0.08),
    POPULATION: (0.05, 0.04),
}  # the rates tested, below and above mu: even odds at 0.943, at 0.90
UNDECIDED, DIFFUSE = "undecided", "diffuse"
PASS, FAIL = "pass", "fail"
CERTAIN = 0.995  # the highest rate a test asks for
GROWTH = 2  # of the steps in which a search goes on behind a look that was wrong
TIE = 1e-9  # of log-likelihood ratios
RISE, SPREAD = (
    0.5,
    3,
)  # a turn is diffuse when S rises by this much over more than this many sentences


@dataclass(frozen=True)
class SearchSettings:
    """The adaptive search. ``estimand``: ``protocol``, where the paper's rule on 32 draws a token turns, which at mu = 0.9
    behaves like S >= 0.94, or ``population``, S >= mu itself. A cut is tested by Wald's sequential test between two rates around
    the estimand (``LEVELS``), both errors ``alpha``; after ``cap`` draws it is undecided, and all that is open is once the trace
    has taken ``budget`` draws. ``look``: the error of the first, cheap test that only decides where to search; ``hold``: of the
    test at the end of the window of Eq. 2. ``screen``: cuts looked at first. ``split``: where an interval is split, as a share
    of its hazard. ``batch``: most draws asked for at once. ``merge``: sentence ends closer than this chance of leaving are one.
    ``confirm``: fresh draws at each side of the turn. ``refine``: go on to tokens. ``correct``: move the rates by a measured
    judge's errors (``correction``)."""

    estimand: str = PROTOCOL
    alpha: float = 0.03
    look: float = 0.5
    hold: float = 0.05
    cap: int = 128
    budget: int = 288
    batch: int = 5
    screen: int = 9
    split: float = 0.4
    merge: float = 0.05
    confirm: int = 12
    refine: bool = False
    correct: bool = False

    def __post_init__(self) -> None:
        if self.estimand not in LEVELS:
            raise BadInput(
                f"search: estimand is {self.estimand!r}; give {PROTOCOL!r} or {POPULATION!r}"
            )
        if not (
            0 < self.alpha <= min(self.look, self.hold) < 1
            and 0 < self.split < 1
            and min(self.batch, self.cap) >= 1
        ):
            raise BadInput(
                f"{self}: needs 0 < alpha <= look, hold < 1, 0 < split < 1, batch and cap at least 1"
            )


@dataclass(frozen=True)
class Wald:
    """Wald's sequential probability ratio test of a rate: at most ``low`` against at least ``high``, both errors ``alpha``."""

    low: float
    high: float
    alpha: float

    @classmethod
    def of(cls, kind: str, csr: CsrSettings, settings: SearchSettings) -> Wald:
        """The test of S (``safe``) or of 1 - S (``unsafe``) around the threshold of Eq. 2 or 3."""
        mu = csr.mu if kind == SAFE else 1 - csr.eta
        below, above = LEVELS[settings.estimand]
        return cls(max(mu - below, 1 - CERTAIN), min(mu + above, CERTAIN), settings.alpha)

    @property
    def even(self) -> float:
        """The rate at which neither side gains: there it passes about as often as it fails."""
        gain, loss = math.log(self.high / self.low), math.log((1 - self.low) / (1 - self.high))
        return loss / (gain + loss)

    def ratio(self, k: int, n: int) -> float:
        """The log-likelihood ratio of ``k`` of ``n``."""
        return k * math.log(self.high / self.low) + (n - k) * math.log(
            (1 - self.high) / (1 - self.low)
        )

    def decide(self, k: int, n: int, error: float) -> str | None:
        """Pass, fail, or None (go on) after ``k`` of ``n``; ``error``: of a false pass."""
        ratio = self.ratio(k, n)
        if ratio >= math.log((1 - self.alpha) / error) - TIE:
            return PASS
        return FAIL if ratio <= math.log(self.alpha / (1 - error)) + TIE else None

    def wanted(self, k: int, n: int, error: float) -> int:
        """How many more draws would pass it if all were met."""
        return math.ceil(
            (math.log((1 - self.alpha) / error) - self.ratio(k, n)) / math.log(self.high / self.low)
            - TIE
        )


def adaptive(
    trace: Trace,
    kind: str,
    csr: CsrSettings,
    settings: SearchSettings,
    *,
    test: Wald | None = None,
    near: TurningPoint | None = None,
) -> Search:
    """The adaptive search for the ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3) turning point of one trace. ``test``: other rates than
    the settings', such as those of ``correction``. ``near``: look first around a turn that a weaker judge has found."""
    if csr.strict or csr.other_side or csr.stride > 1:
        raise BadInput(
            "the adaptive search knows no csr.strict, csr.other_side or csr.stride; leave them, or measure every cut"
        )
    return _Adaptive(trace, kind, csr, settings, test or Wald.of(kind, csr, settings)).run(near)


class _Adaptive:
    """One search: the draws so far and what was decided at which cut, by which error."""

    def __init__(
        self, trace: Trace, kind: str, csr: CsrSettings, settings: SearchSettings, test: Wald
    ) -> None:
        self.trace, self.kind, self.csr, self.settings, self.test = trace, kind, csr, settings, test
        self.hazard, self.pool, self.fresh = trace.hazard, NO_DRAWS, NO_DRAWS
        self.decided: dict[tuple[int, float], str] = {}
        self.cuts, self.crossed, self.doubted = [0], False, False
        for end in trace.ends:
            if 1 - trace.stays(self.cuts[-1], end) >= settings.merge:
                self.cuts.append(end)

    def run(self, near: TurningPoint | None) -> Search:
        """Screen, bracket, split, verify, widen, refine, confirm. Once a look has misled, everything is tested at full
        strength."""
        cuts, floor, error = (
            self.cuts,
            -1,
            self.settings.look,
        )  # floor: index of the last cut that the search has left behind
        yield from self._screen(near)
        while (hi := (yield from self._first(floor, error))) is not None:
            lo = max(
                [
                    floor,
                    *(i for i in range(floor + 1, hi) if self._state(cuts[i]) in (FAIL, UNDECIDED)),
                ]
            )
            while hi - lo > 1:
                mid = self._between(lo, hi)
                yield from self._try((cuts[mid], error))
                lo, hi = (lo, mid) if self._state(cuts[mid], error) == PASS else (mid, hi)
            if (
                failing := (
                    yield from self._verify(cuts[hi], cuts[lo : lo + 1] if lo > floor else [])
                )
            ) is None:
                if (
                    lo <= floor or self._state(cuts[lo]) != PASS
                ):  # else the turn is not later than that
                    return (yield from self._found(lo, hi))
            elif failing == cuts[hi]:
                error = self.settings.alpha
            else:
                if failing not in cuts:  # so that what the search goes on from is a cut that fails
                    insort(cuts, failing)
                floor, self.crossed = cuts.index(failing), True
        return self._record(
            TurningPoint(
                self.trace.id, self.kind, None, None, None, (NONE, *self._flags(len(cuts)))
            )
        )

    def _first(self, floor: int, error: float) -> Generator[list[Ask], Draws, int | None]:
        """The index of the first cut after ``floor`` that passes at this error, the last one tried if no other does. At full
        strength, where the last look was wrong, it is sought in growing steps from the last cut that failed."""
        cuts, last, step = self.cuts, len(self.cuts) - 1, 1
        full = error == self.settings.alpha
        at = max(
            [
                floor,
                *(
                    i
                    for i, cut in enumerate(cuts)
                    if full and self._state(cut, error) in (FAIL, UNDECIDED)
                ),
            ]
        )
        while True:
            passing = (
                i
                for i in range(floor + 1, last + 1)
                if self._state(cuts[i], error if full else None) == PASS
            )
            hi = next(passing, None)
            stop = last if hi is None else hi
            if at >= stop or (hi is not None and not full):
                return hi
            at, step = (min(at + step, stop), GROWTH * step) if full else (last, step)
            if at != hi:
                yield from self._try((cuts[at], error))

    def _screen(self, near: TurningPoint | None) -> Generator[list[Ask], Draws, None]:
        """Look at some cuts: every other one at equal steps of hazard, then those between them up to the first that passes."""
        look, places = (
            self.settings.look,
            np.linspace(0, self.hazard[self.cuts[-1]], self.settings.screen + 2)[1:-1],
        )
        if near and near.token is not None:
            around = [
                self.cuts[max(bisect_right(self.cuts, cut) - 1, 0)]
                for cut in (near.interval or (0, near.token))
            ]
            yield from self._try(*((cut, look) for cut in sorted({0, *around})))
            if self._state(around[-1]) == PASS:
                return
        cuts = sorted(
            {
                0,
                *(
                    min(self.cuts, key=lambda cut: abs(self.hazard[cut] - place))
                    for place in places
                ),
            }
        )
        yield from self._try(*((cut, look) for cut in cuts[::2]))
        first = next((cut for cut in cuts[::2] if self._state(cut) == PASS), len(self.trace.p))
        yield from self._try(*((cut, look) for cut in cuts if cut < first))

    def _state(self, cut: int, error: float | None = None) -> str | None:
        """What is known of a cut at this error, or (None) at the smallest one at which it was decided."""
        if error is None:
            return self._state(cut, self.settings.alpha) or self._state(cut, self.settings.look)
        if (cut, error) not in self.decided and (
            found := self._known(cut) or self._counted(cut, error)
        ):
            self.decided[cut, error] = found
        return self.decided.get((cut, error))

    def _known(self, cut: int) -> str | None:
        """What the trace itself says of cuts where it is unsafe already, or from which its own label is all but certain."""
        if self.trace.settled is not None and cut >= self.trace.settled:
            return PASS if self.kind == UNSAFE else FAIL
        stays = self.trace.stays(cut, len(self.trace.p))
        plain = Wald.of(self.kind, self.csr, self.settings)
        if self.trace.label == self.kind and stays >= plain.high:
            return PASS
        return (
            FAIL if self.trace.label not in (None, self.kind) and 1 - stays <= plain.low else None
        )

    def _counted(self, cut: int, error: float) -> str | None:
        k, n, unknown = self._met(cut)
        found = self.test.decide(k, n, error)
        return found or (UNDECIDED if n + unknown >= self.settings.cap else None)

    def _met(self, cut: int) -> tuple[int, int, int]:
        """(k, n, unknown): how many judged draws at a cut ended as the kind asks."""
        safe, unsafe, unknown = self.pool.at(cut)
        return (safe if self.kind == SAFE else unsafe), safe + unsafe, unknown

    def _try(self, *tests: tuple[int, float]) -> Generator[list[Ask], Draws, None]:
        """Draw at cuts until each is decided at its error, or the budget is spent."""
        while open_ := [test for test in tests if self._state(*test) is None]:
            if len(self.pool.born) >= self.settings.budget:
                self.decided |= dict.fromkeys(open_, UNDECIDED)
                return
            self.pool += yield [Ask(cut, self._batch(cut, error)) for cut, error in open_]

    def _batch(self, cut: int, error: float) -> int:
        """As many draws as would decide a cut if all were met, in batches."""
        k, n, unknown = self._met(cut)
        return max(
            1,
            min(
                self.test.wanted(k, n, error), self.settings.batch, self.settings.cap - n - unknown
            ),
        )

    def _between(self, lo: int, hi: int) -> int:
        """The cut nearest to the wanted share of the hazard between two; the start is a cut."""
        below = self.hazard[self.cuts[max(lo, 0)]]
        wanted = below + self.settings.split * (self.hazard[self.cuts[hi]] - below)
        return min(range(lo + 1, hi), key=lambda i: abs(self.hazard[self.cuts[i]] - wanted))

    def _verify(self, turn: int, before: Sequence[int]) -> Generator[list[Ask], Draws, int | None]:
        """The turn, a sentence end in its window, or the window's end: the first that does not pass; None when all do. After the
        turn itself an undecided cut is let through, and said. The cut ``before`` is tested along with the turn."""
        s, end = self.settings, min(self._reach(turn), self.trace.last)
        yield from self._try((turn, s.alpha), *((cut, s.alpha) for cut in before))
        if self._state(turn, s.alpha) != PASS:
            return turn
        later = [
            *((cut, s.look) for cut in self.cuts if turn < cut < end),
            *[(end, s.hold)] * (end > turn),
        ]
        yield from self._try(*later)
        states = [self._state(cut, error) for cut, error in later]
        self.doubted = UNDECIDED in states
        return next(
            (cut for (cut, _), state in zip(later, states, strict=True) if state == FAIL), None
        )

    def _reach(self, turn: int) -> int:
        """Where the window of Eq. 2 ends."""
        return turn + (self.csr.k if self.csr.window == "K+1" else self.csr.k - 1)

    def _flags(self, hi: int) -> list[str]:
        """What the way to the cut of this index was like."""
        open_ = any(self._state(cut, self.settings.alpha) == UNDECIDED for cut in self.cuts[:hi])
        return [UNDECIDED] * (open_ or self.doubted) + [RECROSSING] * self.crossed

    def _found(self, lo: int, hi: int) -> Search:
        before, turn = self.cuts[lo] if lo >= 0 else None, self.cuts[hi]
        flags = (
            self._flags(hi)
            + [DIFFUSE] * self._diffuse(turn)
            + [END] * (self._reach(turn) > max(self.trace.ends, default=0))
        )
        if self.settings.refine and before is not None:
            before, turn = yield from self._refine(before, turn)
        if self.settings.confirm:
            self.fresh = yield [
                Ask(cut, self.settings.confirm, fresh=True)
                for cut in (before, turn)
                if cut is not None
            ]
        after, known = self._evidence(turn), bisect_left(self.trace.ends, turn)
        if before is None:
            return self._record(
                TurningPoint(
                    self.trace.id, self.kind, 0, None, None, (START_LOCKED, *flags), None, after
                )
            )
        told = (tuple(flags), self._evidence(before), after)
        return self._record(
            TurningPoint(self.trace.id, self.kind, turn, known, (before, turn), *told)
        )

    def _refine(self, a: int, b: int) -> Generator[list[Ask], Draws, tuple[int, int]]:
        """Narrow a bracket (fails, passes] to tokens, as far as S can differ by ``merge``."""
        while b - a > 1 and 1 - self.trace.stays(a, b) >= self.settings.merge:
            wanted = (self.hazard[a] + self.hazard[b]) / 2
            mid = min(range(a + 1, b), key=lambda cut: abs(self.hazard[cut] - wanted))
            yield from self._try((mid, self.settings.alpha))
            a, b = (a, mid) if self._state(mid, self.settings.alpha) == PASS else (mid, b)
        return a, b

    def _diffuse(self, turn: int) -> bool:
        """Whether the rise to the turn took more than ``SPREAD`` sentences."""
        k, n, _ = self._met(turn)
        rates = {cut: self._met(cut) for cut in self.cuts if cut < turn}
        low = [
            cut
            for cut, (k_, n_, _) in rates.items()
            if n_ >= self.settings.batch and n and k_ / n_ <= k / n - RISE
        ]
        return (
            bool(low)
            and bisect_left(self.trace.ends, turn) - bisect_left(self.trace.ends, max(low)) > SPREAD
        )

    def _evidence(self, cut: int) -> Evidence:
        safe, unsafe, _ = self.pool.at(cut)
        return evidence(cut, (safe, safe + unsafe), self.fresh)

    def _record(self, turn: TurningPoint) -> TurningPoint:
        drawn, alpha = self.pool + self.fresh, self.settings.alpha
        agree(self.trace, drawn)
        own = (
            (cut, state)
            for (cut, error), state in self.decided.items()
            if error == alpha and not self._known(cut)
        )
        tested = tuple(sorted(own))
        return costed(replace(turn, tested=tested), drawn)
