"""Pairs from real rollouts: which trace wins over which, and the pairs of stage 2.

``ipo_lib.pairs`` decides whether two rollouts make a pair (Eq. 4). Algorithm 1, which makes the
pairs of stage 1, stands in ``ipo_lib.pipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ipo_lib.dpo import Stage2Settings
from ipo_lib.pairs import NoPair, PairSettings, build_pair, count_reasons
from ipo_lib.records import (
    ANSWER,
    BOTH,
    SAFE,
    Pair,
    Prompt,
    Prompts,
    Rollout,
    Rollouts,
    Verdict,
    Verdicts,
    by_id,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages.drawing import Prefix, sample
from ipo_lib.stages.session import Continuations, Session
from ipo_lib.stages.traces import trace_end
from ipo_lib.stages.verdicts import judge
from ipo_lib.triggers import Trigger

Counts = dict[str, int]  # of pairs, and of losers without one, by reason


def pair_rollouts(
    session: Session,
    prompt: Prompt,
    loser: Rollout,
    winner: Rollout,
    cut: int,
    settings: PairSettings,
    why: str = "",
) -> Pair | NoPair:
    """The pair (x, winner > loser, h) of two rollouts of one prompt, or the reason there is none.

    Args:
        session: for the chat.
        prompt: of both.
        loser: the rejected side.
        winner: the chosen side.
        cut: h of Eq. 4, the response tokens that both share.
        settings: what enters a pair.
        why: where the pair comes from; it is kept in the pair.
    """
    return build_pair(
        loser,
        winner,
        session.chat.prompt_ids(prompt),
        cut,
        settings,
        why,
        loser_end=trace_end(session, loser),
        winner_end=trace_end(session, winner),
        eos_id=session.chat.eos_ids[0],
    )


def harvested_pairs(
    session: Session,
    prompts: Prompts,
    losers: Rollouts,
    cuts: Mapping[str, int | None],
    drawn: Mapping[str, Continuations],
    settings: PairSettings,
) -> tuple[list[Pair], Counts]:
    """Pairs at no further cost, from continuations that a search has drawn (arXiv 2412.08905).

    Of the continuations that pass through a trace's cut, the first ``settings.harvest`` that end
    safe are preferred to it.

    Args:
        session: for the chat.
        prompts: the losers' prompts, by id.
        losers: unsafe traces.
        cuts: tokens before the cue of each loser, by rollout id; None: it has none.
        drawn: the search's continuations of each loser, by rollout id.
        settings: what enters a pair.
    """
    results = []
    for loser in losers:
        cut = cuts[loser.id]
        if cut is None:
            continue
        winners = []
        for continuation, verdict in drawn[loser.id]:
            passes = continuation.token_ids[:cut] == loser.token_ids[:cut]
            if verdict.label == SAFE and continuation.prefix_len <= cut and passes:
                winners.append(continuation)
        prompt = prompts[loser.prompt_id]
        for winner in winners[: settings.harvest]:
            results.append(pair_rollouts(session, prompt, loser, winner, cut, settings, "harvest"))
    return count_reasons(results)


def benign_pairs(
    before: Session,
    after: Session,
    prompts: Sequence[Prompt],
    settings: PairSettings,
    sampling: Sampling,
    stage2: Stage2Settings,
    triggers: Sequence[Trigger] = (),
) -> tuple[list[Pair], Counts, list[Verdict]]:
    """Stage 2's pairs: the base model's whole response over a refusal of the model after stage 1.

    1. The base model answers every prompt once.
    2. The stage-1 model answers until it refuses, at most ``stage2.benign_draws`` times.
    3. Where it never does, it goes on from a trigger at the trace's start
       (``stage2.refusing_prefix``).

    Args:
        before: the base model.
        after: the model after stage 1.
        prompts: benign prompts.
        settings: of the pairs; they always hold trace and answer.
        sampling: of whole responses.
        stage2: how hard a refusal is looked for.
        triggers: sentences for step 3, one after the other; none: no step 3.

    Returns:
        The pairs, at most one a prompt; counts by reason; the refusal verdicts on the first
        response of the stage-1 model to every prompt.
    """
    prompts_by_id = by_id(prompts)

    # 1. What should win: answers of the base model.
    answers = sample(before, [Prefix(prompt) for prompt in prompts], sampling, 1)
    verdicts = judge(before, prompts_by_id, answers, ANSWER, "refusal")
    winners = _with_label("answered", answers, verdicts)

    # 2. What should lose: refusals of the stage-1 model.
    losers: dict[str, Rollout] = {}
    first_verdicts: list[Verdict] = []
    counts: Counts = {"refused at once": 0, "refused later": 0}
    for draw in range(stage2.benign_draws):
        left = [prompt for prompt in prompts if prompt.id not in losers]
        verdicts, refused = _draw_refusals(after, left, sampling, draw)
        first_verdicts = first_verdicts or verdicts
        losers |= refused
        counts["refused at once" if draw == 0 else "refused later"] += len(refused)

    # 3. Refusals after a safety trigger at the start of the trace.
    left = [prompt for prompt in prompts if prompt.id not in losers]
    if stage2.refusing_prefix and triggers and left:
        refused = _refusals_after_triggers(after, left, triggers, sampling)
        losers |= refused
        counts["refused after a trigger"] = len(refused)

    # 4. The pairs.
    pairs, reasons = count_reasons(_whole_pairs(before, prompts, losers, winners, settings))
    counts["never refused"] = len(prompts_by_id) - len(losers)
    counts["not answered by the base model"] = len(prompts_by_id) - len(winners)
    return pairs, reasons | counts, first_verdicts


def _whole_pairs(
    session: Session,
    prompts: Sequence[Prompt],
    losers: dict[str, Rollout],
    winners: dict[str, Rollout],
    settings: PairSettings,
) -> list[Pair | NoPair]:
    """Pairs of whole responses, which differ from their first token on (h = 0)."""
    whole = replace(settings, part=BOTH, eos=True)
    pairs = []
    for prompt in prompts:
        if prompt.id in losers and prompt.id in winners:
            loser, winner = losers[prompt.id], winners[prompt.id]
            pairs.append(pair_rollouts(session, prompt, loser, winner, 0, whole, "benign refusal"))
    return pairs


def _draw_refusals(
    session: Session, prompts: Sequence[Prompt], sampling: Sampling, draw: int
) -> tuple[list[Verdict], dict[str, Rollout]]:
    """The verdicts on one response to every prompt; and the responses that refuse, by prompt id."""
    prefixes = [Prefix(prompt) for prompt in prompts]
    responses = sample(session, prefixes, sampling, 1, first=draw)
    verdicts = judge(session, by_id(prompts), responses, ANSWER, "refusal")
    return verdicts, _with_label("refused", responses, verdicts)


def _refusals_after_triggers(
    session: Session, prompts: Sequence[Prompt], triggers: Sequence[Trigger], sampling: Sampling
) -> dict[str, Rollout]:
    """By prompt id, the responses that refuse after a trigger was put at the trace's start."""
    prefixes = []
    for number, prompt in enumerate(prompts):
        trigger = triggers[number % len(triggers)]
        prefix_ids = session.chat.trace_start_ids(f"{trigger.text.strip()} ")
        prefixes.append(Prefix(prompt, prefix_ids))
    responses = sample(session, prefixes, sampling, 1, stage="refusals")
    verdicts = judge(session, by_id(prompts), responses, ANSWER, "refusal")
    return _with_label("refused", responses, verdicts)


def _with_label(label: str, responses: Rollouts, verdicts: Verdicts) -> dict[str, Rollout]:
    """The responses with this label, by prompt id."""
    return {
        response.prompt_id: response
        for response, verdict in zip(responses, verdicts, strict=True)
        if verdict.label == label
    }
