"""Two different things of one id are refused by every verb that would keep one of them and forget the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
    r1_chat,
    rollout,
    session,
    world,
)

from ipo_lib import overlap, pipeline, stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.evaluation import EvaluationSettings, evaluate
from ipo_lib.experiments import findings
from ipo_lib.experiments.kl import divergence
from ipo_lib.pairs import PairSettings
from ipo_lib.profiles import reading
from ipo_lib.profiles import run as run_
from ipo_lib.profiles.run import Run
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompt, Verdict, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import CorrectionSettings, Prefix
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


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(tmp_path: Path, chat: Chat) -> stages.Session:
    return session(tmp_path, chat, world(chat))


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


VERBS: dict[str, Callable[[stages.Session, list[Prompt]], object]] = {
    "traces": lambda run, prompts: stages.sample_and_judge(run, prompts, THINK, 2),
    "sample": lambda run, prompts: stages.sample(run, [Prefix(one) for one in prompts], THINK, 2),
    "evaluate": lambda run, prompts: evaluate(run, {"harmful": prompts}, HARMFUL, EOS),
    "pairs": lambda run, prompts: pipeline.corrected_pairs(
        run, prompts, TRIGGERS[:1], Phrase(), CorrectionSettings(), PairSettings(), THINK
    ),
    "apart": lambda _, prompts: overlap.apart(prompts, PROMPTS[5:]),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_prompts_of_one_id_are_refused_and_nothing_is_drawn(
    verb: Callable[[stages.Session, list[Prompt]], object], run: stages.Session
) -> None:
    refused(lambda: verb(run, TWICE), "prompt", "p0")
    assert not list(run.store.root.rglob("records.jsonl"))
    verb(run, AGAIN)


def test_sets_that_share_an_id_may_be_measured_apart_but_not_together(run: stages.Session) -> None:
    sets = {"harmful": TWICE[:1], "other": TWICE[1:]}
    settings = EvaluationSettings(("harmful", "other"), (), (), 2)
    found = {one.set: one.total for one in evaluate(run, sets, settings, EOS)}
    assert found == {"harmful": 2, "other": 2}
    refused(
        lambda: stages.sample_and_judge(run, [*sets["harmful"], *sets["other"]], THINK, 1),
        "prompt",
        "p0",
    )


def test_rollouts_of_one_id_are_refused(run: stages.Session, chat: Chat) -> None:
    unsafe = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_="r", finish="think")
    safe = rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}", id_="r", finish="think")
    both, labels, prompts = [unsafe, safe], {"r": UNSAFE}, named()
    verdicts = [Verdict("r", "trace", "harm", label, None, "", "hand") for label in (UNSAFE, SAFE)]
    curves = stages.measure_csr(run, prompts, [unsafe], CSR, THINK)

    def searched() -> object:
        return locate.find_turns(run, prompts, both, labels, UNSAFE, CSR, SEARCH, THINK)

    def mined() -> object:
        return mining.mine_pool(
            run, prompts, both, verdicts, Phrase(), CSR, SEARCH, CorrectionSettings(), THINK
        )

    for call in (
        lambda: stages.judge(run, prompts, both),
        lambda: stages.probabilities(run, prompts, both, THINK),
        lambda: stages.measure_csr(run, prompts, both, CSR, THINK),
        lambda: stages.turning_points(run, both, curves, labels, UNSAFE, CSR),
        lambda: stages.find_cues(run, prompts, both, Phrase()),
        lambda: stages.correct(
            run, prompts, both, TRIGGERS[0], Phrase(), CorrectionSettings(), THINK
        ),
        lambda: locate.known_traces(run, prompts, both, labels, THINK),
        lambda: findings.chain(run, prompts, both, {"t": TRIGGER}, Phrase(), THINK, 1),
        searched,
        mined,
    ):
        refused(call, "rollout", "r")
    assert [*stages.find_cues(run, prompts, [unsafe, replace(unsafe)], Phrase()).items()] == [
        ("r", 1)
    ]


class Many:
    """A detector that is asked about all traces at once."""

    def __init__(self, verb: str) -> None:
        self.asked = list[int]()
        setattr(self, verb, self.count)

    def fingerprint(self) -> dict[str, str]:
        return {"detector": "many"}

    def count(self, *given: object) -> object:
        raise AssertionError("asked about two traces of one id")


@pytest.mark.parametrize("verb", ["many", "sentences"])
def test_rollouts_of_one_id_are_refused_before_a_detector_is_asked(
    verb: str, run: stages.Session, chat: Chat
) -> None:
    both = [rollout(chat, f"{text}\n{CLOSE}", id_="r", finish="think") for text in (CUE, TRIGGER)]
    refused(lambda: stages.find_cues(run, named(), both, Many(verb)), "rollout", "r")  # type: ignore[arg-type]


def test_curves_of_one_id_are_refused(run: stages.Session, chat: Chat) -> None:
    unsafe = rollout(chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_="r", finish="think")
    (curve,) = locate.record(run, named(), [unsafe], {"r": UNSAFE}, THINK, 4)
    other = replace(
        curve,
        ways=[[(2 * weight, safe, cost) for weight, safe, cost in ways] for ways in curve.ways],
    )
    estimators = benchmark.estimators(SAFE, CSR, SEARCH)
    estimator = next(iter(estimators.values()))
    for call in (
        lambda: curves.find_on_curves([curve, other], estimator),
        lambda: curves.Tape([curve, other]),
        lambda: benchmark.compare([curve, other], estimators, SAFE, CSR),
    ):
        refused(call, "curve", "r")
    assert len(curves.Tape([curve, replace(curve)]).places) == 1


def test_triggers_of_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: choose_triggers(TRIGGERS, {"t0": (1, 2)}), "trigger", "t0")
    settings = reading.read_profile("tiny")
    part = settings.Part("builtins:list", {})
    monkeypatch.setattr(run_, "build_component", lambda _: TRIGGERS)
    opened = Run(replace(settings, triggers=part, pool=part), None, tmp_path, tmp_path)  # type: ignore[arg-type]
    refused(lambda: opened.triggers({}, [], [], Phrase()), "trigger", "t0")
    refused(opened.pool, "trigger", "t0")


def test_divergence_is_not_measured_on_two_rollouts_of_one_id(
    run: stages.Session, chat: Chat, tmp_path: Path
) -> None:
    both = [rollout(chat, f"{text}\n{CLOSE}", id_="r", finish="think") for text in (CUE, TRIGGER)]
    opened = Run(reading.read_profile("tiny"), run, tmp_path, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "adapted", lambda *_: run)
        refused(lambda: divergence(opened, tmp_path, named(), both), "rollout", "r")
