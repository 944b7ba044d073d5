"""Bars of a kernel reach the terminal; a log gets few lines; outside a kernel there are none."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from ipo_lib.engines import progress
from ipo_lib.engines.progress import Meter, Relay, say

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def kernel(monkeypatch: Patch) -> None:
    """As in a Jupyter kernel, with bars that are shown at once."""
    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    monkeypatch.setattr(progress, "SECONDS_PER_UPDATE", 0.0)


def test_outside_a_kernel_nothing_is_shown(capfd: Capture) -> None:
    say(1, 2, "rollouts")
    meter = Meter(2, "rollouts")
    meter.step()
    meter.step()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("kernel")
def test_a_meter_shows_its_steps_on_the_error_stream_and_clears_the_bar(capsys: Capture) -> None:
    meter = Meter(8, "rollouts")
    for _ in range(4):
        meter.step()
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.split("\r")[-1].startswith("rollouts:  50%|")
    assert "4/8" in errors.split("\r")[-1]
    for _ in range(4):
        meter.step()
    assert capsys.readouterr().err.split("\r")[-2].strip() == ""


@pytest.mark.usefixtures("kernel")
def test_a_short_loop_shows_no_bar(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(progress, "SECONDS_PER_UPDATE", 3600.0)
    meter = Meter(3, "drawing")
    for _ in range(3):
        meter.step()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("kernel")
def test_what_somebody_else_counts_is_shown_as_a_bar(capsys: Capture) -> None:
    say(2, 3, "table1: base, seed 0")
    assert capsys.readouterr().err.startswith("\rtable1: base, seed 0:  67%|")
    say(4, 3, "GRPO, tokens")
    assert "4/" in capsys.readouterr().err


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_relay_shows_bars_on_a_terminal_and_clears_them(monkeypatch: Patch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    relay = Relay("06")
    relay.write("UserWarning: nothing to look at\n")
    relay.write("\rtraining:  10%|#\rtraining:  20%|##\nA warning")
    relay.write("\r" + "x" * 100)
    relay.write("\r      \r")
    relay.close()
    lines = ["06 training:  20%|##", "06 " + "x" * 36, ""]
    assert terminal.text == "".join(progress.ERASE_LINE + line for line in lines)


def test_a_relay_writes_few_lines_to_a_log(capsys: Capture, monkeypatch: Patch) -> None:
    relay = Relay("06")
    for done in range(3):
        relay.write(f"\rtraining: {done}/3")
    assert capsys.readouterr().err == ""  # in the first minute
    monkeypatch.setattr(progress, "SECONDS_PER_LOG_LINE", 0.2)
    time.sleep(0.2)
    for done in range(3):
        relay.write(f"\rtraining: {done}/3")
    relay.close()
    assert capsys.readouterr().err == "06 training: 0/3\n"


def test_in_a_kernel_is_known_without_loading_ipython() -> None:
    code = (
        "import sys\nfrom ipo_lib.engines import progress\n"
        "assert not progress.in_kernel()\nassert 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
