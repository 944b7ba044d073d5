"""Stages of training: what is written, what is stored, what warns, what is refused in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from preferences import LOG2, PLAIN, make_pairs, preference_loss, side_mean, suffix_logps

from ipo_lib import training
from ipo_lib.dpo import Stage2Settings
from ipo_lib.records import BadInput, Pair
from ipo_lib.store import Store

WRITTEN = ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "training.json")


def test_same_seed_same_bytes(model: Path, stage1: Any, tmp_path: Path) -> None:
    again = training.train(make_pairs(8), model, replace(PLAIN, epochs=4), tmp_path)
    assert again == stage1[1]
    for name in WRITTEN:
        assert (tmp_path / name).read_bytes() == (stage1[0] / name).read_bytes()
    other = training.train(make_pairs(8), model, replace(PLAIN, epochs=4, seed=1), tmp_path)
    assert other != again


def test_out_folder_holds_the_adapter_and_its_records_only(model: Path, stage1: Any) -> None:
    folder, rows = stage1
    assert {path.name for path in folder.iterdir()} == set(WRITTEN)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    summary = json.loads((folder / "training.json").read_text())
    assert summary["pairs"] == 8
    assert summary["too_long"] == 0
    assert summary["effective_batch"] == 4
    assert summary["settings"]["learning_rate"] == 1e-2
    assert not summary["continued"]
    assert str(model.parent) not in (folder / "adapter_config.json").read_text()


def test_adapter_loads_with_peft_and_is_all_that_changed(model: Path, stage1: Any) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = PeftModel.from_pretrained(base, str(stage1[0]))
    ids = torch.tensor([make_pairs(1)[0].prompt_ids])
    with torch.no_grad():
        adapted = tuned(ids).logits
        with tuned.disable_adapter():
            plain = tuned(ids).logits
        fresh = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert torch.equal(plain, fresh(ids).logits)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    for name, value in tuned.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
    weights = load_file(stage1[0] / "adapter_model.safetensors")
    assert weights
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in weights.items())


def test_a_training_that_does_nothing_says_so_loudly(model: Path, tmp_path: Path) -> None:
    settings = replace(PLAIN, epochs=2, batch_size=4, learning_rate=1e-6)
    expected = r"DID NOTHING: the margin of the last 1 of 4 steps is 0\.00\d; raise learning_rate"
    with pytest.warns(UserWarning, match=expected):
        rows = training.train(make_pairs(8), model, settings, tmp_path / "nothing")
    summary = json.loads((tmp_path / "nothing" / "training.json").read_text())
    assert summary["warning"] == training.margin_warning(rows) != ""
    settings = replace(settings, learning_rate=1e-2)
    moved = training.train(make_pairs(8), model, settings, tmp_path / "moved")
    assert training.margin_warning(moved) == ""
    assert training.margin_warning([{"step": 1, "loss": 0.7}]) == ""  # SFT has no margin


def test_stage_two_refers_to_the_base_model(
    model: Path, stage1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step: policy = stage 1's weights, reference = the base model, not stage 1."""
    adapter, harmful, benign = stage1[0], make_pairs(3, seed=1), make_pairs(4, seed=2)
    settings = Stage2Settings(**{**vars(PLAIN), "batch_size": 6, "ratio": 0.5, "min_refusals": 4})
    session: Any = SimpleNamespace(
        store=Store(tmp_path), sampler=SimpleNamespace(fingerprint=lambda: "base")
    )
    path, rows, message = training.train_second_stage(
        session, harmful, benign, model, adapter, settings
    )
    mixed = [pair for side in training.mix(harmful, benign, settings) for pair in side]
    policy, reference = suffix_logps(model, adapter, mixed), suffix_logps(model, None, mixed)
    for side, name in enumerate(("chosen", "rejected")):
        expected = side_mean(policy, side), side_mean(reference, side)
        assert rows[0][f"logps/{name}"] == pytest.approx(expected[0], abs=1e-3)
        assert rows[0][f"ref_logps/{name}"] == pytest.approx(expected[1], abs=1e-3)
        assert abs(expected[0] - expected[1]) > 0.1
    assert rows[0]["loss"] == pytest.approx(preference_loss(policy, reference, 0.1), abs=1e-4)
    assert abs(rows[0]["loss"] - LOG2) > 1e-3  # ten times what the line above allows
    assert message == "stage 2 trained 1 steps on 2 harmful and 4 benign pairs"
    assert path
    assert json.loads((path / "training.json").read_text())["continued"]

    monkeypatch.setattr(training, "train", None)  # what is stored is not trained again
    again = training.train_second_stage(session, harmful, benign, model, adapter, settings)
    assert again == (path, rows, message)


