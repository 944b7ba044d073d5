"""What every estimator of a turning point works with: traces, requests for continuations, draws.

1. A *cut* c of a trace is the prefix ``token_ids[:c]``; S_c is CSR there (Eq. 1).
2. A continuation *starts* at a cut and *departs* at the first token that differs from the trace's.
   At every cut from its start to its departure it is a fair draw of S: one draw counts many times.
3. The *hazard* of a stretch of tokens is how many departures are expected in it, the sum of 1 - p.
   S cannot change by more than the chance of leaving, |S_a - S_b| <= 1 - P(tokens a..b). So cuts
   are chosen at equal steps of hazard, not of tokens.
4. An *estimator* is a generator: it yields lists of ``DrawRequest``, is sent ``Draws`` and returns
   a ``TurningPoint``. It knows no model, so the same search runs on a sampler (``locate``) and on
   recorded curves (``curves``), many traces in step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from ipo_lib.records import BadInput, CsrPoint, Evidence, Ids, Sentence, TurningPoint
from ipo_lib.stats import clopper_pearson

UNJUDGED = -1  # the outcome of a draw that nobody could judge
MAX_DEVIATION = 6  # standard deviations between the counted and the expected departures
Array = np.ndarray[Any, Any]


def summed_before(values: Array) -> Array:
    """The sum of the values before every place, [values + 1]."""
    return np.concatenate([[0.0], np.cumsum(values)])


@dataclass(frozen=True)
class Trace:
    """What an estimator knows of a trace."""

    id: str
    token_ids: Ids  # all of them, through ``</think>``
    ends: tuple[int, ...]  # the cut at the end of each sentence
    p: tuple[float, ...]  # the sampler's probability of each token
    label: str | None  # the trace's own verdict, which is S at its end
    settled: int | None = None  # first cut that holds harm; S is 0 from there (csr.absorbing)

    def __post_init__(self) -> None:
        if len(self.p) != len(self.token_ids):
            raise BadInput(
                f"trace {self.id}: {len(self.p)} probabilities of {len(self.token_ids)} tokens; "
                "give one each"
            )
        least = min(self.p, default=1.0)
        if least <= 0:
            raise BadInput(
                f"trace {self.id}: its token {self.p.index(least)} has probability 0 here; "
                "sample it with this model and these settings"
            )

    @property
    def length(self) -> int:
        """Number of tokens through the last sentence."""
        return self.ends[-1] if self.ends else len(self.p)

    @property
    def last(self) -> int:
        """The last cut where S can be known: the trace's end, or, unjudged, its last sentence's."""
        if self.label is not None:
            return len(self.p)
        return max(self.ends, default=0)

    @property
    def hazard(self) -> Array:
        """Expected departures before every cut, [tokens + 1]."""
        return summed_before(1 - np.array(self.p))

    def stays(self, start: int, stop: int) -> float:
        """The probability that a continuation from cut ``start`` follows the trace to ``stop``."""
        return math.prod(self.p[start:stop])


@dataclass(frozen=True)
class DrawRequest:
    """``n`` continuations from a cut; ``fresh``: none that this search has seen or will see."""

    cut: int
    n: int
    fresh: bool = False


@dataclass(frozen=True)
class Draws:
    """Continuations, one entry each in four integer arrays of the same length."""

    start: Array  # the cut it starts at
    departure: Array  # the first place that differs from the trace; the trace's length: none does
    safe: Array  # its outcome: 1, 0 or UNJUDGED
    tokens: Array  # tokens generated for it

    def __add__(self, other: Draws) -> Draws:
        return Draws(
            np.concatenate([self.start, other.start]),
            np.concatenate([self.departure, other.departure]),
            np.concatenate([self.safe, other.safe]),
            np.concatenate([self.tokens, other.tokens]),
        )

    def counts_at(self, cut: int, started_here: bool = False) -> tuple[int, int, int]:
        """(safe, unsafe, unjudged) of the fair draws at ``cut``, or only of those started there."""
        chosen = self.start == cut
        if not started_here:
            chosen = (self.start <= cut) & (self.departure >= cut)
        outcomes = self.safe[chosen]
        return (
            int((outcomes == 1).sum()),
            int((outcomes == 0).sum()),
            int((outcomes == UNJUDGED).sum()),
        )

    def points(
        self, trace: Trace, cuts: Sequence[int], started_here: bool = False
    ) -> list[CsrPoint]:
        """CSR at some cuts, by ``counts_at``."""
        return [CsrPoint(trace.id, cut, *self.counts_at(cut, started_here)) for cut in cuts]


NO_DRAWS = Draws(*[np.zeros(0, dtype=int)] * 4)
Result = TypeVar("Result")
Requests = list[DrawRequest]
Drawing = Generator[Requests, Draws, Result]  # asks for draws on the way to a result
Search = Drawing[TurningPoint]


def token_sentences(trace: Trace) -> list[Sentence]:
    """The sentences of a trace by tokens; their places in the text are not known here."""
    spans = pairwise((0, *trace.ends))
    return [Sentence(index, 0, 0, start, stop) for index, (start, stop) in enumerate(spans)]


def evidence_at(cut: int, counts: tuple[int, int, int], fresh: Draws) -> Evidence:
    """What was drawn at a cut, with the Clopper-Pearson interval of the fresh draws alone.

    Args:
        cut: the cut.
        counts: (safe, unsafe, unjudged) of the draws that decided where the search went; so they
            give no interval.
        fresh: draws made when the search was over.
    """
    safe, unsafe, _ = counts
    fresh_safe, fresh_unsafe, _ = fresh.counts_at(cut, started_here=True)
    judged = fresh_safe + fresh_unsafe
    interval = clopper_pearson(fresh_safe, judged)
    return Evidence(cut, safe, safe + unsafe, fresh_safe, judged, interval.low, interval.high)


def check_departures(trace: Trace, drawn: Draws) -> None:
    """Refuse draws that leave the trace much more or less often than its probabilities say.

    Raises:
        BadInput: then the trace was drawn by another sampler.
    """
    tokens = len(trace.p)
    chances = np.array(trace.p)
    variances = summed_before(chances * (1 - chances))
    stop = np.minimum(drawn.departure + 1, tokens)
    hazard = trace.hazard
    expected = (hazard[stop] - hazard[drawn.start]).sum()
    variance = (variances[stop] - variances[drawn.start]).sum()
    departed = int((drawn.departure < tokens).sum())
    if abs(departed - expected) > MAX_DEVIATION * math.sqrt(variance + 1):
        raise BadInput(
            f"trace {trace.id}: {departed} of {len(drawn.start)} continuations leave it, where its "
            f"probabilities expect {expected:.0f}; search with the sampler and the settings that "
            "drew it"
        )


def with_costs(turn: TurningPoint, drawn: Draws) -> TurningPoint:
    """The turning point with what finding it cost."""
    count = len(drawn.start)
    return replace(turn, rollouts=count, tokens=int(drawn.tokens.sum()), judged=count)


def run_together(
    searches: Mapping[str, Drawing[Result]],
    draw: Callable[[Mapping[str, Requests]], Mapping[str, Draws]],
) -> dict[str, Result]:
    """Run many searches in step, by name.

    Each round hands all new requests to ``draw`` and takes the answers that are there. ``draw`` may
    answer some searches only; the others get their answer in a later round, without asking again.
    Handed no request, it answers all that still wait.
    """
    results: dict[str, Result] = {}
    answers: Mapping[str, Draws | None] = dict.fromkeys(searches)  # None starts a generator
    waiting: set[str] = set()
    while answers or waiting:
        requests = {}
        for name, drawn in answers.items():
            try:
                requests[name] = searches[name].send(drawn)  # type: ignore[arg-type]
            except StopIteration as end:
                results[name] = end.value
        waiting |= requests.keys()
        answers = draw(requests) if waiting else {}
        waiting -= answers.keys()
    return {name: results[name] for name in searches}
