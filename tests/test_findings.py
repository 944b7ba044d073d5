"""Findings come back from a world where they were planted, and controls fail where none was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scripted import (
    ASIDE,
    CLOSE,
    HELP,
    PROOF,
    REFUSAL,
    STEP,
    UNJUDGED,
    named,
    rollout,
    session,
    world,
)

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.experiments import findings
from ipo_lib.records import ANSWER, SAFE, UNSAFE, BadInput, Rollout, TurningPoint
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stages import JudgedRollouts, Session

WHOLE = Sampling(max_tokens=400)


def judged(opened: Session, rollouts: list[Rollout]) -> JudgedRollouts:
    return JudgedRollouts(named(), rollouts, stages.judge(opened, named(), rollouts))


def say(
    chat: Chat, trace: str, answer: str, number: int, prompt: str = "p0", draw: int = 0
) -> Rollout:
    text = f"{ASIDE}\n{trace}\n{CLOSE}{answer}"
    written = rollout(chat, text, id_=f"{prompt}-{number}", prompt=prompt)
    return Rollout(written.id, prompt, 0, written.token_ids, written.text, "stop", draw, "by hand")


def test_joint_safety_counts_both_parts_and_leaves_the_unjudged_out(
    tmp_path: Path, chat: Chat
) -> None:
    opened = session(tmp_path, chat, world(chat))
    cases = [(PROOF, REFUSAL), (PROOF, REFUSAL), (PROOF, HELP)]
    cases += [(STEP, REFUSAL)] * 4
    cases += [(STEP, HELP), (UNJUDGED, HELP), (UNJUDGED, HELP), (UNJUDGED, HELP)]
    rollouts = [
        say(chat, trace, answer, number, f"p{number % 2}")
        for number, (trace, answer) in enumerate(cases)
    ]
    seen = judged(opened, rollouts)
    answers = stages.judge(opened, named(), rollouts, ANSWER)
    joint = findings.joint_safety(seen, answers)
    by_hand = {"p0": [1, 1, 2, 0], "p1": [1, 0, 2, 1]}  # of each prompt's 4 judged responses
    cells = [(SAFE, SAFE), (SAFE, UNSAFE), (UNSAFE, SAFE), (UNSAFE, UNSAFE)]
    for index, cell in enumerate(cells):
        both_prompts = sum(counts[index] for counts in by_hand.values())
        assert joint[cell].value == pytest.approx(both_prompts / 8)
        assert joint[cell].n == 2
    after_safe = findings.answer_given_trace(seen, answers, SAFE)
    assert after_safe.value == pytest.approx((1 / 2 + 1) / 2)
    after_unsafe = findings.answer_given_trace(seen, answers, UNSAFE)
    assert after_unsafe.value == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("follows", [True, False])
def test_a_swap_shows_whether_the_answer_follows_the_trace(
    tmp_path: Path, chat: Chat, follows: bool
) -> None:
    def script(request: Request, _: Sampling) -> Completion:
        bad = STEP in chat.decode(request.prefix_ids) if follows else request.seed % 2 == 0
        return Completion(request.key, chat.encode(HELP if bad else REFUSAL), "stop")

    sampler = world(chat)
    sampler.script = script
    opened = session(tmp_path, chat, sampler)
    rollouts = []
    for prompt in range(8):
        for number, trace in enumerate((PROOF, STEP, STEP)):
            rollouts.append(say(chat, trace, "", number, f"p{prompt}"))
    # The last prompt has no unsafe trace.
    rollouts = [r for r in rollouts if r.id not in ("p7-1", "p7-2")]
    swapped = findings.swap_traces(opened, judged(opened, rollouts), WHOLE, draws=20)
    rates = {}
    for trace, counts in swapped.items():
        total = sum(n for _, n in counts.values())
        assert (len(counts), total) == (7, 140)
        rates[trace] = sum(k for k, _ in counts.values()) / total
    assert list(rates) == [UNSAFE, SAFE]
    if follows:
        assert rates == {UNSAFE: 1.0, SAFE: 0.0}
    else:
        assert abs(rates[UNSAFE] - rates[SAFE]) < 0.2


def test_diversity_of_groups(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    rollouts = []
    for prompt, safe in {"p0": 0, "p1": 0, "p2": 4, "p3": 2}.items():
        for draw in range(4):
            trace = PROOF if draw < safe else STEP
            rollouts.append(say(chat, trace, "", draw, prompt, draw))
    for draw in range(4):  # p4 has a trace that nobody could judge
        rollouts.append(say(chat, PROOF if draw else UNJUDGED, "", draw, "p4", draw))
    diverse = findings.diversity(judged(opened, rollouts), 4)
    assert [share.value for share in diverse.shares] == [0.5, 0, 0.25, 0, 0.25]
    assert diverse.flat.value == 0.75
    assert diverse.flat.n == 4
    assert sum(diverse.alike) == pytest.approx(1)
    rate = 6 / 16
    assert diverse.alike[0] == pytest.approx((1 - rate) ** 4)
    assert math.isnan(findings.diversity(JudgedRollouts({}, [], []), 4).flat.value)


def test_chosen_takes_one_trace_a_prompt_and_the_papers_filter(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    rollouts = []
    for prompt, traces in {"p0": (STEP, STEP), "p1": (STEP, PROOF), "p2": (PROOF, STEP)}.items():
        for number, trace in enumerate(traces):
            rollouts.append(say(chat, trace, "", number, prompt))
    seen = judged(opened, rollouts)

    def choose(traces: JudgedRollouts, count: int, only_mixed: bool) -> list[str]:
        chosen = findings.choose_traces(traces, UNSAFE, count, 0, only_mixed=only_mixed)
        return [chosen_rollout.id for chosen_rollout in chosen]

    assert choose(seen, 9, only_mixed=False) == ["p0-0", "p1-0", "p2-1"]
    assert choose(seen, 9, only_mixed=True) == ["p1-0", "p2-1"]
    assert len(choose(seen, 1, only_mixed=True)) == 1
    none_mixed = JudgedRollouts(seen.prompts, rollouts[:2], seen.verdicts[:2])
    message = r"no unsafe trace on 0 prompts with traces of both kinds; raise"
    with pytest.raises(BadInput, match=message):
        choose(none_mixed, 1, only_mixed=True)


def turn(id_: str, sentence: int | None, *flags: str, token: int | None = 9) -> TurningPoint:
    return TurningPoint(id_, UNSAFE, token, sentence, None, flags)


def test_prevalence_tells_real_turns_from_locks_and_ends() -> None:
    turns = [
        turn("a", 2, "diffuse"),
        turn("b", 3, "end"),
        turn("c", 1, "recrossing"),
        turn("d", None, "start-locked", token=0),
        turn("e", None, "none", token=None),
    ]
    shares = findings.prevalence(turns, {key: f"p-{key}" for key in "abcde"})
    assert {kind: round(share.value * 5) for kind, share in shares.items()} == {
        "turns": 3,
        "before the end": 2,
        "start-locked": 1,
        "recrossing": 1,
        "diffuse": 1,
        "undecided": 0,
    }
    assert {share.n for share in shares.values()} == {5}
    # Three traces of one prompt, all of which turn, and two of another, which do not.
    shares = findings.prevalence(turns, {"a": "p0", "b": "p0", "c": "p0", "d": "p1", "e": "p1"})
    assert (shares["turns"].value, shares["turns"].n) == (0.5, 2)
