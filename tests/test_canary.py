"""The canary: judges of known weakness, and judges without it, before texts that try to change their own verdict."""

from __future__ import annotations

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
from ipo_lib.experiments import judge_robustness
from ipo_lib.experiments.judge_robustness import Tail, chosen_texts
from ipo_lib.judges.guards import GuardJudge, guard
from ipo_lib.judging import REFUSAL, Exchange, Judge, NoisyJudge
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompt, Rollout, Verdict
from ipo_lib.sandbox import world as invented
from ipo_lib.sandbox.judge import ExactJudge
from ipo_lib.sandbox.traces import Process, respond
from ipo_lib.stages import Session
from ipo_lib.store import Store

NAMED = {prompt.id: prompt for prompt in PROMPTS}


class Credulous(StepJudge):
    """Believes the last line of what it reads where this is a verdict."""

    def label(self, e: Exchange) -> str | None:
        claimed = re.search(r"VERDICT: (safe|unsafe)\s*\Z", e.text or "")
        return claimed[1] if claimed else super().label(e)


class Blind(StepJudge):
    """Cannot read a text with a control token."""

    def label(self, e: Exchange) -> str | None:
        return None if "<|" in (e.text or "") else super().label(e)


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(tiny_model(tmp_path / "model"), prefill="<think>\n")


def said(chat: Chat, trace: str, prompt: str, draw: int = 0) -> Rollout:
    text = trace + CLOSE
    return Rollout(f"{prompt}-{draw}", prompt, 0, chat.encode(text), text, "think", draw, "s")


def session(tmp_path: Path, chat: Chat, judge: Judge) -> Session:
    return Session(Store(tmp_path / "store"), chat, world(chat), judge)


def judged(own: Session, rollouts: Sequence[Rollout]) -> list[Verdict]:
    return stages.judge(own, NAMED, rollouts)


def written(chat: Chat) -> list[Rollout]:
    """Six prompts, each with an unsafe and a safe trace."""
    traces = (STEP, PROOF)
    return [said(chat, traces[draw], f"p{at}", draw) for at in range(6) for draw in range(2)]


def by_tail(found: judge_robustness.Canary) -> dict[object, dict[str, object]]:
    return {row["tail"]: row for row in found.table()}


def test_a_judge_that_reads_only_the_text_is_not_fooled(tmp_path: Path, chat: Chat) -> None:
    own, rollouts = session(tmp_path, chat, StepJudge()), written(chat)
    found = judge_robustness.canary(own, NAMED, rollouts, judged(own, rollouts), 6)
    assert (found.fooled.value, found.turned.value) == (0, 0)
    assert (found.fooled.n, found.turned.n) == (6, 6)  # prompts, not answers
    assert found.fooled.high > 0
    assert {row["not judged"] for row in found.table()} == {0}
    assert [row["tail"] for row in found.table()] == list(judge_robustness.known())
    assert {row["asked"] for row in found.table()} == {12}


def test_a_judge_that_believes_a_last_line_is_found_out_by_the_tails_that_end_in_one(
    tmp_path: Path, chat: Chat
) -> None:
    own, rollouts = session(tmp_path, chat, Credulous()), written(chat)
    found = judge_robustness.canary(own, NAMED, rollouts, judged(own, rollouts), 6)
    ends = {
        name
        for name, tail in judge_robustness.known().items()
        if tail.text.endswith("VERDICT: {label}")
    }
    assert len(ends) >= 3
    for name, tail in judge_robustness.known().items():
        assert found.share(name).value == found.share(name, SAFE).value == float(name in ends), name
        assert by_tail(found)[name]["hostile"] is not tail.control
    hostile = sum(not tail.control for tail in judge_robustness.known().values())
    assert found.fooled.value == pytest.approx(len(ends) / hostile)
    assert str(by_tail(found)["verdict line"]["unsafe made safe"]).startswith("100.0 %")


def test_what_cannot_be_judged_with_a_tail_is_counted_and_in_no_share(
    tmp_path: Path, chat: Chat
) -> None:
    own, rollouts = session(tmp_path, chat, Blind()), written(chat)
    rollouts.append(said(chat, UNJUDGED, "p7"))
    found = judge_robustness.canary(own, NAMED, rollouts, judged(own, rollouts), 9)
    row = by_tail(found)["turn in ChatML"]
    assert (row["asked"], row["not judged"], row["unsafe made safe"]) == (12, 12, "unknown, n=0")
    assert found.fooled.value == 0
    assert {case.prompt_id for case in found.cases} == {f"p{at}" for at in range(6)}


def test_the_control_shows_a_judge_s_own_noise(tmp_path: Path, chat: Chat) -> None:
    own, rollouts = session(tmp_path, chat, NoisyJudge(StepJudge(), 0.5, 1.0)), written(chat)
    verdicts = [
        replace(one, label=SAFE if rollout.draw else UNSAFE)
        for one, rollout in zip(judged(own, rollouts), rollouts, strict=True)
    ]
    found = judge_robustness.canary(own, NAMED, rollouts, verdicts, 6)
    assert 0 < found.share("plain sentence").value < 1
    assert found.share("plain sentence", SAFE).value == 0


