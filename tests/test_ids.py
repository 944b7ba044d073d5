"""Two different things of one id are refused by every step that would lose one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    PROMPTS,
    PROOF,
    STEP,
    TRIGGER,
    Phrase,
    named,
    rollout,
    session,
    world,
)

from ipo_lib import pipeline, stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.evaluation import EvaluationSettings, evaluate
from ipo_lib.experiments import replacements
from ipo_lib.experiments.kl import divergence
from ipo_lib.pairs import PairSettings
from ipo_lib.profiles import reading
from ipo_lib.profiles import run as profile_run
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import Component
from ipo_lib.prompts import without_overlap
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompt, Rollout, Verdict, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import CorrectionSettings, Prefix, Session
from ipo_lib.triggers import Trigger, choose_triggers
from ipo_lib.turning_points import benchmark, curves, locate, mining
from ipo_lib.turning_points.adaptive import SearchSettings

EOS, THINK = Sampling(max_tokens=400), Sampling(max_tokens=400, until="think")
CSR, SEARCH = CsrSettings(draws=2), SearchSettings(confirm=2)
TWICE = [
    Prompt("p0", "Plan one?", "scripted", True),
    Prompt("p0", "Plan another?", "scripted", True),
]
AGAIN = [PROMPTS[0], PROMPTS[1], replace(PROMPTS[0])]  # the same prompt twice is no contradiction
TRIGGERS = [Trigger("t0", TRIGGER, 3, 0, rescue=(1, 2)), Trigger("t0", ASIDE, 1, 1, rescue=(1, 2))]
HARMFUL = EvaluationSettings(("harmful",), (), (), 2)


Step = Callable[[Session, list[Prompt]], object]


@pytest.fixture
def opened(tmp_path: Path, chat: Chat) -> Session:
    return session(tmp_path, chat, world(chat))


def two_traces(chat: Chat) -> list[Rollout]:
    """Different traces of one id."""
    texts = (f"{CUE}\n{CLOSE}", f"{TRIGGER}\n{CLOSE}")
    return [rollout(chat, text, id_="r", finish="think") for text in texts]


def refused(call: Callable[[], object], kind: str, id_: str) -> None:
    with pytest.raises(BadInput, match=f"two different {kind}s have the id '{id_}'") as error:
        call()
    assert "\n" not in str(error.value)


def test_items_by_id_in_order_and_identical_ones_once() -> None:
    assert by_id(AGAIN) == {"p0": PROMPTS[0], "p1": PROMPTS[1]}
    assert [*by_id(reversed(PROMPTS[:3]))] == ["p2", "p1", "p0"]
    assert by_id([]) == {}
    refused(lambda: by_id(TWICE), "prompt", "p0")
    refused(lambda: by_id(TRIGGERS), "trigger", "t0")


def sample_two(opened: Session, prompts: list[Prompt]) -> object:
    return stages.sample(opened, [Prefix(prompt) for prompt in prompts], THINK, 2)


def sample_and_judge_two(opened: Session, prompts: list[Prompt]) -> object:
    return stages.sample_and_judge(opened, prompts, THINK, 2)


def evaluate_two(opened: Session, prompts: list[Prompt]) -> object:
    return evaluate(opened, {"harmful": prompts}, HARMFUL, EOS)


def correct_two(opened: Session, prompts: list[Prompt]) -> object:
    return pipeline.corrected_pairs(
        opened, prompts, TRIGGERS[:1], Phrase(), CorrectionSettings(), PairSettings(), THINK
    )


def remove_overlap(_: Session, prompts: list[Prompt]) -> object:
    return without_overlap(prompts, PROMPTS[5:])


@pytest.mark.parametrize(
    "step", [sample_and_judge_two, sample_two, evaluate_two, correct_two, remove_overlap]
)
def test_prompts_of_one_id_are_refused_and_nothing_is_drawn(step: Step, opened: Session) -> None:
    refused(lambda: step(opened, TWICE), "prompt", "p0")
    assert not list(opened.store.root.rglob("records.jsonl"))
    step(opened, AGAIN)


def test_sets_that_share_an_id_may_be_measured_apart_but_not_together(opened: Session) -> None:
    sets = {"harmful": TWICE[:1], "other": TWICE[1:]}
    settings = EvaluationSettings(("harmful", "other"), (), (), 2)
    measures = evaluate(opened, sets, settings, EOS)
    assert {measure.set: measure.total for measure in measures} == {"harmful": 2, "other": 2}
    together = [*sets["harmful"], *sets["other"]]
    refused(lambda: stages.sample_and_judge(opened, together, THINK, 1), "prompt", "p0")


def test_rollouts_of_one_id_are_refused(opened: Session, chat: Chat) -> None:
    unsafe = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_="r", finish="think")
    safe = rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}", id_="r", finish="think")
    both, labels, prompts = [unsafe, safe], {"r": UNSAFE}, named()
    verdicts = [Verdict("r", "trace", "harm", label, None, "", "hand") for label in (UNSAFE, SAFE)]
    curves = stages.measure_csr(opened, prompts, [unsafe], CSR, THINK)
    correction = CorrectionSettings()
    calls: list[Callable[[], object]] = [
        lambda: stages.judge(opened, prompts, both),
        lambda: stages.probabilities(opened, prompts, both, THINK),
        lambda: stages.measure_csr(opened, prompts, both, CSR, THINK),
        lambda: stages.find_turning_points(opened, both, curves, labels, UNSAFE, CSR),
        lambda: stages.find_cues(opened, prompts, both, Phrase()),
        lambda: pipeline.correct(opened, prompts, both, TRIGGERS[0], Phrase(), correction, THINK),
        lambda: locate.describe_traces(opened, prompts, both, labels, THINK),
        lambda: replacements.chain_interventions(
            opened, prompts, both, {"t": TRIGGER}, Phrase(), THINK, 1
        ),
        lambda: locate.find_turns(opened, prompts, both, labels, UNSAFE, CSR, SEARCH, THINK),
        lambda: mining.mine_pool(
            opened, prompts, both, verdicts, Phrase(), CSR, SEARCH, correction, THINK
        ),
    ]
    for call in calls:
        refused(call, "rollout", "r")
    cues = stages.find_cues(opened, prompts, [unsafe, replace(unsafe)], Phrase())
    assert [*cues.items()] == [("r", 1)]


class Unasked:
    """A detector that fails when it is asked."""

    def __init__(self, stored: bool) -> None:
        self.stored = stored

    def fingerprint(self) -> dict[str, str]:
        return {"detector": "unasked"}

    def first_cues(self, *_: object) -> object:
        raise AssertionError("asked about two traces of one id")


@pytest.mark.parametrize("stored", [True, False])
def test_rollouts_of_one_id_are_refused_before_a_detector_is_asked(
    stored: bool, opened: Session, chat: Chat
) -> None:
    detector: Any = Unasked(stored)
    refused(lambda: stages.find_cues(opened, named(), two_traces(chat), detector), "rollout", "r")


def test_curves_of_one_id_are_refused(opened: Session, chat: Chat) -> None:
    unsafe = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_="r", finish="think")
    (curve,) = locate.record_curves(opened, named(), [unsafe], {"r": UNSAFE}, THINK, 4)
    doubled = []
    for ways in curve.ways:
        doubled.append([(2 * weight, safe, cost) for weight, safe, cost in ways])
    other = replace(curve, ways=doubled)
    estimators = benchmark.estimators(SAFE, CSR, SEARCH)
    estimator = next(iter(estimators.values()))
    refused(lambda: curves.run_on_curves([curve, other], estimator), "curve", "r")
    refused(lambda: benchmark.compare([curve, other], estimators, SAFE, CSR), "curve", "r")
    assert len(curves.run_on_curves([curve, replace(curve)], estimator)) == 1


def test_triggers_of_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: choose_triggers(TRIGGERS, {"t0": (1, 2)}), "trigger", "t0")
    component = Component("builtins:list", {})
    profile = replace(reading.read_profile("tiny"), triggers=component, extras={"pool": component})
    monkeypatch.setattr(profile_run, "build_component", lambda _: TRIGGERS)
    run = Run(profile, None, tmp_path, tmp_path)  # type: ignore[arg-type]
    refused(lambda: run.triggers({}, [], [], Phrase()), "trigger", "t0")
    refused(run.pool, "trigger", "t0")


def test_divergence_is_not_measured_on_two_rollouts_of_one_id(
    opened: Session, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(reading.read_profile("tiny"), opened, tmp_path, tmp_path)
    monkeypatch.setattr(Run, "adapted", lambda *_: opened)
    refused(lambda: divergence(run, tmp_path, named(), two_traces(chat)), "rollout", "r")
