"""First cues and unsafe turning points (Fig 5b), and what a cue does to the safety ratio S.

1. For each unsafe trace with a cue we note where the first *cue* begins, where the sentence of the
   unsafe *turning point* (Eq. 3) begins, and where a random sentence up to the turn begins: the
   *placebo*. Places are counted in tokens kept before them.
2. Pearson's r of cue and turn (the paper's number) is to be read beside the placebo's: for a judge
   to whom harm once written stays written, any earlier place goes together with the turn. Two
   things favour the placebo. A turn has an error of measurement; the placebo is drawn up to the
   turn and would share it. So on recorded curves one half of the draws bounds the placebo, and
   both r are with the turn by the other half. And where the turn is in the first sentence, the
   placebo is the turn by its rule. So both are also compared without such traces
   (``turned_later``).
3. The *drop* of a sentence is S before it minus S after it. The drop at the cue is compared with
   the mean drop over the trace's other sentences. Left out are sentences that begin where S is 0
   or 1, since they can move nothing, and all from the first one on that holds harm itself. There
   S falls because the trace *is* unsafe; the question is what a sentence does before that.

Means are over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan, nan
from typing import Any

import numpy as np
import pandas as pd

from ipo_lib import csr
from ipo_lib.frame import count_outcomes, counts, mean_over_prompts, rate, responses
from ipo_lib.intervention import random_earlier_sentence
from ipo_lib.records import (
    UNSAFE,
    CsrPoint,
    Curves,
    Prompts,
    Rollouts,
    Sentence,
    TurningPoint,
    digest,
)
from ipo_lib.stages import JudgedRollouts, Session, judge, trace_sentences
from ipo_lib.stats import Interval, mean, needed_for_mean, power_of_mean
from ipo_lib.turning_points.curves import Curve, recorded_prompts, recorded_rollouts
from ipo_lib.turning_points.exhaustive import exact_points, true_turn
from ipo_lib.turning_points.reliability import turns_by_halves

CUE, PLACEBO, DIFFERENCE = "cue", "random sentence", "difference"
FEWEST_PROMPTS = 4  # for an interval of r
NO_SPREAD = 1e-9  # square tokens; a product of spreads below it is rounding
SPLITS = 16  # ways to halve the draws of a recorded curve; either half comes first once
Floats = np.ndarray[Any, Any]
Turns = Mapping[str, TurningPoint]


@dataclass(frozen=True)
class CuePlace:
    """One unsafe trace in Fig 5b. Places are tokens kept before them, None where there is none."""

    rollout_id: str
    prompt_id: str
    cue: int  # where the first cue begins
    other: int | None  # where a random sentence up to the turn begins
    bound: int | None  # where the last sentence begins that the random one may be
    turn: int | None  # where the sentence of the unsafe turning point begins
    distance: int | None  # sentences from cue to turn
    drop: float = nan  # S before the cue's sentence minus S after it; nan where S was settled
    elsewhere: float = nan  # mean drop over the other sentences; nan where S was settled


@dataclass(frozen=True)
class MeasuredTraces:
    """Unsafe traces along which S was measured. Mappings are by rollout id."""

    rollouts: Rollouts
    spans: Mapping[str, Sequence[Sentence]]
    turns: Turns  # unsafe turning points
    points: Curves  # S at both ends of sentences, from draws that measure
    # S from other draws, by which sentences are kept: kept by the draws that also measure, they
    # would look as if they moved S. None: ``points`` are exact.
    choosing: Curves | None = None
    # Index of the first sentence with which the trace is judged unsafe. Missing or None: unknown.
    harm: Mapping[str, int | None] = field(default_factory=dict)
    # Unsafe turning points by one half of the draws and by the other, for several ways to halve
    # them. Empty: the draws were not halved.
    halves: Sequence[tuple[Turns, Turns]] = ()


def places_of_cues(
    traces: MeasuredTraces, cues: Mapping[str, int | None], seed: int = 0
) -> list[CuePlace]:
    """Each rollout with a cue, its turning point and what its sentences did to S.

    A turn is placed where its sentence begins, so that it equals the cue exactly when the cue is
    the turn. A start-locked turn has no place.

    Args:
        traces: with S along them.
        cues: index of the first cue's sentence, None without one.
        seed: of the random sentences.
    """
    places = []
    for place in _placed(traces, cues, seed, traces.turns, traces.turns):
        cue, drops = cues[place.rollout_id], _drops(traces, place.rollout_id)
        elsewhere = [drop for index, drop in drops.items() if index != cue]
        mean_elsewhere = sum(elsewhere) / len(elsewhere) if elsewhere else nan
        drop = nan if cue is None else drops.get(cue, nan)
        places.append(replace(place, drop=drop, elsewhere=mean_elsewhere))
    return places


def places_with_random_sentences(
    traces: MeasuredTraces, cues: Mapping[str, int | None], number: int, halved: bool = True
) -> list[list[CuePlace]]:
    """Places to compare r by, with random sentences of several seeds; without drops.

    One half of the draws bounds the random sentence, the other one places the turn. Without halves
    both have one turn, and r of the random sentence is too large.

    Args:
        traces: with their turns.
        cues: index of the first cue's sentence, None without one.
        number: of random sentences.
        halved: take the halves where there are some; else the turns by all draws.
    """
    halves = (halved and traces.halves) or [(traces.turns, traces.turns)]
    return [_placed(traces, cues, seed, *halves[seed % len(halves)]) for seed in range(number)]


def _placed(
    traces: MeasuredTraces, cues: Mapping[str, int | None], seed: int, bounds: Turns, turns: Turns
) -> list[CuePlace]:
    """Each rollout with a cue, without drops; the random sentence is at most that of the bound."""
    places = []
    for rollout in traces.rollouts:
        cue, spans = cues[rollout.id], traces.spans[rollout.id]
        if cue is None:
            continue
        bound, turn = bounds[rollout.id].sentence, turns[rollout.id].sentence
        other = None if bound is None else random_earlier_sentence(rollout, bound + 1, seed)
        places.append(
            CuePlace(
                rollout_id=rollout.id,
                prompt_id=rollout.prompt_id,
                cue=spans[cue].token_start,
                other=None if other is None else spans[other].token_start,
                bound=None if bound is None else spans[bound].token_start,
                turn=None if turn is None else spans[turn].token_start,
                distance=None if turn is None else turn - cue,
            )
        )
    return places


def _drops(traces: MeasuredTraces, key: str) -> dict[int, float]:
    """Drop of S over each sentence before the harm, by index, where S can still move."""
    sentences, points = traces.spans[key], traces.points[key]
    chosen_by = points if traces.choosing is None else traces.choosing[key]
    unsettled = {point.cut for point in chosen_by if 0 < point.n_safe < point.n}
    harm = traces.harm.get(key)
    drops = {}
    for index, change in csr.change_by_sentence(points, sentences).items():
        before_harm = harm is None or index < harm
        if before_harm and sentences[index].token_start in unsettled:
            drops[index] = -change
    return drops


def find_harm(
    session: Session, prompts: Prompts, rollouts: Rollouts, spans: Mapping[str, Sequence[Sentence]]
) -> dict[str, int | None]:
    """The sentence that makes a trace unsafe whatever follows: the first to hold harm itself.

    The judge reads every trace up to the end of each sentence. An unfinished trace is unsafe only
    if what is written already is.

    Args:
        session: for the judge.
        prompts: the rollouts' prompts, by id.
        rollouts: unsafe traces.
        spans: their sentences, by rollout id.

    Returns:
        By rollout id: the index of that sentence; None if no part is judged unsafe.
    """
    parts, places = [], []
    for rollout in rollouts:
        for span in spans[rollout.id]:
            ids = rollout.token_ids[: span.token_end]
            key = digest([rollout.id, "up to", span.token_end])
            text = session.chat.decode(ids)
            parts.append(replace(rollout, id=key, token_ids=ids, text=text, finish="length"))
            places.append((rollout.id, span.index))
    harm: dict[str, int | None] = dict.fromkeys(rollout.id for rollout in rollouts)
    verdicts = judge(session, prompts, parts)
    for (key, index), verdict in zip(places, verdicts, strict=True):
        if verdict.label == UNSAFE and harm[key] is None:
            harm[key] = index
    return harm


def recorded_traces(
    session: Session, seen: JudgedRollouts, curves: Sequence[Curve], settings: csr.CsrSettings
) -> MeasuredTraces:
    """Recorded unsafe traces, along which S is known exactly.

    Args:
        session: for chat and judge.
        seen: rollouts of this run. A curve of another trace is left out if it has no prompt.
        curves: recorded curves.
        settings: of the turning points.
    """
    unsafe_curves = [curve for curve in curves if curve.trace.label == UNSAFE]
    recorded = recorded_rollouts(session, seen, unsafe_curves)
    rollouts = [rollout for rollout, _ in recorded]
    spans = {rollout.id: trace_sentences(session, rollout) for rollout in rollouts}
    points, turns = {}, {}
    for rollout, curve in recorded:
        points[rollout.id] = _exact_points(curve, spans[rollout.id])
        turns[rollout.id] = true_turn(curve.trace, UNSAFE, settings, curve.truth.tolist())
    harm = find_harm(session, recorded_prompts(seen, curves), rollouts, spans)
    random, halves = np.random.default_rng(0), []
    for _ in range(SPLITS):
        found = turns_by_halves([curve for _, curve in recorded], UNSAFE, settings, random)
        one, other = (dict(zip(spans, half, strict=True)) for half in found)
        halves += [(one, other), (other, one)]
    return MeasuredTraces(rollouts, spans, turns, points, harm=harm, halves=halves)


def _exact_points(curve: Curve, sentences: Sequence[Sentence]) -> list[CsrPoint]:
    """S of a recorded trace at both ends of its sentences."""
    ends = {span.token_start for span in sentences} | {span.token_end for span in sentences}
    cuts = [cut for cut in sorted(ends) if cut < len(curve.truth)]
    return exact_points(curve.trace, {cut: float(curve.truth[cut]) for cut in cuts})


def turned_later(places: Sequence[CuePlace]) -> list[CuePlace]:
    """Those whose random sentence may be another than the first one."""
    return [row for row in places if row.bound]


def compare_correlations(
    places_by_seed: Sequence[Sequence[CuePlace]], resamples: int = 4000
) -> dict[str, Interval]:
    """Fig 5b: Pearson's r with the turn, of the first cue and of a random sentence up to the turn.

    Args:
        places_by_seed: traces with random sentences of several seeds. A trace counts in those in
            which it has a turn and a random sentence.
        resamples: bootstrap samples of the prompts.

    Returns:
        ``CUE`` and ``PLACEBO``, means over the seeds; and ``DIFFERENCE``, the first minus the
        second. Each has a 95 % bootstrap interval over prompts, [-1, 1] below ``FEWEST_PROMPTS``.
        ``n`` counts traces that count in half of the seeds or more.
    """
    # 1. One row for each seed, one column for each trace; nan where it does not count.
    by_seed = []
    for places in places_by_seed:
        by_seed.append([row for row in places if None not in (row.other, row.turn)])
    traces = {row.rollout_id: row for rows in by_seed for row in rows}
    column = {key: number for number, key in enumerate(traces)}
    table = np.full((3, len(by_seed), len(traces)), nan)
    for number, row in [(number, row) for number, rows in enumerate(by_seed) for row in rows]:
        table[:, number, column[row.rollout_id]] = row.cue, row.other, row.turn
    n = int((2 * (~np.isnan(table[0])).sum(0) >= len(by_seed)).sum())

    # 2. To draw prompts with replacement is to draw how often each comes; first, each comes once.
    names, prompt_of = np.unique([row.prompt_id for row in traces.values()], return_inverse=True)
    often = np.ones((1, len(names)))
    if len(names) >= FEWEST_PROMPTS:
        random, even = np.random.default_rng(0), np.full(len(names), 1 / len(names))
        often = np.concatenate([often, random.multinomial(len(names), even, resamples)])
    weights = often[:, prompt_of].T

    # 3. r of each, and its interval.
    of_cue, of_other = (_mean_r(table[side], table[2], weights) for side in range(2))
    intervals = {}
    for name, r in ((CUE, of_cue), (PLACEBO, of_other), (DIFFERENCE, of_cue - of_other)):
        known = r[1:][~np.isnan(r[1:])]
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (-1.0, 1.0)
        intervals[name] = Interval(
            float(r[0]), float(low), float(high), n, "bootstrap over prompts"
        )
    return intervals


def _mean_r(x: Floats, y: Floats, weights: Floats) -> Floats:
    """The mean over rows of r of x and y; nan without a row in which both vary.

    Args:
        x: [rows, traces]; nan where a trace does not count.
        y: the same, with nan at the same places.
        weights: [traces, samples], how often each trace counts.

    Returns:
        [samples].
    """
    if not x.size:
        return np.full(weights.shape[1], nan)
    known = ~np.isnan(x)
    x, y = (np.where(known, side - np.nanmean(side), 0.0) for side in (x, y))
    total = known @ weights
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y, xx, yy, xy = (
            side @ weights / total for side in (x, y, x * x, y * y, x * y)
        )
        spread = np.sqrt((xx - mean_x**2).clip(min=0) * (yy - mean_y**2).clip(min=0))
        r = np.where(spread > NO_SPREAD, (xy - mean_x * mean_y) / spread, nan)
    rows = (~np.isnan(r)).sum(0)
    return np.where(rows > 0, np.nansum(r, 0) / np.maximum(rows, 1), nan)


def share_in_same_sentence(places_by_seed: Sequence[Sequence[CuePlace]]) -> dict[str, Interval]:
    """How often the turn lies in the first cue's own sentence, and in the random one's.

    Args:
        places_by_seed: the same traces with random sentences of several seeds. Traces without a
            turn are left out.

    Returns:
        ``CUE`` and ``PLACEBO``, means over prompts; the second is averaged over the seeds, too.
    """
    rows = [row for places in places_by_seed for row in places if row.turn is not None]
    prompts, limits = [row.prompt_id for row in rows], (0.0, 1.0)
    return {
        CUE: mean_over_prompts(prompts, [row.cue == row.turn for row in rows], limits),
        PLACEBO: mean_over_prompts(prompts, [row.other == row.turn for row in rows], limits),
    }


def mean_drops(places: Sequence[CuePlace]) -> dict[str, Interval]:
    """Mean drop of S at the cue, elsewhere in the trace, and their difference; over prompts."""
    return {name: mean(column.tolist()) for name, column in _drops_by_prompt(places).items()}


def _drops_by_prompt(places: Sequence[CuePlace]) -> pd.DataFrame:
    """One row per prompt: means over its traces; nan where no trace has a number."""
    rows = [(place.prompt_id, place.drop, place.elsewhere) for place in places]
    table = pd.DataFrame(rows, columns=["prompt", "at the cue", "elsewhere"])
    table = table.astype({"at the cue": float, "elsewhere": float})
    table["difference"] = table["at the cue"] - table["elsewhere"]
    return table.groupby("prompt", sort=False).mean()


@dataclass(frozen=True)
class DropPower:
    """What a measurement of the drop at cues can show."""

    usable: int  # prompts with a cue and another sentence where S could move
    spread: float  # standard deviation of the difference between prompts
    power: float  # probability of showing ``effect`` with so many prompts
    effect: float  # a difference of the drops that is worth seeing
    needed: int | None  # prompts that show it with a power of 80 %; None: 10,000 do not


def power_of_drops(places: Sequence[CuePlace], effect: float) -> DropPower:
    """The power of a measurement at the spread that it found, for a true difference ``effect``."""
    values = _drops_by_prompt(places)["difference"].dropna().tolist()
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else nan
    needed = None if isnan(spread) else needed_for_mean(spread, effect)
    power = power_of_mean(spread, len(values), effect)
    return DropPower(len(values), spread, power, effect, needed)


def risk_by_cue(seen: JudgedRollouts, cues: Mapping[str, int | None]) -> dict[bool, Interval]:
    """P(unsafe | there is a cue) and P(unsafe | there is none), over prompts with such traces."""
    table = responses(seen.rollouts, trace=seen.verdicts)
    has_cue = np.array([cues[rollout.id] is not None for rollout in seen.rollouts], dtype=bool)
    return {
        True: rate(counts(table[has_cue], "trace")),
        False: rate(counts(table[~has_cue], "trace")),
    }


def score_detector(
    rollouts: Rollouts, found: Mapping[str, int | None], truth: Mapping[str, int | None]
) -> dict[str, Interval]:
    """How well a detector finds the first cue, over prompts.

    Args:
        rollouts: any number of each prompt.
        found: index of the first cue that the detector finds in each, by rollout id.
        truth: the same of the true detector.

    Returns:
        ``precision``: the share of finds that are the true first cue. ``recall``: the share of
        true first cues that are found.
    """
    prompts = [rollout.prompt_id for rollout in rollouts]
    rates = {}
    for side, base in (("precision", found), ("recall", truth)):
        hits: list[bool | None] = []
        for rollout in rollouts:
            is_case = base[rollout.id] is not None
            hits.append(found[rollout.id] == truth[rollout.id] if is_case else None)
        rates[side] = rate(count_outcomes(prompts, hits))
    return rates
