"""Intervened Preference Optimization from beginning to end (section 4 of the paper).

Pairs, by Algorithm 1
    1. Sample a trace of every harmful prompt.
    2. Find its first compliance cue. A trace without a cue is left alone.
    3. Put a safety trigger in the cue's place and let the model go on.
    4. Accept the new trace where it has no cue any more; else repeat 2 and 3, at most N times.
    5. Both traces share a prefix of h tokens. What follows it is a pair (Eq. 4): the new suffix is
       preferred to the old one.

Stage 1 trains a LoRA adapter on these pairs by DPO (``ipo_lib.dpo`` has the loss).

Stage 2 gives back answers to harmless prompts that stage 1 taught to refuse: DPO on the base
model's answer over the refusal, beside pairs of stage 1.

``run_pipeline`` does all of this; notebook 06 and ``ipo train`` call the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ipo_lib.chat import is_cut_off
from ipo_lib.cues import CueDetector
from ipo_lib.engines import processes
from ipo_lib.engines.lora import Rows
from ipo_lib.frame import count_outcomes, rate
from ipo_lib.intervention import NO_CUE, is_accepted
from ipo_lib.pairs import PairSettings, count_reasons
from ipo_lib.profiles.run import Run
from ipo_lib.records import TRACE, Intervention, Pair, Prompt, Prompts, Rollout, Rollouts, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    CorrectionSettings,
    CuesByRollout,
    JudgedRollouts,
    Prefix,
    Replacement,
    Session,
    benign_pairs,
    find_cues,
    intervene,
    judge,
    pair_rollouts,
    sample,
    sample_and_judge,
)
from ipo_lib.stats import Interval
from ipo_lib.training import margin_warning, train_first_stage, train_second_stage
from ipo_lib.triggers import Trigger

Result = TypeVar("Result")
Counts = dict[str, int]  # of pairs, and of losers without one, by reason


@dataclass(frozen=True)
class TrainedStages:
    """What ``run_pipeline`` made."""

    stage1: Path  # adapter folder
    stage2: Path | None  # adapter folder; None where stage 2 was left out
    pairs: int  # of stage 1
    counts: Counts  # pairs of stage 1, and why there are not more
    rows: Rows  # metrics of stage 1, one row a step
    message: str  # what stage 2 did, in one sentence


def run_pipeline(
    run: Run,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    gather: Callable[[], tuple[list[Pair], Counts]] | None = None,
    choose: Callable[[], Sequence[Trigger]] | None = None,
) -> TrainedStages:
    """Train both stages of a profile, in this process or in all that a launcher started.

    The first process samples and judges; the others read its results from the store. Then all of
    them train, each on its share of every step. Nothing that is stored is computed again.

    Args:
        run: an open run; its settings are those of one process, whatever the launcher started.
        harmful: prompts that pairs are made from.
        benign: prompts of stage 2.
        gather: another way to get the pairs of stage 1; None: Algorithm 1 with the profile's cue
            detector and triggers.
        choose: another way to get stage 2's triggers; None: the profile's.

    Raises:
        BadInput: there is no pair, or the launcher shards parameters.
    """
    settings, session = run.profile, run.session
    processes.join(settings.stage1.use_cpu or settings.model.device == "cpu")

    # 1. Stage 1, on intervened pairs.
    def intervened_pairs() -> tuple[list[Pair], Counts]:
        detector, triggers = detector_and_triggers(run, harmful)
        sampling = pair_sampling(run)
        pairs, counts, _ = corrected_pairs(
            session, harmful, triggers, detector, settings.plan, settings.pairs, sampling
        )
        return pairs, counts

    pairs, counts = first_process_first(gather or intervened_pairs)
    stage1, rows = train_first_stage(session, pairs, run.folder, settings.stage1, counts)

    # 2. Stage 2, on what stage 1 refuses too much.
    def refused_pairs() -> list[Pair]:
        triggers = choose() if choose else detector_and_triggers(run, harmful)[1]
        pairs, _, _ = benign_pairs(
            session,
            run.adapted(stage1),
            benign,
            settings.pairs,
            settings.sampling,
            settings.stage2,
            triggers,
        )
        return pairs

    refused = first_process_first(refused_pairs)
    stage2, _, message = train_second_stage(
        session, pairs, refused, run.folder, stage1, settings.stage2
    )
    message = margin_warning(rows) or message
    return TrainedStages(stage1, stage2, len(pairs), counts, rows, message)


def first_process_first(work: Callable[[], Result]) -> Result:
    """``work()`` by the first process, then by the others, who find its results in the store."""
    if not processes.is_first():
        processes.wait()
        return work()
    result = work()
    processes.wait()
    return result


def detector_and_triggers(run: Run, prompts: Sequence[Prompt]) -> tuple[CueDetector, list[Trigger]]:
    """The profile's cue detector and triggers.

    Where the profile names none, a lexicon is learnt and a pool mined from judged traces of
    ``prompts``.
    """
    if run.profile.detector and run.profile.triggers:
        judged = JudgedRollouts(by_id(prompts), [], [])
    else:
        judged = sample_and_judge(run.session, prompts, run.thinking, run.profile.plan.draws)
    detector = run.detector(judged.rollouts, judged.verdicts)
    triggers = run.triggers(judged.prompts, judged.rollouts, judged.verdicts, detector)
    return detector, triggers


def pair_sampling(run: Run) -> Sampling:
    """How the two sides of a pair are sampled: to the end of what a pair holds."""
    return run.thinking if run.profile.pairs.part == TRACE else run.profile.sampling


# Algorithm 1.


@dataclass(frozen=True)
class Correction:
    """One trace of Algorithm 1, its last intervention, and the trace that this ended in."""

    loser: Rollout  # the original trace
    intervention: Intervention  # the last one; ``accepted`` says whether it was enough
    result: Rollout
    cut: int  # tokens before the first cue of the original trace


def corrected_pairs(
    session: Session,
    prompts: Sequence[Prompt],
    triggers: Sequence[Trigger],
    detector: CueDetector,
    plan: CorrectionSettings,
    settings: PairSettings,
    sampling: Sampling,
) -> tuple[list[Pair], Counts, list[Correction]]:
    """Algorithm 1, once per trigger, each on a fresh trace of every prompt.

    Args:
        session: store, model and judge.
        prompts: harmful prompts.
        triggers: safety triggers; with ``plan.share`` all are tried on the same trace of a prompt.
        detector: finds compliance cues.
        plan: how often a trace is corrected and when the result is accepted.
        settings: what enters a pair.
        sampling: of traces and continuations.

    Returns:
        The pairs; their number and the reasons why there are not more; all corrections tried. The
        loser of a pair is any trace with a cue, as in the paper.
    """
    prompts_by_id = by_id(prompts)
    corrections: list[Correction] = []
    for number, trigger in enumerate(triggers):
        first = 0 if plan.share else number
        prefixes = [Prefix(prompt) for prompt in prompts]
        rollouts = sample(session, prefixes, sampling, 1, first=first)
        corrections += correct(session, prompts_by_id, rollouts, trigger, detector, plan, sampling)
    accepted = [tried for tried in corrections if tried.intervention.accepted]
    results = []
    for tried in accepted:
        why = f"trigger {tried.intervention.trigger_id}"
        prompt = prompts_by_id[tried.loser.prompt_id]
        pair = pair_rollouts(session, prompt, tried.loser, tried.result, tried.cut, settings, why)
        if isinstance(pair, Pair):
            # The trigger's own tokens were put there, not sampled.
            pair = replace(pair, given=tried.result.prefix_len - tried.intervention.cut)
        results.append(pair)
    pairs, counts = count_reasons(results)
    counts["no-cue"] = len(triggers) * len(prompts) - len(corrections)
    counts["not-accepted"] = len(corrections) - len(accepted)
    return pairs, counts, corrections


def correct(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    trigger: Trigger,
    detector: CueDetector,
    plan: CorrectionSettings,
    sampling: Sampling,
) -> list[Correction]:
    """Algorithm 1 for one trigger: replace the first cue until the result is accepted.

    With N > 1 the paper stores the last failed trace as the loser. Here the loser stays the
    original trace and ``cut`` its first cue. With N = 1, as in the paper, both are the same.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: traces. Those without a cue are left out of the result.
        trigger: takes the cue's place.
        detector: finds compliance cues.
        plan: ``rounds`` is N; ``accept`` says when a result is accepted.
        sampling: of the continuations.
    """
    cues = find_cues(session, prompts, rollouts, detector)
    active = [(rollout, rollout) for rollout in rollouts if cues[rollout.id] is not None]
    corrections: dict[str, Correction] = {}
    for number in range(1, plan.rounds + 1):
        # 1. The trigger takes the place of the first cue of each trace still to be corrected.
        replacements = [
            Replacement(current, cues[current.id] or 0, trigger.id, trigger.text, number)
            for _, current in active
        ]
        tried = intervene(session, prompts, replacements, sampling)
        results = [result for _, result in tried]
        verdicts = judge(session, prompts, results)
        # 2. Cues of the results, unless nobody reads them: a detector may have to sample for them.
        unread: set[str] = set()
        if plan.accept == NO_CUE or number < plan.rounds:
            new_cues = find_cues(session, prompts, results, detector)
            cues.update(new_cues)
            unread = new_cues.unread
        # 3. Accepted or not; None where that cannot be known.
        for (loser, _), (change, result), verdict in zip(active, tried, verdicts, strict=True):
            index = cues.get(result.id)
            accepted = is_accepted(plan.accept, index, verdict)
            if plan.accept == NO_CUE:
                ends = not is_cut_off(result, TRACE, session.chat.opened)
                if result.id in unread or (index is None and not ends):
                    accepted = None
            before = corrections.get(loser.id)
            cut = before.cut if before else change.cut
            last = replace(change, accepted=accepted)
            corrections[loser.id] = Correction(loser, last, result, cut)
        # 4. What was not accepted and has a cue goes into the next round.
        active = _still_with_a_cue([corrections[loser.id] for loser, _ in active], cues)
    return [corrections[rollout.id] for rollout in rollouts if rollout.id in corrections]


def _still_with_a_cue(
    tried: Sequence[Correction], cues: CuesByRollout
) -> list[tuple[Rollout, Rollout]]:
    """(original trace, present trace) of the corrections that another round can improve."""
    return [
        (correction.loser, correction.result)
        for correction in tried
        if not correction.intervention.accepted and cues.get(correction.result.id) is not None
    ]


def acceptance_rate(corrections: Sequence[Correction]) -> Interval:
    """The share of corrected traces whose last replacement was accepted, over prompts."""
    prompts = [correction.loser.prompt_id for correction in corrections]
    return rate(count_outcomes(prompts, [tried.intervention.accepted for tried in corrections]))
