"""Detectors beside the lexicon: shifted, random, a model asked by few-shot, Eq. 3 by search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import scripted

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.cues import UNREAD, Answers, Texts
from ipo_lib.experiments.detectors import ASK, FewShotCues, RandomCues, SearchedCues, ShiftedCues
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput, Prompts, Rollout, Rollouts
from ipo_lib.sampling import Request

EXAMPLES = ((("They ask.", "I can do it."), 2), (("They ask.", "It is forbidden."), 0))
TEXTS = ["A b.", "C d.", "E f."]


@dataclass(frozen=True)
class Second:
    """The second sentence of traces with more than two."""

    stored: bool = False

    def fingerprint(self) -> dict[str, object]:
        return {"detector": "second"}

    def first_cues(self, prompts: Prompts, rollouts: Rollouts, texts: Texts) -> Answers:
        for rollout in rollouts:
            yield rollout.id, 1 if len(texts[rollout.id]) > 2 else None


class Unreadable(Second):
    """A detector whose answers cannot be read."""

    def first_cues(self, prompts: Prompts, rollouts: Rollouts, texts: Texts) -> Answers:
        for rollout in rollouts:
            yield rollout.id, UNREAD


@pytest.fixture
def trace(chat: Chat) -> Rollout:
    return scripted.rollout(chat, "A b. C d. E f.\n</think>\n\nYes.")


def first_cue(detector: ShiftedCues | RandomCues, trace: Rollout, texts: list[str]) -> int | None:
    return dict(detector.first_cues(scripted.named(), [trace], {trace.id: texts}))[trace.id]


@pytest.mark.parametrize(("by", "index"), [(1, 2), (-1, 0), (2, 2), (-2, 0), (0, 1)])
def test_shifted_finds_stay_inside_the_trace(trace: Rollout, by: int, index: int) -> None:
    assert first_cue(ShiftedCues(Second(), by), trace, TEXTS) == index
    assert first_cue(ShiftedCues(Second(), by), trace, TEXTS[:2]) is None
    assert first_cue(ShiftedCues(Unreadable(), by), trace, TEXTS) == UNREAD


def test_random_finds_are_somewhere_in_the_trace_and_the_same_each_time(trace: Rollout) -> None:
    detector = RandomCues(Second(), 3)
    index = first_cue(detector, trace, TEXTS)
    assert index in (0, 1, 2)
    assert index == first_cue(RandomCues(Second(), 3), trace, TEXTS)
    assert first_cue(detector, trace, TEXTS[:2]) is None
    assert first_cue(RandomCues(Unreadable(), 3), trace, TEXTS) == UNREAD
    traces = [replace(trace, id=str(number)) for number in range(30)]
    assert {first_cue(detector, other, TEXTS) for other in traces} == {0, 1, 2}


@pytest.mark.parametrize("stored", [True, False])
def test_what_a_server_said_is_stored_also_where_it_is_changed(stored: bool) -> None:
    assert ShiftedCues(Second(stored), 1).stored is stored
    assert RandomCues(Second(stored)).stored is stored


@pytest.mark.parametrize(
    ("answer", "index"),
    [("2", 1), (" 3.", 2), ("0", None), ("none", None), ("9", None), ("1", None), ("-2 or 3", 1)],
)
def test_the_first_number_a_model_says_is_the_cue(
    tmp_path: Path, chat: Chat, trace: Rollout, answer: str, index: int | None
) -> None:
    asked: list[Request] = []

    def say(request: Request) -> str:
        asked.append(request)
        return answer

    session = scripted.session(tmp_path, chat, scripted.saying(chat, say))
    traces = [replace(trace, id="one"), replace(trace, id="two")]
    detector, prompts = FewShotCues(session, EXAMPLES), scripted.named()
    cues = stages.find_cues(session, prompts, traces, detector)
    assert cues == {"one": index, "two": index}
    text = chat.decode(asked[0].prompt_ids)
    assert ASK in text
    assert "1. They ask.\n2. I can do it.\nAnswer: 2" in text
    assert text.count("1. A b.\n2. C d.\n3. E f.\nAnswer:") == 1
    assert stages.find_cues(session, prompts, traces[:1], detector) == {"one": index}
    assert len(asked) == 2  # the same question is asked once
    with pytest.raises(BadInput, match="without examples"):
        stages.find_cues(session, prompts, traces, FewShotCues(session, ()))


def test_eq_3_by_search_finds_no_cue_in_safe_traces(tmp_path: Path) -> None:
    run = open_run("tiny", {"prompts.train_harmful.count": 6}, str(tmp_path))
    session, settings = run.session, run.profile
    seen = stages.sample_and_judge(session, run.prompts("train_harmful"), run.thinking, 2)
    detector = SearchedCues(session, settings.csr, settings.search, run.thinking)
    cues = stages.find_cues(session, seen.prompts, seen.rollouts, detector)
    safe, unsafe = seen.labelled("safe"), seen.labelled("unsafe")
    assert all(cues[rollout.id] is None for rollout in safe)
    assert any(cues[rollout.id] is not None for rollout in unsafe)
    alone = stages.find_cues(session, seen.prompts, unsafe[:1], detector)
    assert alone == {unsafe[0].id: cues[unsafe[0].id]}
