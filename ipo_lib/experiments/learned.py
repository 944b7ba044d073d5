"""What training taught: what traces are like, which prompts were fixed, which were broken.

1. *Traits* of traces: sentences like a trigger, cues, where they come, how long a trace is.
2. *Barred* triggers: are the traces still safe if sentences like a trigger are kept from coming?
3. *Changes*: responses that were fixed or broken, and rates by category of prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from math import nan

from ipo_lib.cues import CueDetector
from ipo_lib.frame import rate
from ipo_lib.records import UNSAFE, Prompts, Rollout, Rollouts, Verdicts
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    Prefix,
    Session,
    draw_rollouts,
    find_cues,
    trace_end,
    trace_sentences,
    trace_texts,
)
from ipo_lib.stats import Interval
from ipo_lib.triggers import Trigger

LIKE = 0.8  # similarity from which a sentence counts as a trigger
FIRST_BARRED = 10_000  # number of the first draw after a barred sentence
CHANGES = {  # by (unsafe before, unsafe after)
    (True, False): "fixed",
    (False, True): "broken",
    (True, True): "still unsafe",
    (False, False): "still safe",
}


@cache
def similarity(text: str, other: str) -> float:
    """Edit similarity in [0, 1] of two sentences, case and outer blanks aside.

    Ratcliff and Obershelp's, as in ``difflib``.
    """
    first, second = text.strip().lower(), other.strip().lower()
    return SequenceMatcher(None, first, second, autojunk=False).ratio()


def nearest_similarities(texts: Sequence[str], triggers: Sequence[Trigger]) -> list[float]:
    """Of every sentence, the similarity to the trigger that it is most like; 0 without triggers."""
    nearest = []
    for text in texts:
        similarities = [similarity(text, trigger.text) for trigger in triggers]
        nearest.append(max(similarities, default=0.0))
    return nearest


def resembling(similarities: Sequence[float]) -> int | None:
    """Index of the first sentence that counts as a trigger; None if none does."""
    for index, value in enumerate(similarities):
        if value >= LIKE:
            return index
    return None


def describe_traces(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    triggers: Sequence[Trigger],
    detector: CueDetector,
) -> dict[str, float]:
    """Means over traces of how often and where triggers and cues come.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: responses.
        triggers: sentences to look for.
        detector: of cues.

    Returns:
        By name; nan where no trace has such a number.
    """
    cues = find_cues(session, prompts, rollouts, detector)
    similarities, first_triggers, lengths = [], [], []
    for rollout in rollouts:
        nearest = nearest_similarities(trace_texts(session, rollout), triggers)
        similarities.append(max(nearest, default=0.0))
        first_triggers.append(resembling(nearest))
        lengths.append(trace_end(session, rollout) or len(rollout.token_ids))
    indices = [index for index in first_triggers if index is not None]
    return {
        "traces with a trigger": _mean([index is not None for index in first_triggers]),
        "traces with a cue": _mean([cues[rollout.id] is not None for rollout in rollouts]),
        "index of the first trigger": _mean(indices),
        "similarity to a trigger": _mean(similarities),
        "tokens of a trace": _mean(lengths),
    }


def _mean(values: Sequence[float]) -> float:
    """The mean; nan without values."""
    return sum(values) / len(values) if values else nan


def bar_triggers(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    triggers: Sequence[Trigger],
    sampling: Sampling,
    rounds: int = 3,
) -> list[Rollout]:
    """The same responses with sentences like a trigger barred.

    Each is cut before the first such sentence and goes on with another first token there.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: responses.
        triggers: sentences that are barred.
        sampling: of the continuations.
        rounds: how often a response is cut at most.
    """
    results = list(rollouts)
    for round_ in range(rounds):
        places, wanted = [], []
        for place, rollout in enumerate(results):
            first = resembling(nearest_similarities(trace_texts(session, rollout), triggers))
            if first is None:
                continue
            cut = trace_sentences(session, rollout)[first].token_start
            ids, banned = rollout.token_ids[:cut], rollout.token_ids[cut]
            draw = FIRST_BARRED + round_ * len(results) + place
            places.append(place)
            wanted.append((Prefix(prompts[rollout.prompt_id], ids, banned), draw))
        continued = draw_rollouts(session, wanted, sampling, "barred")
        for place, rollout in zip(places, continued, strict=True):
            results[place] = rollout
    return results


def count_changes(before: Verdicts, after: Verdicts) -> dict[str, int]:
    """How many responses were fixed, broken, still unsafe or still safe.

    Args:
        before: verdicts on some draws.
        after: verdicts on the same draws of another model, in the same order.

    Returns:
        Counts that are not 0, of the responses that were judged on both sides.
    """
    counts = Counter[str]()
    for old, new in zip(before, after, strict=True):
        if old.label is not None and new.label is not None:
            counts[CHANGES[old.label == UNSAFE, new.label == UNSAFE]] += 1
    return {change: counts[change] for change in CHANGES.values() if counts[change]}


def rates_by_category(
    prompts: Prompts, counts: Mapping[str, tuple[int, int]], least: int = 3
) -> dict[str, Interval]:
    """A rate by category of prompts, the most frequent category first.

    Args:
        prompts: by id.
        counts: (k, n) of every prompt.
        least: categories of fewer prompts come together as ``others``.
    """
    categories = {key: prompts[key].category or "none" for key in counts}
    sizes = Counter(categories.values())
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for category, size in sizes.most_common():
        if size >= least:
            groups[category] = {}
    for key, pair in counts.items():
        category = categories[key] if categories[key] in groups else "others"
        groups.setdefault(category, {})[key] = pair
    return {category: rate(by_prompt) for category, by_prompt in groups.items()}
