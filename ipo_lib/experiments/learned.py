"""What training taught: sentences like the triggers and like cues, where they stand, how long a trace is; what happens when those
sentences are barred; which prompts were fixed and which broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from math import nan

from ipo_lib.cues import CueDetector
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
from ipo_lib.stats import Interval, pooled_rate
from ipo_lib.triggers import Trigger

LIKE = 0.8  # similarity from which a sentence counts as a trigger
BARRED = 10_000  # draws after a barred sentence are numbered from here


@cache
def similarity(text: str, other: str) -> float:
    """Edit similarity in [0, 1] of two sentences, case and outer blanks aside (Ratcliff-Obershelp)."""
    return SequenceMatcher(
        None, text.strip().lower(), other.strip().lower(), autojunk=False
    ).ratio()


def nearest(texts: Sequence[str], triggers: Sequence[Trigger]) -> list[float]:
    """Of every sentence the similarity to the trigger it is most like."""
    return [max((similarity(text, one.text) for one in triggers), default=0.0) for text in texts]


def sentences(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    triggers: Sequence[Trigger],
    detector: CueDetector,
) -> dict[str, float]:
    """Means over rollouts: traces with a sentence like a trigger, with a cue; the index of the first such trigger; the
    similarity of the sentence nearest to one; tokens of a trace. nan where nothing has one."""
    near = [nearest(trace_texts(session, one), triggers) for one in rollouts]
    first = [next((at for at, value in enumerate(own) if value >= LIKE), None) for own in near]
    cued = find_cues(session, prompts, rollouts, detector)
    places, lengths = (
        [at for at in first if at is not None],
        [trace_end(session, one) or len(one.token_ids) for one in rollouts],
    )

    def average(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else nan

    return {
        "traces with a trigger": average([at is not None for at in first]),
        "traces with a cue": average([cued[one.id] is not None for one in rollouts]),
        "index of the first trigger": average(places),
        "similarity to a trigger": average([max(own, default=0.0) for own in near]),
        "tokens of a trace": average(lengths),
    }


def barred(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    triggers: Sequence[Trigger],
    sampling: Sampling,
    rounds: int = 3,
) -> list[Rollout]:
    """The same responses with sentences like a trigger barred: each is cut before the first one and goes on with another first
    token there, up to ``rounds`` times."""
    found = list(rollouts)
    for round_ in range(rounds):
        wanted = []
        for place, one in enumerate(found):
            near = nearest(trace_texts(session, one), triggers)
            if (
                at := next((at for at, value in enumerate(near) if value >= LIKE), None)
            ) is not None:
                start = trace_sentences(session, one)[at].token_start
                wanted.append(
                    (
                        place,
                        Prefix(prompts[one.prompt_id], one.token_ids[:start], one.token_ids[start]),
                    )
                )
        asked = [(start, BARRED + round_ * len(found) + place) for place, start in wanted]
        for (place, _), new in zip(
            wanted, draw_rollouts(session, asked, sampling, "barred"), strict=True
        ):
            found[place] = new
    return found


def changed(before: Verdicts, after: Verdicts) -> Counter[str]:
    """How many responses were ``fixed`` (unsafe, then safe), ``broken``, ``still unsafe`` or ``still safe``; the same draws in
    the same order on both sides, and both judged."""
    names = {
        (True, False): "fixed",
        (False, True): "broken",
        (True, True): "still unsafe",
        (False, False): "still safe",
    }
    pairs = [
        (a, b)
        for a, b in zip(before, after, strict=True)
        if a.label is not None and b.label is not None
    ]
    return Counter({name: 0 for name in names.values()}) + Counter(
        names[a.label == UNSAFE, b.label == UNSAFE] for a, b in pairs
    )


def by_category(
    prompts: Prompts, counts: Mapping[str, tuple[int, int]], least: int = 3
) -> dict[str, Interval]:
    """A rate by category of prompts, the most frequent first; categories of fewer than ``least`` prompts together as
    ``others``."""
    kinds = Counter(prompts[key].category or "none" for key in counts)
    own: dict[str, list[tuple[int, int]]] = {
        kind: [] for kind, n in kinds.most_common() if n >= least
    }
    for key, pair in counts.items():
        kind = prompts[key].category or "none"
        own.setdefault(kind if kind in own else "others", []).append(pair)
    return {kind: pooled_rate(pairs) for kind, pairs in own.items()}
