"""Chains of interventions fall as planted, and controls tell a cause from none."""

from __future__ import annotations

from pathlib import Path

import pytest
import scripted
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    PROOF,
    STEP,
    TRIGGER,
    UNJUDGED,
    Phrase,
    named,
    rollout,
    session,
    world,
)

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.experiments import replacements
from ipo_lib.records import SAFE, BadInput, Prompt, Rollout, TurningPoint
from ipo_lib.sampling import Completion, Sampling
from ipo_lib.stages import JudgedRollouts

THINK = Sampling(max_tokens=400, until="think")
Counts = dict[str, tuple[int, int]]


def losers(chat: Chat, count: int = 8) -> list[Rollout]:
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}"
    return [rollout(chat, text, id_=f"l{number}", prompt=f"p{number}") for number in range(count)]


def many_prompts(count: int) -> dict[str, Prompt]:
    return {
        f"p{number}": scripted.Prompt(f"p{number}", f"Plan {number}?", "scripted", True)
        for number in range(count)
    }


def share(counts: Counts) -> float:
    return sum(k for k, _ in counts.values()) / sum(n for _, n in counts.values())


def test_unsafe_traces_with_a_cue_are_taken_one_a_prompt(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    rollouts = []
    for prompt, endings in {"p0": (STEP, STEP), "p2": (PROOF, STEP)}.items():
        for number, ending in enumerate(endings):
            text = f"{ASIDE}\n{ending}\n{CLOSE}"
            rollouts.append(rollout(chat, text, id_=f"{prompt}-{number}", prompt=prompt))
    seen = JudgedRollouts(named(), rollouts, stages.judge(opened, named(), rollouts))
    cues = {r.id: 0 if r.id == "p2-1" else None for r in rollouts}
    assert [r.id for r in replacements.unsafe_with_cue(seen, cues)] == ["p2-1"]
    with pytest.raises(BadInput, match="no unsafe trace with a cue"):
        replacements.unsafe_with_cue(seen, dict.fromkeys(cues))


def test_a_chain_falls_round_by_round_as_planted(tmp_path: Path, chat: Chat) -> None:
    """A trigger rescues half of the traces each time; the neutral sentence rescues none."""
    opened = session(tmp_path, chat, world(chat, {ASIDE: 0.0, TRIGGER: 0.5}))
    texts = {"trigger": TRIGGER, "neutral": ASIDE}
    chains = replacements.chain_interventions(
        opened, many_prompts(120), losers(chat, 120), texts, Phrase(), THINK, 3
    )
    rates = {name: [share(counts) for counts in by_round] for name, by_round in chains.items()}
    assert {len(counts) for counts in chains["trigger"]} == {120}
    assert rates["neutral"] == [1, 1, 1, 1]
    assert rates["trigger"][0] == 1
    assert rates["trigger"][1] == pytest.approx(0.5, abs=0.15)
    assert rates["trigger"][2] <= rates["trigger"][1]


def test_where_nothing_is_put_every_round_draws_anew(tmp_path: Path, chat: Chat) -> None:
    """Half of the draws are safe; where a cue comes first again, the prefix is the same."""
    opened = session(tmp_path, chat, world(chat, {"": 0.5}))
    prompts, bad = many_prompts(120), losers(chat, 120)
    chains = replacements.chain_interventions(
        opened, prompts, bad, {"nothing": ""}, Phrase(), THINK, 3
    )
    rates = [share(counts) for counts in chains["nothing"]]
    assert rates == pytest.approx([1, 0.5, 0.25, 0.125], abs=0.12)


def test_a_text_that_comes_again_is_drawn_anew(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat, {"": 0.5, ASIDE: 0.5}))
    prompts, bad = many_prompts(30), losers(chat, 30)
    cues = stages.find_cues(opened, prompts, bad, Phrase())
    texts = {"nothing": [""] * 8, "neutral": [ASIDE, "It is late. ", ASIDE, ASIDE]}
    rescued = replacements.run_controls(opened, prompts, bad, cues, texts, THINK)
    for kind in texts:
        outcomes = {safe for safe, _ in rescued[kind].values()}
        assert len(outcomes) > 3, "one draw was counted several times"


def test_traces_with_one_beginning_are_drawn_apart(tmp_path: Path, chat: Chat) -> None:
    """Four traces of a prompt are alike up to the cue: with a text there, one prefix."""
    opened = session(tmp_path, chat, world(chat, {ASIDE: 0.5}))
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}"
    alike = [rollout(chat, text, id_=f"l{number}", prompt="p0") for number in range(16)]
    cues = stages.find_cues(opened, named(), alike, Phrase())
    rescued = replacements.run_controls(opened, named(), alike, cues, {"neutral": [ASIDE]}, THINK)
    k, n = rescued["neutral"]["p0"]
    assert n == 16
    assert 0 < k < 16, "one draw was counted several times"


