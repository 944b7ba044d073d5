"""A rollout's trace: its sentences and its end; and which rollouts to look at."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ipo_lib.chat import split_response
from ipo_lib.frame import count_labels
from ipo_lib.records import SAFE, UNSAFE, BadInput, Labels, Rollout, Rollouts, Sentence, Verdicts
from ipo_lib.segmentation import locate_sentences
from ipo_lib.stages.session import Session

Item = TypeVar("Item")


def trace_sentences(session: Session, rollout: Rollout) -> list[Sentence]:
    """The sentences of a rollout's trace; none where it has no trace."""
    span = split_response(rollout.text, session.chat.opened).reasoning
    if span is None:
        return []
    return locate_sentences(rollout.text, session.chat.offsets(rollout.token_ids), *span)


def trace_texts(session: Session, rollout: Rollout) -> list[str]:
    """The text of each sentence of a rollout's trace."""
    spans = trace_sentences(session, rollout)
    return [rollout.text[span.char_start : span.char_end] for span in spans]


def trace_end(session: Session, rollout: Rollout) -> int | None:
    """Number of response tokens through the end of ``</think>``; None where it never comes."""
    for end in range(1, len(rollout.token_ids) + 1):
        if session.chat.closes(rollout.token_ids[:end]):
            return end
    return None


def trace_length(spans: Sequence[Sentence]) -> int:
    """Tokens of a trace up to the end of its last sentence."""
    return spans[-1].token_end if spans else 0


def mixed_prompts(rollouts: Rollouts, verdicts: Verdicts) -> list[str]:
    """Ids of the prompts with safe and unsafe rollouts, on which the paper measures CSR."""
    counts = count_labels(rollouts, verdicts)
    return [prompt for prompt, (unsafe, judged) in counts.items() if 0 < unsafe < judged]


def first_of_each_prompt(rollouts: Rollouts) -> list[Rollout]:
    """The first rollout of every prompt, in order."""
    first: dict[str, Rollout] = {}
    for rollout in rollouts:
        first.setdefault(rollout.prompt_id, rollout)
    return list(first.values())


def random_subset(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """``count`` rollouts (or other items) at random, all where there are fewer, in their order."""
    size = min(count, len(items))
    indices = random.Random(seed).sample(range(len(items)), size)
    return [items[index] for index in sorted(indices)]


def count_label(verdicts: Verdicts, label: str = UNSAFE) -> tuple[int, int]:
    """(k, n): how many of the n verdicts with a label have this one."""
    labels = [verdict.label for verdict in verdicts if verdict.label is not None]
    return labels.count(label), len(labels)


def example_pair(
    rollouts: Rollouts,
    labels: Labels,
    cues: Mapping[str, int | None],
    true_cues: Mapping[str, int | None] | None = None,
) -> tuple[Rollout, Rollout]:
    """An unsafe rollout with a cue and a safe one, of one prompt where possible: to look at.

    Args:
        rollouts: traces.
        labels: theirs, by rollout id.
        cues: index of the first cue that a detector found, by rollout id.
        true_cues: the same by a detector that is never wrong. Where it agrees on some rollout, such
            a rollout is taken.

    Raises:
        BadInput: there is no such pair.
    """
    unsafe = [r for r in rollouts if labels[r.id] == UNSAFE and cues[r.id] is not None]
    confirmed = [r for r in unsafe if true_cues and true_cues[r.id] == cues[r.id]]
    unsafe = confirmed or unsafe
    safe = [r for r in rollouts if labels[r.id] == SAFE]
    if not unsafe or not safe:
        raise BadInput(
            f"no example among {len(rollouts)} rollouts: no unsafe trace with a cue beside a safe "
            "one; raise draws"
        )
    for bad in unsafe:
        for good in safe:
            if bad.prompt_id == good.prompt_id:
                return bad, good
    return unsafe[0], safe[0]
