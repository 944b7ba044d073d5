"""The adaptive search for a turning point (Eq. 2, 3): sequential tests at a few chosen cuts.

Terms (*cut*, *fair draw* and *hazard* are defined in ``draws``):

- A *test* asks whether S at a cut is above the threshold. It is Wald's sequential test: it draws
  until the cut *passes* or *fails*; after ``cap`` draws the cut is *undecided*. Its *error rate* is
  how often a cut passes that should fail. Every fair draw counts, wherever it started.
- *Screening* tests a cut at a high error rate, with few draws. That only says where to search.
- The *bracket* is a cut that does not pass and a later one that does: the turn lies between.
- The *window* is the ``k`` tokens after a turn in which S has to hold (Eq. 2).

Steps:

1. Screen some cuts at equal steps of hazard; a *guess* of the turn and the cut before it first.
2. Bracket the turn: find the first cut that passes.
3. Split the bracket until its sides are neighbours. The next cut is nearer to the failing side:
   to fail takes few draws, to pass takes many.
4. Verify: test both sides at full strength (error rate ``alpha``), then the window. A passing side
   that fails was a false positive: back to 2, at full strength from now on. A cut of the window
   that fails is a re-crossing: back to 2, behind that cut.
5. Refine the bracket to tokens, if ``refine`` is set.
6. Make fresh draws at both sides. Only these give intervals: the others steered the search.

For ``unsafe`` turns all of it is about 1 - S.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ipo_lib.csr import END, NO_TURN, RECROSSING, START_LOCKED, CsrSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, Evidence, TurningPoint
from ipo_lib.turning_points.draws import (
    NO_DRAWS,
    Drawing,
    DrawRequest,
    Search,
    Trace,
    check_departures,
    evidence_at,
    with_costs,
)
from ipo_lib.turning_points.wald import (
    FAIL,
    PASS,
    POPULATION,
    PROTOCOL,
    RATE_OFFSETS,
    UNDECIDED,
    WaldTest,
)

DIFFUSE = "diffuse"  # flag: S rose slowly
DIFFUSE_RISE = 0.5  # by this much
DIFFUSE_SENTENCES = 3  # over more sentences than these


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the adaptive search."""

    # Where the rule turns: ``protocol``, where the paper's 32 draws a token turn (S >= 0.94 for
    # mu = 0.9), or ``population``, where S >= mu itself.
    estimand: str = PROTOCOL
    alpha: float = 0.03  # error rate of a test at full strength, of either kind
    look: float = 0.5  # error rate of screening
    hold: float = 0.05  # error rate of the test at the window's end
    cap: int = 128  # draws after which a cut is undecided
    budget: int = 288  # draws of a trace after which every open cut is undecided
    batch: int = 5  # most draws requested at once at a cut
    screen: int = 9  # cuts screened
    split: float = 0.4  # where a bracket is split, as a share of its hazard
    merge: float = 0.05  # sentence ends closer than this chance of leaving count as one
    confirm: int = 12  # fresh draws at each side of the turn
    refine: bool = False  # narrow the bracket to tokens

    def __post_init__(self) -> None:
        if self.estimand not in RATE_OFFSETS:
            raise BadInput(
                f"search: estimand is {self.estimand!r}; give {PROTOCOL!r} or {POPULATION!r}"
            )
        errors_fit = 0 < self.alpha <= min(self.look, self.hold) < 1
        counts_fit = min(self.batch, self.cap) >= 1
        if not (errors_fit and 0 < self.split < 1 and counts_fit):
            raise BadInput(
                f"{self}: needs 0 < alpha <= look, hold < 1, 0 < split < 1, "
                "batch and cap at least 1"
            )


def adaptive(
    trace: Trace, kind: str, csr: CsrSettings, settings: SearchSettings, guess: int | None = None
) -> Search:
    """Search one trace for its turning point.

    Args:
        trace: the trace.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule: its thresholds and its window.
        settings: error rates and prices of the search.
        guess: the cut at which the turn is expected. Tests stay: a wrong guess costs draws.

    Raises:
        BadInput: the rule has a part that the search cannot test.
    """
    if csr.strict or csr.other_side or csr.stride > 1:
        raise BadInput(
            "the adaptive search knows no csr.strict, csr.other_side or csr.stride; "
            "leave them, or measure every cut"
        )
    return _AdaptiveSearch(trace, kind, csr, settings, guess).run()


