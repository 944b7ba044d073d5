"""Turning points of real traces: many searches in step on a model and a judge.

1. ``describe_traces`` finds out what a search has to know of each trace: one teacher-forced pass.
2. ``run_searches`` runs any estimators. A search is sequential in its own trace, so each round
   draws and judges what all of them request. All of it is stored: a run that was killed makes the
   same requests again and finds the answers in the store.
3. ``find_turns`` does both for the adaptive search.

``record_curves`` records outcome curves, on which estimators run without a model (``curves``).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, nan

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
    Prompt,
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
    draw_rollouts,
    judge,
    probabilities,
    trace_end,
    trace_sentences,
)
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive
from ipo_lib.turning_points.curves import RARE, Curve, Way
from ipo_lib.turning_points.draws import (
    UNJUDGED,
    Drawing,
    Draws,
    Requests,
    Result,
    Trace,
    run_together,
)

# Share of traces with an impossible token above which all are taken for another sampler's.
MAX_IMPOSSIBLE = 0.25
FEWEST = 4  # continuations recorded where a trace is left now and then
FIRST_FRESH = 100_000  # number of the first fresh draw at a cut: no search has seen it
OUTCOME = {SAFE: 1, UNSAFE: 0, None: UNJUDGED}


@dataclass(frozen=True)
class LocatedTurns:
    """Turning points by rollout id, and every continuation that was drawn to find them.

    Rollouts with a token that this sampler could not have drawn are not among them.
    """

    turns: dict[str, TurningPoint]
    drawn: dict[str, Continuations]

    def kept(self, rollouts: Rollouts) -> list[Rollout]:
        """Those of the rollouts that were searched."""
        return [rollout for rollout in rollouts if rollout.id in self.turns]


def find_turns(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    labels: Labels,
    kind: str,
    csr: CsrSettings,
    search: SearchSettings,
    sampling: Sampling,
) -> LocatedTurns:
    """The turning point of every rollout, by the adaptive search.

    ``ipo_lib.stages.find_turning_points`` reads it off a CSR that was measured at every cut.

    Args:
        session: the model and the judge.
        prompts: by id.
        rollouts: whose traces are searched.
        labels: the verdict on each trace, by rollout id.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule, and what the judge reads.
        search: settings of the search.
        sampling: the settings by which the traces were drawn.

    Raises:
        BadInput: the judge reads continuations alone, or the traces are another sampler's.
    """
    if csr.part == CONTINUATION:
        raise BadInput(
            "csr.part 'continuation': such verdicts hold at one cut only and cannot be pooled; "
            "measure every cut"
        )
    traces = describe_traces(session, prompts, rollouts, labels, sampling, csr.absorbing)
    searches = {key: adaptive(trace, kind, csr, search) for key, trace in traces.items()}
    prompt_of = {rollout.id: prompts[rollout.prompt_id] for rollout in rollouts}
    turns, drawn = run_searches(session, prompt_of, traces, searches, csr.part, sampling)
    return LocatedTurns(turns, drawn)


def describe_traces(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    labels: Labels,
    sampling: Sampling,
    absorbing: bool = False,
) -> dict[str, Trace]:
    """What a search needs to know of each trace.

    A trace with a token that this sampler could not have drawn is left out, with a warning.

    Args:
        session: the model, and the judge where ``absorbing`` is set.
        prompts: by id.
        rollouts: whose traces are described.
        labels: the verdict on each trace, by rollout id.
        sampling: the settings by which the traces were drawn.
        absorbing: judge the beginnings of unsafe traces, too (``csr.absorbing``).

    Raises:
        BadInput: more than MAX_IMPOSSIBLE of the traces have such a token; then they are another
            sampler's.
    """
    closing = {key: trace_end(session, rollout) for key, rollout in by_id(rollouts).items()}
    chances = probabilities(session, prompts, rollouts, sampling)
    for rollout in rollouts:
        end = closing[rollout.id] or len(rollout.token_ids)
        chances[rollout.id] = chances[rollout.id][:end]
    impossible = [r for r in rollouts if min(chances[r.id], default=1.0) <= 0]
    if impossible and len(impossible) <= MAX_IMPOSSIBLE * len(rollouts):
        warnings.warn(
            f"{len(impossible)} of {len(rollouts)} traces have a token of probability 0 here, as "
            "16-bit logits can give; they are left out",
            stacklevel=2,
        )
        rollouts = [r for r in rollouts if r not in impossible]
    traces = {}
    for rollout in rollouts:
        p = tuple(chances[rollout.id])
        ends = [span.token_end for span in trace_sentences(session, rollout)]
        cuts = tuple(dict.fromkeys(end for end in ends if 0 < end <= len(p)))
        # An unfinished trace has no outcome yet.
        label = labels[rollout.id] if closing[rollout.id] else None
        traces[rollout.id] = Trace(rollout.id, rollout.token_ids[: len(p)], cuts, p, label)
    if absorbing:
        unsafe = [rollout for rollout in rollouts if labels[rollout.id] == UNSAFE]
        for key, cut in _first_harm(session, prompts, unsafe, traces).items():
            traces[key] = replace(traces[key], settled=cut)
    return traces


def _first_harm(
    session: Session, prompts: Prompts, rollouts: Rollouts, traces: Mapping[str, Trace]
) -> dict[str, int]:
    """The first sentence end up to which a trace by itself is judged unsafe."""
    places: list[tuple[str, int]] = []
    beginnings = []
    for rollout in rollouts:
        for cut in traces[rollout.id].ends:
            ids = rollout.token_ids[:cut]
            key = digest([rollout.id, cut])
            text = session.chat.decode(ids)
            beginnings.append(replace(rollout, id=key, token_ids=ids, text=text))
            places.append((rollout.id, cut))
    first: dict[str, int] = {}
    verdicts = judge(session, prompts, beginnings)
    for (rollout_id, cut), verdict in zip(places, verdicts, strict=True):
        if verdict.label == UNSAFE:
            first.setdefault(rollout_id, cut)
    return first


def run_searches(
    session: Session,
    prompts: Prompts,
    traces: Mapping[str, Trace],
    searches: Mapping[str, Drawing[Result]],
    part: str,
    sampling: Sampling,
) -> tuple[dict[str, Result], dict[str, Continuations]]:
    """Run any searches on their traces.

    Args:
        session: the model and the judge.
        prompts: by trace id.
        traces: by id.
        searches: by trace id.
        part: what the judge reads of a continuation.
        sampling: how continuations are drawn.

    Returns:
        The searches' results, and all continuations drawn for each.
    """
    requested: Counter[tuple[str, int, bool]] = Counter()  # by trace, cut and freshness
    drawn: dict[str, Continuations] = {key: [] for key in searches}
    waiting: dict[str, list[tuple[Prefix, int]]] = {}  # draws of searches without their answer

    def answer(requests: Mapping[str, Requests]) -> dict[str, Draws]:
        # 1. Draw what is new and what still waits.
        for key, wanted in requests.items():
            waiting[key] = _number_draws(prompts[key], traces[key], wanted, requested)
        draws = [draw for numbered in waiting.values() for draw in numbered]
        available = iter(
            draw_available(session, draws, sampling, "continuations", wait=not requests)
        )
        # 2. Judge the draws of the searches that have all of theirs.
        ready: dict[str, list[Rollout]] = {}
        for key, numbered in waiting.items():
            rollouts = [next(available) for _ in numbered]
            finished = [rollout for rollout in rollouts if rollout is not None]
            if len(finished) == len(rollouts):
                ready[key] = finished
        rollouts_to_judge = [rollout for finished in ready.values() for rollout in finished]
        verdicts = iter(judge(session, by_id(prompts.values()), rollouts_to_judge, part))
        # 3. Answer these.
        answers = {}
        for key, finished in ready.items():
            judged = [(rollout, next(verdicts)) for rollout in finished]
            drawn[key] += judged
            answers[key] = as_draws(traces[key].token_ids, judged)
            del waiting[key]
        return answers

    return run_together(searches, answer), drawn


def _number_draws(
    prompt: Prompt, trace: Trace, requests: Requests, requested: Counter[tuple[str, int, bool]]
) -> list[tuple[Prefix, int]]:
    """The requests as prefixes and draw numbers that come after those requested before."""
    numbered = []
    for request in requests:
        place = (trace.id, request.cut, request.fresh)
        first = requested[place] + (FIRST_FRESH if request.fresh else FRESH)
        requested[place] += request.n
        prefix = Prefix(prompt, trace.token_ids[: request.cut])
        for number in range(first, first + request.n):
            numbered.append((prefix, number))
    return numbered


def record_curves(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    labels: Labels,
    sampling: Sampling,
    draws: int,
) -> list[Curve]:
    """The outcome curves of traces, on which estimators run without a model.

    Args:
        session: the model and the judge.
        prompts: by id.
        rollouts: whose traces are recorded.
        labels: the verdict on each trace, by rollout id.
        sampling: the settings by which the traces were drawn.
        draws: continuations at a token that the sampler would surely leave. A token that it leaves
            with probability q > ``RARE`` gets about q times as many, and ``FEWEST`` at least: S
            depends on them in this proportion. They are counted by how they end and by their
            length.
    """
    traces = describe_traces(session, prompts, rollouts, labels, sampling)
    places: list[tuple[str, int]] = []  # of each continuation
    wanted = []
    for rollout in rollouts:
        if rollout.id not in traces:
            continue
        for place, p in enumerate(traces[rollout.id].p):
            if 1 - p <= RARE:
                continue
            ids = rollout.token_ids
            prefix = Prefix(prompts[rollout.prompt_id], ids[:place], ids[place])
            for draw in range(max(FEWEST, ceil(draws * (1 - p)))):
                places.append((rollout.id, place))
                wanted.append((prefix, draw))
    drawn = draw_rollouts(session, wanted, sampling, "forks")
    verdicts = judge(session, prompts, drawn)

    counts: dict[tuple[str, int], Counter[tuple[float, int]]] = {}
    for (key, place), fork, verdict in zip(places, drawn, verdicts, strict=True):
        outcome = {SAFE: 1.0, UNSAFE: 0.0}.get(verdict.label or "", nan)
        tokens = len(fork.token_ids) - place
        counts.setdefault((key, place), Counter())[outcome, tokens] += 1
    curves = []
    prompt_of = {rollout.id: prompts[rollout.prompt_id] for rollout in rollouts}
    for key, trace in traces.items():
        counted = [counts.get((key, place), Counter()) for place in range(len(trace.p))]
        curves.append(Curve(trace, [_ways(counter) for counter in counted], prompt_of[key]))
    return curves


def _ways(counts: Counter[tuple[float, int]]) -> list[Way]:
    """Ways to depart from how often each outcome and length was seen."""
    return [(float(n), safe, tokens) for (safe, tokens), n in sorted(counts.items())]


def csr_points(trace: Trace, drawn: Continuations) -> list[CsrPoint]:
    """CSR at the start and every sentence end, from all continuations that pass through it."""
    return as_draws(trace.token_ids, drawn).points(trace, (0, *trace.ends))


def group_by_cut(drawn: Continuations) -> dict[int, Continuations]:
    """Continuations by the cut they start at."""
    groups: dict[int, Continuations] = {}
    for rollout, verdict in drawn:
        groups.setdefault(rollout.prefix_len, []).append((rollout, verdict))
    return groups


def as_draws(trace: Ids, drawn: Continuations) -> Draws:
    """Continuations and their verdicts as an estimator sees them."""
    rows = []
    for rollout, verdict in drawn:
        start, ids = rollout.prefix_len, rollout.token_ids
        departure = _common_length(trace, ids)
        rows.append((start, departure, OUTCOME[verdict.label], len(ids) - start))
    return Draws(*np.array(rows, dtype=int).reshape(-1, 4).T)


def _common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    for index, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return index
    return min(len(ids), len(others))
