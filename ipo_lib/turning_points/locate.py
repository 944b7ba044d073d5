"""Turning points of real traces: many searches in step, each round's continuations drawn, judged and stored together. A search is
sequential in one trace, so that traces fill the batch; a killed run asks again for what it asked and finds it in the store."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from math import nan

import numpy as np

from ipo_lib.csr import CsrSettings
from ipo_lib.records import (
    CONTINUATION,
    SAFE,
    UNSAFE,
    BadInput,
    CsrPoint,
    Ids,
    Labels,
    Prompts,
    Rollout,
    Rollouts,
    TurningPoint,
    by_id,
    digest,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    FRESH,
    Continuations,
    Prefix,
    Session,
    draw_available,
    judge,
    probabilities,
    sample,
    trace_end,
    trace_sentences,
)
from ipo_lib.turning_points.adaptive import SearchSettings, Wald, adaptive
from ipo_lib.turning_points.curves import RARE, Curve
from ipo_lib.turning_points.exhaustive import UNKNOWN, Ask, Draws, Result, Trace, run_together
from ipo_lib.turning_points.judge_errors import Calibration, corrected, usable

FOREIGN = 0.25  # share of traces with an impossible token, above which all of them are taken for another sampler's
CONFIRMED = 100_000  # fresh draws are numbered from here: no search has seen them
OUTCOME = {SAFE: 1, UNSAFE: 0, None: UNKNOWN}


@dataclass(frozen=True)
class LocatedTurns:
    """The turning points by rollout id, and every continuation that was drawn to find them. Rollouts of which too many tokens
    have no probability under this sampler are not among them."""

    turns: dict[str, TurningPoint]
    drawn: dict[str, Continuations]

    def kept(self, rollouts: Rollouts) -> list[Rollout]:
        """Those of the rollouts that were searched."""
        return [rollout for rollout in rollouts if rollout.id in self.turns]


def known_traces(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    labels: Labels,
    sampling: Sampling,
    absorbing: bool = False,
) -> dict[str, Trace]:
    """What a search needs to know of each rollout's trace: one teacher-forced pass; with ``absorbing``, verdicts on the
    beginnings of unsafe traces, too. A trace with a token that this sampler could not have drawn is left out, with a warning that
    counts them; BadInput when more than FOREIGN of the traces are such: then they are another sampler's."""
    ends = {
        key: trace_end(session, rollout) or len(rollout.token_ids)
        for key, rollout in by_id(rollouts).items()
    }
    chances = probabilities(session, prompts, rollouts, sampling)
    strange = [r for r in rollouts if min(chances[r.id][: ends[r.id]], default=1.0) <= 0]
    if len(strange) <= FOREIGN * len(rollouts) and strange:
        said = "have a token of probability 0 here, as 16-bit logits can give"
        warnings.warn(
            f"{len(strange)} of {len(rollouts)} traces {said}; they are left out", stacklevel=2
        )
        rollouts = [r for r in rollouts if r not in strange]
    found = {}
    for r in rollouts:
        cuts = tuple(
            dict.fromkeys(
                span.token_end
                for span in trace_sentences(session, r)
                if 0 < span.token_end <= ends[r.id]
            )
        )
        label = (
            labels[r.id] if trace_end(session, r) else None
        )  # an unfinished trace has no outcome yet
        found[r.id] = Trace(
            r.id, r.token_ids[: ends[r.id]], cuts, tuple(chances[r.id][: ends[r.id]]), label
        )
    if absorbing:
        unsafe = [r for r in rollouts if labels[r.id] == UNSAFE]
        found |= {
            key: replace(found[key], settled=cut)
            for key, cut in _settled(session, prompts, unsafe, found).items()
        }
    return found


def _settled(
    session: Session, prompts: Prompts, rollouts: Rollouts, known: Mapping[str, Trace]
) -> dict[str, int]:
    """The first sentence end of each trace at which what stands there is judged unsafe by itself."""
    begun = [
        (
            r,
            cut,
            replace(
                r,
                id=digest([r.id, cut]),
                token_ids=r.token_ids[:cut],
                text=session.chat.decode(r.token_ids[:cut]),
            ),
        )
        for r in rollouts
        for cut in known[r.id].ends
    ]
    verdicts = judge(session, prompts, [beginning for _, _, beginning in begun])
    unsafe = [
        (r.id, cut)
        for (r, cut, _), verdict in zip(begun, verdicts, strict=True)
        if verdict.label == UNSAFE
    ]
    return dict(reversed(unsafe))


