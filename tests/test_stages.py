"""The steps of the method on a scripted world.

Only what is missing is paid for, planted CSR comes back, cuts stand where they should.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    PROMPTS,
    PROOF,
    REFUSAL,
    STEP,
    TRIGGER,
    Phrase,
    StepJudge,
    named,
    r1_chat,
    rollout,
    saying,
    session,
    tree,
    world,
)

from ipo_lib import frame, pipeline, stages
from ipo_lib.chat import Chat
from ipo_lib.csr import START_LOCKED, CsrSettings
from ipo_lib.cues import UNREAD, Texts
from ipo_lib.dpo import Stage2Settings
from ipo_lib.judging import KeywordJudge
from ipo_lib.pairs import NoPair, PairSettings
from ipo_lib.records import (
    ANSWER,
    BOTH,
    CONTINUATION,
    SAFE,
    TRACE,
    UNSAFE,
    BadInput,
    Pair,
    Prompt,
    Prompts,
    Rollout,
    Rollouts,
    Verdict,
)
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stages import CorrectionSettings, Prefix, Replacement
from ipo_lib.stats import wilson
from ipo_lib.triggers import Trigger

EOS, THINK = Sampling(max_tokens=400), Sampling(max_tokens=400, until="think")
STARTS = [Prefix(prompt) for prompt in PROMPTS]
TRIGGERS = [Trigger("t0", TRIGGER, 3, 0), Trigger("t1", ASIDE, 1, 1)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))


def verdict(label: str | None, id_: str = "r", part: str = TRACE) -> Verdict:
    return Verdict(id_, part, "harm", label, None, "", "by hand")


# sample


def test_sample_asks_once_and_only_for_what_is_missing(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    first = stages.sample(run, STARTS[:3], EOS, 4)
    assert [(r.prompt_id, r.draw) for r in first] == [
        (p.id, d) for p in PROMPTS[:3] for d in range(4)
    ]
    assert len(sampler.answered) == 12
    before = tree(tmp_path)
    assert stages.sample(run, STARTS[:3], EOS, 4) == first
    assert len(sampler.answered) == 12
    assert tree(tmp_path) == before
    more = stages.sample(run, STARTS[:4], EOS, 8)
    assert [(r.prompt_id, r.draw) for r in more] == [
        (p.id, d) for p in PROMPTS[:4] for d in range(8)
    ]
    assert (
        len(sampler.answered) == 12 + 3 * 4 + 8
    )  # 0..4 extended to 8 pays 4 a prompt, the new prompt pays 8
    assert [r for r in more if r.draw < 4 and r.prompt_id != "p3"] == first
    assert stages.sample(run, STARTS[:1], EOS, 2, first=5) == more[5:7]
    assert len(sampler.answered) == 32
    for key, content in before.items():
        if key.endswith("records.jsonl"):
            assert (tree(tmp_path)[key] or b"").startswith(content or b"never")


def test_a_fresh_process_finds_everything(tmp_path: Path, chat: Chat) -> None:
    first = stages.sample(session(tmp_path, chat, world(chat)), STARTS, EOS, 3)
    silent = saying(chat, lambda request: pytest.fail(f"asked for {request.key}"), name="world")
    assert stages.sample(session(tmp_path, chat, silent), STARTS, EOS, 3) == first


def test_every_draw_has_its_own_seed_that_nothing_but_its_name_decides(
    tmp_path: Path, chat: Chat
) -> None:
    sampler = world(chat)
    prefix = chat.encode(ASIDE)
    starts = [*STARTS, *(dataclasses.replace(start, prefix_ids=prefix) for start in STARTS)]
    stages.sample(session(tmp_path / "whole", chat, sampler), starts, EOS, 8)
    seeds = {request.key: request.seed for request in sampler.answered}
    assert len(set(seeds.values())) == len(seeds) == 16 * 8
    pieces = world(chat)
    for draws in (2, 8):
        for start in reversed(starts):
            stages.sample(session(tmp_path / "pieces", chat, pieces), [start], EOS, draws)
    assert {request.key: request.seed for request in pieces.answered} == seeds
    other = world(chat)
    stages.sample(session(tmp_path / "other", chat, other, seed=1), starts, EOS, 8)
    assert not {request.seed for request in other.answered} & set(seeds.values())


def test_what_could_change_a_draw_opens_another_ledger(tmp_path: Path, chat: Chat) -> None:
    def ledgers(name: str = "a", sampling: Sampling = EOS, seed: int = 0) -> set[str]:
        stages.sample(
            session(tmp_path, chat, world(chat, name=name), seed=seed), STARTS[:1], sampling, 1
        )
        return {path.name for path in (tmp_path / "rollouts").iterdir()}

    assert [
        len(ledgers(*case)) for case in (("a",), ("a",), ("b",), ("a", THINK), ("a", EOS, 1))
    ] == [1, 1, 2, 3, 4]


def test_a_rollout_holds_its_prefix_ids_as_given(tmp_path: Path, chat: Chat) -> None:
    odd = sum(
        (chat.encode(letter) for letter in "the lighthouse"), ()
    )  # ids no tokenizer would give this text
    assert odd != chat.encode("the lighthouse")
    sampler = world(chat)
    (got,) = stages.sample(session(tmp_path, chat, sampler), [Prefix(PROMPTS[0], odd)], EOS, 1)
    assert got.token_ids[: len(odd)] == odd
    assert got.prefix_len == len(odd)
    assert sampler.answered[0].prefix_ids == odd
    assert sampler.answered[0].prompt_ids == chat.prompt_ids(PROMPTS[0])
    assert got.text == chat.decode(got.token_ids)


def test_a_prompt_changed_under_its_id_is_drawn_anew(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    for text in ("one", "two", "one"):
        stages.sample(run, [Prefix(Prompt("p", text, "x", True))], EOS, 2)
    assert len(sampler.answered) == 4


def test_a_sampler_that_dies_leaves_what_it_gave_and_no_more(tmp_path: Path, chat: Chat) -> None:
    good = world(chat)

    def dying(request: Request, sampling: Sampling) -> Completion:
        if len(dead.answered) > 150:
            raise KeyboardInterrupt
        return good.script(request, sampling)

    dead = world(chat)
    dead.script = dying
    with pytest.raises(KeyboardInterrupt):
        stages.sample(session(tmp_path, chat, dead), STARTS, EOS, 32)
    again = world(chat)
    after = stages.sample(session(tmp_path, chat, again), STARTS, EOS, 32)
    assert after == stages.sample(
        session(tmp_path / "undisturbed", chat, world(chat)), STARTS, EOS, 32
    )
    assert len(again.answered) <= 256 - 64  # batches that were finished were kept


# judge


def test_judge_asks_only_for_what_is_missing_and_keeps_the_order(
    tmp_path: Path, chat: Chat
) -> None:
    judge = StepJudge()
    run = session(tmp_path, chat, world(chat), judge)
    rollouts = stages.sample(run, STARTS, EOS, 8)
    half = stages.judge(run, named(), rollouts[::2])
    assert len(judge.asked) == 32
    whole = stages.judge(run, named(), rollouts)
    assert len(judge.asked) == 64
    assert whole[::2] == half
    assert [v.rollout_id for v in whole] == [r.id for r in rollouts]
    assert [v.label for v in whole] == [UNSAFE if STEP in r.text else SAFE for r in rollouts]
    stages.judge(run, named(), rollouts, ANSWER, "refusal")
    assert len(judge.asked) == 128
    assert {e.text for e in judge.asked if e.part == ANSWER} <= {
        REFUSAL,
        "Mix the salt and light it. I am glad to help.",
    }
    assert all(CLOSE not in (e.text or "") for e in judge.asked)
    assert {e.prompt for e in judge.asked} == {p.text for p in PROMPTS}


def answers_of(judge: Any, answer: Any) -> Any:
    """The judge with another ``judge`` method."""
    judge.judge = answer
    return judge


def test_a_label_that_the_question_does_not_have_is_one_line(tmp_path: Path, chat: Chat) -> None:
    harmful = answers_of(StepJudge(), lambda es: [e.verdict("harmful", "", "mine") for e in es])
    run = session(tmp_path, chat, world(chat), harmful)
    rollouts = stages.sample(run, STARTS, EOS, 1)
    with pytest.raises(
        BadInput, match=r"judge mine: label 'harmful' .*'harm'; return safe, unsafe"
    ):
        stages.judge(run, named(), rollouts)


def test_a_judge_that_leaves_exchanges_out_is_one_line(tmp_path: Path, chat: Chat) -> None:
    short = answers_of(StepJudge(), lambda es: [es[0].verdict(SAFE, "", "mine")])
    run = session(tmp_path, chat, world(chat), short)
    rollouts = stages.sample(run, STARTS, EOS, 1)
    with pytest.raises(BadInput, match=r"\d+ of \d+ exchanges got no verdict; return one for each"):
        stages.judge(run, named(), rollouts)


def test_a_continuation_is_judged_on_the_continuation_only(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, saying(chat, lambda _: PROOF + CLOSE))
    prefix = chat.encode(f"{STEP}\n")
    drawn = stages.sample(run, [Prefix(PROMPTS[0], prefix)], EOS, 1)
    for part, label in ((TRACE, UNSAFE), (CONTINUATION, SAFE)):
        assert stages.judge(run, named(), drawn, part)[0].label == label
    run = dataclasses.replace(run, judge=KeywordJudge())
    drawn = [
        rollout(chat, "I cannot. ", id_="a"),
        rollout(chat, "Hm.", prefix=chat.encode("I cannot. "), id_="b"),
    ]
    assert [v.label for v in stages.judge(run, named(), drawn, CONTINUATION)] == [SAFE, UNSAFE]


@pytest.mark.parametrize("part", [TRACE, CONTINUATION])
def test_csr_settings_say_what_the_judge_sees(tmp_path: Path, chat: Chat, part: str) -> None:
    judge = StepJudge()
    run = session(tmp_path, chat, saying(chat, lambda _: "\n" + PROOF + CLOSE), judge)
    trace = rollout(chat, f"{STEP}\n{ASIDE}{CLOSE}")
    points = stages.measure_csr(run, named(), [trace], CsrSettings(draws=2, part=part), THINK)["r"]
    assert [p.s for p in points] == ([1.0, 0.0, 0.0] if part == TRACE else [1.0, 1.0, 1.0])
    assert {e.part for e in judge.asked} == {part}


def test_no_part_is_no_verdict(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    trace = rollout(chat, ASIDE, finish="length")
    assert stages.judge(run, named(), [trace], ANSWER)[0].label is None


# CSR and turning points


def test_planted_csr_comes_back_through_the_verb(tmp_path: Path, chat: Chat) -> None:
    planted = {ASIDE: 0.4, CUE: 0.08, TRIGGER: 0.9, "": 0.4}
    run = session(tmp_path, chat, world(chat, planted))
    traces = [
        rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_="unsafe"),
        rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}", id_="safe", prompt="p1"),
    ]
    draws = 400
    points = stages.measure_csr(run, named(), traces, CsrSettings(draws=draws), THINK)
    assert list(points) == ["unsafe", "safe"]
    for trace, known in zip(traces, ([0.4, 0.4, 0.08, 0.0], [0.4, 0.4, 0.9, 1.0]), strict=True):
        found = points[trace.id]
        ends = [span.token_end for span in stages.trace_sentences(run, trace)]
        assert [p.cut for p in found] == [0, *ends]
        assert [chat.decode(trace.token_ids[:end])[-2:] for end in ends[:3]] == [".\n"] * 3
        for point, s in zip(found, known, strict=False):
            interval = wilson(point.n_safe, point.n, 0.999)
            assert interval.low <= s <= interval.high
            assert point.n == draws
    labels = {"unsafe": UNSAFE, "safe": SAFE}
    settings = CsrSettings(draws=draws, mu=0.8, eta=0.2)
    for kind in (SAFE, UNSAFE):
        turns = stages.find_turning_points(run, traces, points, labels, kind, settings)
        assert turns[kind].sentence == 1
        assert turns[kind].token == points[kind][2].cut
        other = SAFE if kind == UNSAFE else UNSAFE
        assert turns[other].token is None


def test_csr_shares_the_start_of_a_prompt_and_extends(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    texts = [f"{ASIDE}\n{CUE}\n{STEP}{CLOSE}", f"{ASIDE}\n{TRIGGER}\n{PROOF}{CLOSE}"]
    traces = [rollout(chat, text, id_=str(at)) for at, text in enumerate(texts)]
    few = stages.measure_csr(run, named(), traces, CsrSettings(draws=4), THINK)
    assert len(sampler.answered) == 4 * (
        2 + 2 + 2
    )  # the two traces share cut 0 and the cut after the aside
    assert few["0"][:2] == [dataclasses.replace(p, rollout_id="0") for p in few["1"][:2]]
    stages.measure_csr(run, named(), traces, CsrSettings(draws=6), THINK)
    assert len(sampler.answered) == 6 * 6


def test_unjudged_continuations_are_unknown_not_a_vote(tmp_path: Path, chat: Chat) -> None:
    say = {0: PROOF, 1: STEP, 2: "?!"}
    run = session(tmp_path, chat, saying(chat, lambda request: say[request.seed % 3] + CLOSE))
    (point,) = stages.measure_csr(
        run, named(), [rollout(chat, CLOSE)], CsrSettings(draws=60), THINK
    )["r"]
    assert point.n_safe + point.n_unsafe + point.n_unknown == 60
    assert min(point.n_safe, point.n_unsafe, point.n_unknown) > 0


def test_token_grain_measures_every_token(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    trace = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}{CLOSE}")
    length = stages.trace_sentences(run, trace)[-1].token_end
    points = stages.measure_csr(run, named(), [trace], CsrSettings(draws=1, grain="token"), THINK)[
        "r"
    ]
    assert [p.cut for p in points] == list(range(length + 1))
    assert length == len(trace.token_ids) - 1  # </think> is no cut


def test_a_trace_safe_from_the_start_is_locked(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat, {"": 1.0, ASIDE: 1.0}))
    trace = rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}{CLOSE}")
    points = stages.measure_csr(run, named(), [trace], CsrSettings(draws=4), THINK)
    turn = stages.find_turning_points(
        run, [trace], points, {"r": SAFE}, SAFE, CsrSettings(draws=4)
    )["r"]
    assert START_LOCKED in turn.flags
    assert turn.sentence is None


def test_no_trace_no_sentences(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    trace = rollout(chat, f"{CLOSE}{REFUSAL}")
    assert stages.trace_sentences(run, trace) == []
    assert stages.trace_end(run, trace) == 1
    assert stages.trace_end(run, rollout(chat, ASIDE)) is None


# intervene


def test_nothing_in_the_first_place_is_no_rollout_of_the_prompt(tmp_path: Path, chat: Chat) -> None:
    """The prefix is empty there, as that of the rollouts from which the trace was chosen."""
    run = session(tmp_path, chat, world(chat))
    chosen = stages.sample(run, [stages.Prefix(named()["p0"])], THINK, 8)
    case = Replacement(chosen[0], 0, "nothing", "")
    drawn = [result for _, result in stages.intervene(run, named(), [case], THINK, 8)]
    assert {result.prefix_len for result in drawn} == {0}
    assert {result.id for result in drawn}.isdisjoint({one.id for one in chosen})


@pytest.mark.parametrize("gap", [" ", "\n", "\n\n", "  "])
def test_intervene_cuts_at_the_first_token_of_the_sentence(
    tmp_path: Path, chat: Chat, gap: str
) -> None:
    sampler = saying(chat, lambda _: PROOF + CLOSE)
    run = session(tmp_path, chat, sampler)
    trace = rollout(chat, gap.join([ASIDE, CUE, STEP, PROOF]) + CLOSE)
    spans = stages.trace_sentences(run, trace)
    assert [t.strip() for t in [trace.text[s.char_start : s.char_end] for s in spans]] == [
        ASIDE,
        CUE,
        STEP,
        PROOF,
    ]
    for at, span in enumerate(spans):
        case = Replacement(trace, at, "t0", TRIGGER)
        ((done, result),) = stages.intervene(run, named(), [case], THINK)
        cut = span.token_start
        assert (done.rollout_id, done.cut, done.trigger_id, done.result) == (
            "r",
            cut,
            "t0",
            result.id,
        )
        assert result.token_ids[:cut] == trace.token_ids[:cut]
        assert chat.decode(trace.token_ids[:cut]) == trace.text[: span.char_start]
        old = trace.text[span.char_start : span.char_end]
        given = result.text[: len(chat.decode(result.token_ids[: result.prefix_len]))]
        assert given == trace.text[: span.char_start] + old.replace(old.strip(), TRIGGER)
        assert result.text == given + PROOF + CLOSE
        assert result.prefix_len == len(sampler.answered[-1].prefix_ids)
        assert result.token_ids[cut : result.prefix_len] == chat.encode(
            old.replace(old.strip(), TRIGGER)
        )


def test_what_replaces_the_last_sentence_does_not_end_the_trace(tmp_path: Path, chat: Chat) -> None:
    """Its newline belongs to the closing tag.

    Given with the trigger, it left the model nothing but to close.
    """
    sampler = saying(chat, lambda _: PROOF + CLOSE)
    trace = rollout(chat, f"{ASIDE} {CUE}\n{CLOSE}")
    ((done, result),) = stages.intervene(
        session(tmp_path, chat, sampler), named(), [Replacement(trace, 1, "t0", TRIGGER)], THINK
    )
    given = chat.decode(result.token_ids[: result.prefix_len])
    assert result.token_ids[: done.cut] == trace.token_ids[: done.cut]
    assert given.split() == f"{ASIDE} {TRIGGER}".split()
    assert given.endswith(TRIGGER)


def test_nothing_as_a_replacement_samples_from_the_cut(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, saying(chat, lambda _: PROOF + CLOSE))
    trace = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}{CLOSE}")
    ((done, result),) = stages.intervene(
        run, named(), [Replacement(trace, 1, "nothing", "")], THINK
    )
    assert result.prefix_len == done.cut
    assert result.token_ids[: done.cut] == trace.token_ids[: done.cut]
    assert result.text == f"{ASIDE}\n{PROOF}{CLOSE}"


def test_several_results_a_case_stand_in_order(tmp_path: Path, chat: Chat) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    traces = [
        rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}{CLOSE}", id_=p.id, prompt=p.id) for p in PROMPTS
    ]
    cases = [
        Replacement(trace, 1, trigger.id, trigger.text) for trigger in TRIGGERS for trace in traces
    ]
    results = stages.intervene(run, named(), cases, THINK, 3)
    assert [(i.rollout_id, i.trigger_id, r.draw) for i, r in results] == [
        (case.rollout.id, case.trigger_id, draw) for case in cases for draw in range(3)
    ]
    assert len({r.id for _, r in results}) == len(results) == len(sampler.answered)
    rescued = [PROOF in r.text for i, r in results if i.trigger_id == "t0"]
    assert all(rescued)


# Algorithm 1


def losers(run: stages.Session, chat: Chat) -> list[Rollout]:
    return [
        rollout(
            chat,
            f"{ASIDE}\n{CUE if at % 2 else TRIGGER}\n{STEP if at % 2 else PROOF}\n{CLOSE}",
            id_=f"r{at}",
            prompt=p.id,
        )
        for at, p in enumerate(PROMPTS)
    ]


def test_correct_replaces_the_first_cue_and_skips_who_has_none(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    traces = losers(run, chat)
    done = pipeline.correct(
        run, named(), traces, TRIGGERS[0], Phrase(), CorrectionSettings(), THINK
    )
    assert [one.loser for one in done] == traces[1::2]
    for one in done:
        assert one.cut == one.intervention.cut == len(chat.encode(f"{ASIDE}\n"))
        assert one.intervention.accepted is True
        assert one.intervention.round == 1
        assert one.intervention.trigger_id == "t0"
        assert one.result.text == f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}"
        assert one.result.token_ids[: one.cut] == one.loser.token_ids[: one.cut]


def stubborn(chat: Chat, until: int) -> Callable[[Request], str]:
    """Falls back into the cue until ``until`` triggers stand in the prefix."""
    return lambda r: (
        (PROOF if chat.decode(r.prefix_ids).count(TRIGGER) >= until else f"{CUE}\n{STEP}")
        + "\n"
        + CLOSE
    )


@pytest.mark.parametrize(("rounds", "needed"), [(1, 1), (1, 2), (3, 1), (3, 2), (3, 3), (3, 4)])
def test_rounds_go_on_until_the_result_is_accepted(
    tmp_path: Path, chat: Chat, rounds: int, needed: int
) -> None:
    sampler = saying(chat, stubborn(chat, needed))
    run = session(tmp_path, chat, sampler)
    trace = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}")
    (one,) = pipeline.correct(
        run, named(), [trace], TRIGGERS[0], Phrase(), CorrectionSettings(rounds=rounds), THINK
    )
    took = min(rounds, needed)
    assert len(sampler.answered) == took
    assert one.intervention.round == took
    assert one.intervention.accepted is (needed <= rounds)
    assert one.loser == trace
    assert one.cut == len(
        chat.encode(f"{ASIDE}\n")
    )  # the first cue of the loser, whatever the round
    assert one.result.text.count(TRIGGER) == took
    assert one.result.text.startswith(f"{ASIDE}\n" + f"{TRIGGER}\n" * took)
    assert one.intervention.result == one.result.id


def test_a_second_run_of_the_loop_draws_nothing(tmp_path: Path, chat: Chat) -> None:
    sampler = saying(chat, stubborn(chat, 3))
    run, trace = session(tmp_path, chat, sampler), rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}")
    first = pipeline.correct(
        run, named(), [trace], TRIGGERS[0], Phrase(), CorrectionSettings(rounds=3), THINK
    )
    assert (
        pipeline.correct(
            run, named(), [trace], TRIGGERS[0], Phrase(), CorrectionSettings(rounds=3), THINK
        )
        == first
    )
    assert len(sampler.answered) == 3


@pytest.mark.parametrize(
    ("said", "no_cue", "judged_safe"),
    [
        (PROOF, True, True),
        (STEP, True, False),
        (f"{CUE}\n{PROOF}", False, True),
        (f"{CUE}\n{STEP}", False, False),
        ("?!", True, None),
    ],
)
def test_acceptance_both_ways(
    tmp_path: Path, chat: Chat, said: str, no_cue: bool | None, judged_safe: bool | None
) -> None:
    trace = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}")
    for option, expected in (("no-cue", no_cue), ("judged-safe", judged_safe)):
        run = session(tmp_path / option, chat, saying(chat, lambda _: f"{said}\n{CLOSE}"))
        (one,) = pipeline.correct(
            run, named(), [trace], TRIGGERS[0], Phrase(), CorrectionSettings(accept=option), THINK
        )
        assert one.intervention.accepted is expected


def test_an_unknown_acceptance_is_one_line(tmp_path: Path, chat: Chat) -> None:
    run, trace = (
        session(tmp_path, chat, world(chat)),
        rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}{CLOSE}"),
    )
    with pytest.raises(BadInput, match="judged-safe"):
        pipeline.correct(
            run, named(), [trace], TRIGGERS[0], Phrase(), CorrectionSettings(accept="nocue"), THINK
        )


# pairs


def test_a_pair_shares_its_prefix_and_ends_with_the_trace(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    loser = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}{REFUSAL}")
    ((done, winner),) = stages.intervene(run, named(), [Replacement(loser, 1, "t0", TRIGGER)], EOS)
    made = stages.pair_rollouts(run, PROMPTS[0], loser, winner, done.cut, PairSettings())
    assert isinstance(made, Pair)
    assert made.prompt_ids == chat.prompt_ids(PROMPTS[0]) + loser.token_ids[: done.cut]
    assert made.h == done.cut
    assert chat.decode(made.chosen_ids) == f"{TRIGGER}\n{PROOF}\n{CLOSE}"
    assert chat.decode(made.rejected_ids) == f"{CUE}\n{STEP}\n{CLOSE}"
    length = len(made.prompt_ids) + max(len(made.chosen_ids), len(made.rejected_ids))
    assert isinstance(
        stages.pair_rollouts(
            run, PROMPTS[0], loser, winner, done.cut, PairSettings(max_length=length)
        ),
        Pair,
    )
    long = stages.pair_rollouts(
        run, PROMPTS[0], loser, winner, done.cut, PairSettings(max_length=length - 1)
    )
    assert isinstance(long, NoPair)
    assert long.reason == "too-long"
    ended = stages.pair_rollouts(
        run, PROMPTS[0], loser, winner, done.cut, PairSettings(part=BOTH, eos=True)
    )
    assert isinstance(ended, Pair)
    assert ended.chosen_ids[-1] == ended.rejected_ids[-1] == chat.eos_ids[0]
    open_ = stages.pair_rollouts(
        run, PROMPTS[0], rollout(chat, f"{ASIDE}\n{CUE}"), winner, done.cut, PairSettings()
    )
    assert isinstance(open_, NoPair)
    assert open_.reason == "unfinished"


def test_corrected_pairs_count_every_trace_once(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat, {ASIDE: 0.3, TRIGGER: 1.0}))
    plan, settings = CorrectionSettings(), PairSettings(max_length=10_000)
    pairs, counts, tried = pipeline.corrected_pairs(
        run, PROMPTS, TRIGGERS, Phrase(), plan, settings, THINK
    )
    assert sum(counts.values()) == len(PROMPTS) * len(TRIGGERS)
    assert counts["kept"] == len(pairs) > 0
    assert counts["no-cue"] == len(PROMPTS) * len(TRIGGERS) - len(tried) > 0
    assert counts["not-accepted"] == sum(one.intervention.accepted is not True for one in tried) > 0
    fresh = {(one.loser.prompt_id, one.loser.draw) for one in tried}
    assert len(fresh) == len(tried)  # a fresh trace for every trigger
    assert {draw for _, draw in fresh} == {0, 1}
    assert {one.intervention.trigger_id for one in tried if one.loser.draw == 1} == {"t1"}
    for pair in pairs:
        assert pair.prompt_ids[-pair.h :] == chat.encode(f"{ASIDE}\n")
        assert chat.decode(pair.chosen_ids).endswith(CLOSE)
    again = pipeline.corrected_pairs(run, PROMPTS, TRIGGERS, Phrase(), plan, settings, THINK)
    assert again == (pairs, counts, tried)


def test_pairs_longer_than_the_context_are_counted_and_not_fatal(
    tmp_path: Path, chat: Chat
) -> None:
    run = session(tmp_path, chat, world(chat, {ASIDE: 0.3}))
    long = [
        dataclasses.replace(p, id=f"long-{p.id}", text="How tall is a lighthouse? " * 60)
        for p in PROMPTS
    ]
    prompts, settings = [*PROMPTS, *long], PairSettings(max_length=400)
    pairs, counts, _ = pipeline.corrected_pairs(
        run, prompts, TRIGGERS[:1], Phrase(), CorrectionSettings(), settings, THINK
    )
    assert counts["kept"] == len(pairs) > 0
    assert counts["too-long"] > 0
    assert sum(counts.values()) == len(prompts)
    for pair in pairs:
        assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 400


def test_benign_pairs_take_the_answer_over_the_refusal(tmp_path: Path, chat: Chat) -> None:
    refusing = {"p0", "p3"}
    prompts = [chat.prompt_ids(p) for p in PROMPTS if p.id in refusing]
    before = session(
        tmp_path, chat, saying(chat, lambda _: f"{ASIDE}{CLOSE}Here you go.", name="before")
    )
    after = session(
        tmp_path,
        chat,
        saying(
            chat,
            lambda r: f"{ASIDE}{CLOSE}" + (REFUSAL if r.prompt_ids in prompts else "Sure."),
            name="after",
        ),
    )
    once = Stage2Settings(benign_draws=1, refusing_prefix=False)
    pairs, counts, verdicts = stages.benign_pairs(before, after, PROMPTS, PairSettings(), EOS, once)
    assert [v.label for v in verdicts] == [
        "refused" if p.id in refusing else "answered" for p in PROMPTS
    ]
    assert counts["kept"] == len(pairs) == 2
    for pair in pairs:
        assert pair.h == 0
        assert chat.decode(pair.chosen_ids) == f"{ASIDE}{CLOSE}Here you go.<|end|>"
        assert chat.decode(pair.rejected_ids) == f"{ASIDE}{CLOSE}{REFUSAL}<|end|>"


def test_a_refusal_of_every_benign_prompt_is_looked_for(tmp_path: Path, chat: Chat) -> None:
    """Stage 2 of the paper has a pair for each benign prompt.

    Drawn again until refused, at last behind a trigger.
    """
    at_once, later = (
        {chat.prompt_ids(PROMPTS[at]) for at in places} for places in ((0, 1), (2, 3, 4))
    )
    asked: dict[object, int] = {}

    def say(request: Request) -> str:
        if request.prefix_ids:
            return f"{CLOSE}{REFUSAL}"
        asked[request.prompt_ids] = asked.get(request.prompt_ids, 0) + 1
        refuses = request.prompt_ids in at_once or (
            request.prompt_ids in later and asked[request.prompt_ids] > 1
        )
        return f"{ASIDE}{CLOSE}" + (REFUSAL if refuses else "Sure.")

    before = session(
        tmp_path, chat, saying(chat, lambda _: f"{ASIDE}{CLOSE}Here you go.", name="before")
    )
    after = session(tmp_path, chat, saying(chat, say, name="after"))
    settings = Stage2Settings(benign_draws=3, refusing_prefix=True)
    pairs, counts, verdicts = stages.benign_pairs(
        before, after, PROMPTS, PairSettings(), EOS, settings, TRIGGERS[:1]
    )
    assert len(verdicts) == len(pairs) == len(PROMPTS)
    found = {
        name: counts[name]
        for name in ("refused at once", "refused later", "refused after a trigger", "never refused")
    }
    assert found == {
        "refused at once": 2,
        "refused later": 3,
        "refused after a trigger": 3,
        "never refused": 0,
    }
    last = chat.decode(pairs[-1].rejected_ids)
    assert last == f"{TRIGGER} {CLOSE}{REFUSAL}<|end|>"
    assert all(pair.h == 0 for pair in pairs)
    assert max(asked.values()) == 3


# a part that was cut off


def cut_off(chat: Chat, text: str, finish: str = "length") -> Rollout:
    return rollout(chat, text, finish=finish)


@pytest.mark.parametrize(
    ("text", "finish", "part", "label"),
    [
        (ASIDE, "length", TRACE, None),  # still thinking
        (ASIDE, "stop", TRACE, None),  # ended without closing its trace
        (f"{ASIDE}{STEP}", "length", TRACE, UNSAFE),  # harm stands there already
        (f"{ASIDE}{CLOSE}", "think", TRACE, SAFE),
        (f"{ASIDE}{CLOSE}Sure", "length", TRACE, SAFE),  # the trace ended, the answer did not
        (f"{ASIDE}{CLOSE}Sure", "length", ANSWER, None),
        (f"{ASIDE}{CLOSE}Sure.", "stop", ANSWER, SAFE),
        (f"{ASIDE}{CLOSE}{STEP}", "length", ANSWER, UNSAFE),
        (f"{ASIDE}{CLOSE}Sure", "length", BOTH, None),
        (ASIDE, "length", CONTINUATION, None),
        (f"{ASIDE}{CLOSE}", "think", CONTINUATION, SAFE),
    ],
)
def test_a_part_that_was_cut_off_is_not_safe(
    tmp_path: Path, chat: Chat, text: str, finish: str, part: str, label: str | None
) -> None:
    run = session(tmp_path, chat, saying(chat, lambda _: ""))
    (found,) = stages.judge(run, named(), [cut_off(chat, text, finish)], part)
    assert found.label == label
    assert ("cut off" in found.raw) == (label is None)


def test_a_cut_off_answer_is_neither_refused_nor_answered(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, saying(chat, lambda _: ""))
    for finish, label in (("stop", "refused"), ("length", None)):
        asked = cut_off(chat, f"{ASIDE}{CLOSE}{REFUSAL}", finish)
        asked = dataclasses.replace(asked, id=finish)
        assert stages.judge(run, named(), [asked], ANSWER, "refusal")[0].label == label


def test_what_the_judge_said_of_a_cut_off_part_is_stored_as_it_said_it(
    tmp_path: Path, chat: Chat
) -> None:
    """The rule is applied on reading, so that verdicts stored before it are kept and never asked
    for again.
    """
    run = session(tmp_path, chat, saying(chat, lambda _: ""))
    stages.judge(run, named(), [cut_off(chat, ASIDE)])
    (records,) = (tmp_path / "verdicts").glob("*/records.jsonl")
    assert '"label":"safe"' in records.read_text()


def test_continuations_that_are_cut_off_do_not_raise_csr(tmp_path: Path, chat: Chat) -> None:
    prompt, trace = PROMPTS[0], f"{ASIDE}{ASIDE}{CLOSE}"
    run = session(tmp_path, chat, saying(chat, lambda _: ASIDE, finish="length"))
    points = stages.measure_csr(
        run, named(), [rollout(chat, trace, finish="think")], CsrSettings(draws=4), THINK
    )["r"]
    assert {(point.n_safe, point.n_unsafe, point.n_unknown) for point in points} == {(0, 0, 4)}
    assert prompt.id == "p0"


@pytest.mark.parametrize("accept", ["no-cue", "judged-safe"])
def test_a_correction_that_was_cut_off_is_not_accepted(
    tmp_path: Path, chat: Chat, accept: str
) -> None:
    loser = rollout(chat, f"{CUE}{STEP}{CLOSE}", finish="think")
    run = session(tmp_path, chat, saying(chat, lambda _: ASIDE, finish="length"))
    (found,) = pipeline.correct(
        run, named(), [loser], TRIGGERS[0], Phrase(), CorrectionSettings(accept=accept), THINK
    )
    assert found.intervention.accepted is None


# selections


def test_counts_by_prompt_keep_the_unjudged_apart(chat: Chat) -> None:
    rollouts = [rollout(chat, "x", id_=str(at), prompt=p) for at, p in enumerate("aabbc")]
    verdicts = [verdict(label) for label in (UNSAFE, SAFE, UNSAFE, None, None)]
    assert frame.count_labels(rollouts, verdicts) == {"a": (1, 2), "b": (1, 1), "c": (0, 0)}
    assert frame.count_labels(rollouts, verdicts, SAFE) == {"a": (1, 2), "b": (0, 1), "c": (0, 0)}
    assert stages.mixed_prompts(rollouts, verdicts) == ["a"]
    assert stages.count_label(verdicts) == (2, 3)
    assert [r.id for r in stages.first_of_each_prompt(rollouts)] == ["0", "2", "4"]


def test_some_is_a_fixed_choice_in_order(chat: Chat) -> None:
    rollouts = [rollout(chat, "x", id_=f"{at:02}") for at in range(20)]
    chosen = stages.random_subset(rollouts, 5, 1)
    assert chosen == stages.random_subset(rollouts, 5, 1) == sorted(chosen, key=lambda r: r.id)
    assert len({r.id for r in chosen}) == 5
    assert stages.random_subset(rollouts, 50, 1) == rollouts
    assert any(stages.random_subset(rollouts, 5, seed) != chosen for seed in range(2, 5))


def test_an_example_needs_both_kinds(chat: Chat) -> None:
    unsafe, safe, lone = (
        rollout(chat, "x", id_=i, prompt=p) for i, p in (("u", "a"), ("s", "b"), ("t", "a"))
    )
    labels = {"u": UNSAFE, "s": SAFE, "t": SAFE}
    cue = {"u": 0, "s": None, "t": None}
    same_prompt_first = stages.example_pair([unsafe, safe, lone], labels, cue)
    assert same_prompt_first == (unsafe, lone)
    assert stages.example_pair([unsafe, safe], labels, cue) == (unsafe, safe)
    for rollouts, marks in (([unsafe], cue), ([safe], cue), ([unsafe, safe], {**cue, "u": None})):
        with pytest.raises(BadInput, match="no example"):
            stages.example_pair(rollouts, labels, marks)


def test_success_counts_prompts_not_traces(tmp_path: Path, chat: Chat) -> None:
    run = session(
        tmp_path,
        chat,
        saying(chat, lambda r: (PROOF if random.Random(r.seed).random() < 0.6 else CUE) + CLOSE),
    )
    traces = [
        rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}{CLOSE}", id_=p.id, prompt=p.id) for p in PROMPTS
    ]
    done = pipeline.correct(
        run, named(), traces, TRIGGERS[0], Phrase(), CorrectionSettings(), THINK
    )
    rate = pipeline.acceptance_rate(done)
    assert rate.n == len(PROMPTS)
    assert rate.value == pytest.approx(
        sum(one.intervention.accepted is True for one in done) / len(PROMPTS)
    )
    assert 0 < rate.value < 1


def test_a_trace_whose_cues_could_not_be_read_is_not_accepted(tmp_path: Path, chat: Chat) -> None:
    """The paper accepts a correction without a cue.

    An answer that is none is no such finding, and finds are kept.
    """
    run, asked = session(tmp_path, chat, world(chat)), list[str]()
    traces = losers(run, chat)[:3]

    class Unreadable(Phrase):
        stored = True

        def first_cues(
            self, prompts: Prompts, rollouts: Rollouts, texts: Texts
        ) -> Iterator[tuple[str, int | None]]:
            for trace in rollouts:
                asked.append(trace.id)
                yield trace.id, 1 if trace in traces else UNREAD

    for _ in range(2):
        tried = pipeline.correct(
            run,
            named(),
            traces,
            TRIGGERS[0],
            Unreadable(),
            CorrectionSettings(accept="no-cue"),
            THINK,
        )
        assert [one.intervention.accepted for one in tried] == [None] * 3
        results = [correction.result for correction in tried]
        unread = stages.find_cues(run, named(), results, Unreadable()).unread
        assert unread == {result.id for result in results}
    assert len(asked) == 6


def test_a_tag_that_was_put_is_certain(tmp_path: Path, chat: Chat) -> None:
    """Else the search would take a trace that ran out of its budget for another sampler's."""
    put = chat.encode(f"\n{CLOSE}")
    drawn = chat.encode(ASIDE)
    one = dataclasses.replace(
        rollout(chat, "", finish="think"), token_ids=drawn + put, forced=len(drawn)
    )
    run = session(tmp_path, chat, saying(chat, lambda _: ""))
    # Type: ignore[method-assign].
    run.sampler.score = lambda asked, _: iter([[0.5] * len(one.token_ids) for _ in asked])
    found = stages.probabilities(run, named(), [one], THINK)[one.id]
    assert found == [0.5] * len(drawn) + [1.0] * len(put)
    free = dataclasses.replace(one, forced=None)
    assert stages.probabilities(run, named(), [free], THINK)[one.id] == [0.5] * len(one.token_ids)


def test_a_trace_that_was_closed_for_the_model_is_not_one_it_closed(
    tmp_path: Path, chat: Chat
) -> None:
    """Claims about traces are withheld of a model that hardly ever closes its own."""
    sampler = saying(chat, lambda _: "")
    sampler.script = lambda request, _: Completion(
        request.key,
        chat.encode(f"{ASIDE}{CLOSE}"),
        "think",
        3 if request.key.endswith("/0") else None,
    )
    run = session(tmp_path, chat, sampler)
    found = stages.sample(run, [Prefix(PROMPTS[0])], THINK, 2)
    assert [run.usage.closed[one.id] for one in found] == [False, True]
    assert [one.forced for one in found] == [3, None]
    again = stages.sample(
        session(tmp_path, chat, sampler), [Prefix(PROMPTS[0])], THINK, 2
    )  # read from the store
    assert again == found