def test_stage_two_is_skipped_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Stage2Settings(**vars(PLAIN), min_refusals=5)
    session: Any = SimpleNamespace(store=Store(tmp_path / "out"), sampler=None)
    path, rows, message = training.train_second_stage(
        session, make_pairs(3), make_pairs(4), Path("nowhere"), Path("nowhere"), settings
    )
    assert (path, rows) == (None, [])
    assert message == "stage 2 skipped: 4 benign refusals, at least 5 needed"
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("harmful", "benign", "ratio", "sizes"), [(50, 20, 0.5, (10, 20)), (3, 20, 0.3, (3, 10))]
)
def test_mix_keeps_the_ratio(
    harmful: int, benign: int, ratio: float, sizes: tuple[int, int]
) -> None:
    settings = Stage2Settings(ratio=ratio, seed=4)
    sides = make_pairs(harmful, seed=1), make_pairs(benign, seed=2)
    mixed = training.mix(*sides, settings)
    assert tuple(map(len, mixed)) == sizes
    assert mixed == training.mix(*sides, settings)
    for side, taken in zip(sides, mixed, strict=True):
        assert taken == [pair for pair in side if pair in taken]  # no duplicates, order kept
    if sizes[0] < harmful:
        assert mixed != training.mix(*sides, replace(settings, seed=5))


def test_weights_keep_the_ratio_with_every_pair() -> None:
    settings = Stage2Settings(ratio=0.5, min_refusals=4, keep_all=True)
    sides = training.mix(make_pairs(9), make_pairs(4, seed=2), settings)
    assert [len(side) for side in sides] == [9, 4]
    weights = [sum(pair.weight for pair in side) for side in sides]
    assert weights[0] / weights[1] == pytest.approx(0.5)  # with no harmful pair left out
    assert sum(weights) == pytest.approx(13)


def test_long_pairs_are_counted_not_fatal(model: Path, tmp_path: Path) -> None:
    long = Pair("long", tuple(range(2, 30)), (5,) * 5, (6,) * 5, 0, "planted")
    settings = replace(PLAIN, max_length=32)
    rows = training.train([*make_pairs(4), long], model, settings, tmp_path)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert len(rows) == 1
    assert (summary["pairs"], summary["too_long"]) == (4, 1)
    with pytest.raises(BadInput, match="none of 1 pairs fits max_length 32"):
        training.train([long], model, settings, tmp_path)


def test_what_is_missing_or_diverged_is_one_line(model: Path, tmp_path: Path) -> None:
    for folder, adapter in ((tmp_path, None), (model, tmp_path)):
        with pytest.raises(BadInput, match="holds no"):
            training.train(make_pairs(1), folder, PLAIN, tmp_path / "out", adapter=adapter)
    with pytest.raises(BadInput, match="lower learning_rate"):
        training._metrics([{"step": 3, "loss": math.nan}], 0.1)


def test_training_prints_nothing(model: Path, tmp_path: Path) -> None:
    """In a fresh process, where no other test has silenced a library before."""
    code = f"""
import warnings
from dataclasses import replace
warnings.simplefilter("ignore")
from preferences import PLAIN, make_pairs
from ipo_lib import training
for engine in ("trl", "shared"):
    settings = replace(PLAIN, engine=engine)
    training.train(make_pairs(2), {str(model)!r}, settings, {str(tmp_path)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert "it/s" not in done.stderr
    assert "%|" not in done.stderr


def test_intermediate_adapters_are_whole_and_differ(model: Path, tmp_path: Path) -> None:
    training.train(make_pairs(24), model, replace(PLAIN, keep=2), tmp_path / "kept")
    training.train(make_pairs(24), model, PLAIN, tmp_path / "plain")
    kept = training.kept_adapters(tmp_path / "kept")
    assert list(kept) == [8, 16]  # 6 steps of 4 pairs, after the second and the fourth
    folders = (*kept.values(), tmp_path / "kept")
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert len(set(weights)) == 3
    plain = (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    assert weights[-1] == plain  # keeping some changes nothing
    for folder in kept.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == model.name
    assert training.kept_adapters(tmp_path / "plain") == {}


def test_a_training_that_never_leaves_the_warm_up_is_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="warm-up"):
        training.train(make_pairs(4), model, replace(PLAIN, warmup=0.1), tmp_path)
    assert len(training.train(make_pairs(4), model, PLAIN, tmp_path)) == 1
