"""What a kernel says reaches whoever looks on, and nobody else is bothered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipo_lib.engines import progress


def test_a_kernel_writes_and_the_watcher_shows_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    path = tmp_path / "progress.json"
    with progress.watched(path, "06_ipo_training"):
        meter = progress.Meter(8, "rollouts")
        for _ in range(4):
            meter.step()
        assert json.loads(path.read_text()) == ["rollouts", 4, 8]
        time.sleep(0.2)
    said = capfd.readouterr().err
    assert f"06 {'rollouts':25} [{'#' * 15}{'.' * 15}] 4 of 8" in said
    assert "\r" not in said  # a log, not a terminal
    assert not path.exists()


def test_nobody_looks_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.FILE, raising=False)
    progress.say(1, 2, "rollouts")
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_half_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.02)
    path = tmp_path / "progress.json"
    with progress.watched(path, "00"):
        path.write_text('["roll')
        time.sleep(0.1)
    with (
        pytest.raises(ZeroDivisionError),
        progress.watched(path, "00"),
    ):  # what goes wrong inside comes out
        raise ZeroDivisionError


def test_the_bar_is_full_at_the_end_and_never_longer() -> None:
    assert progress.line("x", 0, 0).count("#") == 0
    assert (
        progress.line("x", 9, 9).count("#")
        == progress.line("x", 12, 9).count("#")
        == progress.WIDTH
    )


def test_a_meter_speaks_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int, str]] = []
    monkeypatch.setattr(progress, "say", lambda *what: said.append(what))
    monkeypatch.setattr(progress, "EVERY", 3600.0)
    meter = progress.Meter(3, "drawing")
    for _ in range(3):
        meter.step()
    assert said == [(3, 3, "drawing")]


def test_two_workers_of_the_same_notebooks_do_not_trip_over_each_other(tmp_path: Path) -> None:
    code = "from ipo_lib import progress\nfor at in range(400): progress.say(at, 400, 'rollouts')"
    environment = {**os.environ, progress.FILE: str(tmp_path / "progress.json")}
    workers = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [(worker.communicate()[1], worker.returncode) for worker in workers] == [(b"", 0)] * 3
    assert json.loads((tmp_path / "progress.json").read_text())[1:] == [399, 400]
