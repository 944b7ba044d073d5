"""Find the cues of real traces, and replace a sentence of a trace by another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ipo_lib.cues import UNREAD, CueDetector
from ipo_lib.intervention import cut_and_text
from ipo_lib.records import (
    BadInput,
    Intervention,
    Prompts,
    Rollout,
    Rollouts,
    as_rollouts,
    by_id,
    prompt_of,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages.drawing import Prefix, draw_rollouts
from ipo_lib.stages.session import FRESH, JUDGE_VERSION, WRITE_EVERY, Session
from ipo_lib.stages.traces import trace_sentences, trace_texts


@dataclass(frozen=True)
class CorrectionSettings:
    """How traces are gathered and corrected (Algorithm 1)."""

    draws: int = 8  # traces of each prompt
    rounds: int = 1  # N of Algorithm 1: replacements tried on a trace
    # When a corrected trace is kept: no-cue, where the detector finds no cue in it (the paper), or
    # judged-safe. A lexicon learnt from the judge's verdicts is no second opinion on them.
    accept: str = "no-cue"
    traces: int = 16  # traces of each label from which triggers are mined
    pool: int = 6  # triggers in use
    share: bool = False  # try all triggers on one trace of a prompt; the paper: each on a fresh one


class CuesByRollout(dict[str, "int | None"]):
    """The sentence index of every rollout's first cue, by rollout id; None: no cue was found.

    ``unread`` holds the rollouts of which the detector's answer could not be read. Their index is
    None, too, but it does not mean that there is no cue.
    """

    def __init__(self, indices: Mapping[str, int | None], unread: set[str]) -> None:
        super().__init__(indices)
        self.unread = unread


def find_cues(
    session: Session, prompts: Prompts, rollouts: Rollout | Rollouts, detector: CueDetector
) -> CuesByRollout:
    """The first compliance cue of every rollout.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: one trace or several.
        detector: is never the judge itself. What it finds is stored where ``detector.stored`` says
            so, as for a detector behind a server, which costs money.
    """
    rollouts_by_id = by_id(as_rollouts(rollouts))
    texts = {key: trace_texts(session, rollout) for key, rollout in rollouts_by_id.items()}
    if detector.stored:
        spec = {"detector": detector.fingerprint(), "opened": session.chat.opened}
        ledger = session.store.ledger("cues", JUDGE_VERSION, spec)
        missing = [rollouts_by_id[key] for key in ledger.missing(texts)]
        answers = detector.first_cues(prompts, missing, texts)
        ledger.collect(((key, {"sentence": index}) for key, index in answers), WRITE_EVERY)
        indices = {key: ledger[key]["sentence"] for key in texts}
    else:
        indices = dict(detector.first_cues(prompts, [*rollouts_by_id.values()], texts))
    unread = {key for key, index in indices.items() if index == UNREAD}
    return CuesByRollout({**indices, **dict.fromkeys(unread)}, unread)


@dataclass(frozen=True)
class Replacement:
    """One replacement to try: a text takes the place of a sentence of a trace."""

    rollout: Rollout
    sentence: int  # index of the sentence
    trigger_id: str  # names the text in the results
    text: str  # empty: nothing is put there, and the model draws anew
    round: int = 1
    draw: int = 0  # number of its first draw


def intervene(
    session: Session,
    prompts: Prompts,
    replacements: Sequence[Replacement],
    sampling: Sampling,
    draws: int = 1,
    first: int = 0,
    apart: bool = False,
) -> list[tuple[Intervention, Rollout]]:
    """Cut each trace before a sentence, put a text there and let the model continue.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        replacements: which text takes the place of which sentence of which trace.
        sampling: of the continuations.
        draws: results of each replacement.
        first: added to the number of every draw.
        apart: replacements that come to the same prefix get draws of their own. Else they share
            their draws.
    """
    wanted, cuts = [], []
    before = Counter[Prefix]()  # how often a prefix came before
    for replacement in replacements:
        rollout = replacement.rollout
        spans = trace_sentences(session, rollout)
        if not 0 <= replacement.sentence < len(spans):
            raise BadInput(
                f"replacement: sentence {replacement.sentence} of rollout {rollout.id}, which has "
                f"{len(spans)}; give an index from 0 to {len(spans) - 1}"
            )
        is_last = replacement.sentence == len(spans) - 1
        span = spans[replacement.sentence]
        cut, text = cut_and_text(rollout, span, replacement.text, last=is_last)
        prefix_ids = rollout.token_ids[:cut] + session.chat.encode(text)
        prefix = Prefix(prompt_of(rollout, prompts), prefix_ids)
        number = first + replacement.draw
        if apart:
            number += draws * before[prefix]
            before[prefix] += 1
        if not prefix_ids:
            number += FRESH  # else these would be the prompt's own rollouts
        wanted += [(prefix, draw) for draw in range(number, number + draws)]
        cuts += [(replacement, cut)] * draws
    drawn = draw_rollouts(session, wanted, sampling, "interventions")
    results = []
    for (tried, cut), result in zip(cuts, drawn, strict=True):
        change = Intervention(tried.rollout.id, cut, tried.trigger_id, result.id, tried.round)
        results.append((change, result))
    return results