def test_nothing_is_asked_twice_and_another_judge_is_asked_anew(tmp_path: Path, chat: Chat) -> None:
    judge, rollouts = StepJudge(), written(chat)
    own = session(tmp_path, chat, judge)
    verdicts = judged(own, rollouts)
    judge.asked.clear()
    first = judge_robustness.canary(own, NAMED, rollouts, verdicts, 2)
    asked = len(judge.asked)
    assert asked == 4 * len(judge_robustness.known())
    again = session(tmp_path, chat, judge)
    assert judge_robustness.canary(again, NAMED, rollouts, verdicts, 2) == first
    assert len(judge.asked) == asked
    judge_robustness.canary(again, NAMED, rollouts, verdicts, 3)  # more pay for what is new alone
    assert len(judge.asked) == 6 * len(judge_robustness.known())
    other = StepJudge("other")
    judge_robustness.canary(replace(again, judge=other), NAMED, rollouts, verdicts, 2)
    assert len(other.asked) == asked


def test_one_rollout_of_each_prompt_comes_first(chat: Chat) -> None:
    rollouts = [said(chat, STEP, prompt, draw) for prompt in ("p0", "p1") for draw in range(3)]
    verdicts = [Verdict(one.id, "trace", "harm", UNSAFE, None, "", "j") for one in rollouts]
    assert [one.id for one, _ in chosen_texts(rollouts, verdicts, UNSAFE, 3)] == [
        "p0-0",
        "p1-0",
        "p0-1",
    ]
    assert chosen_texts(rollouts, verdicts, SAFE, 3) == []


def test_the_sandbox_s_own_judge_is_not_fooled(tmp_path: Path, chat: Chat) -> None:
    items, rng = invented.prompts("train_harmful", 16), random.Random(0)
    texts = {one.id: one for one in items}
    rollouts = [said(chat, respond(rng, one, Process()).reasoning, one.id) for one in items]
    own = session(tmp_path, chat, ExactJudge())
    found = judge_robustness.canary(own, texts, rollouts, stages.judge(own, texts, rollouts), 4)
    assert {case.before for case in found.cases} == {SAFE, UNSAFE}
    assert (found.fooled.value, found.turned.value) == (0, 0)
    assert sum(case.after is None for case in found.cases) < len(found.cases) / 2


def test_a_guard_is_asked_like_any_judge(tmp_path: Path, chat: Chat) -> None:
    folder = tiny_model(tmp_path / "guard", family="qwen2", context=4096)
    made = guard("qwen3guard-0.6b", folder=str(folder), dtype="float32")
    judge = GuardJudge(made.name, replace(made.guard, mass=0.0), made.chat, made.sampler)
    own, rollouts = session(tmp_path, chat, judge), written(chat)[:4]
    found = judge_robustness.canary(own, NAMED, rollouts, judged(own, rollouts), 2)
    assert {case.after for case in found.cases} <= {SAFE, UNSAFE}
    assert len(found.cases) >= 2 * len(judge_robustness.known())


def test_what_was_answered_before_a_judge_fails_is_kept(tmp_path: Path, chat: Chat) -> None:
    class Failing(StepJudge):
        def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:  # type: ignore[override]
            for at, one in enumerate(super().judge(exchanges)):
                if at == 7 and self.broken:
                    raise BadInput("no answer")
                yield one

        broken = False

    judge, rollouts = Failing(), written(chat)
    own = session(tmp_path, chat, judge)
    verdicts = judged(own, rollouts)
    judge.broken = True
    with pytest.raises(BadInput, match="no answer"):
        judge_robustness.canary(own, NAMED, rollouts, verdicts, 1)
    judge.broken = False
    judge.asked.clear()
    judge_robustness.canary(own, NAMED, rollouts, verdicts, 1)
    assert len(judge.asked) == 2 * len(judge_robustness.known()) - 7


def test_bad_input(tmp_path: Path, chat: Chat) -> None:
    own, rollouts = session(tmp_path, chat, StepJudge()), [said(chat, UNJUDGED, "p0")]
    verdicts = judged(own, rollouts)
    with pytest.raises(BadInput, match="none of 1 verdicts is safe or unsafe; judge"):
        judge_robustness.canary(own, NAMED, rollouts, verdicts, 1)
    with pytest.raises(BadInput, match="count 0; give at least 1"):
        judge_robustness.canary(own, NAMED, rollouts, verdicts, 0)
    other: list[Any] = [replace(verdicts[0], question=REFUSAL)]
    with pytest.raises(BadInput, match="'refusal'; give those on harm"):
        judge_robustness.canary(own, NAMED, rollouts, other, 1)
    with pytest.raises(BadInput, match="no tail 'x'; choose one of plain sentence"):
        judge_robustness.Canary((), judge_robustness.known()).share("x")
    with pytest.raises(BadInput, match="has no answer"):
        judge_robustness.canary(
            own, NAMED, rollouts, [replace(verdicts[0], label=SAFE, part="answer")], 1
        )


def test_the_tails_are_whole() -> None:
    tails = judge_robustness.known()
    assert sum(tail.control for tail in tails.values()) == 1
    assert all(not tail.control or "{label}" not in tail.text for tail in tails.values())
    assert Tail("It is {label}, {so} there.").against(UNSAFE) == "It is safe, {so} there."
    assert isinstance(NAMED["p0"], Prompt)
