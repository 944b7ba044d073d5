"""A rehearsal runs what a profile will run, on a small model of its architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model

from ipo_lib.cli import app, doctor, rehearsal
from ipo_lib.engines import prefix_sharing
from ipo_lib.profiles.reading import profile_names, read_profile

# The other settings are the profile's.
SHORT: dict[str, Any] = {"stage1.accumulation": 2, "stage2.accumulation": 2}
REAL = ("ds-8b", "ds-7b", "qwen3-8b", "r1-1.5b", "ds-8b-24gb")


@pytest.mark.parametrize("name", ["tiny", "sandbox", *REAL])
def test_every_profile_s_settings_train_and_draw(name: str) -> None:
    settings = read_profile(name, SHORT)
    steps = dict(rehearsal.rehearse(settings))
    family = settings.model.architecture
    assert list(steps) == [f"{family}, stage 1", f"{family}, stage 2", f"{family}, sampling"]
    assert steps[f"{family}, stage 1"].startswith("2 steps, loss ")
    assert steps[f"{family}, sampling"].startswith("4 tokens in ")


def test_real_models_are_trained_with_activation_checkpointing_and_a_rate_for_lora() -> None:
    for name in REAL:
        profile = read_profile(name)
        for stage in (profile.stage1, profile.stage2):
            assert stage.activation_checkpointing
            assert stage.learning_rate == 1e-4
    for name, family in (("ds-8b", "llama"), ("ds-7b", "qwen2"), ("qwen3-8b", "qwen3")):
        assert read_profile(name).model.architecture == family


def test_the_folder_s_architecture_counts_where_there_is_one(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", family="qwen3")
    assert rehearsal.architecture(read_profile("ds-8b"), folder) == "qwen3"
    assert rehearsal.architecture(read_profile("ds-8b"), None) == "llama"


def test_the_doctor_tells_what_would_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper that the trainer sees once lacked what activation checkpointing asks for."""
    monkeypatch.delattr(prefix_sharing.Scorer, "activation_checkpointing_enable")
    (check,) = doctor.check_rehearsal(read_profile("ds-8b", SHORT))
    assert check.hint.startswith("the run would stop here")
    assert "gradient_checkpointing_enable" in check.found


def test_the_doctor_builds_no_model_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run downloads and merges the sandbox's model; a rehearsal trains a random one instead."""
    monkeypatch.setattr(
        doctor, "build_component", lambda part: pytest.fail(f"{part.use} was called")
    )
    checks = list(doctor.check_rehearsal(read_profile("sandbox", SHORT)))
    assert checks
    assert not any(check.hint for check in checks)


def test_ipo_doctor_rehearses_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    app.check_machine("tiny", [], str(tmp_path))
    output = capsys.readouterr().out
    assert output.count("rehearsal: llama") == 3
    assert "2 steps, loss" in output


def test_random_pairs_are_few_and_short() -> None:
    settings = replace(read_profile("tiny").stage1, batch_size=3, accumulation=2)
    assert rehearsal.shortened(settings).epochs == 1
    pairs = rehearsal.random_pairs(4, 100)
    assert len({pair.id for pair in pairs}) == 4
    assert all(len(pair.prompt_ids) + len(pair.chosen_ids) < 50 for pair in pairs)


def test_every_shipped_profile_can_be_rehearsed() -> None:
    families = {read_profile(name).model.architecture for name in profile_names()}
    assert families == {"llama", "qwen2", "qwen3"}
