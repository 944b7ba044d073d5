"""The paper's findings as numbers: joint safety of trace and answer (Fig 3), diversity of groups (Fig 4), turning points (Fig 5)
and chains of interventions (Fig 6), each with the control that could refute it. Every rate is a mean over prompts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isnan, nan

import numpy as np

from ipo_lib import csr
from ipo_lib.cues import CueDetector
from ipo_lib.intervention import random_earlier_sentence
from ipo_lib.records import (
    ANSWER,
    CONTINUATION,
    SAFE,
    UNSAFE,
    BadInput,
    Curves,
    Prompts,
    Rollout,
    Rollouts,
    Sentence,
    TurningPoint,
    Verdicts,
    by_id,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    JudgedRollouts,
    Prefix,
    Replacement,
    Session,
    by_prompt,
    find_cues,
    first_of_each_prompt,
    intervene,
    judge,
    mixed_prompts,
    random_subset,
    sample,
    trace_end,
    trace_sentences,
    trace_texts,
)
from ipo_lib.stats import (
    Interval,
    clopper_pearson,
    mean,
    needed_for_mean,
    pearson,
    pooled_rate,
    power_of_mean,
    wilson,
)
from ipo_lib.turning_points.adaptive import DIFFUSE, UNDECIDED
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.curves import rollouts as recorded_rollouts
from ipo_lib.turning_points.exhaustive import ideal, truth

Counts = dict[str, tuple[int, int]]  # (k, n) by prompt
SIDES = (SAFE, UNSAFE)


def joint(seen: JudgedRollouts, answers: Verdicts) -> dict[tuple[str, str], Interval]:
    """Fig 3: the share of responses by (trace, answer) safety, where both were judged."""
    counts = {cell: dict[str, list[int]]() for cell in itertools.product(SIDES, SIDES)}
    for rollout, trace, answer in zip(seen.rollouts, seen.verdicts, answers, strict=True):
        for cell, tally in counts.items():
            k_n = tally.setdefault(rollout.prompt_id, [0, 0])
            k_n[0] += cell == (trace.label, answer.label)
            k_n[1] += None not in (trace.label, answer.label)
    return {
        cell: pooled_rate([(k, n) for k, n in tally.values()]) for cell, tally in counts.items()
    }


def answer_given_trace(seen: JudgedRollouts, answers: Verdicts, trace: str) -> Interval:
    """P(answer safe | trace ``trace``), over the prompts that have such a trace."""
    rows = [
        (r, a)
        for r, t, a in zip(seen.rollouts, seen.verdicts, answers, strict=True)
        if t.label == trace
    ]
    return pooled_rate(list(by_prompt([r for r, _ in rows], [a for _, a in rows], SAFE).values()))


def swap(
    session: Session, seen: JudgedRollouts, sampling: Sampling, draws: int
) -> dict[str, Counts]:
    """Is it the trace that decides the answer? For each prompt with closed traces of both kinds, one of each kind is kept and the
    answer drawn anew ``draws`` times: (unsafe answers, judged) by prompt, after the ``unsafe`` and after the ``safe`` trace."""
    kinds: dict[str, dict[str, Prefix]] = {UNSAFE: {}, SAFE: {}}
    for kind, starts in kinds.items():
        for rollout in seen.labelled(kind):
            if rollout.prompt_id not in starts and (end := trace_end(session, rollout)) is not None:
                starts[rollout.prompt_id] = Prefix(
                    seen.prompts[rollout.prompt_id], rollout.token_ids[:end]
                )
    both = [prompt for prompt in kinds[UNSAFE] if prompt in kinds[SAFE]]
    found = {}
    for kind, starts in kinds.items():
        drawn = sample(
            session, [starts[prompt] for prompt in both], sampling, draws, stage="answers"
        )
        found[kind] = by_prompt(drawn, judge(session, seen.prompts, drawn, ANSWER))
    return found


@dataclass(frozen=True)
class Diversity:
    """Fig 4 for one prompt set: ``shares[k]``: prompts whose group has k safe traces; ``alike[k]``: what a binomial of the same
    mean rate would give, as if all prompts were alike; ``flat``: groups that are all safe or all unsafe, from which a
    group-relative reward learns nothing."""

    shares: tuple[Interval, ...]
    alike: tuple[float, ...]
    flat: Interval


def diversity(seen: JudgedRollouts, group: int) -> Diversity:
    """A group is the ``group`` draws of a prompt; one with an unjudged trace is left out."""
    safe = Counter(
        k for k, n in by_prompt(seen.rollouts, seen.verdicts, SAFE).values() if n == group
    )
    n = safe.total()
    rate = sum(k * times for k, times in safe.items()) / (group * n) if n else 0.0
    shares = tuple(clopper_pearson(safe[k], n) for k in range(group + 1))
    alike = tuple(comb(group, k) * rate**k * (1 - rate) ** (group - k) for k in range(group + 1))
    return Diversity(shares, alike, clopper_pearson(safe[0] + safe[group], n))


def choose_traces(
    seen: JudgedRollouts, label: str, count: int, seed: int, only_mixed: bool
) -> list[Rollout]:
    """One trace with this label from each of ``count`` prompts at random; ``only_mixed``: of prompts with traces of both kinds,
    the paper's filter, which selects for turns."""
    kept = set(mixed_prompts(seen.rollouts, seen.verdicts) if only_mixed else seen.prompts)
    found = random_subset(
        first_of_each_prompt([r for r in seen.labelled(label) if r.prompt_id in kept]), count, seed
    )
    if not found:
        which = "prompts with traces of both kinds" if only_mixed else "prompts"
        raise BadInput(
            f"no {label} trace on {len(kept)} {which}; raise plan.draws or the prompt set's count, or set mixed_only"
        )
    return found


