"""What is learnt from judged training traces, never typed: the lexicon of cues and the pool of safety triggers (Eq. 2)."""

from __future__ import annotations

from ipo_lib.csr import CsrSettings
from ipo_lib.cues import CueDetector, LexiconCues
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

CLUSTERS, MEMBERS = (
    2,
    3,
)  # clusters tried for each trigger in use, and triggers tried of each cluster


def learn_lexicon(session: Session, rollouts: Rollouts, verdicts: Verdicts) -> LexiconCues:
    """A lexicon of cues from judged rollouts alone; unjudged ones are left out."""
    known = [
        (rollout, v.label == UNSAFE)
        for rollout, v in zip(rollouts, verdicts, strict=True)
        if v.label
    ]
    rows = [(trace_texts(session, rollout), unsafe) for rollout, unsafe in known]
    return LexiconCues().learn(rows, [rollout.prompt_id for rollout, _ in known])


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
    """(the whole pool with counts and clusters, the ``plan.pool`` triggers in use), from the training split. Sentences at the
    safe turning points of ``plan.traces`` safe traces, on prompts with mixed outcomes; of each cluster the best one-shot rescue
    of ``plan.traces`` unsafe traces. Raises BadInput when no safe trace turns."""
    by_id(rollouts)
    labels = {
        rollout.id: verdict.label for rollout, verdict in zip(rollouts, verdicts, strict=True)
    }
    chosen = set(mixed_prompts(rollouts, verdicts))
    safe = random_subset(
        [r for r in rollouts if labels[r.id] == SAFE and r.prompt_id in chosen],
        plan.traces,
        session.seed,
    )
    turns = locate.find_turns(
        session, prompts, safe, labels, SAFE, settings, search, sampling
    ).turns
    pool = cluster_sentences(
        turns.values(), {rollout.id: trace_texts(session, rollout) for rollout in safe}
    )
    if not pool:
        raise BadInput(
            f"no trigger: none of {len(safe)} safe traces has a safe turning point; raise plan.traces or plan.draws"
        )
    unsafe = random_subset(
        [r for r in rollouts if labels[r.id] == UNSAFE], plan.traces, session.seed
    )
    cue = find_cues(session, prompts, unsafe, detector)
    clusters = [
        [trigger for trigger in pool if trigger.cluster == cluster]
        for cluster in range(CLUSTERS * plan.pool)
    ]
    tried = [trigger for members in clusters for trigger in members[:MEMBERS]]
    cases = [
        Replacement(r, at, trigger.id, trigger.text)
        for trigger in tried
        for r in unsafe
        if (at := cue[r.id]) is not None
    ]
    results = intervene(
        session, prompts, cases, sampling, first=FRESH
    )  # not the draws by which triggers are measured later
    rescues: dict[str, tuple[int, int]] = {}
    for (done, _), verdict in zip(
        results, judge(session, prompts, [result for _, result in results]), strict=True
    ):
        k, n = rescues.get(done.trigger_id, (0, 0))
        rescues[done.trigger_id] = (k + (verdict.label == SAFE), n + (verdict.label is not None))
    return pool, choose_triggers(pool, rescues, plan.pool)
