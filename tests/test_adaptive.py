"""The adaptive search: its test's error rates, what it finds on planted curves, what its intervals cover, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_turning_points import course, step

from ipo_lib.csr import END, NONE, RECROSSING, START_LOCKED, CsrSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, TurningPoint
from ipo_lib.sandbox import curves as made_up
from ipo_lib.turning_points import benchmark, curves
from ipo_lib.turning_points.adaptive import (
    DIFFUSE,
    FAIL,
    LEVELS,
    PASS,
    POPULATION,
    PROTOCOL,
    UNDECIDED,
    SearchSettings,
    Wald,
    adaptive,
)
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.exhaustive import Trace, truth

CSR, SEARCH = CsrSettings(), SearchSettings()


def find(one: Curve, kind: str = SAFE, seed: int = 0, **changes: object) -> TurningPoint:
    settings = SearchSettings(**changes)  # type: ignore[arg-type]
    return curves.find_on_curves([one], lambda trace: adaptive(trace, kind, CSR, settings), seed)[
        one.trace.id
    ]


def decided(
    rate: float, test: Wald, error: float, cap: int, runs: int = 2000, batch: int = 5
) -> list[str | None]:
    """How the sequential test ends on draws of this rate."""
    random, ends = np.random.default_rng([int(1000 * rate), cap]), list[str | None]()
    for _ in range(runs):
        k = n = 0
        while (state := test.decide(k, n, error)) is None and n < cap:
            more = max(1, min(batch, test.wanted(k, n, error), cap - n))
            k, n = k + int(random.binomial(more, rate)), n + more
        ends.append(state)
    return ends


@pytest.mark.parametrize("estimand", [PROTOCOL, POPULATION])
def test_the_sequential_test_keeps_its_errors(estimand: str) -> None:
    test = Wald.of(SAFE, CSR, SearchSettings(estimand=estimand))
    slack = 4 * np.sqrt(0.05 * 0.95 / 2000)
    for rate in (0.5, 0.85, test.low):
        assert decided(rate, test, 0.05, 128).count(PASS) / 2000 <= 0.05 + slack
    for rate in (test.high, 0.99, 1.0):
        assert decided(rate, test, 0.05, 128).count(FAIL) / 2000 <= 0.05 + slack
    if estimand == PROTOCOL:
        assert decided(0.97, test, 0.05, 128).count(FAIL) / 2000 <= 0.05 + slack


def test_even_odds_lie_where_the_estimand_does() -> None:
    for estimand, middle in ((PROTOCOL, 0.943), (POPULATION, 0.90)):
        test = Wald.of(SAFE, CSR, SearchSettings(estimand=estimand))
        assert test.even == pytest.approx(middle, abs=0.005)
        ends = decided(middle, test, test.alpha, 1000)
        assert 0.35 <= ends.count(PASS) / len(ends) <= 0.65, estimand
    assert set(LEVELS) == {PROTOCOL, POPULATION}


def test_a_sharp_turn_is_found_for_both_kinds() -> None:
    for seed in range(10):
        found = find(step(0.2, 0.995, 20), seed=seed)
        assert (found.sentence, found.interval, found.token) == (3, (18, 24), 24)
        assert not {UNDECIDED, DIFFUSE} & set(found.flags)
        mirrored = find(step(0.8, 0.005, 20, label=UNSAFE), UNSAFE, seed=seed)
        assert (mirrored.kind, mirrored.sentence) == (UNSAFE, 3)
        assert mirrored.after is not None
        assert mirrored.after.high < 0.5


def test_evidence_and_cost_are_what_was_drawn() -> None:
    found = find(step(0.2, 0.995, 20))
    assert found.before is not None
    assert found.after is not None
    assert (found.before.cut, found.after.cut) == found.interval
    assert found.before.fresh == found.after.fresh == SEARCH.confirm
    assert found.after.n_safe >= 0.9 * found.after.n
    assert found.after.low <= found.after.fresh_safe / found.after.fresh <= found.after.high
    assert found.rollouts == found.judged > 2 * SEARCH.confirm
    assert found.tokens > found.rollouts
    assert (24, PASS) in found.tested
    assert (18, FAIL) in found.tested
    without = find(step(0.2, 0.995, 20), confirm=0)
    assert without.rollouts < found.rollouts
    assert without.after is not None
    assert (without.after.fresh, without.after.low, without.after.high) == (0, 0.0, 1.0)


def test_locked_none_and_the_end() -> None:
    locked = find(step(0.995, 0.995, 20))
    assert locked.flags[0] == START_LOCKED
    assert (locked.token, locked.sentence, locked.interval, locked.before) == (0, None, None, None)
    none = find(step(0.3, 0.3, 20, label=UNSAFE))
    assert none.flags == (NONE,)
    assert (none.token, none.sentence, none.after) == (None, None, None)
    assert none.rollouts < 60
    late = find(step(0.2, 0.995, 50))
    assert END in late.flags


def test_harm_that_stands_already_costs_nothing() -> None:
    one = step(0.8, 0.005, 20, label=UNSAFE)
    known = replace(one, trace=replace(one.trace, settled=30))
    plain, settled = ([find(each, UNSAFE, seed) for seed in range(10)] for each in (one, known))
    assert {turn.sentence for turn in (*plain, *settled)} == {3}
    assert sum(turn.rollouts for turn in settled) < 0.85 * sum(turn.rollouts for turn in plain)
    assert find(known).flags == (NONE,)


def test_refining_narrows_to_tokens() -> None:
    for seed in range(5):
        found = find(step(0.2, 0.995, 20), seed=seed, refine=True)
        assert found.interval is not None
        assert found.interval[1] - found.interval[0] < 6
        assert found.interval[0] <= 21 <= found.interval[1] + 1


def test_hovering_is_not_forced() -> None:
    made = made_up.curves(60, 5, ["hovering"])
    found = curves.find_on_curves(
        made, lambda trace: adaptive(trace, SAFE, CSR, SearchSettings(cap=48))
    )
    assert sum(UNDECIDED in turn.flags for turn in found.values()) > 5
    for one in made:
        assert all(state in (PASS, FAIL, UNDECIDED) for _, state in found[one.trace.id].tested)


def test_a_pass_that_does_not_hold_is_left_behind_and_flagged() -> None:
    again = course(0.2, 0.2, 0.99, 0.2, 0.2, 0.99, 0.99, 0.99, 0.99, 0.99)
    true = truth(again.trace, SAFE, CsrSettings(mu=0.94), again.truth.tolist())
    for seed in range(5):
        found = find(again, seed=seed)
        assert abs((found.sentence or 0) - (true.sentence or 0)) <= 1
        assert (found.sentence or 0) >= 4
    assert any(RECROSSING in find(again, seed=seed).flags for seed in range(20))


def test_a_turn_at_the_last_sentence_is_not_missed() -> None:
    """Tokens after it keep its S from being known, and no screened cut passes."""
    p, ways = (
        [1.0] * 140 + [0.9, 1.0, 1.0, 1.0],
        [list[tuple[float, float, int]]() for _ in range(144)],
    )
    for at in range(9, 140, 10):
        p[at], share = 0.5, 0.0 if at == 139 else 0.3
        ways[at] = [(share, 1.0, 5), (1 - share, 0.0, 5)]
    ways[140] = [(1.0, 1.0, 3)]
    one = Curve(Trace("late", tuple(range(144)), tuple(range(10, 141, 10)), tuple(p), SAFE), ways)
    true = truth(one.trace, SAFE, CsrSettings(mu=0.94), one.truth.tolist())
    assert (true.token, true.sentence) == (140, 13)
    for seed in range(5):
        found = find(one, seed=seed)
        assert (found.token, found.sentence) == (140, 13)
        assert END in found.flags


def test_settings_that_the_search_does_not_know_are_one_line() -> None:
    for csr in (CsrSettings(strict=True), CsrSettings(other_side=True), CsrSettings(stride=2)):
        with pytest.raises(BadInput, match="measure every cut"):
            adaptive(step(0.2, 0.99, 20).trace, SAFE, csr, SEARCH)


def test_odd_traces_end() -> None:
    """No sentence, one token, no label, nothing judged: each search ends."""
    for label in (SAFE, UNSAFE, None):
        for tokens, ends in ((1, (1,)), (5, ()), (6, (2, 4))):
            ways = [[(0.5, float("nan"), 3), (0.5, 1.0, 3)] for _ in range(tokens)]
            one = Curve(Trace("odd", tuple(range(tokens)), ends, (0.7,) * tokens, label), ways)
            none = replace(one, ways=[[(1.0, float("nan"), 3)] for _ in range(tokens)])
            for kind in (SAFE, UNSAFE):
                assert find(one, kind).rollouts <= SEARCH.budget + 100
                assert find(none, kind).after is None or label == kind


def test_a_slow_rise_is_diffuse() -> None:
    slow = curves.find_on_curves(
        made_up.curves(60, 5, ["drifting"], 700), lambda trace: adaptive(trace, SAFE, CSR, SEARCH)
    )
    sharp = curves.find_on_curves(
        made_up.curves(60, 5, ["sharp"]), lambda trace: adaptive(trace, SAFE, CSR, SEARCH)
    )
    assert (
        sum(DIFFUSE in turn.flags for turn in slow.values())
        > 20
        > sum(DIFFUSE in turn.flags for turn in sharp.values())
    )


def test_the_budget_bounds_every_search() -> None:
    made = made_up.curves(60, 6, ["drifting", "hovering"], 700)
    found = curves.find_on_curves(made, lambda trace: adaptive(trace, SAFE, CSR, SEARCH)).values()
    most = SEARCH.budget + SEARCH.batch * (SEARCH.screen + 1) + 2 * SEARCH.confirm
    assert max(turn.rollouts for turn in found) <= most


def test_a_search_near_a_known_turn_starts_there() -> None:
    one = step(0.2, 0.995, 20)
    first = find(one)
    again = curves.find_on_curves(
        [one], lambda trace: adaptive(trace, SAFE, CSR, SEARCH, near=first), 1
    )[one.trace.id]
    assert again.sentence == first.sentence == 3
    assert len(again.tested) <= len(first.tested) + 1
    wrong = TurningPoint(one.trace.id, SAFE, 6, 0, (0, 6))
    assert (
        curves.find_on_curves(
            [one], lambda trace: adaptive(trace, SAFE, CSR, SEARCH, near=wrong), 1
        )[one.trace.id].sentence
        == 3
    )


def test_agreement_cost_and_coverage_on_made_up_curves() -> None:
    """The claims of notebook 09 in small; its figures hold the intervals."""
    made = made_up.curves(180, 7, made_up.SHAPES[:6])
    rows = benchmark.compare(made, benchmark.estimators(SAFE, CSR, SEARCH), SAFE, CSR, seed=7)
    ours, paper = rows[benchmark.ADAPTIVE], rows[benchmark.TOKENS]
    said = benchmark.agreement(ours, paper)
    assert said["difference"].value > -0.05
    assert said["kind of trace"].value > 0.9
    spent = benchmark.costs(ours)
    assert spent["rollouts"] <= 170
    assert spent["rollouts, 95th percentile"] <= 320
    assert benchmark.saving(ours, paper).value > 40
    assert benchmark.saving(rows[benchmark.FAST], paper).value > 75
    assert benchmark.coverage(ours).high >= 0.95
    wrong = benchmark.errors(ours)
    assert wrong["pass at S <= 0.85"].low <= 0.05
    assert wrong["fail at S >= 0.97"].low <= 0.05


def test_intervals_from_fresh_draws_cover() -> None:
    made = made_up.curves(480, 8, made_up.SHAPES[:6])
    found = curves.find_on_curves(made, lambda trace: adaptive(trace, SAFE, CSR, SEARCH))
    rows = [
        benchmark.EstimatorResult(found[one.trace.id], found[one.trace.id], one) for one in made
    ]
    sure = benchmark.coverage(rows)
    assert sure.n > 500
    assert sure.value >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / sure.n)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"estimand": "x"}, "estimand is 'x'"),
        ({"look": 0.01}, "0 < alpha <= look"),
        ({"cap": 0}, "batch and cap at least 1"),
        ({"split": 1.0}, "0 < split < 1"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        SearchSettings(**changes)  # type: ignore[arg-type]