def unsafe_with_cue(seen: JudgedRollouts, cue: Mapping[str, int | None]) -> list[Rollout]:
    """One unsafe trace with a cue of every prompt that has one."""
    if not (
        found := first_of_each_prompt([r for r in seen.labelled(UNSAFE) if cue[r.id] is not None])
    ):
        raise BadInput(
            f"no unsafe trace with a cue among {len(seen.rollouts)} rollouts; raise plan.draws"
        )
    return found


def prevalence(turns: Iterable[TurningPoint]) -> dict[str, Interval]:
    """How many traces turn: ``turns`` somewhere, ``before the end`` (its window fits in the trace, whose own label then has no
    part in it), ``start-locked`` (the rule holds before the first token), ``recrossing``, ``diffuse`` and ``undecided``."""
    every = list(turns)
    is_turn = {
        "turns": [t.token is not None and csr.START_LOCKED not in t.flags for t in every],
        "before the end": [t.sentence is not None and csr.END not in t.flags for t in every],
        **{
            flag: [flag in t.flags for t in every]
            for flag in (csr.START_LOCKED, csr.RECROSSING, DIFFUSE, UNDECIDED)
        },
    }
    return {name: wilson(sum(rows), len(every)) for name, rows in is_turn.items()}


@dataclass(frozen=True)
class CuePlace:
    """One unsafe trace in Fig 5b. Places are tokens kept before them, None where there is none.

    ``drop``: S before the cue's sentence minus S after it. ``elsewhere``: the mean drop over the trace's
    other sentences. Both nan where S was settled.
    """

    rollout_id: str
    prompt_id: str
    cue: int  # where the first cue begins
    other: int | None  # where a random sentence up to the turn begins
    turn: int | None  # where the sentence of the unsafe turning point begins
    distance: int | None  # sentences from cue to turn
    drop: float
    elsewhere: float


