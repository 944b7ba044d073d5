"""Checkpoints: a training that was killed ends with the bytes of one that was not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preferences import PLAIN, make_pairs

from ipo_lib import training
from ipo_lib.engines import checkpoints, progress
from ipo_lib.records import BadInput
from ipo_lib.store import Store

PAIRS = make_pairs(12)
BASIC = replace(PLAIN, epochs=3, batch_size=2, dropout=0.1, keep=1)  # 18 steps, 6 an epoch


class Killed(BaseException):
    """Stands for a signal: nothing in a training catches it."""


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checkpoints.VARIABLE, "0")


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function by which the training is killed at the end of a step; at none by default."""

    def kill_at(step: int | None = None) -> None:
        def say(now: int, *_: Any) -> None:
            if now == step:
                raise Killed

        monkeypatch.setattr(progress, "say", say)

    return kill_at


def reached(folder: Path) -> str:
    """The name of the last complete checkpoint, of whatever training; "": there is none."""
    steps = [int(mark.parent.name[11:]) for mark in folder.glob(f"*/{checkpoints.MARK}")]
    return f"checkpoint-{max(steps)}" if steps else ""


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 3},
        {"length_buckets": False},
        {"loss": "sft"},
        {"engine": "trl"},
        {"engine": "trl", "length_buckets": False},
    ],
    ids=str,
)
def test_a_killed_training_ends_as_one_that_was_not(
    model: Path, tmp_path: Path, every_step: None, kill_at: Any, changes: dict[str, Any]
) -> None:
    settings = replace(BASIC, **changes)
    last = 18 // settings.accumulation
    kill_at()
    rows = training.train(PAIRS, model, settings, tmp_path / "whole")
    for step in dict.fromkeys(min(step, last) for step in (2, 7, 13, 18)):  # 7, 13: a new epoch
        kill_at(step)
        with pytest.raises(Killed):
            training.train(PAIRS, model, settings, tmp_path / "killed")
        assert reached(tmp_path / "killed") == f"checkpoint-{step - 1}"
    kill_at()
    assert training.train(PAIRS, model, settings, tmp_path / "killed") == rows
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_stage_two_goes_on_from_its_checkpoint(
    model: Path, stage1: Any, tmp_path: Path, every_step: None, kill_at: Any
) -> None:
    kill_at()
    training.train(PAIRS, model, BASIC, tmp_path / "whole", adapter=stage1[0])
    kill_at(5)
    with pytest.raises(Killed):
        training.train(PAIRS, model, BASIC, tmp_path / "killed", adapter=stage1[0])
    kill_at()
    training.train(PAIRS, model, BASIC, tmp_path / "killed", adapter=stage1[0])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_torn_checkpoint_is_not_read(
    model: Path, tmp_path: Path, every_step: None, kill_at: Any
) -> None:
    kill_at(4)
    with pytest.raises(Killed):
        training.train(PAIRS, model, BASIC, tmp_path)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / checkpoints.MARK).unlink()
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_bytes(b"half")
    name = (tmp_path / "checkpoint-3" / checkpoints.MARK).read_text()
    assert checkpoints.latest(tmp_path, name) == tmp_path / "checkpoint-3"
    kill_at()
    training.train(PAIRS, model, BASIC, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("other", [{"learning_rate": 2e-2}, {"pairs": make_pairs(12, seed=1)}])
def test_another_training_does_not_go_on_from_it(
    model: Path, tmp_path: Path, every_step: None, kill_at: Any, other: dict[str, Any]
) -> None:
    kill_at(9)
    with pytest.raises(Killed):
        training.train(PAIRS, model, BASIC, tmp_path / "killed")
    kill_at()
    pairs = other.pop("pairs", PAIRS)
    settings = replace(BASIC, **other)
    training.train(pairs, model, settings, tmp_path / "killed")
    training.train(pairs, model, settings, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_short_training_writes_no_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Any
) -> None:
    monkeypatch.delenv(checkpoints.VARIABLE, raising=False)
    kill_at(9)
    with pytest.raises(Killed):
        training.train(PAIRS, model, BASIC, tmp_path)
    assert not reached(tmp_path)


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_time_that_is_none_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checkpoints.VARIABLE, text)
    with pytest.raises(BadInput, match=f"IPO_CHECKPOINT_SECONDS '{text}' is no time"):
        checkpoints.seconds()


def test_the_store_keeps_what_a_killed_training_has_reached(
    model: Path, tmp_path: Path, every_step: None, kill_at: Any
) -> None:
    artifact = Store(tmp_path).artifact("adapters", 1, {"of": "a test"})

    def fill(folder: Path) -> None:
        training.train(PAIRS, model, BASIC, folder)

    kill_at(6)
    with pytest.raises(Killed):
        artifact.make(fill, goes_on=True)
    assert not artifact.done
    assert reached(artifact.building) == "checkpoint-5"
    seen: list[str] = []

    def fill_and_count(folder: Path) -> None:
        kill_at()
        seen.append(reached(folder))
        fill(folder)

    assert artifact.make(fill_and_count, goes_on=True) == artifact.path
    assert artifact.done
    assert seen == ["checkpoint-5"]
    assert not list(artifact.path.glob("checkpoint-*"))
