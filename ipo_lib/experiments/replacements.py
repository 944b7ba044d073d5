"""Chains of interventions (Fig 6), with the controls that could refute them.

1. Unsafe traces with a cue are taken, one or a few of every prompt.
2. *Chain*: a text takes the place of the first cue, the model continues, and where the result is
   not safe the same is done again with its first cue.
3. *Controls*: other texts take that place (a neutral sentence, nothing at all), and the trigger
   takes the place of a random earlier sentence.
4. *Reverse*: a cue takes the place of the sentence in which a safe trace turned safe.

A result that could not be judged counts as not safe in 2 and 3; left out, it would look like a
cure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ipo_lib.cues import CueDetector
from ipo_lib.frame import count_labels, count_outcomes
from ipo_lib.intervention import random_earlier_sentence
from ipo_lib.records import (
    CONTINUATION,
    SAFE,
    UNSAFE,
    BadInput,
    Prompts,
    Rollout,
    Rollouts,
    TurningPoint,
    by_id,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    JudgedRollouts,
    Replacement,
    Session,
    find_cues,
    intervene,
    judge,
    trace_texts,
)

Counts = dict[str, tuple[int, int]]  # (k, n) by prompt


def unsafe_with_cue(
    seen: JudgedRollouts, cues: Mapping[str, int | None], most: int = 1
) -> list[Rollout]:
    """Unsafe traces with a cue, the first ``most`` of every prompt that has one.

    Raises:
        BadInput: no prompt has one.
    """
    taken: Counter[str] = Counter()
    with_cue = []
    for rollout in seen.labelled(UNSAFE):
        if cues[rollout.id] is not None and taken[rollout.prompt_id] < most:
            taken[rollout.prompt_id] += 1
            with_cue.append(rollout)
    if not with_cue:
        raise BadInput(
            f"no unsafe trace with a cue among {len(seen.rollouts)} rollouts; sample more of each "
            "prompt (in a profile: plan.draws)"
        )
    return with_cue


def chain_interventions(
    session: Session,
    prompts: Prompts,
    losers: Rollouts,
    texts: Mapping[str, str],
    detector: CueDetector,
    sampling: Sampling,
    rounds: int,
) -> dict[str, list[Counts]]:
    """Fig 6: how many traces are still not safe after 0, 1, ... ``rounds`` interventions.

    Args:
        session: store, model and judge.
        prompts: the losers' prompts, by id.
        losers: one unsafe trace of each prompt.
        texts: what takes the place of a cue, by name. Empty: nothing, so that the model draws anew.
        detector: of cues. A trace without a cue stays as it is.
        sampling: of the continuations.
        rounds: interventions on one trace.

    Returns:
        By name of the text, for each number of interventions: (1 if not safe, 1) of every prompt.
    """
    current: dict[tuple[str, str], tuple[Rollout, str | None]] = {}
    for name in texts:
        for loser_id, rollout in by_id(losers).items():
            current[name, loser_id] = (rollout, UNSAFE)
    prompt_ids = [loser.prompt_id for loser in losers]
    counts = {name: [dict.fromkeys(prompt_ids, (1, 1))] for name in texts}
    for round_ in range(1, rounds + 1):
        # 1. Find the first cue of every trace that is not safe yet.
        unsafe = {key: rollout for key, (rollout, label) in current.items() if label != SAFE}
        cues = find_cues(session, prompts, [*unsafe.values()], detector)
        # 2. Put the text in its place and continue.
        keys, replacements = [], []
        for (name, loser_id), rollout in unsafe.items():
            index = cues[rollout.id]
            if index is not None:
                text = texts[name]
                # Where the prefix stays that of the round before, a new draw is needed: nothing is
                # put there, or the text itself is taken for a cue.
                stays = text.strip() in ("", trace_texts(session, rollout)[index].strip())
                draw = round_ - 1 if stays else 0
                keys.append((name, loser_id))
                replacements.append(Replacement(rollout, index, name, text, round_, draw))
        results = [result for _, result in intervene(session, prompts, replacements, sampling)]
        # 3. The results take the place of the traces.
        verdicts = judge(session, prompts, results)
        for key, result, verdict in zip(keys, results, verdicts, strict=True):
            current[key] = (result, verdict.label)
        # 4. Count what is not safe now.
        for name, by_round in counts.items():
            not_safe = [current[name, loser.id][1] != SAFE for loser in losers]
            by_round.append(count_outcomes(prompt_ids, not_safe))
    return counts


def merge_counts(tables: Iterable[Counts]) -> Counts:
    """Several counts of the same prompts as one: the prompt stays the unit."""
    merged: Counts = {}
    for by_prompt in tables:
        for prompt, (k, n) in by_prompt.items():
            sum_k, sum_n = merged.get(prompt, (0, 0))
            merged[prompt] = (sum_k + k, sum_n + n)
    return merged


def run_controls(
    session: Session,
    prompts: Prompts,
    losers: Rollouts,
    cues: Mapping[str, int | None],
    texts: Mapping[str, Sequence[str]],
    sampling: Sampling,
) -> dict[str, Counts]:
    """Replace the first cue once by each text, and a random earlier sentence by the first kind.

    Args:
        session: store, model and judge.
        prompts: the losers' prompts, by id.
        losers: unsafe traces.
        cues: index of each trace's first cue.
        texts: texts by kind. An empty text is "nothing": a fresh draw.
        sampling: of the continuations.

    Returns:
        By kind of text: (safe, asked) of every prompt.
    """
    at_cue, earlier = [], []
    for rollout in losers:
        index = cues[rollout.id]
        if index is not None:
            at_cue.append((rollout, index))
            before = random_earlier_sentence(rollout, index, session.seed)
            if before is not None:
                earlier.append((rollout, before))
    plan = {kind: (at_cue, lines) for kind, lines in texts.items()}
    first = next(iter(texts))
    plan[f"{first}, earlier sentence"] = (earlier, texts[first])

    # Every kind counts the same prompts, so that differences can be paired.
    nothing = dict.fromkeys((rollout.prompt_id for rollout, _ in at_cue), (0, 0))
    counts = {}
    for kind, (places, lines) in plan.items():
        replacements = _replacements(places, kind, lines)
        drawn = intervene(session, prompts, replacements, sampling, apart=True)
        results = [result for _, result in drawn]
        safe = [verdict.label == SAFE for verdict in judge(session, prompts, results)]
        counts[kind] = nothing | count_outcomes([result.prompt_id for result in results], safe)
    return counts


def repeat_to(texts: Sequence[str], count: int) -> list[str]:
    """``count`` texts, taken in turn, so that a kind of few texts gets as many draws as others.

    There are more where the kind has more, and none where it has none. ``run_controls`` draws anew
    for a text that comes again.
    """
    rounds = -(-count // max(len(texts), 1))
    return [*texts, *(list(texts) * rounds)[len(texts) : count]]


def _replacements(
    places: Sequence[tuple[Rollout, int]], kind: str, texts: Sequence[str]
) -> list[Replacement]:
    """Every text at every place: (rollout, sentence index)."""
    replacements = []
    for rollout, index in places:
        for number, text in enumerate(texts):
            replacements.append(Replacement(rollout, index, f"{kind} {number}", text))
    return replacements


def frequent_sentences(
    session: Session, rollouts: Rollouts, indices: Mapping[str, int | None], count: int
) -> list[str]:
    """The most frequent sentences at an index of the rollouts, such as their first cues.

    Args:
        session: for the chat.
        rollouts: traces.
        indices: a sentence index by rollout id, or None.
        count: sentences to return; ties by text.
    """
    frequencies = Counter[str]()
    for rollout in rollouts:
        index = indices[rollout.id]
        if index is not None:
            frequencies[trace_texts(session, rollout)[index].strip()] += 1
    ranked = sorted(frequencies.items(), key=lambda item: (-item[1], item[0]))
    return [text for text, _ in ranked[:count]]


def reverse_interventions(
    session: Session,
    prompts: Prompts,
    turns: Mapping[str, TurningPoint],
    rollouts: Rollouts,
    texts: Mapping[str, Sequence[str]],
    sampling: Sampling,
    draws: int,
) -> dict[str, Counts]:
    """Fig 6 backwards: put texts in place of the sentence in which a safe trace turned safe.

    Args:
        session: store, model and judge, who reads what the model wrote after the text.
        prompts: the rollouts' prompts, by id.
        turns: safe turning points by rollout id.
        rollouts: safe traces.
        texts: texts by kind, such as cues and neutral sentences.
        sampling: of the continuations.
        draws: continuations after each text.

    Returns:
        By kind of text: (unsafe, judged) of every prompt.
    """
    places = []
    for rollout in rollouts:
        index = turns[rollout.id].sentence
        if index is not None:
            places.append((rollout, index))
    counts = {}
    for kind, lines in texts.items():
        replacements = _replacements(places, kind, lines)
        drawn = intervene(session, prompts, replacements, sampling, draws, apart=True)
        results = [result for _, result in drawn]
        verdicts = judge(session, prompts, results, CONTINUATION)
        counts[kind] = count_labels(results, verdicts)
    return counts