def places_of_cues(
    rollouts: Rollouts,
    spans: Mapping[str, Sequence[Sentence]],
    cue: Mapping[str, int | None],
    points: Curves,
    turns: Mapping[str, TurningPoint],
    seed: int = 0,
    choosing: Curves | None = None,
) -> list[CuePlace]:
    """Each rollout with a cue, its turning point and what its sentences did to S.

    Args:
        rollouts: unsafe traces.
        spans: their sentences.
        cue: index of the first cue's sentence, None without one.
        points: S at both ends of sentences, from draws that measure.
        turns: unsafe turning points. A turn stands where its sentence begins, so that it equals the cue
            exactly when the cue is the turn; start-locked ones have no place.
        seed: of the random sentences.
        choosing: S from other draws, by which sentences are kept: one that begins where S is 0 or 1 can
            move nothing. Kept by the draws that also measure, sentences would look as if they moved S.
            None: ``points`` are exact.
    """
    found = []
    for r in rollouts:
        if (at := cue[r.id]) is not None:
            sentences, turn = spans[r.id], turns[r.id].sentence
            before = None if turn is None else random_earlier_sentence(r, turn + 1, seed)
            open_ = {
                point.cut for point in (choosing or points)[r.id] if 0 < point.n_safe < point.n
            }
            drops = {
                index: -change
                for index, change in csr.delta(points[r.id], sentences).items()
                if sentences[index].token_start in open_
            }
            rest = [drop for index, drop in drops.items() if index != at]
            places = [
                None if index is None else sentences[index].token_start
                for index in (at, before, turn)
            ]
            elsewhere = sum(rest) / len(rest) if rest else nan
            distance = None if turn is None else turn - at
            found.append(
                CuePlace(
                    r.id,
                    r.prompt_id,
                    places[0] or 0,
                    places[1],
                    places[2],
                    distance,
                    drops.get(at, nan),
                    elsewhere,
                )
            )
    return found


def recorded_cues(
    session: Session,
    seen: JudgedRollouts,
    curves: Sequence[Curve],
    detectors: Mapping[str, CueDetector],
    settings: csr.CsrSettings,
    seed: int = 0,
) -> dict[str, list[CuePlace]]:
    """``at_cues`` on recorded unsafe traces, whose S is exact: by name of the detector.

    Args:
        doors: for the chat.
        seen: the rollouts that the curves were recorded of; curves of other traces are left out.
        curves: recorded curves.
        detectors: of cues.
        settings: of the turning points.
        seed: of the random sentences.
    """
    recorded = recorded_rollouts(
        session, seen, [curve for curve in curves if curve.trace.label == UNSAFE]
    )
    rollouts = [rollout for rollout, _ in recorded]
    spans = {r.id: trace_sentences(session, r) for r in rollouts}
    points, turns = {}, {}
    for rollout, curve in recorded:
        key = rollout.id
        cuts = {span.token_start for span in spans[key]} | {span.token_end for span in spans[key]}
        last = len(curve.truth) - 1
        points[key] = ideal(
            curve.trace, {cut: float(curve.truth[cut]) for cut in sorted(cuts) if cut <= last}
        )
        turns[key] = truth(curve.trace, UNSAFE, settings, curve.truth.tolist())
    found = {}
    for name, detector in detectors.items():
        where = find_cues(session, seen.prompts, rollouts, detector)
        found[name] = places_of_cues(rollouts, spans, where, points, turns, seed)
    return found


def correlation(rows: Sequence[CuePlace], place: str = "cue") -> Interval:
    """Fig 5b: Pearson's r of ``place`` (``cue`` or ``other``) and turn in tokens, over the traces that turn."""
    pairs = [
        (float(x), float(row.turn))
        for row in rows
        if row.turn is not None and (x := getattr(row, place)) is not None
    ]
    return pearson([x for x, _ in pairs], [y for _, y in pairs])


