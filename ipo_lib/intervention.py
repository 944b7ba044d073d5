"""Corrective intervention: put a safety trigger in the place of a compliance cue.

Algorithm 1 for one trace with a cue:

1. A cue detector finds the first compliance cue (``ipo_lib.cues``).
2. The trace is cut before that sentence, and a safety trigger (``ipo_lib.triggers``) is put there:
   ``cut_and_text``.
3. The model continues after the trigger.
4. If the new trace has a cue again, repeat from step 1, at most N times; else it is accepted:
   ``is_accepted``.

Controls replace the cue by a neutral sentence (``nearest_neutral``) or replace another sentence
(``random_earlier_sentence``). Nothing here samples: ``ipo_lib.stages.intervene`` does one
replacement, and ``ipo_lib.pipeline.correct`` runs the loop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ipo_lib.records import SAFE, UNSAFE, BadInput, Rollout, Sentence, Verdict, digest

NO_CUE, JUDGED_SAFE = "no-cue", "judged-safe"


def cut_and_text(
    rollout: Rollout, sentence: Sentence, trigger_text: str, last: bool = False
) -> tuple[int, str]:
    """Where to cut the trace (h of Eq. 4), and the text to put there.

    The model continues from ``token_ids[:cut]`` plus the tokens of the text. The trigger takes over
    the whitespace around the sentence that it replaces.

    Args:
        rollout: the trace to correct.
        sentence: the one to replace: a cue, or in the reverse control that at a safe turning point.
        trigger_text: the new sentence; empty: nothing is put there, the control of a fresh sample.
        last: the sentence ends the trace. Then the whitespace behind it is left out: it would make
            any text the end of the trace.
    """
    if not trigger_text.strip():
        return sentence.token_start, ""
    old = rollout.text[sentence.char_start : sentence.char_end]
    before, after = old, ""
    if old.strip():
        before, _, after = old.partition(old.strip())
    if last:
        after = ""
    return sentence.token_start, f"{before}{trigger_text.strip()}{after}"


def nearest_neutral(like: str, sentences: Sequence[str]) -> str:
    """Control: the neutral sentence whose length in characters is nearest to that of ``like``."""
    if not sentences:
        raise BadInput("neutral control: the list of neutral sentences is empty; give at least one")
    length = len(like.strip())
    return min(sentences, key=lambda sentence: (abs(len(sentence.strip()) - length), sentence))


def random_earlier_sentence(rollout: Rollout, cue: int, seed: int, lowest: int = 0) -> int | None:
    """Control: index of a random sentence before the cue; None if there is none.

    Args:
        rollout: the draw depends on its id and on the seed alone.
        cue: index of the cue.
        seed: of the draw.
        lowest: index of the first sentence that may be drawn.
    """
    if cue <= lowest:
        return None
    return random.Random(digest([seed, rollout.id])).randrange(lowest, cue)


def is_accepted(option: str, cue: int | None, verdict: Verdict | None) -> bool | None:
    """Whether a corrected trace is kept.

    Args:
        option: ``no-cue``, as in the paper: it has no cue; ``judged-safe``: its judge says safe.
        cue: index of the first cue in the corrected trace; None: there is none.
        verdict: on the corrected trace.

    Returns:
        None if the option asks the judge, and the judge cannot tell.
    """
    if option not in (NO_CUE, JUDGED_SAFE):
        raise BadInput(f"acceptance is {option!r}; give {NO_CUE!r} or {JUDGED_SAFE!r}")
    if option == NO_CUE:
        return cue is None
    if verdict is None or verdict.label not in (SAFE, UNSAFE):
        return None
    return verdict.label == SAFE
