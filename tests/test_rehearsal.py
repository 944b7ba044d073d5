"""A rehearsal runs what a profile will run, on a small model of its architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model

from ipo_lib.cli import doctor, rehearsal, reproduce
from ipo_lib.engines import prefix_sharing
from ipo_lib.profiles.reading import profile_names, read_profile

SHORT: dict[str, Any] = {
    "stage1.accumulation": 2,
    "stage2.accumulation": 2,
}  # the other settings are the profile's own


@pytest.mark.parametrize(
    "name", ["tiny", "sandbox", "ds-8b", "ds-8b-24gb", "ds-7b", "qwen3-8b", "r1-1.5b"]
)
def test_every_profile_s_settings_train_and_draw(name: str) -> None:
    settings = read_profile(name, SHORT)
    found = dict(rehearsal.rehearse(settings))
    family = settings.model.architecture
    assert list(found) == [f"{family}, stage 1", f"{family}, stage 2", f"{family}, sampling"]
    assert found[f"{family}, stage 1"].startswith("2 steps, loss ")
    assert found[f"{family}, sampling"].startswith("4 tokens in ")


def test_real_models_are_trained_with_activation_checkpointing_and_a_rate_for_lora() -> None:
    for name in ("ds-8b", "ds-7b", "qwen3-8b", "r1-1.5b", "ds-8b-24gb"):
        for stage in (read_profile(name).stage1, read_profile(name).stage2):
            assert stage.activation_checkpointing
            assert stage.learning_rate == 1e-4
    assert [read_profile(name).model.architecture for name in ("ds-8b", "ds-7b", "qwen3-8b")] == [
        "llama",
        "qwen2",
        "qwen3",
    ]


def test_the_folder_s_architecture_counts_where_there_is_one(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", family="qwen3")
    assert rehearsal.architecture(read_profile("ds-8b"), folder) == "qwen3"
    assert rehearsal.architecture(read_profile("ds-8b"), None) == "llama"


def test_the_doctor_tells_what_would_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every GPU profile did: the wrapper that the trainer sees lacked what activation checkpointing asks for."""
    monkeypatch.delattr(prefix_sharing.Scorer, "activation_checkpointing_enable")
    (found,) = doctor.rehearsed(read_profile("ds-8b", SHORT))
    assert found.hint.startswith("the run would stop here")
    assert "gradient_checkpointing_enable" in found.found


def test_the_doctor_builds_no_model_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox's model is downloaded and merged by a run; a rehearsal trains a random one instead."""
    monkeypatch.setattr(
        doctor, "build_component", lambda part: pytest.fail(f"{part.use} was called")
    )
    found = list(doctor.rehearsed(read_profile("sandbox", SHORT)))
    assert found
    assert not [one.hint for one in found if one.hint]


def test_ipo_doctor_rehearses_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reproduce.doctor("tiny", [], str(tmp_path))
    said = capsys.readouterr().out
    assert said.count("rehearsal: llama") == 3
    assert "2 steps, loss" in said


def test_made_up_pairs_are_few_and_short() -> None:
    settings = replace(read_profile("tiny").stage1, batch_size=3, accumulation=2)
    assert rehearsal.two_steps(settings).epochs == 1
    pairs = rehearsal.made_up_pairs(4, 100)
    assert len({pair.id for pair in pairs}) == 4
    assert all(len(pair.prompt_ids) + len(pair.chosen_ids) < 50 for pair in pairs)


def test_every_shipped_profile_can_be_rehearsed() -> None:
    assert {read_profile(name).model.architecture for name in profile_names()} == {
        "llama",
        "qwen2",
        "qwen3",
    }
