"""Detectors beside the lexicon: shifted and random ones, a model asked by few-shot, Eq. 3 by search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scripted

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.experiments.detectors import ASK, FewShotCues, RandomCues, ShiftedCues
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request

EXAMPLES = ((("They ask.", "I can do it."), 2), (("They ask.", "It is forbidden."), 0))


class Second:
    def fingerprint(self) -> dict[str, object]:
        return {"detector": "second"}

    def first(self, rollout: object, prompt: object, texts: list[str]) -> int | None:
        return 1 if len(texts) > 2 else None


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return scripted.r1_chat(tmp_path_factory.mktemp("detectors"))


@pytest.mark.parametrize(("by", "found"), [(1, 2), (-1, 0), (2, 2), (-2, 0), (0, 1)])
def test_shifted_finds_stay_inside_the_trace(chat: Chat, by: int, found: int) -> None:
    one, prompt = scripted.rollout(chat, "A b. C d. E f.\n</think>\n\nYes."), scripted.PROMPTS[0]
    texts = ["A b.", "C d.", "E f."]
    assert ShiftedCues(Second(), by).first(one, prompt, texts) == found
    assert ShiftedCues(Second(), by).first(one, prompt, texts[:2]) is None
    at = RandomCues(Second(), 3).first(one, prompt, texts)
    assert at in (0, 1, 2)
    assert at == RandomCues(Second(), 3).first(one, prompt, texts)
    assert RandomCues(Second(), 3).first(one, prompt, texts[:2]) is None
    places = {
        RandomCues(Second(), 3).first(replace(one, id=str(n)), prompt, texts) for n in range(30)
    }
    assert places == {0, 1, 2}


@pytest.mark.parametrize(
    ("said", "found"),
    [("2", 1), (" 3.", 2), ("0", None), ("none", None), ("9", None), ("1", None), ("-2 or 3", 1)],
)
def test_the_first_number_a_model_says_is_the_cue(
    tmp_path: Path, chat: Chat, said: str, found: int | None
) -> None:
    asked: list[Request] = []

    def answer(request: Request) -> str:
        asked.append(request)
        return said

    session = scripted.session(tmp_path, chat, scripted.saying(chat, answer))
    traces = [
        scripted.rollout(chat, "A b. C d. E f.\n</think>\n\nYes.", id_=name)
        for name in ("one", "two")
    ]
    detector = FewShotCues(session, EXAMPLES)
    prompts = scripted.named()
    assert stages.find_cues(session, prompts, traces, detector) == {"one": found, "two": found}
    text = chat.decode(asked[0].prompt_ids)
    assert ASK in text
    assert "1. They ask.\n2. I can do it.\nAnswer: 2" in text
    assert text.count("1. A b.\n2. C d.\n3. E f.\nAnswer:") == 1
    assert detector.first(traces[0], scripted.PROMPTS[0], []) == found
    assert len(asked) == 2  # the same question is asked once
    with pytest.raises(BadInput, match="without examples"):
        stages.find_cues(session, prompts, traces, FewShotCues(session, ()))


def test_eq_3_by_search_finds_no_cue_in_safe_traces(tmp_path: Path) -> None:
    from ipo_lib.experiments.detectors import SearchedCues

    run = open_run("tiny", {"prompts.train_harmful.count": 6}, str(tmp_path))
    seen = stages.sample_and_judge(run.session, run.prompts("train_harmful"), run.thinking, 2)
    detector = SearchedCues(run.session, run.profile.csr, run.profile.search, run.thinking)
    found = stages.find_cues(run.session, seen.prompts, seen.rollouts, detector)
    assert all(found[one.id] is None for one in seen.labelled("safe"))
    assert any(found[one.id] is not None for one in seen.labelled("unsafe"))
    one = seen.labelled("unsafe")[0]
    assert detector.first(one, seen.prompts[one.prompt_id], []) == found[one.id]