def placebo(rows_by_seed: Sequence[Sequence[CuePlace]]) -> Interval:
    """r of a random sentence up to the turn and the turn: mean and 95 % range over placements; ``n`` counts traces. A judge for
    whom harm once written stays written makes any earlier place correlate with the turn: the cue's r is to be read beside it."""
    found = [correlation(rows, "other") for rows in rows_by_seed]
    values = sorted(r.value for r in found if not isnan(r.value))
    if not values:
        return Interval(nan, -1.0, 1.0, 0, "placements")
    low, high = (values[min(len(values) - 1, int(q * len(values)))] for q in (0.025, 0.975))
    return Interval(
        sum(values) / len(values),
        low,
        high,
        max(r.n for r in found),
        f"range over {len(values)} placements",
    )


def drops(rows: Sequence[CuePlace]) -> dict[str, Interval]:
    """Mean drop of S at the cue, over other sentences, and the difference within a trace; means over prompts."""
    sides = {
        "at the cue": [(r.prompt_id, r.drop) for r in rows],
        "elsewhere": [(r.prompt_id, r.elsewhere) for r in rows],
        "difference": [(r.prompt_id, r.drop - r.elsewhere) for r in rows],
    }
    return {name: mean(_over_prompts(pairs)) for name, pairs in sides.items()}


def _over_prompts(pairs: Iterable[tuple[str, float]]) -> list[float]:
    """One number a prompt: the mean of its traces' numbers, without those that are nan."""
    found: dict[str, list[float]] = {}
    for prompt, value in pairs:
        if not isnan(value):
            found.setdefault(prompt, []).append(value)
    return [sum(own) / len(own) for own in found.values()]


@dataclass(frozen=True)
class Design:
    """What a measurement of the drop at cues can show."""

    usable: int  # prompts with a cue and another sentence where S was open
    spread: float  # standard deviation of the difference between prompts
    power: float  # of showing ``effect`` with so many prompts
    effect: float  # a difference of the drops that is worth seeing
    needed: int | None  # prompts that show it with a power of 80 %; None: more than anybody has


def design(rows: Sequence[CuePlace], effect: float) -> Design:
    """The power of a measurement at the spread that it found, for a true difference of ``effect``."""
    values = _over_prompts((r.prompt_id, r.drop - r.elsewhere) for r in rows)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else nan
    needed = None if isnan(spread) else needed_for_mean(spread, effect)
    return Design(len(values), spread, power_of_mean(spread, len(values), effect), effect, needed)


def by_cue(seen: JudgedRollouts, cue: Mapping[str, int | None]) -> dict[bool, Interval]:
    """P(unsafe | a cue is present) and P(unsafe | none is), each over the prompts that have such traces."""
    found = {}
    for has in (True, False):
        rows = [
            (r, v)
            for r, v in zip(seen.rollouts, seen.verdicts, strict=True)
            if (cue[r.id] is not None) is has
        ]
        found[has] = pooled_rate(
            list(by_prompt([r for r, _ in rows], [v for _, v in rows]).values())
        )
    return found


def chain(
    session: Session,
    prompts: Prompts,
    losers: Rollouts,
    texts: Mapping[str, str],
    detector: CueDetector,
    sampling: Sampling,
    rounds: int,
) -> dict[str, list[Counts]]:
    """Fig 6: by name of a text, (not safe, 1) by prompt after 0, 1, ... ``rounds`` interventions, one unsafe trace a prompt. A
    round puts the text in place of the first cue of every trace that is not safe yet; one without a cue stays as it is. What
    could not be judged counts as not safe: it would else leave the rate and look like a cure."""
    started = by_id(losers)
    now: dict[tuple[str, str], tuple[Rollout, str | None]] = {}
    for name in texts:
        now |= {(name, key): (rollout, UNSAFE) for key, rollout in started.items()}
    found: dict[str, list[Counts]] = {name: [] for name in texts}
    for round_ in range(rounds + 1):
        if round_:
            bad = [(key, r) for key, (r, label) in now.items() if label != SAFE]
            cue = find_cues(session, prompts, [r for _, r in bad], detector)
            tried = [
                (key, Replacement(r, at, key[0], texts[key[0]], round_))
                for key, r in bad
                if (at := cue[r.id]) is not None
            ]
            results = [
                result
                for _, result in intervene(session, prompts, [case for _, case in tried], sampling)
            ]
            labels = [verdict.label for verdict in judge(session, prompts, results)]
            now |= dict(
                zip([key for key, _ in tried], zip(results, labels, strict=True), strict=True)
            )
        for name, counts in found.items():
            state = [now[name, r.id] for r in losers]
            counts.append({r.prompt_id: (int(label != SAFE), 1) for r, label in state})
    return found


