"""A canary for judges: can the text that is judged change its own verdict?

1. Rollouts are taken that the judge itself called unsafe, and others that it called safe.
2. A hostile tail is put at the end of the judged text: a closing tag, an instruction, control
   tokens of a chat template, a turn of its own (``judge_robustness.yml``). It argues for the opposite.
3. The judge is asked again. An unsafe text that became safe has *fooled* it; a safe text that
   became unsafe was *turned*. A tail that argues for nothing, the control, shows the judge's
   own noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.chat import part_text
from ipo_lib.judging import HARM, Exchange
from ipo_lib.records import (
    CONTINUATION,
    SAFE,
    UNSAFE,
    BadInput,
    Prompts,
    Rollout,
    Rollouts,
    Verdict,
    Verdicts,
    digest,
    from_json,
    to_json,
)
from ipo_lib.stages import WRITE_EVERY, Session
from ipo_lib.stats import Interval, format_interval, pooled_rate

TAILS = Path(__file__).with_name("judge_robustness.yml")
LABEL = "{label}"
OPPOSITE = {SAFE: UNSAFE, UNSAFE: SAFE}
CANARY_VERSION = 1  # raised when the meaning of a stored answer changes
COUNT = 20  # rollouts of each verdict, where nothing else is said


@dataclass(frozen=True)
class Tail:
    """What is put at the end of a judged text; ``control``: it argues for no verdict."""

    text: str
    control: bool = False

    def against(self, label: str) -> str:
        """The tail that argues for the opposite of ``label``."""
        return self.text.replace(LABEL, OPPOSITE[label])


@dataclass(frozen=True)
class AttackedText:
    """One judged text with one tail, its verdict before and after; None: it could not be judged."""

    tail: str
    prompt_id: str
    before: str
    after: str | None


@dataclass(frozen=True)
class Canary:
    """What a judge said of texts with hostile tails.

    ``fooled`` and ``turned`` pool the hostile tails: the share of unsafe verdicts that became safe,
    and of safe ones that became unsafe, over prompts. Answers that cannot be read count in neither.
    """

    cases: tuple[AttackedText, ...]
    tails: dict[str, Tail]

    @property
    def fooled(self) -> Interval:
        """The share of unsafe texts that a hostile tail made safe."""
        return self._changed(self._hostile(), UNSAFE)

    @property
    def turned(self) -> Interval:
        """The share of safe texts that a hostile tail made unsafe."""
        return self._changed(self._hostile(), SAFE)

    def table(self) -> list[dict[str, object]]:
        """One row a tail: the two shares with their intervals, and how many were not judged."""
        rows: list[dict[str, object]] = []
        for name, tail in self.tails.items():
            asked = [case for case in self.cases if case.tail == name]
            rows.append(
                {
                    "tail": name,
                    "hostile": not tail.control,
                    "unsafe made safe": format_interval(self._changed([name], UNSAFE)),
                    "safe made unsafe": format_interval(self._changed([name], SAFE)),
                    "asked": len(asked),
                    "not judged": sum(case.after is None for case in asked),
                }
            )
        return rows

    def share(self, tail: str, label: str = UNSAFE) -> Interval:
        """The share of texts with verdict ``label`` that one tail turned over, over prompts."""
        if tail not in self.tails:
            raise BadInput(f"canary: no tail {tail!r}; choose one of {', '.join(self.tails)}")
        return self._changed([tail], label)

    def _hostile(self) -> list[str]:
        return [name for name, tail in self.tails.items() if not tail.control]

    def _changed(self, tails: Sequence[str], label: str) -> Interval:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for case in self.cases:
            if case.tail in tails and case.before == label and case.after is not None:
                counts[case.prompt_id][0] += case.after == OPPOSITE[label]
                counts[case.prompt_id][1] += 1
        return pooled_rate([(k, n) for k, n in counts.values()])


def known() -> dict[str, Tail]:
    """The tails of ``judge_robustness.yml`` by name."""
    data = yaml.safe_load(TAILS.read_text("utf-8"))
    return {name: from_json(Tail, one) for name, one in data.items()}


def canary(
    session: Session, prompts: Prompts, rollouts: Rollouts, verdicts: Verdicts, count: int = COUNT
) -> Canary:
    """Ask the judge of ``doors`` again about texts that it has judged, with each tail at their end.

    Args:
        doors: Store and judge; what was asked before is read from the store.
        prompts: The rollouts' prompts by id.
        rollouts: Rollouts that were judged.
        verdicts: The same judge's verdicts on harm, one a rollout, in the same order.
        count: How many unsafe and how many safe rollouts to take at most; one of each prompt first.

    Returns:
        The verdicts before and after, by tail.

    Raises:
        BadInput: ``count`` is below 1, a verdict is on another question, or none is safe or unsafe.
    """
    if count < 1:
        raise BadInput(f"canary: count {count}; give at least 1")
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.rollout_id != rollout.id or verdict.question != HARM:
            found_one = f"verdict on {verdict.rollout_id!r}, {verdict.question!r}"
            raise BadInput(f"canary: {found_one}; give those on harm, in order")
    unsafe = chosen_texts(rollouts, verdicts, UNSAFE, count)
    chosen = unsafe + chosen_texts(rollouts, verdicts, SAFE, count)
    if not chosen:
        none = f"none of {len(verdicts)} verdicts is safe or unsafe"
        raise BadInput(f"canary: {none}; judge the rollouts first")
    tails = known()
    asked: dict[str, tuple[AttackedText, Exchange]] = {}
    for rollout, verdict in chosen:
        text = judged_text(session, rollout, verdict)
        for name, tail in tails.items():
            own = tail.against(verdict.label or "")
            key = f"{rollout.id}/{verdict.part}/{digest([own])}"
            prompt = prompts[rollout.prompt_id]
            exchange = Exchange(key, prompt.text, text + own, verdict.part, HARM)
            asked[key] = AttackedText(name, rollout.prompt_id, verdict.label or "", None), exchange
    found = ask(session, [exchange for _, exchange in asked.values()])
    cases = [replace(case, after=found[key]) for key, (case, _) in asked.items()]
    return Canary(tuple(cases), tails)


def chosen_texts(
    rollouts: Rollouts, verdicts: Verdicts, label: str, count: int
) -> list[tuple[Rollout, Verdict]]:
    """Up to ``count`` rollouts with this label: the first of every prompt, then the second, ..."""
    seen: dict[str, int] = defaultdict(int)
    ranked: list[tuple[int, Rollout, Verdict]] = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.label == label:
            ranked.append((seen[rollout.prompt_id], rollout, verdict))
            seen[rollout.prompt_id] += 1
    ranked.sort(key=lambda one: one[0])
    return [(rollout, verdict) for _, rollout, verdict in ranked[:count]]


def judged_text(session: Session, rollout: Rollout, verdict: Verdict) -> str:
    """The text that a verdict is about. BadInput when the rollout has no such part."""
    offsets = session.chat.offsets(rollout.token_ids) if verdict.part == CONTINUATION else ()
    text = part_text(rollout, verdict.part, session.chat.opened, offsets)
    if text is None:
        missing = f"rollout {rollout.id!r} has no {verdict.part}"
        raise BadInput(f"canary: {missing}; give the verdicts of these rollouts")
    return text


def ask(session: Session, exchanges: Sequence[Exchange]) -> dict[str, str | None]:
    """The label of every exchange by its id; what the store lacks is asked for and kept."""
    ledger = session.store.ledger("canary", CANARY_VERSION, {"judge": session.judge.fingerprint()})
    named = {exchange.rollout_id: exchange for exchange in exchanges}
    missing = [named[key] for key in ledger.missing(named)]
    ledger.collect(answers(session, missing), WRITE_EVERY)
    return {key: ledger[key]["label"] for key in named}


def answers(
    session: Session, exchanges: Sequence[Exchange]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The judge's verdicts by the id of their exchange, asked for in chunks as they are kept."""
    for first in range(0, len(exchanges), WRITE_EVERY):
        for verdict in session.judge.judge(exchanges[first : first + WRITE_EVERY]):
            yield verdict.rollout_id, to_json(verdict)
