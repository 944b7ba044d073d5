"""What may be spent: bounds that hold for one process, and for all processes and resumes of a run that count in one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ipo_lib.engines import openai_api
from ipo_lib.engines.openai_api import BUDGET_FILE, Budget, Server
from ipo_lib.records import BadInput

HOUSE = Path(__file__).parents[1]
SERVER = Server(("http://one/v1",), "m")
SPEND = """
import sys
from ipo_lib.records import BadInput
from ipo_lib.engines.openai_api import Server, budget
own, made = budget(Server(("http://one/v1",), "m"), "judge", dollars=10.0, dollars_in=1e6, dollars_out=1e6), 0
try:
    for _ in range(50):
        own.reserve("judge 'm'", 1, 0)
        made += 1
except BadInput as error:
    print(error, file=sys.stderr)
print(made)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(BUDGET_FILE, str(tmp_path / "runs" / "budget.json"))
    return tmp_path / "runs" / "budget.json"


def opened(**bounds: float) -> Budget:
    """As another process would open it."""
    openai_api._BUDGETS.clear()
    return openai_api.budget(SERVER, "judge", **bounds)


def used(read: int, written: int) -> SimpleNamespace:
    return SimpleNamespace(prompt_tokens=read, completion_tokens=written)


def test_processes_of_one_run_cannot_pass_the_bound_together(file: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", SPEND]
    started = [subprocess.Popen(command, cwd=HOUSE, text=True, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    said = [one.communicate(timeout=60) for one in started]
    assert sum(int(out) for out, _ in said) == 10
    assert json.loads(file.read_text()) == {
        "judge m at http://one/v1": {"calls": 10, "dollars": 10.0}
    }
    for _, error in said:
        assert "10.00 of 10.00 dollars spent" in error
        assert f"all processes of this run count in {file}, delete it to count anew" in error


def test_a_resume_goes_on_from_what_was_spent_and_a_raised_bound_too(file: Path) -> None:
    first = opened(dollars=5.0, dollars_in=1e6)
    first.settle(first.reserve("judge 'm'", 4, 0), used(3, 0))
    again = opened(dollars=5.0, dollars_in=1e6)
    assert again is not first
    with pytest.raises(
        BadInput,
        match=r"3\.00 of 5\.00 dollars spent, the next call could pass the bound; raise the budget",
    ):
        again.reserve("judge 'm'", 3, 0)
    raised = opened(dollars=8.0, dollars_in=1e6)
    raised.release(raised.reserve("judge 'm'", 3, 0))
    assert (raised.spent, raised.made) == (3.0, 2)
    file.unlink()
    assert opened(dollars=5.0, dollars_in=1e6).reserve("judge 'm'", 5, 0) == 5.0


def test_calls_are_counted_together_too_and_a_judge_s_and_a_detector_s_are_two(file: Path) -> None:
    opened(calls=2).reserve("judge 'm'", 1, 0)
    opened(calls=2).reserve("judge 'm'", 1, 0)
    with pytest.raises(
        BadInput,
        match="2 of 2 calls made, the bound; raise calls, answers so far are kept; all processes",
    ):
        opened(calls=2).reserve("judge 'm'", 1, 0)
    openai_api.budget(SERVER, "detector", calls=2).reserve("detector 'm'", 1, 0)
    assert sorted(json.loads(file.read_text())) == [
        "detector m at http://one/v1",
        "judge m at http://one/v1",
    ]


def test_without_a_file_a_process_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BUDGET_FILE, raising=False)
    opened(calls=1).reserve("judge 'm'", 1, 0)
    one = opened(calls=1)
    one.reserve("judge 'm'", 1, 0)
    with pytest.raises(BadInput) as error:
        one.reserve("judge 'm'", 1, 0)
    assert "processes" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "counts",
    [
        {},
        {"total_tokens": 7},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": 3},
    ],
)
def test_a_server_that_does_not_count_is_billed_at_the_most(counts: dict[str, int | None]) -> None:
    one = Budget(dollars=9.0, dollars_in=1e6)
    one.settle(one.reserve("judge", 4, 0), SimpleNamespace(**counts))
    assert one.spent == 4.0


@pytest.mark.parametrize("text", ["{", "[]", '{"judge m at http://one/v1": 3}'])
def test_a_broken_file_is_said_in_one_line(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(BadInput, match="delete it to count anew") as error:
        opened(calls=1).reserve("judge 'm'", 1, 0)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(BUDGET_FILE, str(tmp_path / "file" / "budget.json"))
    with pytest.raises(BadInput, match=rf"name another in \${BUDGET_FILE}"):
        opened(calls=1).reserve("judge 'm'", 1, 0)
    assert os.environ[BUDGET_FILE]