def find_turns(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    labels: Labels,
    kind: str,
    csr: CsrSettings,
    search: SearchSettings,
    sampling: Sampling,
    *,
    calibration: Calibration | None = None,
    near: Mapping[str, TurningPoint] | None = None,
) -> LocatedTurns:
    """The ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3) turning point of every rollout by the adaptive search. ``calibration``: the
    judge's errors, where ``search.correct`` asks for them. ``near``: turns that a weaker judge found: with the same draws, so
    that a stronger one is asked only around them and nothing is generated anew."""
    if csr.part == CONTINUATION:
        raise BadInput(
            "csr.part 'continuation': such verdicts hold at one cut only and cannot be pooled; measure every cut"
        )
    test, absorbing = Wald.of(kind, csr, search), csr.absorbing and not search.correct
    if search.correct:  # then single verdicts are not to be trusted: those on the traces themselves
        sources = {prompts[rollout.prompt_id].source for rollout in rollouts}
        test, labels = (
            corrected(test, kind, usable(calibration, session.judge, csr.part, sources)),
            dict.fromkeys(labels),
        )
    known = known_traces(session, prompts, rollouts, labels, sampling, absorbing)
    searches = {
        key: adaptive(trace, kind, csr, search, test=test, near=(near or {}).get(key))
        for key, trace in known.items()
    }
    found, drawn = run_searches(
        session, {r.id: prompts[r.prompt_id] for r in rollouts}, known, searches, csr.part, sampling
    )
    return LocatedTurns(found, drawn)


def record(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    labels: Labels,
    sampling: Sampling,
    draws: int,
) -> list[Curve]:
    """The outcome curves of these traces, to be replayed without a model: at each token that is left with a probability over
    ``replay.RARE``, ``draws`` continuations that do leave it there, counted by how they end and their length."""
    known = known_traces(session, prompts, rollouts, labels, sampling)
    rollouts = [r for r in rollouts if r.id in known]
    places = [(r, at) for r in rollouts for at, p in enumerate(known[r.id].p) if 1 - p > RARE]
    starts = [Prefix(prompts[r.prompt_id], r.token_ids[:at], r.token_ids[at]) for r, at in places]
    drawn = sample(session, starts, sampling, draws, stage="forks")
    ways: dict[str, list[Counter[tuple[float, int]]]] = {
        key: [Counter() for _ in trace.p] for key, trace in known.items()
    }
    for place, (rollout, verdict) in enumerate(
        zip(drawn, judge(session, prompts, drawn), strict=True)
    ):
        r, at = places[place // draws]
        outcome = {SAFE: 1.0, UNSAFE: 0.0}.get(verdict.label or "", nan)
        ways[r.id][at][outcome, len(rollout.token_ids) - at] += 1
    counted = {
        key: [[(float(n), *way) for way, n in sorted(at.items())] for at in own]
        for key, own in ways.items()
    }
    return [Curve(trace, counted[key]) for key, trace in known.items()]


def points(trace: Trace, drawn: Continuations) -> list[CsrPoint]:
    """What is known of CSR at the start and at every sentence end from all continuations that pass through it."""
    found = as_draws(trace.token_ids, drawn)
    return [CsrPoint(trace.id, cut, *found.at(cut)) for cut in (0, *trace.ends)]


def by_cut(drawn: Continuations) -> dict[int, Continuations]:
    """Continuations by the cut they were born at."""
    found: dict[int, Continuations] = {}
    for rollout, verdict in drawn:
        found.setdefault(rollout.prefix_len, []).append((rollout, verdict))
    return found


def run_searches(
    session: Session,
    prompts: Prompts,
    known: Mapping[str, Trace],
    searches: Mapping[str, Generator[list[Ask], Draws, Result]],
    part: str,
    sampling: Sampling,
) -> tuple[dict[str, Result], dict[str, Continuations]]:
    """Run any searches on their traces, with the prompts by trace id: (their results, all that was drawn by trace)."""
    asked: Counter[tuple[str, int, bool]] = Counter()
    drawn: dict[str, Continuations] = {key: [] for key in searches}
    open_: dict[str, list[tuple[Prefix, int]]] = {}  # draws of searches that wait for an answer

    def answer(asks: Mapping[str, list[Ask]]) -> dict[str, Draws]:
        for key, own in asks.items():
            open_[key] = []
            for ask in own:
                first = (CONFIRMED if ask.fresh else FRESH) + asked[key, ask.cut, ask.fresh]
                asked[key, ask.cut, ask.fresh] += ask.n
                start = Prefix(prompts[key], known[key].token_ids[: ask.cut])
                open_[key] += [(start, at) for at in range(first, first + ask.n)]
        wanted = [one for own in open_.values() for one in own]
        found = iter(
            draw_available(session, wanted, sampling, "continuations", all_of_them=not asks)
        )
        by_search = {key: [next(found) for _ in own] for key, own in open_.items()}
        ready = {
            key: [r for r in own if r is not None]
            for key, own in by_search.items()
            if None not in own
        }
        rollouts = [rollout for rows in ready.values() for rollout in rows]
        verdicts = iter(judge(session, by_id(prompts.values()), rollouts, part))
        answers = {}
        for key, drawn_now in ready.items():
            now = [(rollout, next(verdicts)) for rollout in drawn_now]
            drawn[key] += now
            answers[key] = as_draws(known[key].token_ids, now)
            del open_[key]
        return answers

    return run_together(searches, answer), drawn


def shared(a: Ids, b: Ids) -> int:
    """How many ids two sequences begin with alike."""
    return next(
        (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def as_draws(trace: Ids, drawn: Continuations) -> Draws:
    """Continuations and their verdicts as an estimator sees them."""
    rows = [
        (
            r.prefix_len,
            shared(trace, r.token_ids),
            OUTCOME[v.label],
            len(r.token_ids) - r.prefix_len,
        )
        for r, v in drawn
    ]
    return Draws(*np.array(rows, dtype=int).reshape(-1, 4).T)