Test = tuple[int, float]  # a cut and an error rate


class _AdaptiveSearch:
    """One search: the draws so far, and what was decided at which cut and error rate."""

    def __init__(
        self, trace: Trace, kind: str, csr: CsrSettings, settings: SearchSettings, guess: int | None
    ) -> None:
        self.trace = trace
        self.guess = guess
        self.kind = kind
        self.settings = settings
        self.alpha = settings.alpha
        self.screening_error = settings.look
        self.window_error = settings.hold
        self.test = WaldTest.for_kind(kind, csr, settings.estimand, settings.alpha)
        self.window = csr.k if csr.window == "K+1" else csr.k - 1
        self.hazard = trace.hazard
        self.drawn = NO_DRAWS
        self.fresh = NO_DRAWS
        self.decided: dict[Test, str] = {}
        self.crossed = False  # a turn was left behind since S did not hold
        self.doubted = False  # a cut of the window stayed undecided
        self.cuts = [0]  # the start and the sentence ends, rising
        for end in trace.ends:
            if 1 - trace.stays(self.cuts[-1], end) >= settings.merge:
                self.cuts.append(end)

    def run(self) -> Search:
        """Steps 1 to 6. ``low`` and ``high``: indices of the bracket's sides."""
        cuts = self.cuts
        error = self.screening_error
        floor = -1  # index of the last cut that the search has left behind
        yield from self._screen()
        while (high := (yield from self._first_passing(floor, error))) is not None:
            low = self._last_not_passing(floor, range(floor + 1, high))
            low, high = yield from self._split(low, high, error)
            before = [cuts[low]] if low > floor else []
            failing = yield from self._verify(cuts[high], before)
            if failing is None:
                # If the lower side passes at full strength, the turn is not later than there.
                if low <= floor or self._state(cuts[low]) != PASS:
                    return (yield from self._found(low, high))
            elif failing == cuts[high]:
                error = self.alpha
            else:
                if failing not in cuts:
                    insort(cuts, failing)
                floor = cuts.index(failing)
                self.crossed = True
        flags = (NO_TURN, *self._flags(len(cuts)))
        return self._record(TurningPoint(self.trace.id, self.kind, None, None, None, flags))

    # Step 1.

    def _screen(self) -> Drawing[None]:
        """Screen every other one of some cuts, then those between up to the first that passes."""
        if self.guess is not None and (yield from self._guess_is_right(self.guess)):
            return
        cuts_to_screen = {0}
        for place in np.linspace(0, self.hazard[self.cuts[-1]], self.settings.screen + 2)[1:-1]:
            cuts_to_screen.add(self._nearest(self.cuts, place))
        cuts = sorted(cuts_to_screen)
        coarse = cuts[::2]
        yield from self._test(coarse, self.screening_error)
        first = next((cut for cut in coarse if self._state(cut) == PASS), len(self.trace.p))
        yield from self._test(cuts[: bisect_left(cuts, first)], self.screening_error)

    def _guess_is_right(self, guess: int) -> Drawing[bool]:
        """Whether the first cut from the guess on passes, and the one before it does not."""
        index = min(bisect_left(self.cuts, guess), len(self.cuts) - 1)
        sides = self.cuts[max(index - 1, 0) : index + 1]
        yield from self._test(sides, self.screening_error)
        return [self._state(cut) == PASS for cut in sides] == [False] * (len(sides) - 1) + [True]

    def _nearest(self, cuts: Iterable[int], hazard: float) -> int:
        """The cut with the nearest hazard before it."""
        return min(cuts, key=lambda cut: abs(self.hazard[cut] - hazard))

    # Step 2.

    def _first_passing(self, floor: int, error: float) -> Drawing[int | None]:
        """Index of the first cut after ``floor`` whose test passes at ``error``, or None.

        While screening, any test counts, and the last cut is tried if none passes. After a false
        positive, search forward by doubling from the last failing cut.
        """
        cuts = self.cuts
        last = len(cuts) - 1
        if error != self.alpha:
            passing = self._passing_index(floor, None)
            if passing is None and floor < last:
                yield from self._test([cuts[last]], error)
                passing = self._passing_index(floor, None)
            return passing
        index = self._last_not_passing(floor, range(len(cuts)), error)
        step = 1
        while True:
            passing = self._passing_index(floor, error)
            stop = last if passing is None else passing
            if index >= stop:
                return passing
            index = min(index + step, stop)
            step *= 2
            if index != passing:
                yield from self._test([cuts[index]], error)

    def _passing_index(self, floor: int, error: float | None) -> int | None:
        """Index of the first cut after ``floor`` that is known to pass."""
        for index in range(floor + 1, len(self.cuts)):
            if self._state(self.cuts[index], error) == PASS:
                return index
        return None

    def _last_not_passing(self, floor: int, indices: range, error: float | None = None) -> int:
        """The last of these indices whose cut is known not to pass, at least ``floor``."""
        for index in indices:
            if self._state(self.cuts[index], error) in (FAIL, UNDECIDED):
                floor = max(floor, index)
        return floor

    # Step 3.

    def _split(self, low: int, high: int, error: float) -> Drawing[tuple[int, int]]:
        """Narrow the bracket until its sides are neighbouring cuts."""
        cuts = self.cuts
        while high - low > 1:
            before = self.hazard[cuts[max(low, 0)]]
            width = self.hazard[cuts[high]] - before
            place = before + self.settings.split * width
            middle = cuts.index(self._nearest(cuts[low + 1 : high], place))
            yield from self._test([cuts[middle]], error)
            if self._state(cuts[middle], error) == PASS:
                high = middle
            else:
                low = middle
        return low, high

    # Step 4.

    def _verify(self, turn: int, before: Sequence[int]) -> Drawing[int | None]:
        """The first cut that speaks against a turn, or None.

        It is the turn itself, a sentence end in its window, or the window's end. In the window an
        undecided cut is let through and remembered. ``before``: a cut tested along with the turn.
        """
        yield from self._test([turn, *before], self.alpha)
        if self._state(turn, self.alpha) != PASS:
            return turn
        end = min(turn + self.window, self.trace.last)
        tests = [(cut, self.screening_error) for cut in self.cuts if turn < cut < end]
        if end > turn:
            tests.append((end, self.window_error))
        yield from self._decide(tests)
        states = [self._state(cut, error) for cut, error in tests]
        self.doubted = UNDECIDED in states
        return tests[states.index(FAIL)][0] if FAIL in states else None

    # Steps 5 and 6.

    def _found(self, low: int, high: int) -> Search:
        """The turning point in a verified bracket; ``low`` is -1 where the trace starts locked."""
        turn = self.cuts[high]
        before = self.cuts[low] if low >= 0 else None
        flags = self._flags(high)
        if self._is_diffuse(turn):
            flags.append(DIFFUSE)
        if turn + self.window > max(self.trace.ends, default=0):
            flags.append(END)
        if self.settings.refine and before is not None:
            before, turn = yield from self._refine(before, turn)
        sides = [turn] if before is None else [before, turn]
        if draws := self.settings.confirm:
            self.fresh = yield [DrawRequest(cut, draws, fresh=True) for cut in sides]
        evidence = [self._evidence(cut) for cut in sides]
        result = TurningPoint(self.trace.id, self.kind, 0, None, None, after=evidence[-1])
        if before is None:
            return self._record(replace(result, flags=(START_LOCKED, *flags)))
        sentence = bisect_left(self.trace.ends, turn)
        result = replace(result, token=turn, sentence=sentence, interval=(before, turn))
        return self._record(replace(result, flags=tuple(flags), before=evidence[0]))

    def _refine(self, before: int, turn: int) -> Drawing[tuple[int, int]]:
        """Narrow a bracket to tokens, as long as S can differ by ``merge`` between its sides."""
        while turn - before > 1 and 1 - self.trace.stays(before, turn) >= self.settings.merge:
            half = (self.hazard[before] + self.hazard[turn]) / 2
            middle = self._nearest(range(before + 1, turn), half)
            yield from self._test([middle], self.alpha)
            if self._state(middle, self.alpha) == PASS:
                turn = middle
            else:
                before = middle
        return before, turn

    # The result.

    def _flags(self, high: int) -> list[str]:
        """What the way to the cut of this index was like."""
        states = (self._state(cut, self.alpha) for cut in self.cuts[:high])
        flags = [UNDECIDED] if UNDECIDED in states or self.doubted else []
        return [*flags, RECROSSING] if self.crossed else flags

    def _is_diffuse(self, turn: int) -> bool:
        """Whether the last cut far below the turn lies several sentences before it."""
        k, n, _ = self._counts(turn)
        last_low = None
        for cut in self.cuts[: self.cuts.index(turn)]:
            k_before, n_before, _ = self._counts(cut)
            enough = n > 0 and n_before >= self.settings.batch
            if enough and k_before / n_before <= k / n - DIFFUSE_RISE:
                last_low = cut
        if last_low is None:
            return False
        sentences = bisect_left(self.trace.ends, turn) - bisect_left(self.trace.ends, last_low)
        return sentences > DIFFUSE_SENTENCES

    def _evidence(self, cut: int) -> Evidence:
        return evidence_at(cut, self.drawn.counts_at(cut), self.fresh)

    def _record(self, turn: TurningPoint) -> TurningPoint:
        """The turning point with its cost and the cuts that were tested at full strength."""
        drawn = self.drawn + self.fresh
        check_departures(self.trace, drawn)
        tested = []
        for (cut, error), state in self.decided.items():
            if error == self.alpha and not self._known(cut):
                tested.append((cut, state))
        return with_costs(replace(turn, tested=tuple(sorted(tested))), drawn)

    # Tests.

    def _test(self, cuts: Iterable[int], error: float) -> Drawing[None]:
        """Test these cuts at one error rate."""
        yield from self._decide([(cut, error) for cut in cuts])

    def _decide(self, tests: Sequence[Test]) -> Drawing[None]:
        """Draw until every test is decided, or the budget is spent."""
        while waiting := [test for test in tests if self._state(*test) is None]:
            if len(self.drawn.start) >= self.settings.budget:
                self.decided |= dict.fromkeys(waiting, UNDECIDED)
                return
            self.drawn += yield [
                DrawRequest(cut, self._batch(cut, error)) for cut, error in waiting
            ]

    def _batch(self, cut: int, error: float) -> int:
        """As many draws as could decide a cut, within the batch and the cap."""
        k, n, unjudged = self._counts(cut)
        wanted = self.test.draws_to_pass(k, n, error)
        return max(1, min(wanted, self.settings.batch, self.settings.cap - n - unjudged))

    def _state(self, cut: int, error: float | None = None) -> str | None:
        """What is known of a cut at an error rate; None for the rate: at the smallest decided."""
        if error is None:
            return self._state(cut, self.alpha) or self._state(cut, self.screening_error)
        if (cut, error) not in self.decided:
            state = self._known(cut) or self._counted(cut, error)
            if state:
                self.decided[cut, error] = state
        return self.decided.get((cut, error))

    def _known(self, cut: int) -> str | None:
        """What the trace itself tells: it holds harm already, or its own end is all but certain."""
        trace = self.trace
        if trace.settled is not None and cut >= trace.settled:
            return PASS if self.kind == UNSAFE else FAIL
        stays = trace.stays(cut, len(trace.p))
        if trace.label == self.kind and stays >= self.test.high:
            return PASS
        other_end = trace.label not in (None, self.kind)
        return FAIL if other_end and 1 - stays <= self.test.low else None

    def _counted(self, cut: int, error: float) -> str | None:
        """What the draws tell of a cut."""
        k, n, unjudged = self._counts(cut)
        state = self.test.decide(k, n, error)
        return state or (UNDECIDED if n + unjudged >= self.settings.cap else None)

    def _counts(self, cut: int) -> tuple[int, int, int]:
        """(k, n, unjudged): k of n judged draws at a cut end as the kind asks."""
        safe, unsafe, unjudged = self.drawn.counts_at(cut)
        return (safe if self.kind == SAFE else unsafe), safe + unsafe, unjudged
