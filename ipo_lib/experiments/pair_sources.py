"""Pairs other than Algorithm 1's: what the paper's method is compared with.

*Natural* pairs come from ordinary sampling, *teacher* examples from a stronger source, *unshared*
pairs from Algorithm 1 without the shared prefix. *Weights* scale a pair's loss by the change of S.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ipo_lib.pairs import NoPair, count_reasons
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import NATURAL, TEACHER, UNSHARED
from ipo_lib.records import SAFE, UNSAFE, Ids, Pair, Prompt, Prompts, Rollout, Rollouts, digest
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    FRESH,
    Prefix,
    count_label,
    judge,
    pair_rollouts,
    sample,
    sample_and_judge,
    trace_sentences,
)

CONTINUATIONS = 16  # at each side of a cue, where pairs are weighed


def natural_pairs(
    run: Run, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[list[Pair], dict[str, int]]:
    """Every unsafe trace of a prompt against a safe one of the same prompt; nothing is shared.

    Args:
        run: with the profile.
        prompts: harmful prompts.
        sampling: of the traces.

    Returns:
        Pairs, and counts by reason.
    """
    session, settings = run.session, run.profile.pairs
    seen = sample_and_judge(session, prompts, sampling, run.profile.plan.draws)
    unsafe, safe = seen.labelled(UNSAFE), seen.labelled(SAFE)
    results: list[Pair | NoPair] = []
    for prompt in prompts:
        losers = [rollout for rollout in unsafe if rollout.prompt_id == prompt.id]
        winners = [rollout for rollout in safe if rollout.prompt_id == prompt.id]
        if not winners:
            continue
        for number, loser in enumerate(losers):
            winner = winners[number % len(winners)]
            results.append(pair_rollouts(session, prompt, loser, winner, 0, settings, NATURAL))
    return count_reasons(results)


def teacher_examples(run: Run, prompts: Sequence[Prompt]) -> list[Pair]:
    """Safe responses of the profile's stronger source without a rejected side: for SFT (STAR-1)."""
    examples, chat = [], run.session.chat
    for prompt, text in zip(prompts, run.teacher_responses(prompts), strict=True):
        chosen_ids = (*chat.encode(text), chat.eos_ids[0])
        name = digest([prompt.id, text])
        examples.append(Pair(name, chat.prompt_ids(prompt), chosen_ids, (), 0, TEACHER))
    return examples


def _split_prefix(pair: Pair) -> tuple[Ids, Ids]:
    """The ids of a pair's prompt, and the response tokens that both sides share."""
    length = len(pair.prompt_ids) - pair.h
    return pair.prompt_ids[:length], pair.prompt_ids[length:]


def unshared_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The same traces, each loser beside the winner of the prompt's next trace: no shared prefix.

    A prompt with one trace gives no pair.
    """
    by_prompt: dict[Ids, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[_split_prefix(pair)[0]].append(pair)
    mixed = []
    for prompt_ids, losers in by_prompt.items():
        winners = losers[1:] + losers[:1]
        for loser, winner in zip(losers, winners, strict=True):
            loser_prefix, winner_prefix = _split_prefix(loser)[1], _split_prefix(winner)[1]
            if loser_prefix == winner_prefix:
                continue
            name = digest([winner.id, loser.id])
            chosen_ids = winner_prefix + winner.chosen_ids
            rejected_ids = loser_prefix + loser.rejected_ids
            mixed.append(Pair(name, prompt_ids, chosen_ids, rejected_ids, 0, UNSHARED))
    return mixed


def weigh_pairs(run: Run, prompts: Prompts, pairs: Sequence[Pair], losers: Rollouts) -> list[Pair]:
    """The pairs with weights of mean 1, by how much S changes at the loser's cue.

    1. S before the cue's sentence and after it is estimated from CONTINUATIONS draws each.
    2. The weight is the absolute difference, divided by the mean over pairs.

    Args:
        run: with the profile.
        prompts: by id.
        pairs: of Algorithm 1.
        losers: the traces that Algorithm 1 corrected.
    """
    session = run.session
    prefixes = []
    for pair in pairs:
        loser = _loser_of(run, prompts, pair, losers)
        ends = [span.token_end for span in trace_sentences(session, loser)]
        after = next((end for end in ends if end > pair.h), pair.h + len(pair.rejected_ids))
        for cut in (pair.h, after):
            prefixes.append(Prefix(prompts[loser.prompt_id], loser.token_ids[:cut]))
    drawn = sample(
        session, prefixes, run.thinking, CONTINUATIONS, first=FRESH, stage="continuations"
    )
    verdicts = judge(session, prompts, drawn)
    safe_rates = []
    for start in range(0, len(verdicts), CONTINUATIONS):
        safe, judged = count_label(verdicts[start : start + CONTINUATIONS], SAFE)
        safe_rates.append(safe / max(judged, 1))
    sides = zip(safe_rates[::2], safe_rates[1::2], strict=True)
    changes = [abs(after - before) for before, after in sides]
    mean = sum(changes) / max(len(changes), 1) or 1.0
    return [
        replace(pair, weight=change / mean) for pair, change in zip(pairs, changes, strict=True)
    ]


def _loser_of(run: Run, prompts: Prompts, pair: Pair, losers: Rollouts) -> Rollout:
    """The trace that a pair's rejected side was cut from."""
    prompt_ids, shared_ids = _split_prefix(pair)
    start = shared_ids + pair.rejected_ids
    for loser in losers:
        of_prompt = run.session.chat.prompt_ids(prompts[loser.prompt_id]) == prompt_ids
        if of_prompt and loser.token_ids[: len(start)] == start:
            return loser
    raise LookupError(f"pair {pair.id}: its loser is not among the traces")
