"""First cues and unsafe turning points (Fig 5b), and what a cue does to the safety ratio S.

1. For each unsafe trace with a cue we note where the first *cue* begins, where the sentence of the
   unsafe *turning point* (Eq. 3) begins, and where a random sentence up to the turn begins: the
   *placebo*. Places are counted in tokens kept before them.
2. Pearson's r of cue and turn (the paper's number) is to be read beside the placebo's: for a judge
   to whom harm once written stays written, any earlier place goes together with the turn.
3. The *drop* of a sentence is S before it minus S after it. The drop at the cue is compared with
   the mean drop over the trace's other sentences. A sentence that begins where S is 0 or 1 can
   move nothing and is left out.

Means are over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np
import pandas as pd

from ipo_lib import csr
from ipo_lib.cues import CueDetector
from ipo_lib.frame import counts, rate, responses
from ipo_lib.intervention import random_earlier_sentence
from ipo_lib.records import UNSAFE, CsrPoint, Curves, Rollouts, Sentence, TurningPoint
from ipo_lib.stages import JudgedRollouts, Session, find_cues, trace_sentences
from ipo_lib.stats import Interval, mean, needed_for_mean, pearson, power_of_mean
from ipo_lib.turning_points.curves import Curve, recorded_rollouts
from ipo_lib.turning_points.exhaustive import exact_points, true_turn

CUE, PLACEBO = "cue", "other"  # fields of CuePlace


@dataclass(frozen=True)
class CuePlace:
    """One unsafe trace in Fig 5b. Places are tokens kept before them, None where there is none."""

    rollout_id: str
    prompt_id: str
    cue: int  # where the first cue begins
    other: int | None  # where a random sentence up to the turn begins
    turn: int | None  # where the sentence of the unsafe turning point begins
    distance: int | None  # sentences from cue to turn
    drop: float  # S before the cue's sentence minus S after it; nan where S was settled
    elsewhere: float  # mean drop over the other sentences; nan where S was settled


def places_of_cues(
    rollouts: Rollouts,
    spans: Mapping[str, Sequence[Sentence]],
    cues: Mapping[str, int | None],
    points: Curves,
    turns: Mapping[str, TurningPoint],
    seed: int = 0,
    choosing: Curves | None = None,
) -> list[CuePlace]:
    """Each rollout with a cue, its turning point and what its sentences did to S.

    Args:
        rollouts: unsafe traces.
        spans: their sentences, by rollout id.
        cues: index of the first cue's sentence, None without one.
        points: S at both ends of sentences, from draws that measure.
        turns: unsafe turning points. A turn is placed where its sentence begins, so that it equals
            the cue exactly when the cue is the turn; start-locked ones have no place.
        seed: of the random sentences.
        choosing: S from other draws, by which sentences are kept. Kept by the draws that also
            measure, sentences would look as if they moved S. None: ``points`` are exact.
    """
    places = []
    for rollout in rollouts:
        cue = cues[rollout.id]
        if cue is None:
            continue
        sentences, turn = spans[rollout.id], turns[rollout.id].sentence
        # 1. The placebo: a random sentence up to and including the turn.
        other = None if turn is None else random_earlier_sentence(rollout, turn + 1, seed)
        # 2. Drops of the sentences in which S could move.
        chosen_by = points if choosing is None else choosing
        drops = _drops(points[rollout.id], chosen_by[rollout.id], sentences)
        elsewhere = [drop for index, drop in drops.items() if index != cue]
        places.append(
            CuePlace(
                rollout_id=rollout.id,
                prompt_id=rollout.prompt_id,
                cue=sentences[cue].token_start,
                other=None if other is None else sentences[other].token_start,
                turn=None if turn is None else sentences[turn].token_start,
                distance=None if turn is None else turn - cue,
                drop=drops.get(cue, nan),
                elsewhere=sum(elsewhere) / len(elsewhere) if elsewhere else nan,
            )
        )
    return places


def _drops(
    points: Sequence[CsrPoint], choosing: Sequence[CsrPoint], sentences: Sequence[Sentence]
) -> dict[int, float]:
    """Drop of S over each sentence, by index, where ``choosing`` says that S can still move."""
    unsettled = {point.cut for point in choosing if 0 < point.n_safe < point.n}
    changes = csr.change_by_sentence(points, sentences)
    return {
        index: -change
        for index, change in changes.items()
        if sentences[index].token_start in unsettled
    }


def recorded_cues(
    session: Session,
    seen: JudgedRollouts,
    curves: Sequence[Curve],
    detectors: Mapping[str, CueDetector],
    settings: csr.CsrSettings,
    seed: int = 0,
) -> dict[str, list[CuePlace]]:
    """``places_of_cues`` on recorded unsafe traces, whose S is known exactly.

    Args:
        session: for the chat.
        seen: the rollouts that the curves were recorded of; curves of other traces are left out.
        curves: recorded curves.
        detectors: cue detectors by name.
        settings: of the turning points.
        seed: of the random sentences.

    Returns:
        By name of the detector: the places of its cues.
    """
    unsafe_curves = [curve for curve in curves if curve.trace.label == UNSAFE]
    recorded = recorded_rollouts(session, seen, unsafe_curves)
    rollouts = [rollout for rollout, _ in recorded]
    spans = {rollout.id: trace_sentences(session, rollout) for rollout in rollouts}
    points, turns = {}, {}
    for rollout, curve in recorded:
        points[rollout.id] = _exact_points(curve, spans[rollout.id])
        turns[rollout.id] = true_turn(curve.trace, UNSAFE, settings, curve.truth.tolist())
    places = {}
    for name, detector in detectors.items():
        cues = find_cues(session, seen.prompts, rollouts, detector)
        places[name] = places_of_cues(rollouts, spans, cues, points, turns, seed)
    return places


def _exact_points(curve: Curve, sentences: Sequence[Sentence]) -> list[CsrPoint]:
    """S of a recorded trace at both ends of its sentences."""
    ends = {span.token_start for span in sentences} | {span.token_end for span in sentences}
    cuts = [cut for cut in sorted(ends) if cut < len(curve.truth)]
    return exact_points(curve.trace, {cut: float(curve.truth[cut]) for cut in cuts})


def correlation(places: Sequence[CuePlace], what: str = CUE) -> Interval:
    """Fig 5b: Pearson's r of ``what`` (cue or placebo) and turn, over the traces that turn."""
    starts, turns = [], []
    for place in places:
        start = getattr(place, what)
        if start is not None and place.turn is not None:
            starts.append(float(start))
            turns.append(float(place.turn))
    return pearson(starts, turns)


def placebo_correlation(places_by_seed: Sequence[Sequence[CuePlace]]) -> Interval:
    """Pearson's r of a random sentence up to the turn and the turn.

    Args:
        places_by_seed: the same traces with random sentences of several seeds.

    Returns:
        Mean and 95 % range over the seeds; ``n`` counts traces.
    """
    intervals = [correlation(places, PLACEBO) for places in places_by_seed]
    values = sorted(interval.value for interval in intervals if not isnan(interval.value))
    if not values:
        return Interval(nan, -1.0, 1.0, 0, "placements")
    last = len(values) - 1
    low, high = (values[min(last, int(share * len(values)))] for share in (0.025, 0.975))
    traces = max(interval.n for interval in intervals)
    method = f"range over {len(values)} placements"
    return Interval(sum(values) / len(values), low, high, traces, method)


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
