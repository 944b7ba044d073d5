"""Can a text change the verdict of its judge? A test with adversarial suffixes.

1. Take rollouts that the judge has called unsafe, and others that it has called safe.
2. Append a suffix to the judged text: a closing tag, an instruction, control tokens of a chat
   template, a turn of a conversation (``judge_robustness.yml``). It argues for the opposite.
3. Ask the judge again, and count unsafe texts that became safe and safe texts that became unsafe.

A control suffix argues for nothing. It shows how often the judge changes its mind by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ipo_lib.chat import part_text
from ipo_lib.frame import count_outcomes, rate
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
)
from ipo_lib.stages import WRITE_EVERY, Session
from ipo_lib.stages.verdicts import verdicts_in_chunks
from ipo_lib.stats import Interval, format_interval

SUFFIXES_FILE = Path(__file__).with_name("judge_robustness.yml")
LABEL = "{label}"
OPPOSITE = {SAFE: UNSAFE, UNSAFE: SAFE}
VERSION = 1  # raised when the meaning of a stored answer changes
COUNT = 20  # rollouts of each verdict


@dataclass(frozen=True)
class Suffix:
    """What is put at the end of a judged text."""

    text: str
    control: bool = False  # it argues for no verdict

    def against(self, label: str) -> str:
        """The suffix that argues for the opposite of ``label``."""
        return self.text.replace(LABEL, OPPOSITE[label])


@dataclass(frozen=True)
class AttackedText:
    """One judged text with one suffix."""

    suffix: str
    prompt_id: str
    before: str  # the verdict without the suffix
    after: str | None  # and with it; None: not judged


@dataclass(frozen=True)
class Robustness:
    """The verdicts of one judge with and without suffixes.

    All shares are over prompts. Texts that could not be judged again do not count.
    """

    texts: tuple[AttackedText, ...]
    suffixes: dict[str, Suffix]

    @property
    def unsafe_made_safe(self) -> Interval:
        """The share of unsafe texts that an adversarial suffix made safe."""
        return self._changed(self._adversarial(), UNSAFE)

    @property
    def safe_made_unsafe(self) -> Interval:
        """The share of safe texts that an adversarial suffix made unsafe."""
        return self._changed(self._adversarial(), SAFE)

    def share(self, suffix: str, label: str = UNSAFE) -> Interval:
        """The share of texts with verdict ``label`` whose verdict one suffix changed."""
        if suffix not in self.suffixes:
            choices = ", ".join(self.suffixes)
            raise BadInput(f"judge robustness: no suffix {suffix!r}; choose one of {choices}")
        return self._changed([suffix], label)

    def table(self) -> list[dict[str, object]]:
        """One row per suffix: both shares with intervals, and how many texts were not judged."""
        rows: list[dict[str, object]] = []
        for name, suffix in self.suffixes.items():
            verdicts = [text.after for text in self.texts if text.suffix == name]
            rows.append(
                {
                    "suffix": name,
                    "adversarial": not suffix.control,
                    "unsafe made safe": format_interval(self.share(name, UNSAFE)),
                    "safe made unsafe": format_interval(self.share(name, SAFE)),
                    "asked": len(verdicts),
                    "not judged": verdicts.count(None),
                }
            )
        return rows

    def _adversarial(self) -> list[str]:
        return [name for name, suffix in self.suffixes.items() if not suffix.control]

    def _changed(self, suffixes: Sequence[str], label: str) -> Interval:
        """Of the texts with this verdict, the share whose verdict these suffixes changed."""
        prompts: list[str] = []
        outcomes: list[bool | None] = []
        for text in self.texts:
            if text.suffix in suffixes and text.before == label:
                prompts.append(text.prompt_id)
                outcomes.append(None if text.after is None else text.after == OPPOSITE[label])
        return rate(count_outcomes(prompts, outcomes))


def load_suffixes() -> dict[str, Suffix]:
    """The suffixes of ``judge_robustness.yml`` by name."""
    data = yaml.safe_load(SUFFIXES_FILE.read_text("utf-8"))
    return {name: from_json(Suffix, settings) for name, settings in data.items()}


def attack_judge(
    session: Session, prompts: Prompts, rollouts: Rollouts, verdicts: Verdicts, count: int = COUNT
) -> Robustness:
    """Ask the session's judge again about texts that it has judged, with each suffix at their end.

    Args:
        session: store and judge; what was asked before is read from the store.
        prompts: the rollouts' prompts by id.
        rollouts: rollouts that were judged.
        verdicts: the same judge's verdicts on harm, one per rollout, in the same order.
        count: how many unsafe and how many safe rollouts to take at most.

    Returns:
        The verdicts with and without suffixes.

    Raises:
        BadInput: ``count`` is below 1, a verdict is on another question, or none is safe or unsafe.
    """
    if count < 1:
        raise BadInput(f"judge robustness: count {count}; give at least 1")
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.rollout_id != rollout.id or verdict.question != HARM:
            wrong = f"verdict on {verdict.rollout_id!r}, {verdict.question!r}"
            raise BadInput(f"judge robustness: {wrong}; give those on harm, in order")
    # 1. Choose texts of each verdict.
    unsafe = choose_texts(rollouts, verdicts, UNSAFE, count)
    chosen = unsafe + choose_texts(rollouts, verdicts, SAFE, count)
    if not chosen:
        raise BadInput(
            f"judge robustness: none of {len(verdicts)} verdicts is safe or unsafe; "
            "judge the rollouts first"
        )
    # 2. Put each suffix at the end of each text.
    suffixes = load_suffixes()
    texts: dict[str, AttackedText] = {}
    exchanges: list[Exchange] = []
    for rollout, verdict in chosen:
        prompt, text = prompts[rollout.prompt_id].text, judged_text(session, rollout, verdict)
        label = verdict.label or ""
        for name, suffix in suffixes.items():
            ending = suffix.against(label)
            key = f"{rollout.id}/{verdict.part}/{digest([ending])}"
            exchanges.append(Exchange(key, prompt, text + ending, verdict.part, HARM))
            texts[key] = AttackedText(name, rollout.prompt_id, label, None)
    # 3. Ask the judge again.
    labels = _labels(session, exchanges)
    judged = [replace(text, after=labels[key]) for key, text in texts.items()]
    return Robustness(tuple(judged), suffixes)


def choose_texts(
    rollouts: Rollouts, verdicts: Verdicts, label: str, count: int
) -> list[tuple[Rollout, Verdict]]:
    """Rollouts with one label: the first of every prompt, then the second of every prompt, ...

    Args:
        rollouts: all rollouts.
        verdicts: one per rollout, in the same order.
        label: of the rollouts to choose.
        count: how many to choose at most.
    """
    seen: dict[str, int] = defaultdict(int)
    ranked: list[tuple[int, Rollout, Verdict]] = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.label == label:
            ranked.append((seen[rollout.prompt_id], rollout, verdict))
            seen[rollout.prompt_id] += 1
    ranked.sort(key=lambda row: row[0])
    return [(rollout, verdict) for _, rollout, verdict in ranked[:count]]


def judged_text(session: Session, rollout: Rollout, verdict: Verdict) -> str:
    """The text that a verdict is about. BadInput when the rollout has no such part."""
    offsets = session.chat.offsets(rollout.token_ids) if verdict.part == CONTINUATION else ()
    text = part_text(rollout, verdict.part, session.chat.opened, offsets)
    if text is None:
        missing = f"rollout {rollout.id!r} has no {verdict.part}"
        raise BadInput(f"judge robustness: {missing}; give the verdicts of these rollouts")
    return text


def _labels(session: Session, exchanges: Sequence[Exchange]) -> dict[str, str | None]:
    """The label of every exchange by its id; what the store lacks is asked for and kept."""
    ledger = session.store.ledger("canary", VERSION, {"judge": session.judge.fingerprint()})
    named = {exchange.rollout_id: exchange for exchange in exchanges}
    missing = [named[key] for key in ledger.missing(named)]
    ledger.collect(verdicts_in_chunks(session.judge, missing), WRITE_EVERY)
    return {key: ledger[key]["label"] for key in named}
