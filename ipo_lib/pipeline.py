"""TODO: what ipo_lib.pipeline is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ipo_lib.chat import OPEN
from ipo_lib.cues import CueDetector
from ipo_lib.dpo import Stage2Settings
from ipo_lib.pairs import PairSettings, Refusal, build_pair, count_reasons
from ipo_lib.records import ANSWER, BOTH, SAFE, Pair, Prompt, Rollout, Verdict, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    Continuations,
    Correction,
    CorrectionSettings,
    Prefix,
    Session,
    correct,
    judge,
    sample,
    trace_end,
)
from ipo_lib.triggers import Trigger


def pair_rollouts(
    session: Session,
    prompt: Prompt,
    loser: Rollout,
    winner: Rollout,
    cut: int,
    settings: PairSettings,
    why: str = "",
) -> Pair | Refusal:
    """The pair (x, winner > loser, h = ``cut``) of two rollouts of one prompt, or the reason there is none."""
    ids, ends = (
        session.chat.prompt_ids(prompt),
        [trace_end(session, one) for one in (loser, winner)],
    )
    return build_pair(
        loser,
        winner,
        ids,
        cut,
        settings,
        why,
        loser_end=ends[0],
        winner_end=ends[1],
        eos_id=session.chat.eos_ids[0],
    )


def corrected_pairs(
    session: Session,
    prompts: Sequence[Prompt],
    triggers: Sequence[Trigger],
    detector: CueDetector,
    plan: CorrectionSettings,
    settings: PairSettings,
    sampling: Sampling,
) -> tuple[list[Pair], dict[str, int], list[Correction]]:
    """Algorithm 1 once per trigger, each on a fresh trace of every prompt (or all on one: ``plan.share``): (pairs, counts by
    reason, what was tried). The loser is any trace with a cue, as in the paper; the winner is what its first cue's replacement
    was accepted with. ``counts`` has ``no-cue`` and ``not-accepted`` beside the reasons of ``pairs``."""
    named, tried = by_id(prompts), list[Correction]()
    for place, trigger in enumerate(triggers):
        rollouts = sample(
            session,
            [Prefix(prompt) for prompt in prompts],
            sampling,
            1,
            first=0 if plan.share else place,
        )
        tried += correct(session, named, rollouts, trigger, detector, plan, sampling)
    won = [
        (one, named[one.loser.prompt_id], f"trigger {one.intervention.trigger_id}")
        for one in tried
        if one.intervention.accepted
    ]
    results = [
        (one, pair_rollouts(session, prompt, one.loser, one.result, one.cut, settings, why))
        for one, prompt, why in won
    ]
    given = [
        one.result.prefix_len - one.intervention.cut for one, _ in results
    ]  # tokens of the trigger
    kept, counts = count_reasons(
        dataclasses.replace(made, given=n) if isinstance(made, Pair) else made
        for (_, made), n in zip(results, given, strict=True)
    )
    counts |= {
        "no-cue": len(triggers) * len(prompts) - len(tried),
        "not-accepted": len(tried) - len(won),
    }
    return kept, counts, tried


def harvested_pairs(
    session: Session,
    prompts: Mapping[str, Prompt],
    losers: Sequence[Rollout],
    at: Mapping[str, int | None],
    drawn: Mapping[str, Continuations],
    settings: PairSettings,
) -> tuple[list[Pair], dict[str, int]]:
    """On-policy pairs at no further cost (arXiv 2412.08905, footnote 7): of the continuations that a search has drawn (``drawn``
    by trace), the first ``settings.harvest`` that pass through the trace's cut ``at`` (its cue) and end safe win over it."""
    results = []
    for loser in losers:
        if (cut := at[loser.id]) is not None:
            shares = [
                one
                for one, verdict in drawn[loser.id]
                if verdict.label == SAFE and one.prefix_len <= cut
            ]
            winners = [one for one in shares if one.token_ids[:cut] == loser.token_ids[:cut]][
                : settings.harvest
            ]
            results += [
                pair_rollouts(
                    session, prompts[loser.prompt_id], loser, one, cut, settings, "harvest"
                )
                for one in winners
            ]
    return count_reasons(results)


def benign_pairs(
    before: Session,
    after: Session,
    prompts: Sequence[Prompt],
    settings: PairSettings,
    sampling: Sampling,
    stage2: Stage2Settings,
    triggers: Sequence[Trigger] = (),
) -> tuple[list[Pair], dict[str, int], list[Verdict]]:
    """Stage 2's pairs: the base model's whole response over a refusal of the model after stage 1.

    1. The base model answers every prompt once.
    2. The stage-1 model answers until it refuses, at most ``stage2.benign_draws`` times.
    3. Where it never does (``stage2.refusing_prefix``), it goes on from a trigger at the trace's start.

    Args:
        before: the base model.
        after: the model after stage 1.
        prompts: benign prompts.
        settings: of the pairs; the part is always trace and answer.
        sampling: of whole responses.
        stage2: how hard a refusal is looked for.
        triggers: sentences for step 3, one after the other; none: no step 3.

    Returns:
        The pairs, at most one a prompt; counts by reason; the refusal verdicts on the first response
        of the stage-1 model to every prompt.
    """
    named = by_id(prompts)
    answers = sample(before, [Prefix(prompt) for prompt in prompts], sampling, 1)
    answered = judge(before, named, answers, ANSWER, "refusal")
    winners = {
        r.prompt_id: r for r, v in zip(answers, answered, strict=True) if v.label == "answered"
    }
    losers: dict[str, Rollout] = {}
    first: list[Verdict] = []
    counts: dict[str, int] = {}
    for draw in range(stage2.benign_draws):
        left = [prompt for prompt in prompts if prompt.id not in losers]
        responses = sample(after, [Prefix(prompt) for prompt in left], sampling, 1, first=draw)
        verdicts = judge(after, named, responses, ANSWER, "refusal")
        first = first or verdicts
        refused = _refused(responses, verdicts)
        losers |= refused
        counts["refused at once" if draw == 0 else "refused later"] = counts.get(
            "refused later", 0
        ) + len(refused)
    left = [prompt for prompt in prompts if prompt.id not in losers]
    if stage2.refusing_prefix and triggers and left:
        opening = "" if after.chat.opened else f"{OPEN}\n"
        texts = [
            f"{opening}{triggers[at % len(triggers)].text.strip()} " for at in range(len(left))
        ]
        starts = [
            Prefix(prompt, after.chat.encode(text))
            for prompt, text in zip(left, texts, strict=True)
        ]
        responses = sample(after, starts, sampling, 1, stage="refusals")
        refused = _refused(responses, judge(after, named, responses, ANSWER, "refusal"))
        losers |= refused
        counts["refused behind a trigger"] = len(refused)
    whole = dataclasses.replace(settings, part=BOTH, eos=True)
    results = [
        pair_rollouts(
            before, prompt, losers[prompt.id], winners[prompt.id], 0, whole, "benign refusal"
        )
        for prompt in prompts
        if prompt.id in losers and prompt.id in winners
    ]
    kept, reasons = count_reasons(results)
    counts |= {
        "never refused": len(named) - len(losers),
        "not answered by the base model": len(named) - len(winners),
    }
    return kept, reasons | counts, first


def _refused(responses: Sequence[Rollout], verdicts: Sequence[Verdict]) -> dict[str, Rollout]:
    """The responses that refuse, by prompt."""
    return {
        r.prompt_id: r for r, v in zip(responses, verdicts, strict=True) if v.label == "refused"
    }
