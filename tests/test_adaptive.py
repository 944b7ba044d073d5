"""The adaptive search: what it finds on planted curves, what its intervals cover, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from planted import course, step

from ipo_lib.csr import END, NO_TURN, RECROSSING, START_LOCKED, CsrSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompt, TurningPoint
from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points import benchmark
from ipo_lib.turning_points.adaptive import DIFFUSE, SearchSettings, adaptive
from ipo_lib.turning_points.curves import Curve, Way, run_on_curves
from ipo_lib.turning_points.draws import Trace
from ipo_lib.turning_points.exhaustive import true_turn
from ipo_lib.turning_points.wald import FAIL, PASS, UNDECIDED

CSR, SEARCH = CsrSettings(), SearchSettings()


def find_all(
    curves: Sequence[Curve], settings: SearchSettings = SEARCH, kind: str = SAFE, seed: int = 0
) -> dict[str, TurningPoint]:
    return run_on_curves(curves, lambda trace: adaptive(trace, kind, CSR, settings), seed)


def find(curve: Curve, kind: str = SAFE, seed: int = 0, **changes: object) -> TurningPoint:
    settings = replace(SEARCH, **changes)  # type: ignore[arg-type]
    return find_all([curve], settings, kind, seed)[curve.id]


def test_a_sharp_turn_is_found_for_both_kinds() -> None:
    for seed in range(10):
        turn = find(step(0.2, 0.995, 20), seed=seed)
        assert (turn.sentence, turn.interval, turn.token) == (3, (18, 24), 24)
        assert not {UNDECIDED, DIFFUSE} & set(turn.flags)
        mirrored = find(step(0.8, 0.005, 20, label=UNSAFE), UNSAFE, seed=seed)
        assert (mirrored.kind, mirrored.sentence) == (UNSAFE, 3)
        assert mirrored.after is not None
        assert mirrored.after.high < 0.5


def test_evidence_and_cost_are_what_was_drawn() -> None:
    turn = find(step(0.2, 0.995, 20))
    before, after = turn.before, turn.after
    assert before is not None
    assert after is not None
    assert (before.cut, after.cut) == turn.interval
    assert before.fresh == after.fresh == SEARCH.confirm
    assert after.n_safe >= 0.9 * after.n
    assert after.low <= after.fresh_safe / after.fresh <= after.high
    assert turn.rollouts == turn.judged > 2 * SEARCH.confirm
    assert turn.tokens > turn.rollouts
    assert (24, PASS) in turn.tested
    assert (18, FAIL) in turn.tested
    without = find(step(0.2, 0.995, 20), confirm=0)
    assert without.rollouts < turn.rollouts
    assert without.after is not None
    assert (without.after.fresh, without.after.low, without.after.high) == (0, 0.0, 1.0)


def test_locked_none_and_the_end() -> None:
    locked = find(step(0.995, 0.995, 20))
    assert locked.flags[0] == START_LOCKED
    assert (locked.token, locked.sentence, locked.interval, locked.before) == (0, None, None, None)
    none = find(step(0.3, 0.3, 20, label=UNSAFE))
    assert none.flags == (NO_TURN,)
    assert (none.token, none.sentence, none.after) == (None, None, None)
    assert none.rollouts < 60
    late = find(step(0.2, 0.995, 50))
    assert END in late.flags


def test_harm_that_stands_already_costs_nothing() -> None:
    curve = step(0.8, 0.005, 20, label=UNSAFE)
    known = replace(curve, trace=replace(curve.trace, settled=30))
    plain = [find(curve, UNSAFE, seed) for seed in range(10)]
    settled = [find(known, UNSAFE, seed) for seed in range(10)]
    assert {turn.sentence for turn in (*plain, *settled)} == {3}
    assert sum(turn.rollouts for turn in settled) < 0.85 * sum(turn.rollouts for turn in plain)
    assert find(known).flags == (NO_TURN,)


def test_refining_narrows_to_tokens() -> None:
    for seed in range(5):
        turn = find(step(0.2, 0.995, 20), seed=seed, refine=True)
        assert turn.interval is not None
        assert turn.interval[1] - turn.interval[0] < 6
        assert turn.interval[0] <= 21 <= turn.interval[1] + 1


def test_hovering_is_not_forced() -> None:
    turns = find_all(made_up.curves(60, 5, ["hovering"]), SearchSettings(cap=48))
    assert len(turns) == 60
    assert sum(UNDECIDED in turn.flags for turn in turns.values()) > 5
    for turn in turns.values():
        assert all(state in (PASS, FAIL, UNDECIDED) for _, state in turn.tested)


def test_a_pass_that_does_not_hold_is_left_behind_and_flagged() -> None:
    again = course(0.2, 0.2, 0.99, 0.2, 0.2, 0.99, 0.99, 0.99, 0.99, 0.99)
    true = true_turn(again.trace, SAFE, CsrSettings(mu=0.94), again.truth.tolist())
    for seed in range(5):
        turn = find(again, seed=seed)
        assert abs((turn.sentence or 0) - (true.sentence or 0)) <= 1
        assert (turn.sentence or 0) >= 4
    assert any(RECROSSING in find(again, seed=seed).flags for seed in range(20))


def test_a_turn_at_the_last_sentence_is_not_missed() -> None:
    """Tokens after it keep its S from being known, and no screened cut passes."""
    p = [1.0] * 140 + [0.9, 1.0, 1.0, 1.0]
    ways: list[list[Way]] = [[] for _ in p]
    for place in range(9, 140, 10):
        share = 0.0 if place == 139 else 0.3
        p[place] = 0.5
        ways[place] = [(share, 1.0, 5), (1 - share, 0.0, 5)]
    ways[140] = [(1.0, 1.0, 3)]
    curve = Curve(Trace("late", tuple(range(144)), tuple(range(10, 141, 10)), tuple(p), SAFE), ways)
    true = true_turn(curve.trace, SAFE, CsrSettings(mu=0.94), curve.truth.tolist())
    assert (true.token, true.sentence) == (140, 13)
    for seed in range(5):
        turn = find(curve, seed=seed)
        assert (turn.token, turn.sentence) == (140, 13)
        assert END in turn.flags


def test_settings_that_the_search_does_not_know_are_one_line() -> None:
    for csr in (CsrSettings(strict=True), CsrSettings(other_side=True), CsrSettings(stride=2)):
        with pytest.raises(BadInput, match="measure every cut"):
            adaptive(step(0.2, 0.99, 20).trace, SAFE, csr, SEARCH)


@pytest.mark.parametrize("label", [SAFE, UNSAFE, None])
def test_odd_traces_end(label: str | None) -> None:
    """No sentence, one token, no label, nothing judged: each search ends."""
    nan = float("nan")
    for tokens, ends in ((1, (1,)), (5, ()), (6, (2, 4))):
        trace = Trace("odd", tuple(range(tokens)), ends, (0.7,) * tokens, label)
        half = Curve(trace, [[(0.5, nan, 3), (0.5, 1.0, 3)]] * tokens)
        none = Curve(trace, [[(1.0, nan, 3)]] * tokens)
        for kind in (SAFE, UNSAFE):
            assert find(half, kind).rollouts <= SEARCH.budget + 100
            assert find(none, kind).after is None or label == kind


def test_a_slow_rise_is_diffuse() -> None:
    slow = find_all(made_up.curves(60, 5, ["drifting"], 700)).values()
    sharp = find_all(made_up.curves(60, 5, ["sharp"])).values()
    assert sum(DIFFUSE in turn.flags for turn in slow) > 20
    assert sum(DIFFUSE in turn.flags for turn in sharp) < 20


def test_the_budget_bounds_every_search() -> None:
    curves = made_up.curves(60, 6, ["drifting", "hovering"], 700)
    most = SEARCH.budget + SEARCH.batch * (SEARCH.screen + 1) + 2 * SEARCH.confirm
    assert max(turn.rollouts for turn in find_all(curves).values()) <= most


def test_agreement_cost_and_coverage_on_made_up_curves() -> None:
    """The claims of notebook 09 in small; its figures hold the intervals."""
    curves = made_up.curves(180, 7, made_up.SHAPES[:6])
    every = benchmark.estimators(SAFE, CSR, SEARCH)
    named = {n: every[n] for n in (benchmark.PER_TOKEN, benchmark.ADAPTIVE, benchmark.FAST)}
    rows = benchmark.compare(curves, named, SAFE, CSR, seed=7)
    ours, paper = rows[benchmark.ADAPTIVE], rows[benchmark.PER_TOKEN]
    shares = benchmark.agreement(ours, paper)
    assert shares["difference"].value > -0.05
    assert shares["kind of trace"].value > 0.9
    spent = benchmark.costs(ours)
    assert spent["rollouts"] <= 170
    assert spent["rollouts, 95th percentile"] <= 320
    assert benchmark.token_saving(ours, paper).value > 40
    assert benchmark.token_saving(rows[benchmark.FAST], paper).value > 75
    assert benchmark.interval_coverage(ours).high >= 0.95
    wrong = benchmark.decision_errors(ours)
    assert wrong["pass at S <= 0.85"].low <= 0.05
    assert wrong["fail at S >= 0.97"].low <= 0.05


def test_traces_of_one_prompt_are_no_independent_traces() -> None:
    """Six times the same curves, as traces of one prompt each, tell no more than once."""
    prompts = [Prompt(f"p{number}", "?", "made up", True) for number in range(40)]
    once = []
    for curve, prompt in zip(made_up.curves(40, 8, made_up.SHAPES[:6]), prompts, strict=True):
        once.append(replace(curve, prompt=prompt))
    often = []
    for copy in range(6):
        for curve in once:
            trace = replace(curve.trace, id=f"{curve.id}/{copy}")
            often.append(replace(curve, trace=trace))
    turned, turned_often = (benchmark.turning_share(some, SAFE, CSR) for some in (once, often))
    assert turned_often == turned
    assert turned.n == 40
    every = benchmark.estimators(SAFE, CSR, SEARCH)
    named = {name: every[name] for name in (benchmark.PER_SENTENCE, benchmark.ADAPTIVE)}
    rows = benchmark.compare(often, named, SAFE, CSR)
    ours, others = rows[benchmark.ADAPTIVE], rows[benchmark.PER_SENTENCE]
    shares = benchmark.agreement(ours, others)
    assert {share.n for share in shares.values()} == {40}
    assert benchmark.token_saving(ours, others).n == 40


def test_intervals_from_fresh_draws_cover() -> None:
    curves = made_up.curves(480, 8, made_up.SHAPES[:6])
    turns = find_all(curves)
    rows = [benchmark.EstimatorResult(turns[c.id], turns[c.id], c) for c in curves]
    coverage = benchmark.interval_coverage(rows)
    assert coverage.n > 500
    assert coverage.value >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / coverage.n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimand": "x"}, "estimand is 'x'"),
        ({"look": 0.01}, "0 < alpha <= look"),
        ({"cap": 0}, "batch and cap at least 1"),
        ({"split": 1.0}, "0 < split < 1"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        SearchSettings(**changes)  # type: ignore[arg-type]


def test_a_right_guess_saves_draws_and_a_wrong_one_costs_no_truth() -> None:
    curves = [replace_id(step(0.2, 0.995, 120, tokens=240), f"c{number}") for number in range(40)]

    def run(guess: int | None) -> tuple[float, float]:
        found = run_on_curves(curves, lambda trace: adaptive(trace, SAFE, CSR, SEARCH, guess))
        right = np.mean([turn.interval == truth for turn in found.values()])
        return float(right), float(np.mean([turn.rollouts for turn in found.values()]))

    truth = find(curves[0]).interval
    assert truth is not None
    (plain, cost), (helped, cheaper) = run(None), run(truth[1])
    assert plain == helped == 1.0
    assert cheaper < 0.95 * cost
    for wrong in (0, 6, 10_000):
        right, _ = run(wrong)
        assert right == 1.0


def replace_id(curve: Curve, name: str) -> Curve:
    return replace(curve, trace=replace(curve.trace, id=name))
