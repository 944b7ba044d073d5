"""The lexicon and the pool come from judged traces alone: what was planted is found, no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted import ASIDE, CUE, PROMPTS, TRIGGER, Phrase, named, rollout, session, world

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.cues import LexiconCues
from ipo_lib.records import SAFE, BadInput, Prompt, Rollout, Verdict
from ipo_lib.sampling import Sampling
from ipo_lib.stages import CorrectionSettings, Session
from ipo_lib.turning_points.adaptive import SearchSettings
from ipo_lib.turning_points.mining import learn_lexicon, mine_pool

THINK = Sampling(max_tokens=400, until="think")
MANY = [Prompt(f"p{n}", f"Plan {n}?", "scripted", True) for n in range(24)]


def judged(run: Session, prompts: list[Prompt], draws: int) -> tuple[list[Rollout], list[Verdict]]:
    seen = stages.sample_and_judge(run, prompts, THINK, draws)
    return seen.rollouts, seen.verdicts


def test_the_lexicon_finds_the_planted_cue(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    rollouts, verdicts = judged(run, MANY, 4)
    detector = learn_lexicon(run, rollouts, verdicts)
    assert isinstance(detector, LexiconCues)
    cues = stages.find_cues(run, named(MANY), rollouts, detector)
    assert cues == stages.find_cues(run, named(MANY), rollouts, Phrase())
    assert detector == learn_lexicon(run, rollouts, verdicts)


def test_unjudged_traces_teach_nothing(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    rollouts, verdicts = judged(run, MANY, 4)
    text = f"{ASIDE}\nRivers are deep ?!\n</think>"
    unread = [rollout(chat, text, id_=f"u{p.id}", prompt=p.id) for p in MANY]
    more = stages.judge(run, named(MANY), unread)
    assert {v.label for v in more} == {None}
    assert learn_lexicon(run, rollouts + unread, verdicts + more) == learn_lexicon(
        run, rollouts, verdicts
    )


def test_one_label_alone_is_one_line(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat, {ASIDE: 1.0, "": 1.0}))
    with pytest.raises(BadInput, match="both labels"):
        learn_lexicon(run, *judged(run, MANY, 2))


def test_the_pool_is_the_planted_trigger(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    rollouts, verdicts = judged(run, PROMPTS, 6)
    arguments = (
        named(),
        rollouts,
        verdicts,
        Phrase(),
        CsrSettings(draws=24),
        SearchSettings(),
        CorrectionSettings(traces=6),
        THINK,
    )
    pool, used = mine_pool(run, *arguments)
    assert [t.text for t in used] == [TRIGGER]
    assert pool[0].text == TRIGGER
    assert pool[0].count >= 5
    (best,) = used
    assert best.rescue is not None
    k, n = best.rescue
    assert k == n > 0  # the planted trigger always rescues
    asked = len(sampler.answered)
    assert mine_pool(run, *arguments) == (pool, used)
    assert len(sampler.answered) == asked


def test_no_turn_no_pool(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    traces = []
    for n, turn in enumerate((CUE, TRIGGER) * 2):
        text = f"{ASIDE}\n{turn}\n</think>"
        traces.append(rollout(chat, text, id_=f"{n}", prompt=f"p{n // 2}"))
    verdicts = stages.judge(run, named(), traces)
    with pytest.raises(BadInput, match=r"no trigger.*raise"):
        mine_pool(
            run,
            named(),
            traces,
            verdicts,
            Phrase(),
            CsrSettings(draws=4),
            SearchSettings(),
            CorrectionSettings(),
            THINK,
        )
    assert {v.label for v in verdicts} == {SAFE}  # one label alone: no prompt is mixed
