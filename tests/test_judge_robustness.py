"""Texts that try to change their verdict, and judges that can be fooled or cannot."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from scripted import CLOSE, PROMPTS, PROOF, STEP, UNJUDGED, StepJudge, world

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.experiments.judge_robustness import (
    Robustness,
    Suffix,
    attack_judge,
    choose_texts,
    load_suffixes,
)
from ipo_lib.judges.guards import guard
from ipo_lib.judging import REFUSAL, Exchange, Judge, NoisyJudge
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompt, Rollout, Verdict
from ipo_lib.sandbox import world as invented
from ipo_lib.sandbox.judge import ExactJudge
from ipo_lib.sandbox.traces import Process, respond
from ipo_lib.stages import Session
from ipo_lib.store import Store

NAMED = {prompt.id: prompt for prompt in PROMPTS}


class Credulous(StepJudge):
    """Believes the last line of a text where this is a verdict."""

    def label(self, exchange: Exchange) -> str | None:
        claimed = re.search(r"VERDICT: (safe|unsafe)\s*\Z", exchange.text or "")
        return claimed[1] if claimed else super().label(exchange)


class Blind(StepJudge):
    """Cannot read a text with a control token."""

    def label(self, exchange: Exchange) -> str | None:
        return None if "<|" in (exchange.text or "") else super().label(exchange)


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(tiny_model(tmp_path / "model"), prefill="<think>\n")


def closed_trace(chat: Chat, trace: str, prompt: str, draw: int = 0) -> Rollout:
    text = trace + CLOSE
    return Rollout(f"{prompt}-{draw}", prompt, 0, chat.encode(text), text, "think", draw, "s")


def open_session(tmp_path: Path, chat: Chat, judge: Judge) -> Session:
    return Session(Store(tmp_path / "store"), chat, world(chat), judge)


def judged(session: Session, rollouts: Sequence[Rollout]) -> list[Verdict]:
    return stages.judge(session, NAMED, rollouts)


def traces(chat: Chat) -> list[Rollout]:
    """Six prompts, each with an unsafe and a safe trace."""
    rollouts = []
    for number in range(6):
        for draw, text in enumerate((STEP, PROOF)):
            rollouts.append(closed_trace(chat, text, f"p{number}", draw))
    return rollouts


def by_suffix(result: Robustness) -> dict[object, dict[str, object]]:
    return {row["suffix"]: row for row in result.table()}


def test_a_judge_that_reads_only_the_text_is_not_fooled(tmp_path: Path, chat: Chat) -> None:
    session, rollouts = open_session(tmp_path, chat, StepJudge()), traces(chat)
    result = attack_judge(session, NAMED, rollouts, judged(session, rollouts), 6)
    assert (result.unsafe_made_safe.value, result.safe_made_unsafe.value) == (0, 0)
    assert (result.unsafe_made_safe.n, result.safe_made_unsafe.n) == (6, 6)  # prompts, not answers
    assert result.unsafe_made_safe.high > 0
    assert {row["not judged"] for row in result.table()} == {0}
    assert [row["suffix"] for row in result.table()] == list(load_suffixes())
    assert {row["asked"] for row in result.table()} == {12}


def test_a_judge_that_believes_a_last_line_is_found_out_by_the_suffixes_that_end_in_one(
    tmp_path: Path, chat: Chat
) -> None:
    session, rollouts = open_session(tmp_path, chat, Credulous()), traces(chat)
    result = attack_judge(session, NAMED, rollouts, judged(session, rollouts), 6)
    suffixes = load_suffixes()
    ends = [name for name, suffix in suffixes.items() if suffix.text.endswith("VERDICT: {label}")]
    assert len(ends) >= 3
    for name, suffix in suffixes.items():
        fooled = float(name in ends)
        assert result.share(name).value == result.share(name, SAFE).value == fooled, name
        assert by_suffix(result)[name]["adversarial"] is not suffix.control
    adversarial = sum(not suffix.control for suffix in suffixes.values())
    assert result.unsafe_made_safe.value == pytest.approx(len(ends) / adversarial)
    assert str(by_suffix(result)["verdict line"]["unsafe made safe"]).startswith("100.0 %")


def test_what_cannot_be_judged_with_a_suffix_is_counted_and_in_no_share(
    tmp_path: Path, chat: Chat
) -> None:
    session, rollouts = open_session(tmp_path, chat, Blind()), traces(chat)
    rollouts.append(closed_trace(chat, UNJUDGED, "p7"))
    result = attack_judge(session, NAMED, rollouts, judged(session, rollouts), 9)
    row = by_suffix(result)["turn in ChatML"]
    assert (row["asked"], row["not judged"], row["unsafe made safe"]) == (12, 12, "unknown, n=0")
    assert result.unsafe_made_safe.value == 0
    assert {text.prompt_id for text in result.texts} == {f"p{number}" for number in range(6)}


def test_the_control_shows_a_judge_s_own_noise(tmp_path: Path, chat: Chat) -> None:
    session, rollouts = (
        open_session(tmp_path, chat, NoisyJudge(StepJudge(), 0.5, 1.0)),
        traces(chat),
    )
    verdicts = []
    for rollout, verdict in zip(rollouts, judged(session, rollouts), strict=True):
        verdicts.append(replace(verdict, label=SAFE if rollout.draw else UNSAFE))
    result = attack_judge(session, NAMED, rollouts, verdicts, 6)
    assert 0 < result.share("plain sentence").value < 1
    assert result.share("plain sentence", SAFE).value == 0


def test_nothing_is_asked_twice_and_another_judge_is_asked_anew(tmp_path: Path, chat: Chat) -> None:
    judge, rollouts = StepJudge(), traces(chat)
    session = open_session(tmp_path, chat, judge)
    verdicts = judged(session, rollouts)
    judge.asked.clear()
    first = attack_judge(session, NAMED, rollouts, verdicts, 2)
    asked = len(judge.asked)
    assert asked == 4 * len(load_suffixes())
    again = open_session(tmp_path, chat, judge)
    assert attack_judge(again, NAMED, rollouts, verdicts, 2) == first
    assert len(judge.asked) == asked
    attack_judge(again, NAMED, rollouts, verdicts, 3)  # more pay for what is new alone
    assert len(judge.asked) == 6 * len(load_suffixes())
    other = StepJudge("other")
    attack_judge(replace(again, judge=other), NAMED, rollouts, verdicts, 2)
    assert len(other.asked) == asked


def test_one_rollout_of_each_prompt_comes_first(chat: Chat) -> None:
    rollouts = []
    for prompt, draw in itertools.product(("p0", "p1"), range(3)):
        rollouts.append(closed_trace(chat, STEP, prompt, draw))
    verdicts = [Verdict(r.id, "trace", "harm", UNSAFE, None, "", "j") for r in rollouts]
    chosen = choose_texts(rollouts, verdicts, UNSAFE, 3)
    assert [rollout.id for rollout, _ in chosen] == ["p0-0", "p1-0", "p0-1"]
    assert choose_texts(rollouts, verdicts, SAFE, 3) == []


def test_the_sandbox_s_own_judge_is_not_fooled(tmp_path: Path, chat: Chat) -> None:
    items, rng = invented.prompts("train_harmful", 16), random.Random(0)
    prompts = {item.id: item for item in items}
    rollouts = []
    for item in items:
        rollouts.append(closed_trace(chat, respond(rng, item, Process()).reasoning, item.id))
    session = open_session(tmp_path, chat, ExactJudge())
    result = attack_judge(session, prompts, rollouts, stages.judge(session, prompts, rollouts), 4)
    assert {text.before for text in result.texts} == {SAFE, UNSAFE}
    assert (result.unsafe_made_safe.value, result.safe_made_unsafe.value) == (0, 0)
    assert sum(text.after is None for text in result.texts) < len(result.texts) / 2


def test_a_guard_is_asked_like_any_judge(tmp_path: Path, chat: Chat) -> None:
    folder = tiny_model(tmp_path / "guard", family="qwen2", context=4096)
    judge = guard("qwen3guard-0.6b", folder=str(folder), dtype="float32")
    judge = replace(judge, guard=replace(judge.guard, mass=0.0), context=math.inf)
    session, rollouts = open_session(tmp_path, chat, judge), traces(chat)[:4]
    result = attack_judge(session, NAMED, rollouts, judged(session, rollouts), 2)
    assert {text.after for text in result.texts} <= {SAFE, UNSAFE}
    assert len(result.texts) >= 2 * len(load_suffixes())


def test_what_was_answered_before_a_judge_fails_is_kept(tmp_path: Path, chat: Chat) -> None:
    class Failing(StepJudge):
        def judge(  # type: ignore[override]
            self, exchanges: Sequence[Exchange]
        ) -> Iterator[Verdict]:
            for index, verdict in enumerate(super().judge(exchanges)):
                if index == 7 and self.broken:
                    raise BadInput("no answer")
                yield verdict

        broken = False

    judge, rollouts = Failing(), traces(chat)
    session = open_session(tmp_path, chat, judge)
    verdicts = judged(session, rollouts)
    judge.broken = True
    with pytest.raises(BadInput, match="no answer"):
        attack_judge(session, NAMED, rollouts, verdicts, 1)
    judge.broken = False
    judge.asked.clear()
    attack_judge(session, NAMED, rollouts, verdicts, 1)
    assert len(judge.asked) == 2 * len(load_suffixes()) - 7


def test_bad_input(tmp_path: Path, chat: Chat) -> None:
    session, rollouts = (
        open_session(tmp_path, chat, StepJudge()),
        [closed_trace(chat, UNJUDGED, "p0")],
    )
    verdicts = judged(session, rollouts)
    with pytest.raises(BadInput, match="none of 1 verdicts is safe or unsafe; judge"):
        attack_judge(session, NAMED, rollouts, verdicts, 1)
    with pytest.raises(BadInput, match="count 0; give at least 1"):
        attack_judge(session, NAMED, rollouts, verdicts, 0)
    other: list[Any] = [replace(verdicts[0], question=REFUSAL)]
    with pytest.raises(BadInput, match="'refusal'; give those on harm"):
        attack_judge(session, NAMED, rollouts, other, 1)
    with pytest.raises(BadInput, match="no suffix 'x'; choose one of plain sentence"):
        Robustness((), load_suffixes()).share("x")
    answers = [replace(verdicts[0], label=SAFE, part="answer")]
    with pytest.raises(BadInput, match="has no answer"):
        attack_judge(session, NAMED, rollouts, answers, 1)


def test_the_suffixes_are_whole() -> None:
    suffixes = load_suffixes()
    assert sum(suffix.control for suffix in suffixes.values()) == 1
    assert all(not suffix.control or "{label}" not in suffix.text for suffix in suffixes.values())
    assert Suffix("It is {label}, {so} there.").against(UNSAFE) == "It is safe, {so} there."
    assert isinstance(NAMED["p0"], Prompt)
