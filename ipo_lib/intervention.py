"""Where a trace leans to complying, what takes that place, and the controls: the pure half of Algorithm 1. A *cue
detector* finds the sentence to replace; the *trigger pool* is mined at safe turning points (Eq. 2), not typed;
``replace`` makes of a sentence a cut in tokens and the text to put there. The loop, which samples, is in ``stages``."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ipo_lib.records import SAFE, UNSAFE, BadInput, Rollout, Sentence, Verdict, digest

NO_CUE, JUDGED_SAFE = "no-cue", "judged-safe"


def cut_and_text(
    rollout: Rollout, sentence: Sentence, trigger_text: str, last: bool = False
) -> tuple[int, str]:
    """The cut (h of Eq. 4) and the replacement: continue from ``token_ids[:cut]`` + encode(replacement), nothing else.
    The trigger takes over the whitespace around what it replaces; not that behind the ``last`` sentence of a trace, which
    would make any text the end of the trace. Controls: an empty text is "nothing", a fresh sample
    from the cut; a cue at ``TurningPoint.sentence`` of a safe trace is the reverse."""
    old = rollout.text[sentence.char_start : sentence.char_end]
    lead, _, trail = old.partition(old.strip()) if old.strip() else (old, "", "")
    return (
        sentence.token_start,
        f"{lead}{trigger_text.strip()}{'' if last else trail}" if trigger_text.strip() else "",
    )


def nearest_neutral(like: str, sentences: Sequence[str]) -> str:
    """Control: the neutral sentence nearest in characters to ``like``; BadInput when there is none to take."""
    if not sentences:
        raise BadInput("neutral control: the list of neutral sentences is empty; give at least one")
    return min(sentences, key=lambda s: (abs(len(s.strip()) - len(like.strip())), s))


def random_earlier_sentence(rollout: Rollout, cue: int, seed: int, lowest: int = 0) -> int | None:
    """Control: a random sentence in [``lowest``, ``cue``), fixed by (seed, rollout id); None when there is none."""
    return (
        random.Random(digest([seed, rollout.id])).randrange(lowest, cue) if cue > lowest else None
    )


def is_accepted(option: str, cue: int | None, verdict: Verdict | None) -> bool | None:
    """Whether a corrected trace is kept: ``no-cue`` (the paper) or ``judged-safe``; None when its judge cannot tell."""
    if option not in (NO_CUE, JUDGED_SAFE):
        raise BadInput(f"acceptance is {option!r}; give {NO_CUE!r} or {JUDGED_SAFE!r}")
    return (
        cue is None
        if option == NO_CUE
        else {SAFE: True, UNSAFE: False}.get((verdict and verdict.label) or "")
    )