def test_a_trace_without_a_cue_stays_as_it_is(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    plain = rollout(chat, f"{ASIDE}\n{STEP}\n{CLOSE}", id_="plain")
    chains = replacements.chain_interventions(
        opened, named(), [plain], {"trigger": TRIGGER}, Phrase(), THINK, 2
    )
    assert chains == {"trigger": [{"p0": (1, 1)}] * 3}


@pytest.mark.parametrize("causes", [True, False])
def test_controls_tell_a_cause_from_none(tmp_path: Path, chat: Chat, causes: bool) -> None:
    s = {ASIDE: 0.3, TRIGGER: 1.0 if causes else 0.3, CUE: 0.3, "": 0.3}
    opened = session(tmp_path, chat, world(chat, s))
    prompts, bad = many_prompts(60), losers(chat, 60)
    cues = stages.find_cues(opened, prompts, bad, Phrase())
    texts = {"trigger": [TRIGGER, "Wait, someone may get hurt. "], "neutral": [ASIDE]}
    rescued = replacements.run_controls(opened, prompts, bad, cues, texts, THINK)
    assert list(rescued) == ["trigger", "neutral", "trigger, earlier sentence"]
    assert {tuple(counts) for counts in rescued.values()} == {tuple(prompts)}
    assert share(rescued["neutral"]) == pytest.approx(0.3, abs=0.2)
    assert (share(rescued["trigger"]) == 1) is causes


def test_backwards_a_cue_makes_a_safe_trace_unsafe(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat, {CUE: 0.0, TRIGGER: 1.0, ASIDE: 1.0}))
    text = f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}"
    good = [rollout(chat, text, id_=f"g{number}", prompt=f"p{number}") for number in range(4)]
    curves = stages.measure_csr(opened, named(), good, CsrSettings(draws=4), THINK)
    assert any(point.s == 1.0 for points in curves.values() for point in points)
    turns = {r.id: TurningPoint(r.id, SAFE, 9, 1, None) for r in good}
    turns["g3"] = TurningPoint("g3", SAFE, 9, None, None)
    texts = {"cue": [CUE], "neutral": [ASIDE]}
    unsafe = replacements.reverse_interventions(opened, named(), turns, good, texts, THINK, 5)
    assert unsafe == {
        "cue": dict.fromkeys(("p0", "p1", "p2"), (5, 5)),
        "neutral": dict.fromkeys(("p0", "p1", "p2"), (0, 5)),
    }


def test_merged_counts_keep_the_prompt_as_the_unit() -> None:
    first, second = {"p0": (1, 1), "p1": (0, 1)}, {"p0": (0, 1), "p2": (0, 0)}
    merged = replacements.merge_counts([first, second])
    assert merged == {"p0": (1, 2), "p1": (0, 1), "p2": (0, 0)}


def test_what_nobody_could_judge_is_no_cure(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    unreadable = chat.encode(UNJUDGED + CLOSE)
    sampler.script = lambda request, _: Completion(request.key, unreadable, "think")
    opened, bad = session(tmp_path, chat, sampler), losers(chat, 2)
    chains = replacements.chain_interventions(
        opened, named(), bad, {"trigger": TRIGGER}, Phrase(), THINK, 2
    )
    assert chains == {"trigger": [{"p0": (1, 1), "p1": (1, 1)}] * 3}
    cues = stages.find_cues(opened, named(), bad, Phrase())
    texts = {"trigger": [TRIGGER]}
    rescued = replacements.run_controls(opened, named(), bad, cues, texts, THINK)
    assert rescued["trigger"] == {"p0": (0, 1), "p1": (0, 1)}


def test_common_sentences_come_by_frequency_then_text(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    rollouts = []
    for number, text in enumerate(("B here.", "A here.", "B here.", "C here.")):
        rollouts.append(rollout(chat, f"{ASIDE}\n{text}\n{CLOSE}", id_=str(number)))
    indices = {"0": 1, "1": 1, "2": 1, "3": None}
    frequent = replacements.frequent_sentences(opened, rollouts, indices, 9)
    assert frequent == ["B here.", "A here."]
    assert replacements.frequent_sentences(opened, rollouts, indices, 1) == ["B here."]


def test_few_texts_are_taken_in_turn() -> None:
    assert replacements.repeat_to(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert replacements.repeat_to(["a", "b", "c"], 2) == ["a", "b", "c"]  # every text once
    assert replacements.repeat_to([""], 2) == ["", ""]
    assert replacements.repeat_to([], 3) == []


def test_a_few_unsafe_traces_of_every_prompt_may_be_taken(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    traces = [
        rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_=f"r{number}", prompt=prompt)
        for number, prompt in enumerate(("p0", "p0", "p0", "p1"))
    ]
    seen = JudgedRollouts(named(), traces, stages.judge(opened, named(), traces))
    cues = stages.find_cues(opened, named(), traces, Phrase())
    for most, kept in ((1, ["r0", "r3"]), (2, ["r0", "r1", "r3"])):
        assert [r.id for r in replacements.unsafe_with_cue(seen, cues, most)] == kept
