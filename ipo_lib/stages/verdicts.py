"""Judging, through the store: a verdict on a part of a rollout is asked for once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ipo_lib.chat import is_cut_off, part_text
from ipo_lib.judging import LABELS, Exchange, Judge
from ipo_lib.records import (
    CONTINUATION,
    TRACE,
    UNSAFE,
    BadInput,
    Prompt,
    Prompts,
    Rollout,
    Rollouts,
    Verdict,
    as_prompts,
    as_rollouts,
    by_id,
    from_json,
    prompt_of,
    to_json,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages.drawing import Prefix, sample
from ipo_lib.stages.session import JUDGE_VERSION, WRITE_EVERY, Session
from ipo_lib.store import Ledger

# How the reason begins why a server gave no answer.
UNANSWERED = ("declined", "cut off (", "empty")


@dataclass(frozen=True, repr=False)
class JudgedRollouts:
    """Rollouts of some prompts with the verdicts on their traces, in one order."""

    prompts: dict[str, Prompt]  # by id
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    def __repr__(self) -> str:
        """In one line: the traces would fill pages."""
        counts = Counter(verdict.label or "not judged" for verdict in self.verdicts)
        listed = ", ".join(f"{count} {label}" for label, count in counts.items())
        return f"JudgedRollouts({len(self.rollouts)} of {len(self.prompts)} prompts: {listed})"

    @property
    def labels(self) -> dict[str, str | None]:
        """The label of every rollout's trace, by rollout id."""
        return {verdict.rollout_id: verdict.label for verdict in self.verdicts}

    @property
    def coverage(self) -> float:
        """The share of traces that the judge could judge."""
        judged = sum(verdict.label is not None for verdict in self.verdicts)
        return judged / max(len(self.verdicts), 1)

    def labelled(self, label: str) -> list[Rollout]:
        """The rollouts whose trace has this label."""
        labels = self.labels
        return [rollout for rollout in self.rollouts if labels[rollout.id] == label]


def sample_and_judge(
    session: Session, prompts: Prompt | str | Sequence[Prompt | str], sampling: Sampling, draws: int
) -> JudgedRollouts:
    """Sample every prompt and judge the traces.

    Args:
        session: store, model and judge.
        prompts: one or several, each a prompt or its text.
        sampling: temperature, top-p and length.
        draws: rollouts of each prompt.
    """
    prompts_by_id = by_id(as_prompts(prompts))
    starts = [Prefix(prompt) for prompt in prompts_by_id.values()]
    rollouts = sample(session, starts, sampling, draws)
    return JudgedRollouts(prompts_by_id, rollouts, judge(session, prompts_by_id, rollouts))


def judge(
    session: Session,
    prompts: Prompts,
    rollouts: Rollout | Rollouts,
    part: str = TRACE,
    question: str = "harm",
) -> list[Verdict]:
    """The verdict on one part of every rollout, in order.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: what is judged, one or several.
        part: trace, answer, trace+answer or continuation.
        question: harm, refusal or correct.

    Returns:
        One verdict per rollout. A part that was cut off has the label None unless it is unsafe
        already, since its rest is not known; the store keeps what the judge said of it.
    """
    ledger = _ledger(session, part, question)
    rollouts = as_rollouts(rollouts)
    rollouts_by_id = by_id(rollouts)
    exchanges = []
    for key in ledger.missing(rollouts_by_id):
        rollout = rollouts_by_id[key]
        offsets = session.chat.offsets(rollout.token_ids) if part == CONTINUATION else ()
        text = part_text(rollout, part, session.chat.opened, offsets)
        exchanges.append(Exchange(key, prompt_of(rollout, prompts).text, text, part, question))
    ledger.collect(verdicts_in_chunks(session.judge, exchanges), WRITE_EVERY)
    warn_of_unanswered([ledger[exchange.rollout_id] for exchange in exchanges])
    return [_of_a_whole_part(session, rollout, ledger) for rollout in rollouts]


def stored_labels(
    session: Session, rollouts: Rollouts, part: str = TRACE, question: str = "harm"
) -> dict[str, str | None]:
    """The labels that the store holds, by rollout id, as ``judge`` would give them."""
    ledger = _ledger(session, part, question)
    judged = [rollout for rollout in rollouts if rollout.id in ledger]
    return {rollout.id: _of_a_whole_part(session, rollout, ledger).label for rollout in judged}


def _ledger(session: Session, part: str, question: str) -> Ledger:
    """The verdicts of the session's judge on a part."""
    spec = {
        "judge": session.judge.fingerprint(),
        "part": part,
        "question": question,
        "opened": session.chat.opened,
    }
    return session.store.ledger("verdicts", JUDGE_VERSION, spec)


def verdicts_in_chunks(
    judge: Judge, exchanges: Sequence[Exchange]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Verdicts to store by rollout id, asked for as many at a time as are stored at once.

    Raises:
        BadInput: a label that the question does not have, or no verdict on an exchange.
    """
    for start in range(0, len(exchanges), WRITE_EVERY):
        chunk = exchanges[start : start + WRITE_EVERY]
        left = {exchange.rollout_id for exchange in chunk}
        for verdict in judge.judge(chunk):
            allowed = LABELS.get(verdict.question)
            if verdict.label is not None and allowed and verdict.label not in allowed:
                raise BadInput(
                    f"judge {verdict.judge}: label {verdict.label!r} on the question "
                    f"{verdict.question!r}; return {', '.join(allowed)} or None"
                )
            left.discard(verdict.rollout_id)
            yield verdict.rollout_id, to_json(verdict)
        if left:
            raise BadInput(
                f"judge: {len(left)} of {len(chunk)} exchanges got no verdict; return one for each"
            )


def warn_of_unanswered(records: Sequence[Mapping[str, Any]]) -> None:
    """Warn of exchanges that a server declined, cut off or left empty, counted by reason."""
    reasons = Counter(
        record["raw"]
        for record in records
        if record["label"] is None and record["raw"].startswith(UNANSWERED)
    )
    if reasons:
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        warnings.warn(
            f"{reasons.total()} of {len(records)} exchanges are not judged: {counted}", stacklevel=3
        )


def _of_a_whole_part(session: Session, rollout: Rollout, ledger: Ledger) -> Verdict:
    """The stored verdict as it counts: not safe where the part was cut off."""
    verdict = from_json(Verdict, ledger[rollout.id])
    if verdict.label in (None, UNSAFE):
        return verdict
    if not is_cut_off(rollout, verdict.part, session.chat.opened):
        return verdict
    return replace(verdict, label=None, p=None, raw=f"cut off; the judge said {verdict.label}")
