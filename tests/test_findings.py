"""Each finding comes back from a world where it was planted, and its control fails in a world where nothing was."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import scripted
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    HELP,
    PROOF,
    REFUSAL,
    STEP,
    TRIGGER,
    UNJUDGED,
    Phrase,
    named,
    r1_chat,
    rollout,
    session,
    world,
)

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.experiments import findings
from ipo_lib.records import (
    ANSWER,
    SAFE,
    UNSAFE,
    BadInput,
    CsrPoint,
    Rollout,
    Sentence,
    TurningPoint,
)
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stages import JudgedRollouts, Session
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.exhaustive import Trace

THINK, EOS = Sampling(max_tokens=400, until="think"), Sampling(max_tokens=400)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))


def judged(run: Session, rollouts: list[Rollout]) -> JudgedRollouts:
    return JudgedRollouts(named(), rollouts, stages.judge(run, named(), rollouts))


def say(chat: Chat, trace: str, answer: str, at: int, prompt: str = "p0", draw: int = 0) -> Rollout:
    one = rollout(chat, f"{ASIDE}\n{trace}\n{CLOSE}{answer}", id_=f"{prompt}-{at}", prompt=prompt)
    return Rollout(one.id, prompt, 0, one.token_ids, one.text, "stop", draw, "by hand")


def test_joint_safety_counts_both_parts_and_leaves_the_unjudged_out(
    tmp_path: Path, chat: Chat
) -> None:
    run = session(tmp_path, chat, world(chat))
    cases = (
        [(PROOF, REFUSAL)] * 2
        + [(PROOF, HELP)]
        + [(STEP, REFUSAL)] * 4
        + [(STEP, HELP)]
        + [(UNJUDGED, HELP)] * 3
    )
    seen = judged(run, [say(chat, *case, at, f"p{at % 2}") for at, case in enumerate(cases)])
    answers = stages.judge(run, named(), seen.rollouts, ANSWER)
    joint = findings.joint(seen, answers)
    by_hand = {"p0": [1, 1, 2, 0], "p1": [1, 0, 2, 1]}  # of each prompt's 4 judged responses
    for at, cell in enumerate([(SAFE, SAFE), (SAFE, UNSAFE), (UNSAFE, SAFE), (UNSAFE, UNSAFE)]):
        assert joint[cell].value == pytest.approx(
            sum(counts[at] for counts in by_hand.values()) / 8
        )
        assert joint[cell].n == 2
    assert findings.answer_given_trace(seen, answers, SAFE).value == pytest.approx((1 / 2 + 1) / 2)
    assert findings.answer_given_trace(seen, answers, UNSAFE).value == pytest.approx(
        (1 + 2 / 3) / 2
    )


@pytest.mark.parametrize("follows", [True, False])
def test_a_swap_shows_whether_the_answer_follows_the_trace(
    tmp_path: Path, chat: Chat, follows: bool
) -> None:
    def script(request: Request, _: Sampling) -> Completion:
        bad = STEP in chat.decode(request.prefix_ids) if follows else request.seed % 2 == 0
        return Completion(request.key, chat.encode(HELP if bad else REFUSAL), "stop")

    sampler = world(chat)
    sampler.script = script
    run = session(tmp_path, chat, sampler)
    rollouts = [
        say(chat, trace, "", at, f"p{prompt}")
        for prompt in range(8)
        for at, trace in enumerate((PROOF, STEP, STEP))
    ]
    rollouts = [
        r for r in rollouts if r.id not in ("p7-1", "p7-2")
    ]  # the last prompt has no unsafe trace
    swapped = findings.swap(run, judged(run, rollouts), EOS, draws=20)
    rates = {
        trace: sum(k for k, _ in counts.values()) / sum(n for _, n in counts.values())
        for trace, counts in swapped.items()
    }
    assert {
        trace: (len(counts), sum(n for _, n in counts.values()))
        for trace, counts in swapped.items()
    } == {UNSAFE: (7, 140), SAFE: (7, 140)}
    assert (
        (rates[UNSAFE], rates[SAFE]) == (1.0, 0.0)
        if follows
        else abs(rates[UNSAFE] - rates[SAFE]) < 0.2
    )


def test_diversity_of_groups(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    safe = {"p0": 0, "p1": 0, "p2": 4, "p3": 2}
    rollouts = [
        say(chat, PROOF if at < k else STEP, "", at, p, at)
        for p, k in safe.items()
        for at in range(4)
    ]
    rollouts += [say(chat, PROOF if at else UNJUDGED, "", at, "p4", at) for at in range(4)]
    found = findings.diversity(judged(run, rollouts), 4)
    assert [share.value for share in found.shares] == [0.5, 0, 0.25, 0, 0.25]
    assert found.flat.value == 0.75
    assert found.flat.n == 4  # p4 has a trace that nobody could judge
    assert sum(found.alike) == pytest.approx(1)
    rate = 6 / 16
    assert found.alike[0] == pytest.approx((1 - rate) ** 4)
    assert math.isnan(findings.diversity(JudgedRollouts({}, [], []), 4).flat.value)


def test_chosen_takes_one_trace_a_prompt_and_the_papers_filter(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    written = {"p0": (STEP, STEP), "p1": (STEP, PROOF), "p2": (PROOF, STEP)}
    rollouts = [
        say(chat, trace, "", at, prompt)
        for prompt, traces in written.items()
        for at, trace in enumerate(traces)
    ]
    seen = judged(run, rollouts)
    assert [r.id for r in findings.choose_traces(seen, UNSAFE, 9, 0, only_mixed=False)] == [
        "p0-0",
        "p1-0",
        "p2-1",
    ]
    assert [r.id for r in findings.choose_traces(seen, UNSAFE, 9, 0, only_mixed=True)] == [
        "p1-0",
        "p2-1",
    ]
    assert len(findings.choose_traces(seen, UNSAFE, 1, 0, only_mixed=True)) == 1
    none = JudgedRollouts(seen.prompts, rollouts[:2], seen.verdicts[:2])
    with pytest.raises(
        BadInput, match=r"no unsafe trace on 0 prompts with traces of both kinds; raise"
    ):
        findings.choose_traces(none, UNSAFE, 1, 0, only_mixed=True)
    assert [
        r.id
        for r in findings.unsafe_with_cue(
            seen, {r.id: 0 if r.id == "p2-1" else None for r in rollouts}
        )
    ] == ["p2-1"]
    with pytest.raises(BadInput, match="no unsafe trace with a cue"):
        findings.unsafe_with_cue(seen, dict.fromkeys((r.id for r in rollouts), None))


def turn(sentence: int | None, *flags: str, token: int | None = 9, key: str = "r") -> TurningPoint:
    return TurningPoint(key, UNSAFE, token, sentence, None, flags)


def test_prevalence_tells_real_turns_from_locks_and_ends() -> None:
    turns = [
        turn(2, "diffuse"),
        turn(3, "end"),
        turn(1, "recrossing"),
        turn(None, "start-locked", token=0),
        turn(None, "none", token=None),
    ]
    found = findings.prevalence(turns)
    assert {name: round(share.value * 5) for name, share in found.items()} == {
        "turns": 3,
        "before the end": 2,
        "start-locked": 1,
        "recrossing": 1,
        "diffuse": 1,
        "undecided": 0,
    }
    assert {share.n for share in found.values()} == {5}


SPANS = [Sentence(at, 10 * at, 10 * at + 10, 10 * at, 10 * at + 10) for at in range(5)]


def curve(key: str, *s: float) -> list[CsrPoint]:
    return [
        CsrPoint(key, 10 * at, round(100 * value), 100 - round(100 * value), 0)
        for at, value in enumerate(s)
    ]


def test_what_stands_at_a_cue(chat: Chat) -> None:
    one = rollout(chat, "x", id_="a")
    points = {"a": curve("a", 0.8, 0.8, 0.7, 0.05, 0.0, 0.0)}
    (row,) = findings.places_of_cues([one], {"a": SPANS}, {"a": 2}, points, {"a": turn(3, key="a")})
    assert (row.cue, row.turn, row.distance) == (20, 30, 1)
    assert row.other in (0, 10, 20, 30)
    assert row.drop == pytest.approx(0.65)
    assert row.elsewhere == pytest.approx(
        (0 + 0.1 + 0.05) / 3
    )  # the last sentence begins where S is settled
    rising = {"a": curve("a", 0.2, 0.4, 0.4, 0.9, 0.0, 0.0)}
    (up,) = findings.places_of_cues([one], {"a": SPANS}, {"a": 2}, rising, {"a": turn(3, key="a")})
    assert up.drop == pytest.approx(
        -0.5
    )  # a sentence that raises S is no cue, however far it moves it
    assert (
        findings.places_of_cues([one], {"a": SPANS}, {"a": None}, points, {"a": turn(3, key="a")})
        == []
    )
    (locked,) = findings.places_of_cues(
        [one], {"a": SPANS}, {"a": 2}, points, {"a": turn(None, "start-locked", token=0, key="a")}
    )
    assert locked.turn is locked.distance is None


def test_a_cue_at_the_turn_correlates_and_a_random_place_less(chat: Chat) -> None:
    rollouts = [rollout(chat, "x", id_=str(at), prompt=f"p{at}") for at in range(24)]
    cue = {r.id: 1 + at % 4 for at, r in enumerate(rollouts)}
    turns = {r.id: turn(cue[r.id], key=r.id) for r in rollouts}
    points = {
        r.id: curve(r.id, 0.5, *[0.5 if at < cue[r.id] else 0.0 for at in range(5)])
        for r in rollouts
    }
    spans = {r.id: SPANS for r in rollouts}
    rows = findings.places_of_cues(rollouts, spans, cue, points, turns)
    assert findings.correlation(rows).value == pytest.approx(1)
    chance = findings.placebo(
        [findings.places_of_cues(rollouts, spans, cue, points, turns, seed) for seed in range(50)]
    )
    assert 0 < chance.value < 0.9  # not 0: the earlier place is bound by the cue
    assert chance.low < chance.value < chance.high
    found = findings.drops(rows)
    assert found["at the cue"].value == pytest.approx(0.5)
    assert found["elsewhere"].value == 0
    assert found["difference"].low > 0
    assert found["difference"].n == 24
    assert math.isnan(findings.placebo([[]]).value)


def noisy_points(key: str, s: float, draws: int, random: np.random.Generator) -> list[CsrPoint]:
    """S estimated at the ends of five sentences, none of which moves it."""
    k = random.binomial(draws, s, 6)
    return [CsrPoint(key, 10 * at, int(one), draws - int(one), 0) for at, one in enumerate(k)]


def test_draws_that_choose_sentences_do_not_measure_them(chat: Chat) -> None:
    """S is 0.05 throughout. A sentence seen open by eight draws is seen too open by the same eight."""
    random = np.random.default_rng(0)
    rollouts = [rollout(chat, "x", id_=str(at), prompt=f"p{at}") for at in range(300)]
    choosing, measuring = (
        {r.id: noisy_points(r.id, 0.05, 8, random) for r in rollouts} for _ in range(2)
    )
    cue, spans = dict.fromkeys((r.id for r in rollouts), 2), {r.id: SPANS for r in rollouts}
    turns = {r.id: turn(3, key=r.id) for r in rollouts}
    once = findings.places_of_cues(rollouts, spans, cue, choosing, turns)
    apart = findings.places_of_cues(rollouts, spans, cue, measuring, turns, choosing=choosing)
    assert findings.drops(once)["at the cue"].low > 0.04  # what one set of draws makes up
    found = findings.drops(apart)["at the cue"]
    assert found.low < 0 < found.high
    assert abs(found.value) < 0.03


def test_a_design_says_what_it_can_show(chat: Chat) -> None:
    def rows(drops: list[float]) -> list[findings.CuePlace]:
        return [
            findings.CuePlace(str(at), f"p{at}", 1, 0, 1, 0, drop, 0.0)
            for at, drop in enumerate(drops)
        ]

    few, many = (findings.design(rows([0.0, 0.4] * count), 0.1) for count in (4, 60))
    assert (few.usable, many.usable) == (8, 120)
    assert few.power < 0.4 < 0.9 < many.power
    assert few.needed == pytest.approx(many.needed, rel=0.2)
    assert 25 < (many.needed or 0) < 45
    nothing = findings.design(rows([]), 0.1)
    assert (nothing.power, nothing.needed) == (0.0, None)
    assert findings.design([*rows([math.nan, 0.3])], 0.1).usable == 1


def test_recorded_curves_give_the_drop_without_a_draw(chat: Chat, tmp_path: Path) -> None:
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}"
    rollouts = [
        rollout(chat, text, id_=f"r{at}", prompt=f"p{at % 8}", finish="think") for at in range(8)
    ]
    run = session(tmp_path, chat, world(chat))
    seen = judged(run, rollouts)
    ends = tuple(span.token_end for span in stages.trace_sentences(run, rollouts[0]))
    size = len(rollouts[0].token_ids)
    curves = []
    for (
        r
    ) in rollouts:  # half of the continuations leave safely in the cue's sentence, none elsewhere
        p = [0.5 if at == ends[0] else 1.0 for at in range(size)]
        ways = [[(1.0, 1.0, 5)] if at == ends[0] else [] for at in range(size)]
        curves.append(Curve(Trace(r.id, r.token_ids, ends, tuple(p), UNSAFE), ways))
    found = findings.recorded_cues(run, seen, curves, {"phrase": Phrase()}, CsrSettings())["phrase"]
    assert len(found) == 8
    assert {row.drop for row in found} == {0.5}
    assert findings.drops(found)["at the cue"].value == 0.5
    other = [
        dataclasses.replace(r, token_ids=r.token_ids[:-3], text="another draw") for r in rollouts
    ]
    drifted = dataclasses.replace(
        seen, rollouts=other
    )  # as 16-bit draws of another machine, under the same ids
    again = findings.recorded_cues(run, drifted, curves, {"phrase": Phrase()}, CsrSettings())[
        "phrase"
    ]
    assert [(row.prompt_id, row.cue, row.drop) for row in again] == [
        (row.prompt_id, row.cue, row.drop) for row in found
    ]
    assert {row.rollout_id for row in again}.isdisjoint({row.rollout_id for row in found})
    assert findings.recorded_cues(
        run, JudgedRollouts(named(), [], []), curves, {"phrase": Phrase()}, CsrSettings()
    ) == {"phrase": []}


def test_risk_by_cue(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    rollouts = [say(chat, trace, "", at) for at, trace in enumerate((STEP, STEP, PROOF, PROOF))]
    risk = findings.by_cue(judged(run, rollouts), {"p0-0": 1, "p0-1": 1, "p0-2": 1, "p0-3": None})
    assert (risk[True].value, risk[False].value) == (pytest.approx(2 / 3), 0)


def losers(chat: Chat, count: int = 8) -> list[Rollout]:
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}"
    return [rollout(chat, text, id_=f"l{at}", prompt=f"p{at}") for at in range(count)]


def test_a_chain_falls_round_by_round_as_planted(tmp_path: Path, chat: Chat) -> None:
    """A trigger rescues half of the traces each time; the neutral sentence, which plants nothing, rescues none."""
    run = session(tmp_path, chat, world(chat, {ASIDE: 0.0, TRIGGER: 0.5}))
    many = {
        f"p{at}": scripted.Prompt(f"p{at}", f"Plan {at}?", "scripted", True) for at in range(120)
    }
    texts = {"trigger": TRIGGER, "neutral": ASIDE}
    found = findings.chain(run, many, losers(chat, 120), texts, Phrase(), THINK, 3)
    rates = {
        name: [sum(k for k, _ in counts.values()) / len(counts) for counts in rows]
        for name, rows in found.items()
    }
    assert rates["neutral"] == [1, 1, 1, 1]
    assert rates["trigger"][0] == 1
    assert rates["trigger"][1] == pytest.approx(0.5, abs=0.15)
    assert rates["trigger"][2] <= rates["trigger"][1]


def test_a_trace_without_a_cue_stays_as_it_is(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    plain = rollout(chat, f"{ASIDE}\n{STEP}\n{CLOSE}", id_="plain")
    found = findings.chain(run, named(), [plain], {"trigger": TRIGGER}, Phrase(), THINK, 2)
    assert found == {"trigger": [{"p0": (1, 1)}] * 3}


@pytest.mark.parametrize("causes", [True, False])
def test_controls_tell_a_cause_from_none(tmp_path: Path, chat: Chat, causes: bool) -> None:
    s = {ASIDE: 0.3, TRIGGER: 1.0 if causes else 0.3, CUE: 0.3, "": 0.3}
    run = session(tmp_path, chat, world(chat, s))
    many = {
        f"p{at}": scripted.Prompt(f"p{at}", f"Plan {at}?", "scripted", True) for at in range(60)
    }
    bad = losers(chat, 60)
    cue = stages.find_cues(run, many, bad, Phrase())
    found = findings.controls(
        run,
        many,
        bad,
        cue,
        {"trigger": [TRIGGER, "Wait, someone may get hurt. "], "neutral": [ASIDE]},
        THINK,
    )
    assert list(found) == ["trigger", "neutral", "trigger, earlier sentence"]
    assert {tuple(counts) for counts in found.values()} == {tuple(many)}
    rates = {
        kind: sum(k for k, _ in counts.values()) / sum(n for _, n in counts.values())
        for kind, counts in found.items()
    }
    assert rates["neutral"] == pytest.approx(0.3, abs=0.2)
    assert (rates["trigger"] == 1) is causes


def test_backwards_a_cue_makes_a_safe_trace_unsafe(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat, {CUE: 0.0, TRIGGER: 1.0, ASIDE: 1.0}))
    good = [
        rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}", id_=f"g{at}", prompt=f"p{at}")
        for at in range(4)
    ]
    points = stages.measure_csr(run, named(), good, CsrSettings(draws=4), THINK)
    assert {point.s for rows in points.values() for point in rows} >= {1.0}
    turned = {r.id: TurningPoint(r.id, SAFE, 9, 1 if r.id != "g3" else None, None) for r in good}
    found = findings.reverse(
        run, named(), turned, good, {"cue": [CUE], "neutral": [ASIDE]}, THINK, 5
    )
    assert found == {
        "cue": dict.fromkeys(("p0", "p1", "p2"), (5, 5)),
        "neutral": dict.fromkeys(("p0", "p1", "p2"), (0, 5)),
    }


def test_merged_counts_keep_the_prompt_as_the_unit() -> None:
    assert findings.merged([{"p0": (1, 1), "p1": (0, 1)}, {"p0": (0, 1), "p2": (0, 0)}]) == {
        "p0": (1, 2),
        "p1": (0, 1),
        "p2": (0, 0),
    }


def test_what_nobody_could_judge_is_no_cure(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    sampler.script = lambda request, _: Completion(
        request.key, chat.encode(UNJUDGED + CLOSE), "think"
    )
    run, bad = session(tmp_path, chat, sampler), losers(chat, 2)
    found = findings.chain(run, named(), bad, {"trigger": TRIGGER}, Phrase(), THINK, 2)
    assert found == {"trigger": [{"p0": (1, 1), "p1": (1, 1)}] * 3}
    cue = stages.find_cues(run, named(), bad, Phrase())
    assert findings.controls(run, named(), bad, cue, {"trigger": [TRIGGER]}, THINK)["trigger"] == {
        "p0": (0, 1),
        "p1": (0, 1),
    }


def test_common_sentences_come_by_frequency_then_text(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    texts = ("B here.", "A here.", "B here.", "C here.")
    rollouts = [
        rollout(chat, f"{ASIDE}\n{text}\n{CLOSE}", id_=str(at)) for at, text in enumerate(texts)
    ]
    at = {"0": 1, "1": 1, "2": 1, "3": None}
    assert findings.frequent_sentences(run, rollouts, at, 9) == ["B here.", "A here."]
    assert findings.frequent_sentences(run, rollouts, at, 1) == ["B here."]
