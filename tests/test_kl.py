"""KL along traces: against a plain computation, and where it sits on traces with known curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ipo_lib import training
from ipo_lib.engines import lora
from ipo_lib.experiments import kl, recipes
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.records import SAFE, Rollout, by_id
from ipo_lib.stages import JudgedRollouts, sample_and_judge
from ipo_lib.store import Store
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.draws import Trace

SMALL = {
    "prompts.train_harmful.count": 6,
    "prompts.train_benign.count": 4,
    "plan.draws": 4,
    "plan.pool": 2,
    "stage1.keep": 0,
    "stage1.batch_size": 4,
    "stage1.learning_rate": 4e-3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run("tiny", SMALL, str(tmp_path_factory.mktemp("kl")))


@pytest.fixture(scope="module")
def adapter(run: Run) -> Path:
    pairs, _ = recipes.gather_pairs(run, run.prompts("train_harmful"))
    return training.train_first_stage(run.session, pairs, run.folder, run.profile.stage1)[0]


@pytest.fixture(scope="module")
def judged(run: Run) -> JudgedRollouts:
    return sample_and_judge(run.session, run.prompts("train_harmful"), run.thinking, 1)


def test_divergence_is_that_of_two_plain_forwards(
    run: Run, adapter: Path, judged: JudgedRollouts
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rollout = judged.rollouts[0]
    prompt_ids = run.session.chat.prompt_ids(judged.prompts[rollout.prompt_id])
    base = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.tensor([prompt_ids + rollout.token_ids])
    with torch.no_grad():
        p = tuned(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        with tuned.disable_adapter():
            q = tuned(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    for direction, (a, b) in zip(kl.DIRECTIONS, ((p, q), (q, p)), strict=True):
        nats = kl.divergence(run, adapter, judged.prompts, [rollout], direction)[rollout.id]
        assert nats == pytest.approx((a.exp() * (a - b)).sum(-1).tolist(), abs=1e-4)
        assert len(nats) == len(rollout.token_ids)
        assert max(nats) > 0.01
    again = kl.divergence(run, adapter, judged.prompts, [rollout])
    assert again == kl.divergence(run, adapter, judged.prompts, [rollout])


def test_an_adapter_on_another_base_is_refused(run: Run, adapter: Path, tmp_path: Path) -> None:
    from models import tiny_model

    from ipo_lib.records import BadInput

    other = tiny_model(tmp_path / "other", family="llama", hidden=64)
    with pytest.raises(BadInput, match="not for 'other'"):
        lora.make_config(other, run.profile.stage1, adapter)


def test_means_by_offset() -> None:
    nats = {"a": [0.0, 1.0, 2.0], "b": [4.0, 5.0], "c": [6.0]}
    points = kl.mean_by_offset(nats, {"a": 1, "b": 1, "c": 0}, range(-1, 3))
    means = [(offset, value) for offset, value, _, _ in points]
    assert means == [(-1, 2.0), (0, pytest.approx(4.0))]
    assert all(low <= value <= high for _, value, low, high in points)


def recorded(curve: Curve) -> list[kl.SafetyChanges]:
    rollout = Rollout(curve.trace.id, "p", 0, (), "", "think", 0, "by hand")
    return kl.recorded_changes([(rollout, curve)])


def test_concentration_compares_the_sentence_of_the_largest_change_with_the_rest() -> None:
    # S: 0.5 up to token 4, 1 after it
    ways = [[(1.0, 0.0, 1)] if token == 4 else [] for token in range(9)]
    p = tuple(0.5 if token == 4 else 1.0 for token in range(9))
    curve = Curve(Trace("t", tuple(range(9)), (3, 6, 9), p, SAFE), ways)
    assert [curve.truth[cut] for cut in (0, 3, 6, 9)] == [0.5, 0.5, 1.0, 1.0]
    prompts = {"t": "p", "u": "p"}
    inside = [1.0] * 3 + [4.0] * 3 + [1.0] * 3
    assert kl.concentration({"t": inside}, recorded(curve), prompts) == (("p", 3.0),)
    outside = [4.0] * 3 + [1.0] * 3 + [4.0] * 3
    assert kl.concentration({"t": outside}, recorded(curve), prompts) == (("p", -3.0),)
    one_sentence = Curve(Trace("u", (1, 2), (2,), (1.0, 1.0), SAFE), [[], []])
    assert kl.concentration({"u": [1.0, 2.0]}, recorded(one_sentence), prompts) == ()


def test_position_is_matched_against_sentences_at_the_same_place() -> None:
    """KL that grows along a trace seems to sit where S changes late; matched, it does not."""
    ends = (0, 2, 4, 6)
    late = [kl.SafetyChanges(f"late {i}", ends, (0.5, 0.5, 0.5, 1.0)) for i in range(3)]
    early = [kl.SafetyChanges(f"early {i}", ends, (0.5, 1.0, 1.0, 1.0)) for i in range(3)]
    changes = [*late, *early]
    growing = {change.rollout_id: [0.0, 0.0, 1.0, 1.0, 2.0, 2.0] for change in changes}
    prompts = {key: key for key in growing}
    plain = dict(kl.concentration(growing, changes, prompts))
    assert plain["late 0"] == 1.5
    matched = dict(kl.concentration(growing, changes, prompts, matched=True))
    assert set(matched.values()) == {0.0}
    larger = growing | {change.rollout_id: [0.0, 0.0, 1.0, 1.0, 5.0, 5.0] for change in late}
    assert dict(kl.concentration(larger, changes, prompts, matched=True))["late 1"] == 3.0


def test_logits_are_read_a_part_at_a_time(
    run: Run, adapter: Path, judged: JudgedRollouts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rollout = judged.rollouts[0]
    whole = kl.divergence(run, adapter, judged.prompts, [rollout])[rollout.id]
    monkeypatch.setattr(kl, "CHUNK", 3)
    session = dataclasses.replace(run.session, store=Store(tmp_path))
    fresh = dataclasses.replace(run, session=session)
    parts = kl.divergence(fresh, adapter, judged.prompts, [rollout])[rollout.id]
    assert parts == pytest.approx(whole, abs=1e-5)


def test_without_recorded_curves_s_is_measured(run: Run, adapter: Path) -> None:
    live = run.changed({"extras.forks": None, "csr.draws": 8})
    sets = live.prompts("train_harmful"), live.prompts("train_benign")
    assert kl.measure_divergence(live, "row", 0, adapter, *sets, 4).where == ()
    measured = kl.measure_divergence(live, "row", 0, adapter, *sets, 4, curves=8)
    assert measured.where
    assert dict(measured.where).keys() <= by_id(sets[0]).keys()


def test_fewer_recorded_curves_can_be_read(run: Run, adapter: Path) -> None:
    """A profile with many of them reads some, since each costs a pass of two models."""
    sets = run.prompts("train_harmful"), run.prompts("train_benign")
    every = dict(kl.measure_divergence(run, "row", 0, adapter, *sets, 4).where)
    some = dict(kl.measure_divergence(run, "row", 0, adapter, *sets, 4, curves=3).where)
    assert 0 < len(some) <= 3 < len(every)
    assert some.keys() <= every.keys()


def test_a_model_that_did_not_move_has_no_kl_and_one_that_did_has(run: Run, adapter: Path) -> None:
    sets = run.prompts("train_harmful"), run.prompts("train_benign")
    measured = kl.measure_divergence(run, "row", 3, adapter, *sets, 4)
    assert (measured.row, measured.seed) == ("row", 3)
    assert max(value for _, value, _, _ in measured.index) > 0.01
    assert {offset for offset, *_ in measured.cue} & {-1, 0, 1}
    assert measured.benign
    assert measured.where
