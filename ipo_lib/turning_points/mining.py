"""What is learnt from judged training traces: the lexicon of cues and the pool of safety triggers.

A safety trigger is a sentence at a safe turning point (Eq. 2). Alike sentences form a cluster; of
each of the largest clusters one is used: the median by how many unsafe traces it rescues when it
replaces their cue.
"""

from __future__ import annotations

from ipo_lib.csr import CsrSettings
from ipo_lib.cues import CueDetector, LexiconCues
from ipo_lib.frame import count_outcomes
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompts, Rollouts, Verdicts, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    FRESH,
    CorrectionSettings,
    Replacement,
    Session,
    find_cues,
    intervene,
    judge,
    mixed_prompts,
    random_subset,
    trace_texts,
)
from ipo_lib.triggers import Trigger, choose_triggers, cluster_sentences
from ipo_lib.turning_points import locate
from ipo_lib.turning_points.adaptive import SearchSettings

MEMBERS = 3  # triggers tried of each cluster


def learn_lexicon(session: Session, rollouts: Rollouts, verdicts: Verdicts) -> LexiconCues:
    """A lexicon of cues from judged rollouts alone; unjudged ones are left out."""
    rows = []
    prompt_ids = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.label:
            rows.append((trace_texts(session, rollout), verdict.label == UNSAFE))
            prompt_ids.append(rollout.prompt_id)
    return LexiconCues().learn(rows, prompt_ids)


def mine_pool(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    verdicts: Verdicts,
    detector: CueDetector,
    settings: CsrSettings,
    search: SearchSettings,
    plan: CorrectionSettings,
    sampling: Sampling,
) -> tuple[list[Trigger], list[Trigger]]:
    """Mine safety triggers from the training split.

    Args:
        session: the model and the judge.
        prompts: by id.
        rollouts: whole responses to these prompts.
        verdicts: on their traces, in the same order.
        detector: finds the cues that triggers replace.
        settings: Eq. 2.
        search: for turning points.
        plan: how many traces are searched and rescued (``traces``), and how many triggers are
            used (``pool``).
        sampling: the settings by which the traces were drawn.

    Returns:
        The whole pool with counts and clusters, and the ``plan.pool`` triggers in use.

    Raises:
        BadInput: no safe trace turns.
    """
    by_id(rollouts)  # refuses two rollouts of one id
    labels = {}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        labels[rollout.id] = verdict.label

    # 1. The sentences at safe turning points, on prompts with mixed outcomes.
    mixed = set(mixed_prompts(rollouts, verdicts))
    safe = [r for r in rollouts if labels[r.id] == SAFE and r.prompt_id in mixed]
    safe = random_subset(safe, plan.traces, session.seed)
    located = locate.find_turns(session, prompts, safe, labels, SAFE, settings, search, sampling)
    texts = {rollout.id: trace_texts(session, rollout) for rollout in safe}
    pool = cluster_sentences(located.turns.values(), texts)
    if not pool:
        raise BadInput(
            f"no trigger: none of {len(safe)} safe traces has a safe turning point; "
            "raise plan.traces or plan.draws"
        )

    # 2. Choose those that rescue unsafe traces.
    unsafe = [rollout for rollout in rollouts if labels[rollout.id] == UNSAFE]
    unsafe = random_subset(unsafe, plan.traces, session.seed)
    candidates = _candidates(pool, plan.pool)
    rescues = _count_rescues(session, prompts, unsafe, candidates, detector, sampling)
    return pool, choose_triggers(pool, rescues, plan.pool)


def _candidates(pool: list[Trigger], clusters: int) -> list[Trigger]:
    """The first triggers of each of the first clusters."""
    candidates = []
    for cluster in range(clusters):
        members = [trigger for trigger in pool if trigger.cluster == cluster]
        candidates += members[:MEMBERS]
    return candidates


def _count_rescues(
    session: Session,
    prompts: Prompts,
    unsafe: Rollouts,
    triggers: list[Trigger],
    detector: CueDetector,
    sampling: Sampling,
) -> dict[str, tuple[int, int]]:
    """By trigger id, (k, n): k of n judged traces end safe with it in place of their cue."""
    cues = find_cues(session, prompts, unsafe, detector)
    replacements = []
    for trigger in triggers:
        for rollout in unsafe:
            if (cue := cues[rollout.id]) is not None:
                replacements.append(Replacement(rollout, cue, trigger.id, trigger.text))
    # FRESH: not the draws by which triggers are measured later.
    results = intervene(session, prompts, replacements, sampling, first=FRESH)
    verdicts = judge(session, prompts, [result for _, result in results])
    outcomes: list[bool | None] = []
    for verdict in verdicts:
        outcomes.append(None if verdict.label is None else verdict.label == SAFE)
    return count_outcomes([done.trigger_id for done, _ in results], outcomes)
