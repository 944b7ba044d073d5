"""KL along traces: against a plain computation, and where it sits on traces whose curve is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ipo_lib import training
from ipo_lib.engines import lora
from ipo_lib.experiments import kl, recipes
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.records import SAFE, Rollout
from ipo_lib.stages import sample_and_judge
from ipo_lib.store import Store
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.exhaustive import Trace

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
    pairs, _ = recipes.gather(run, run.prompts("train_harmful"))
    return training.train_first_stage(run.session, pairs, run.folder, run.profile.stage1)[0]


def test_divergence_is_that_of_two_plain_forwards(run: Run, adapter: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seen = sample_and_judge(run.session, run.prompts("train_harmful"), run.thinking, 1)
    one = seen.rollouts[0]
    head = run.session.chat.prompt_ids(seen.prompts[one.prompt_id])
    base = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.tensor([head + one.token_ids])
    with torch.no_grad():
        p = tuned(ids).logits[0, len(head) - 1 : -1].log_softmax(-1)
        with tuned.disable_adapter():
            q = tuned(ids).logits[0, len(head) - 1 : -1].log_softmax(-1)
    for direction, (a, b) in zip(kl.DIRECTIONS, ((p, q), (q, p)), strict=True):
        found = kl.divergence(run, adapter, seen.prompts, [one], direction)[one.id]
        assert found == pytest.approx((a.exp() * (a - b)).sum(-1).tolist(), abs=1e-4)
        assert len(found) == len(one.token_ids)
        assert max(found) > 0.01
    assert kl.divergence(run, adapter, seen.prompts, [one]) == {
        one.id: kl.divergence(run, adapter, seen.prompts, [one])[one.id]
    }


def test_an_adapter_on_another_base_is_refused(run: Run, adapter: Path, tmp_path: Path) -> None:
    from models import tiny_model

    from ipo_lib.records import BadInput

    other = tiny_model(tmp_path / "other", family="llama", hidden=64)
    with pytest.raises(BadInput, match="not for 'other'"):
        lora.config(other, run.profile.stage1, adapter)


def recorded(key: str) -> Rollout:
    return Rollout(key, "p", 0, (), "", "think", 0, "by hand")


def test_aligned_means_by_offset() -> None:
    found = {"a": [0.0, 1.0, 2.0], "b": [4.0, 5.0], "c": [6.0]}
    points = kl.aligned(found, {"a": 1, "b": 1, "c": 0}, range(-1, 3))
    assert [(offset, value) for offset, value, _, _ in points] == [
        (-1, 2.0),
        (0, pytest.approx(4.0)),
    ]
    assert all(low <= value <= high for _, value, low, high in points)


def test_concentration_compares_the_sentence_of_the_largest_change_with_the_rest() -> None:
    ways = [[(1.0, 0.0, 1)] if at == 4 else [] for at in range(9)]
    p = tuple(0.5 if at == 4 else 1.0 for at in range(9))  # S: 0.5 up to token 4, 1 after it
    curve = Curve(Trace("t", tuple(range(9)), (3, 6, 9), p, SAFE), ways)
    assert [curve.truth[cut] for cut in (0, 3, 6, 9)] == [0.5, 0.5, 1.0, 1.0]
    changes = kl.known_changes([(recorded("t"), curve)])
    assert kl.concentration({"t": [1.0] * 3 + [4.0] * 3 + [1.0] * 3}, changes, {"t": "p"}) == (
        ("p", 3.0),
    )
    assert kl.concentration({"t": [4.0] * 3 + [1.0] * 3 + [4.0] * 3}, changes, {"t": "p"}) == (
        ("p", -3.0),
    )
    whole = Curve(Trace("u", (1, 2), (2,), (1.0, 1.0), SAFE), [[], []])
    assert (
        kl.concentration({"u": [1.0, 2.0]}, kl.known_changes([(recorded("u"), whole)]), {"u": "p"})
        == ()
    )


def test_position_is_matched_against_sentences_at_the_same_place() -> None:
    """KL that only grows along a trace looks concentrated where S changes late; beside the same place it does not."""
    ends = (0, 2, 4, 6)
    late = [kl.Changes(f"late {at}", ends, (0.5, 0.5, 0.5, 1.0)) for at in range(3)]
    early = [kl.Changes(f"early {at}", ends, (0.5, 1.0, 1.0, 1.0)) for at in range(3)]
    growing = {one.rollout_id: [0.0, 0.0, 1.0, 1.0, 2.0, 2.0] for one in (*late, *early)}
    prompts = {key: key for key in growing}
    plain = dict(kl.concentration(growing, [*late, *early], prompts))
    assert plain["late 0"] == 1.5
    matched = dict(kl.concentration(growing, [*late, *early], prompts, matched=True))
    assert set(matched.values()) == {0.0}
    there = growing | {one.rollout_id: [0.0, 0.0, 1.0, 1.0, 5.0, 5.0] for one in late}
    assert dict(kl.concentration(there, [*late, *early], prompts, matched=True))["late 1"] == 3.0


def test_logits_are_read_a_part_at_a_time(
    run: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = sample_and_judge(run.session, run.prompts("train_harmful"), run.thinking, 1)
    one = seen.rollouts[0]
    whole = kl.divergence(run, adapter, seen.prompts, [one])[one.id]
    monkeypatch.setattr(kl, "CHUNK", 3)
    fresh = dataclasses.replace(
        run, session=dataclasses.replace(run.session, store=Store(tmp_path))
    )
    assert kl.divergence(fresh, adapter, seen.prompts, [one])[one.id] == pytest.approx(
        whole, abs=1e-5
    )


def test_without_recorded_curves_s_is_measured(run: Run, adapter: Path) -> None:
    live = run.changed({"forks": None, "csr.draws": 8})
    sets = live.prompts("train_harmful"), live.prompts("train_benign")
    assert kl.measure_divergence(live, "row", 0, adapter, *sets, 4).where == ()
    found = kl.measure_divergence(live, "row", 0, adapter, *sets, 4, curves=8)
    assert found.where
    assert {prompt for prompt, _ in found.where} <= {one.id for one in sets[0]}


def test_a_model_that_did_not_move_has_no_kl_and_one_that_did_has(run: Run, adapter: Path) -> None:
    sets = run.prompts("train_harmful"), run.prompts("train_benign")
    found = kl.measure_divergence(run, "row", 3, adapter, *sets, 4)
    assert (found.row, found.seed) == ("row", 3)
    assert max(value for _, value, _, _ in found.index) > 0.01
    assert {offset for offset, *_ in found.cue} & {-1, 0, 1}
    assert found.benign
    assert found.where
