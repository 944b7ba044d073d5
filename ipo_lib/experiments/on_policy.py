"""Is a sentence that is put into a trace like one that the model writes itself?

An intervention puts a sentence at the place of the cue that the model did not choose (*swapped*).
The model may also write such a sentence itself, if it is sampled there often enough (*its own*).
Both are taken at the same place of the same traces.

1. An unsafe trace is cut before its first cue, and continued many times.
2. The first new sentence of each continuation is of one *kind*: a trigger, a neutral sentence, a
   cue, or something else.
3. Continuations that begin with the model's own trigger are compared with those after a trigger
   that was put there; in the same way for neutral sentences.

For each kind of sentence: how often the trace ends safe, how much that differs between traces, how
often a cue comes after it, and how likely the sentence is under the model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

from ipo_lib.cues import CueDetector
from ipo_lib.experiments.learned import LIKE, nearest_similarities
from ipo_lib.frame import count_outcomes
from ipo_lib.profiles.run import Run
from ipo_lib.records import SAFE, Prompts, Rollout, Rollouts, Sentence
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    Replacement,
    find_cues,
    intervene,
    judge,
    probabilities,
    trace_sentences,
    trace_texts,
)
from ipo_lib.stats import Interval, mean
from ipo_lib.triggers import Trigger

TRIGGER, NEUTRAL, CUE, OTHER = "trigger", "neutral sentence", "cue", "another sentence"
OWN, SWAPPED = "the model's own", "swapped"
FLOOR = 1e-12  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class Continued:
    """A trace that goes on after a sentence at the place of the cue."""

    loser: Rollout  # the unsafe trace that was cut
    rollout: Rollout
    sentence: int  # index of the sentence at the place of the cue
    kind: str  # of that sentence
    source: str  # OWN or SWAPPED
    safe: bool  # whether the trace ends safe; False where it could not be judged
    cue_after: bool  # whether a cue comes after that sentence


def continue_before_cues(
    run: Run,
    prompts: Prompts,
    losers: Rollouts,
    cues: Mapping[str, int | None],
    triggers: Sequence[Trigger],
    detector: CueDetector,
    draws: int,
) -> list[Continued]:
    """Both kinds of continuation of every trace.

    Args:
        run: with the profile.
        prompts: the losers' prompts, by id.
        losers: unsafe traces with a cue.
        cues: index of each loser's first cue.
        triggers: each is put into every trace; a sentence that resembles one is a trigger.
        detector: of cues.
        draws: continuations of a trace without a sentence put in; as many after triggers as there
            are triggers, and after neutral sentences.
    """
    session, sampling = run.session, run.thinking
    neutral = [Trigger(text, text, 0, 0, None) for text in run.profile.neutral]

    # 1. The model goes on by itself, with draws that did not choose the trace.
    own = [Replacement(loser, cues[loser.id] or 0, "", "") for loser in losers]
    places = [(loser, "", OWN) for loser in losers for _ in range(draws)]
    results = intervene(session, prompts, own, sampling, draws, apart=True)

    # 2. It goes on after a sentence that was put there.
    swapped = []
    for loser in losers:
        for kind, texts in ((TRIGGER, triggers), (NEUTRAL, neutral)):
            for text in texts:
                swapped.append(Replacement(loser, cues[loser.id] or 0, text.id, text.text))
                places.append((loser, kind, SWAPPED))
    results += intervene(session, prompts, swapped, sampling, apart=True)

    # 3. What came of it.
    all_rollouts = [rollout for _, rollout in results]
    verdicts = judge(session, prompts, all_rollouts)
    later_cues = _cues_after(run, prompts, all_rollouts, [p[0] for p in places], cues, detector)
    continued = []
    for (loser, kind, source), rollout, verdict in zip(places, all_rollouts, verdicts, strict=True):
        index = cues[loser.id] or 0
        sentences, cue = trace_texts(session, rollout), later_cues[rollout.id]
        if index >= len(sentences):
            continue  # the model closed the trace at once
        own_kind = kind_of_sentence(sentences[index], triggers, neutral, cue == index)
        after, safe = cue is not None and cue > index, verdict.label == SAFE
        continued.append(Continued(loser, rollout, index, kind or own_kind, source, safe, after))
    return continued


def kind_of_sentence(
    text: str, triggers: Sequence[Trigger], neutral: Sequence[Trigger], is_cue: bool
) -> str:
    """The kind of a sentence: by its likeness to a trigger or to a neutral sentence, or a cue.

    Args:
        text: the sentence.
        triggers: safety triggers.
        neutral: neutral sentences.
        is_cue: whether the detector calls it a cue.
    """
    if is_cue:
        return CUE
    if nearest_similarities([text], triggers)[0] >= LIKE:
        return TRIGGER
    if nearest_similarities([text], neutral)[0] >= LIKE:
        return NEUTRAL
    return OTHER


def _cues_after(
    run: Run,
    prompts: Prompts,
    rollouts: Rollouts,
    losers: Rollouts,
    cues: Mapping[str, int | None],
    detector: CueDetector,
) -> dict[str, int | None]:
    """The first cue of each continuation; before the cut there is none, by the choice of it."""
    found = find_cues(run.session, prompts, rollouts, detector)
    firsts: dict[str, int | None] = {}
    for rollout, loser in zip(rollouts, losers, strict=True):
        index, start = found[rollout.id], cues[loser.id] or 0
        firsts[rollout.id] = index if index is not None and index >= start else None
    return firsts


@dataclass(frozen=True)
class SentenceEffect:
    """What a kind of sentence does, over the traces that have such a continuation."""

    safe: dict[str, tuple[int, int]]  # (k, n) by prompt: traces that end safe
    cue_after: dict[str, tuple[int, int]]  # (k, n) by prompt: a cue comes after the sentence
    spread: float  # standard deviation between traces of the share that ends safe
    log_probability: Interval  # mean a token of the sentence, in nats, over traces
    count: int  # continuations


def effects(
    run: Run, prompts: Prompts, continued: Sequence[Continued]
) -> dict[tuple[str, str], SentenceEffect]:
    """By kind of sentence and source, what such sentences do.

    Args:
        run: with the profile.
        prompts: by id.
        continued: from ``continue_before_cues``.
    """
    groups: dict[tuple[str, str], list[Continued]] = defaultdict(list)
    for one in continued:
        groups[one.kind, one.source].append(one)
    table = {}
    for key, group in groups.items():
        names = [one.rollout.prompt_id for one in group]
        by_loser: dict[str, list[float]] = defaultdict(list)
        for one in group:
            by_loser[one.loser.id].append(float(one.safe))
        shares = [sum(values) / len(values) for values in by_loser.values()]
        table[key] = SentenceEffect(
            count_outcomes(names, [one.safe for one in group]),
            count_outcomes(names, [one.cue_after for one in group]),
            stdev(shares) if len(shares) > 1 else math.nan,
            _log_probability(run, prompts, group),
            len(group),
        )
    return table


def _log_probability(run: Run, prompts: Prompts, group: Sequence[Continued]) -> Interval:
    """The mean log-probability of a sentence's tokens at temperature 1, one sentence a trace."""
    first_of_each: dict[str, Continued] = {}
    for one in group:
        first_of_each.setdefault(one.loser.id, one)
    rollouts = [one.rollout for one in first_of_each.values()]
    plain = Sampling(temperature=1.0, top_p=1.0, max_tokens=run.profile.sampling.max_tokens)
    scores = probabilities(run.session, prompts, rollouts, plain)
    means = []
    for one in first_of_each.values():
        span: Sentence = trace_sentences(run.session, one.rollout)[one.sentence]
        tokens = scores[one.rollout.id][span.token_start : span.token_end]
        logs = [math.log(max(p, FLOOR)) for p in tokens]
        means.append(sum(logs) / max(len(logs), 1))
    return mean(means, (math.log(FLOOR), 0.0))
