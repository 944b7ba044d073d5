"""A planted cue goes with the turn and lowers S; a random place and a settled S do not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scripted import ASIDE, CLOSE, CUE, PROOF, STEP, Phrase, named, rollout, session, world

from ipo_lib import stages, stats
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.experiments import cue_effects
from ipo_lib.experiments.cue_effects import CuePlace, MeasuredTraces, places_of_cues
from ipo_lib.records import UNSAFE, CsrPoint, Rollout, Sentence, TurningPoint
from ipo_lib.stages import JudgedRollouts, Session
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.draws import Trace

SPANS = [  # sentences of ten characters and ten tokens
    Sentence(number, 10 * number, 10 * number + 10, 10 * number, 10 * number + 10)
    for number in range(5)
]


def judged(opened: Session, rollouts: list[Rollout]) -> JudgedRollouts:
    return JudgedRollouts(named(), rollouts, stages.judge(opened, named(), rollouts))


def turn(sentence: int | None, *flags: str, token: int | None = 9, key: str = "a") -> TurningPoint:
    return TurningPoint(key, UNSAFE, token, sentence, None, flags)


def curve(key: str, *values: float) -> list[CsrPoint]:
    """S at the ends of the sentences, from 100 draws."""
    points = []
    for index, s in enumerate(values):
        safe = round(100 * s)
        points.append(CsrPoint(key, 10 * index, safe, 100 - safe, 0))
    return points


def test_what_is_noted_of_a_cue(chat: Chat) -> None:
    traces, spans = [rollout(chat, "x", id_="a")], {"a": SPANS}
    points, turns = {"a": curve("a", 0.8, 0.8, 0.7, 0.05, 0.0, 0.0)}, {"a": turn(3)}
    (place,) = places_of_cues(MeasuredTraces(traces, spans, turns, points), {"a": 2})
    assert (place.cue, place.turn, place.distance) == (20, 30, 1)
    assert place.other in (0, 10, 20, 30)
    assert place.drop == pytest.approx(0.65)
    # The last sentence begins where S is settled.
    assert place.elsewhere == pytest.approx((0 + 0.1 + 0.05) / 3)
    rising = {"a": curve("a", 0.2, 0.4, 0.4, 0.9, 0.0, 0.0)}
    (up,) = places_of_cues(MeasuredTraces(traces, spans, turns, rising), {"a": 2})
    assert up.drop == pytest.approx(-0.5)  # a sentence that raises S is no cue, however far
    assert places_of_cues(MeasuredTraces(traces, spans, turns, points), {"a": None}) == []
    locked_turns = {"a": turn(None, "start-locked", token=0)}
    (locked,) = places_of_cues(MeasuredTraces(traces, spans, locked_turns, points), {"a": 2})
    assert locked.turn is locked.distance is None
    # From the first harmful sentence on, S falls because of the harm: it is no comparison.
    measured = MeasuredTraces(traces, spans, turns, points, harm={"a": 3})
    (before_harm,) = places_of_cues(measured, {"a": 2})
    assert before_harm.drop == pytest.approx(0.65)
    assert before_harm.elsewhere == pytest.approx((0 + 0.1) / 2)
    (itself,) = places_of_cues(measured, {"a": 3})
    assert math.isnan(itself.drop)
    assert itself.turn == itself.cue == 30


def test_a_cue_at_the_turn_correlates_and_a_random_place_less(chat: Chat) -> None:
    traces = [rollout(chat, "x", id_=str(number), prompt=f"p{number}") for number in range(24)]
    spans = {r.id: SPANS for r in traces}
    cues = {r.id: 1 + number % 4 for number, r in enumerate(traces)}
    turns = {key: turn(index, key=key) for key, index in cues.items()}
    points = {}
    for key, cue in cues.items():
        after = [0.5 if index < cue else 0.0 for index in range(5)]
        points[key] = curve(key, 0.5, *after)
    measured = MeasuredTraces(traces, spans, turns, points)
    places = places_of_cues(measured, cues)
    by_seed = [places_of_cues(measured, cues, seed) for seed in range(50)]
    r = cue_effects.compare_correlations(by_seed)
    assert r[cue_effects.CUE].value == pytest.approx(1)
    chance = r[cue_effects.PLACEBO]
    assert 0 < chance.value < 0.9  # not 0: the earlier place is bound by the cue
    assert chance.low < chance.value < chance.high
    assert 0 < r["difference"].low < r["difference"].value == pytest.approx(1 - chance.value)
    drops = cue_effects.mean_drops(places)
    assert drops["at the cue"].value == pytest.approx(0.5)
    assert drops["elsewhere"].value == 0
    assert drops["difference"].low > 0
    assert drops["difference"].n == 24


def place(index: int, cue: int, other: int, turn: int | None, prompts: int = 1000) -> CuePlace:
    return CuePlace(str(index), f"p{index % prompts}", cue, other, turn, turn, 0)


def test_correlations_are_those_of_the_textbook() -> None:
    random = np.random.default_rng(0)
    cues, turns = random.integers(0, 90, 40), random.integers(0, 90, 40)
    others = [random.integers(0, 90, 40) for _ in range(3)]
    by_seed = []
    for other in others:
        by_seed.append([place(n, cues[n], other[n], turns[n]) for n in range(40)])
        by_seed[-1].append(place(99, 5, 5, None))  # no turn
    r = cue_effects.compare_correlations(by_seed)
    expected = np.corrcoef(cues, turns)[0, 1]
    chance = np.mean([np.corrcoef(other, turns)[0, 1] for other in others])
    assert r[cue_effects.CUE].value == pytest.approx(expected)
    assert r[cue_effects.PLACEBO].value == pytest.approx(chance)
    assert r[cue_effects.DIFFERENCE].value == pytest.approx(expected - chance)
    assert {interval.n for interval in r.values()} == {40}
    fisher = stats.pearson(cues.tolist(), turns.tolist())
    assert r[cue_effects.CUE].low == pytest.approx(fisher.low, abs=0.1)
    assert r[cue_effects.CUE].high == pytest.approx(fisher.high, abs=0.1)


def test_traces_of_one_prompt_do_not_narrow_the_interval() -> None:
    random = np.random.default_rng(1)
    cues, turns, others = (random.integers(0, 90, 20) for _ in range(3))
    once = [place(n, cues[n], others[n], turns[n]) for n in range(20)]
    copies = [place(n, cues[n % 20], others[n % 20], turns[n % 20], prompts=20) for n in range(200)]
    one, ten = (cue_effects.compare_correlations([rows])["difference"] for rows in (once, copies))
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high), abs=1e-9)


def test_no_difference_is_found_in_traces_without_one() -> None:
    """Cue and random sentence are drawn alike: the interval of the difference holds 0 (n=60)."""
    wrong = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        turns = random.integers(1, 90, 40)
        rows = []
        for n, turn_at in enumerate(turns):
            cue, other = random.integers(0, turn_at + 1, 2)
            rows.append(place(n, cue, other, int(turn_at), prompts=20))
        difference = cue_effects.compare_correlations([rows], 300)["difference"]
        wrong += not difference.low <= 0 <= difference.high
    assert wrong <= 8


def test_a_random_sentence_must_not_share_the_error_of_the_turn() -> None:
    """Cue and random sentence are alike. Only a turn with one error for both tells them apart."""
    random = np.random.default_rng(0)
    shared, halved = [], []
    for n in range(400):
        turn_at = int(random.integers(1, 90))
        one, other = (max(1, turn_at + int(error)) for error in random.normal(0, 25, 2))
        cue = int(random.integers(0, turn_at + 1))
        before = int(random.integers(0, one + 1))
        shared.append(place(n, cue, before, one))
        halved.append(dataclasses.replace(shared[-1], turn=other))
    biased = cue_effects.compare_correlations([shared])["difference"]
    assert biased.high < -0.05
    fair = cue_effects.compare_correlations([halved])["difference"]
    assert fair.low < 0 < fair.high


def test_one_half_bounds_the_random_sentence_and_the_other_places_the_turn(chat: Chat) -> None:
    traces, spans = [rollout(chat, "x", id_="a")], {"a": SPANS}
    halves = [({"a": turn(1)}, {"a": turn(4)}), ({"a": turn(4)}, {"a": turn(None)})]
    measured = MeasuredTraces(traces, spans, {"a": turn(2)}, {}, halves=halves)
    by_seed = cue_effects.places_with_random_sentences(measured, {"a": 3}, 40)
    rows = [row for (row,) in by_seed]
    assert {(row.cue, row.bound, row.turn) for row in rows} == {(30, 10, 40), (30, 40, None)}
    assert {row.other for row in rows[::2]} == {0, 10}
    assert {row.other for row in rows[1::2]} == {0, 10, 20, 30, 40}
    ((whole,),) = cue_effects.places_with_random_sentences(measured, {"a": 3}, 1, halved=False)
    assert (whole.bound, whole.turn) == (20, 20)


def test_each_seed_may_have_turns_of_its_own() -> None:
    """r is averaged over seeds; a trace counts where it has a turn, whichever traces came first."""
    random = np.random.default_rng(3)
    cues, others, turns = random.integers(0, 90, (3, 2, 20))
    by_seed = [[place(n, cues[0, n], others[s, n], turns[s, n]) for n in range(20)] for s in (0, 1)]
    by_seed[1] = [dataclasses.replace(by_seed[1][0], turn=None), *reversed(by_seed[1][1:])]
    r = cue_effects.compare_correlations(by_seed)
    first = np.corrcoef(cues[0], turns[0])[0, 1]
    second = np.corrcoef(cues[0, 1:], turns[1, 1:])[0, 1]
    assert r[cue_effects.CUE].value == pytest.approx((first + second) / 2)
    assert r[cue_effects.CUE].n == 20


def test_turns_in_the_first_sentence_can_be_left_out() -> None:
    rows = [place(0, 5, 0, 0), place(1, 5, 0, 7), place(2, 5, 0, None)]
    assert cue_effects.turned_later(rows) == [rows[1]]


def test_too_few_traces_decide_nothing() -> None:
    for rows in ([], [place(0, 5, 0, 7)], [place(0, 5, 0, 7), place(1, 5, 0, 7)]):
        for interval in cue_effects.compare_correlations([rows]).values():
            assert math.isnan(interval.value)
            assert (interval.low, interval.high) == (-1, 1)
    two = cue_effects.compare_correlations([[place(0, 5, 0, 7), place(1, 6, 2, 9)]])
    assert (two["cue"].value, two["cue"].low, two["cue"].high) == (pytest.approx(1), -1, 1)
    assert math.isnan(cue_effects.compare_correlations([])["difference"].value)


def noisy_points(key: str, s: float, draws: int, random: np.random.Generator) -> list[CsrPoint]:
    """S estimated at the ends of five sentences, none of which moves it."""
    points = []
    for index, safe in enumerate(random.binomial(draws, s, 6)):
        points.append(CsrPoint(key, 10 * index, int(safe), draws - int(safe), 0))
    return points


def test_draws_that_choose_sentences_do_not_measure_them(chat: Chat) -> None:
    """S is 0.05 throughout. Where eight draws happen to see S move, they see too much of it."""
    random = np.random.default_rng(0)
    traces = [rollout(chat, "x", id_=str(number), prompt=f"p{number}") for number in range(300)]
    choosing = {r.id: noisy_points(r.id, 0.05, 8, random) for r in traces}
    measuring = {r.id: noisy_points(r.id, 0.05, 8, random) for r in traces}
    cues, spans = {r.id: 2 for r in traces}, {r.id: SPANS for r in traces}
    turns = {r.id: turn(3, key=r.id) for r in traces}
    once = places_of_cues(MeasuredTraces(traces, spans, turns, choosing), cues)
    apart = places_of_cues(MeasuredTraces(traces, spans, turns, measuring, choosing), cues)
    assert cue_effects.mean_drops(once)["at the cue"].low > 0.04  # what one set of draws makes up
    drop = cue_effects.mean_drops(apart)["at the cue"]
    assert drop.low < 0 < drop.high
    assert abs(drop.value) < 0.03


def test_a_design_says_what_it_can_show() -> None:
    def places(drops: list[float]) -> list[CuePlace]:
        return [
            CuePlace(str(number), f"p{number}", 1, 0, 1, 1, 0, drop, 0.0)
            for number, drop in enumerate(drops)
        ]

    few = cue_effects.power_of_drops(places([0.0, 0.4] * 4), 0.1)
    many = cue_effects.power_of_drops(places([0.0, 0.4] * 60), 0.1)
    assert (few.usable, many.usable) == (8, 120)
    assert few.power < 0.4 < 0.9 < many.power
    assert few.needed == pytest.approx(many.needed, rel=0.2)
    assert 25 < (many.needed or 0) < 45
    nothing = cue_effects.power_of_drops([], 0.1)
    assert (nothing.power, nothing.needed) == (0.0, None)
    assert cue_effects.power_of_drops(places([math.nan, 0.3]), 0.1).usable == 1


def cues_in(opened: Session, measured: MeasuredTraces) -> dict[str, int | None]:
    return stages.find_cues(opened, named(), measured.rollouts, Phrase())


def test_recorded_curves_give_the_drop_without_a_draw(chat: Chat, tmp_path: Path) -> None:
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}"
    traces = [
        rollout(chat, text, id_=f"r{number}", prompt=f"p{number % 8}", finish="think")
        for number in range(8)
    ]
    opened = session(tmp_path, chat, world(chat))
    seen = judged(opened, traces)
    settings = CsrSettings()
    ends = tuple(span.token_end for span in stages.trace_sentences(opened, traces[0]))
    curves = []
    for trace in traces:
        # Half of the continuations leave safely in the cue's sentence, none elsewhere.
        probabilities = [1.0] * len(trace.token_ids)
        ways: list[list[tuple[float, float, int]]] = [[] for _ in trace.token_ids]
        probabilities[ends[0]], ways[ends[0]] = 0.5, [(1.0, 1.0, 5)]
        recorded = Trace(trace.id, trace.token_ids, ends, tuple(probabilities), UNSAFE)
        curves.append(Curve(recorded, ways))
    measured = cue_effects.recorded_traces(opened, seen, curves, settings)
    assert set(measured.harm.values()) == {2}  # the step
    assert len(measured.halves) == 2 * cue_effects.SPLITS
    assert measured.halves[0] == measured.halves[1][::-1]
    places = places_of_cues(measured, cues_in(opened, measured))
    assert len(places) == 8
    assert {place.drop for place in places} == {0.5}
    assert cue_effects.mean_drops(places)["at the cue"].value == 0.5

    # The draws of another machine in 16 bit: other tokens under the same ids.
    others = [
        dataclasses.replace(r, token_ids=r.token_ids[:-3], text="another draw") for r in traces
    ]
    drifted = dataclasses.replace(seen, rollouts=others)
    others_measured = cue_effects.recorded_traces(opened, drifted, curves, settings)
    again = places_of_cues(others_measured, cues_in(opened, others_measured))
    assert [(place.prompt_id, place.cue, place.drop) for place in again] == [
        (place.prompt_id, place.cue, place.drop) for place in places
    ]
    ids = {place.rollout_id for place in places}
    assert ids.isdisjoint({place.rollout_id for place in again})
    nothing = JudgedRollouts({}, [], [])
    assert cue_effects.recorded_traces(opened, nothing, curves, settings).rollouts == []

    # Curves that say their prompt are read without a rollout of this run.
    own = []
    for number, curve in enumerate(curves):
        own.append(dataclasses.replace(curve, prompt=named()[f"p{number % 8}"]))
    alone = cue_effects.recorded_traces(opened, nothing, own, settings)
    assert alone.harm == measured.harm
    rows = places_of_cues(alone, cues_in(opened, alone))
    assert [(row.prompt_id, row.cue, row.drop) for row in rows] == [
        (row.prompt_id, row.cue, row.drop) for row in places
    ]


def test_the_turn_in_the_sentence_of_cue_and_random_sentence() -> None:
    """Prompt p0 has two traces with a turn, p1 one; a trace without a turn is left out."""
    by_seed = []
    for others in ((4, 0, 7), (0, 0, 2)):
        rows = [
            CuePlace(key, prompt, cue, other, turn, turn, 0)
            for key, prompt, cue, other, turn in (
                ("a", "p0", 4, others[0], 4),
                ("b", "p0", 2, others[1], 5),
                ("c", "p1", 7, others[2], 7),
            )
        ]
        by_seed.append([*rows, CuePlace("d", "p2", 1, None, None, None, None)])
    shares = cue_effects.share_in_same_sentence(by_seed)
    assert shares["cue"].value == pytest.approx((1 / 2 + 1) / 2)
    assert shares["random sentence"].value == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert {share.n for share in shares.values()} == {2}


def test_risk_by_cue(tmp_path: Path, chat: Chat) -> None:
    opened = session(tmp_path, chat, world(chat))
    traces = []
    for number, ending in enumerate((STEP, STEP, PROOF, PROOF)):
        text = f"{ASIDE}\n{ending}\n{CLOSE}"
        traces.append(rollout(chat, text, id_=f"p0-{number}"))
    cues = {"p0-0": 1, "p0-1": 1, "p0-2": 1, "p0-3": None}
    risk = cue_effects.risk_by_cue(judged(opened, traces), cues)
    assert (risk[True].value, risk[False].value) == (pytest.approx(2 / 3), 0)


def test_a_detector_is_scored_over_prompts(chat: Chat) -> None:
    """Prompt p0: two finds, one right; p1: one find, right. Of three true cues two are found."""
    rollouts = [
        rollout(chat, "x", id_=key, prompt=prompt)
        for key, prompt in (("a", "p0"), ("b", "p0"), ("c", "p1"), ("d", "p1"))
    ]
    found = {"a": 1, "b": 2, "c": 3, "d": None}
    truth = {"a": 1, "b": None, "c": 3, "d": 4}
    scores = cue_effects.score_detector(rollouts, found, truth)
    assert scores["precision"].value == pytest.approx((1 / 2 + 1) / 2)
    assert scores["recall"].value == pytest.approx((1 + 1 / 2) / 2)
    assert (scores["precision"].n, scores["recall"].n) == (2, 2)
