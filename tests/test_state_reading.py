"""What is read from states: planted curves, folds without leaks, guesses and settled traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planted import step

from ipo_lib.csr import CsrSettings
from ipo_lib.experiments import state_reading
from ipo_lib.experiments.state_reading import PredictedCurve
from ipo_lib.records import SAFE, UNSAFE, BadInput, Rollout
from ipo_lib.turning_points.curves import Curve

CSR = CsrSettings()


def predicted(
    name: str, prompt: str, curve: Curve, values: list[float], constant: float = 0.5
) -> PredictedCurve:
    rollout = Rollout(name, prompt, 0, curve.trace.token_ids, "", "think", 0, "s")
    length = len(curve.truth) - 1
    cuts = tuple(np.linspace(0, length, len(values)).astype(int).tolist())
    named = replace(curve, trace=replace(curve.trace, id=name))
    return PredictedCurve(rollout, named, cuts, np.array(values), constant, constant)


def exactly(name: str, prompt: str, curve: Curve) -> PredictedCurve:
    """A prediction that is right at every cut."""
    one = predicted(name, prompt, curve, [0.0] * 11)
    return replace(one, predicted=one.exact)


def test_errors_are_distances_from_s_over_prompts() -> None:
    curve = step(0.2, 0.995, 20)
    right, off = exactly("a", "p", curve), exactly("b", "q", curve)
    off = replace(off, predicted=np.clip(off.exact - 0.1, 0, 1))
    errors = state_reading.errors([right, right, off])
    assert errors["probe"].value == pytest.approx(0.05, abs=1e-3)  # prompts count alike
    assert errors["probe"].n == 2
    is_open = (right.exact >= 0.05) & (right.exact <= 0.95)
    assert 0 < is_open.sum() < len(is_open)
    assert errors["probe, where S is open"].value == pytest.approx(0.05, abs=1e-3)
    open_constant = float(np.abs(0.5 - right.exact)[is_open].mean())
    assert errors["constant, where S is open"].value == pytest.approx(open_constant, abs=1e-3)
    of_constant = float(np.abs(0.5 - right.exact).mean())
    assert errors["constant"].value == pytest.approx(of_constant, abs=1e-3)
    difference = errors["probe minus constant"].value
    assert difference == pytest.approx(0.05 - of_constant, abs=1e-3)


@pytest.mark.parametrize("within", [(0.0, 1.0), (0.05, 0.95)])
def test_no_constant_is_nearer_to_s(within: tuple[float, float]) -> None:
    """Distances are averaged over cuts, traces and prompts, as the errors are."""
    random = np.random.default_rng(0)
    s_by_prompt = {
        f"p{number}": [random.beta(0.3, 0.3, length) for length in random.integers(1, 30, traces)]
        for number, traces in enumerate((1, 2, 5, 3, 1))
    }

    def distance(constant: float) -> float:
        of_prompts = []
        for traces in s_by_prompt.values():
            kept = [s[(s >= within[0]) & (s <= within[1])] for s in traces]
            of_traces = [np.abs(constant - s).mean() for s in kept if len(s)]
            if of_traces:
                of_prompts.append(np.mean(of_traces))
        return float(np.mean(of_prompts))

    nearest = distance(state_reading.nearest_constant(s_by_prompt, within))
    assert nearest <= min(distance(constant) for constant in np.linspace(0, 1, 501)) + 1e-12
    assert state_reading.nearest_constant({}, within) == 0.5


def test_ranking_and_settled_traces() -> None:
    safe, unsafe = step(0.2, 0.995, 20), step(0.8, 0.005, 20, label=UNSAFE)
    traces = []
    for number in range(12):
        traces.append(predicted(f"s{number}", f"p{number}", safe, [0.97, 0.97]))
        traces.append(predicted(f"u{number}", f"p{number}", unsafe, [0.5, 0.1]))
    ranked = state_reading.auroc(traces, 0.0)
    assert (ranked.value, ranked.low, ranked.high, ranked.n) == (1.0, 1.0, 1.0, 12)
    found = state_reading.settled(traces, 0.05)
    assert found.share.value == 0.5
    assert found.wrong.value == 0.0
    liar = predicted("x", "p99", unsafe, [0.99, 0.1])
    assert state_reading.settled([*traces, liar], 0.05).wrong.value == pytest.approx(1 / 13)
    assert state_reading.settled(traces, 0.01).share.value == 0.0


def test_calibration_groups_predictions() -> None:
    traces = [exactly(f"t{number}", f"p{number}", step(0.2, 0.995, 20)) for number in range(5)]
    for guess, exact in state_reading.calibration(traces):
        assert guess == pytest.approx(exact.value, abs=1e-6)


def test_a_guess_is_where_the_prediction_crosses_the_threshold() -> None:
    safe = predicted("a", "p", step(0.2, 0.995, 20), [0.2, 0.5, 0.95, 0.99])
    never = predicted("b", "p", step(0.2, 0.995, 20), [0.2, 0.5, 0.6, 0.7])
    guesses = state_reading.guesses([safe, never], SAFE, CSR)
    assert guesses == {"a": safe.cuts[2], "b": None}
    assert state_reading.guesses([safe], UNSAFE, CSR) == {"a": None}


def test_the_turn_of_an_exact_prediction_is_near_the_true_one() -> None:
    one = exactly("a", "p", step(0.2, 0.995, 20))
    turn = state_reading.turns_by_probe([one], SAFE, CSR)["a"]
    assert turn.token is not None
    assert 18 <= turn.token <= 30


def test_a_fold_never_learns_from_its_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[set[str]] = []
    read: list[list[str]] = []

    class Probe:
        def log_odds(self, states: Any) -> Any:
            return np.zeros(len(states))

    def learn(states: Any, judged: Any) -> Probe:
        learnt.append({rollout.prompt_id for rollout in judged.rollouts})
        return Probe()

    class Span:
        token_start, token_end = 0, 5

    def of_trace(session: Any, rollout: Rollout) -> list[Span]:
        read.append([rollout.prompt_id])
        return [Span()]

    curve = step(0.2, 0.995, 20)
    recorded = []
    for number in range(20):
        one = predicted(f"r{number}", f"p{number % 7}", curve, [0.5, 0.5])
        recorded.append((one.rollout, one.curve))
    states = {rollout.id: np.zeros((2, 3)) for rollout, _ in recorded}
    monkeypatch.setattr(state_reading, "states_by_sentence", lambda *_: states)
    monkeypatch.setattr(state_reading, "learn_probe", learn)
    monkeypatch.setattr(state_reading, "trace_sentences", of_trace)
    found = state_reading.predict_curves(None, {}, recorded)  # type: ignore[arg-type]
    assert sorted(one.rollout.id for one in found) == sorted(name for name in states)
    assert len(learnt) == state_reading.FOLDS
    # Each prompt is missing from exactly one fold's lesson: that which predicts it.
    for number in range(7):
        assert sum(f"p{number}" not in prompts for prompts in learnt) == 1
    assert all(one.predicted.tolist() == [0.5, 0.5] for one in found)
    # Every trace is the same curve, read at tokens 0 and 5, where S is 0.2.
    assert all(one.constant == pytest.approx(0.2, abs=0.01) for one in found)
    assert all(one.open_constant == pytest.approx(0.2, abs=0.01) for one in found)
    with pytest.raises(BadInput, match="1 prompts with recorded curves; 5 are needed"):
        state_reading.predict_curves(None, {}, recorded[:1])  # type: ignore[arg-type]