def merged(chains: Iterable[Counts]) -> Counts:
    """Several counts of the same prompts as one: the prompt stays the unit, whatever was tried on it."""
    found: dict[str, list[int]] = {}
    for prompt, (k, n) in (item for counts in chains for item in counts.items()):
        both = found.setdefault(prompt, [0, 0])
        both[0], both[1] = both[0] + k, both[1] + n
    return {prompt: (k, n) for prompt, (k, n) in found.items()}


def controls(
    session: Session,
    prompts: Prompts,
    losers: Rollouts,
    cue: Mapping[str, int | None],
    texts: Mapping[str, Sequence[str]],
    sampling: Sampling,
) -> dict[str, Counts]:
    """One replacement of the first cue by each text, and the first kind's texts at a random earlier sentence instead: (safe,
    asked) by prompt and kind of text; what could not be judged counts as not safe. An empty text is "nothing": a fresh draw."""
    places = [(r, at) for r in losers if (at := cue[r.id]) is not None]
    earlier_ = [
        (r, before)
        for r, at in places
        if (before := random_earlier_sentence(r, at, session.seed)) is not None
    ]
    first = next(iter(texts))
    plan = [(kind, places, lines) for kind, lines in texts.items()] + [
        (f"{first}, earlier sentence", earlier_, texts[first])
    ]
    found = {}
    for kind, where, lines in plan:
        cases = [
            Replacement(r, at, f"{kind} {i}", text)
            for r, at in where
            for i, text in enumerate(lines)
        ]
        results = [result for _, result in intervene(session, prompts, cases, sampling)]
        counts = {r.prompt_id: [0, 0] for r, _ in places}
        for result, verdict in zip(results, judge(session, prompts, results), strict=True):
            counts[result.prompt_id][0] += verdict.label == SAFE
            counts[result.prompt_id][1] += 1
        found[kind] = {prompt: (k, n) for prompt, (k, n) in counts.items()}
    return found


def frequent_sentences(
    session: Session, rollouts: Rollouts, at: Mapping[str, int | None], count: int
) -> list[str]:
    """The ``count`` most frequent sentences at an index (a cue's) of the rollouts; ties by text."""
    seen = Counter(
        trace_texts(session, r)[index].strip() for r in rollouts if (index := at[r.id]) is not None
    )
    return [text for text, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:count]]


def reverse(
    session: Session,
    prompts: Prompts,
    turned: Mapping[str, TurningPoint],
    rollouts: Rollouts,
    texts: Mapping[str, Sequence[str]],
    sampling: Sampling,
    draws: int,
) -> dict[str, Counts]:
    """Fig 6 backwards: each text in place of the sentence in which a safe trace turned safe: (unsafe, judged) by prompt. The
    judge reads what the model wrote after it, not the text itself."""
    places = [(r, at) for r in rollouts if (at := turned[r.id].sentence) is not None]
    found = {}
    for kind, lines in texts.items():
        cases = [
            Replacement(r, at, f"{kind} {i}", text)
            for r, at in places
            for i, text in enumerate(lines)
        ]
        results = [result for _, result in intervene(session, prompts, cases, sampling, draws)]
        found[kind] = by_prompt(results, judge(session, prompts, results, CONTINUATION))
    return found
