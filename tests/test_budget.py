"""Budgets: bounds that hold in one process, and in all processes of a run that share a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ipo_lib.engines import budget
from ipo_lib.engines.budget import BUDGET_FILE, Budget
from ipo_lib.engines.openai_api import Server
from ipo_lib.records import BadInput

CHECKOUT = Path(__file__).parents[1]
SERVER = Server(("http://one/v1",), "m")
SPEND = """
import sys
from ipo_lib.records import BadInput
from ipo_lib.engines.budget import shared_budget
from ipo_lib.engines.openai_api import Server
server = Server(("http://one/v1",), "m")
budget = shared_budget(server, "judge", dollars=10.0, dollars_in=1e6, dollars_out=1e6)
calls = 0
try:
    for _ in range(50):
        budget.reserve("judge 'm'", 1, 0)
        calls += 1
except BadInput as error:
    print(error, file=sys.stderr)
print(calls)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(BUDGET_FILE, str(tmp_path / "runs" / "budget.json"))
    return tmp_path / "runs" / "budget.json"


def fresh_budget(**bounds: float) -> Budget:
    """The budget as another process would open it."""
    budget._BUDGETS.clear()
    return budget.shared_budget(SERVER, "judge", **bounds)


def test_processes_of_one_run_cannot_pass_the_bound_together(file: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", SPEND]
    processes = []
    for _ in range(3):
        processes.append(subprocess.Popen(command, cwd=CHECKOUT, text=True, **pipes))  # type: ignore[call-overload]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert sum(int(out) for out, _ in outputs) == 10
    counts = {"calls": 10, "dollars": 10.0}
    assert json.loads(file.read_text()) == {"judge m at http://one/v1": counts}
    for _, error in outputs:
        assert "10.00 of 10.00 dollars spent" in error
        assert f"all processes of this run count in {file}, delete it to count anew" in error


def test_a_resume_and_a_raised_bound_go_on_from_what_was_spent(file: Path) -> None:
    first = fresh_budget(dollars=5.0, dollars_in=1e6)
    usage = SimpleNamespace(prompt_tokens=3, completion_tokens=0)
    first.settle(first.reserve("judge 'm'", 4, 0), usage)
    again = fresh_budget(dollars=5.0, dollars_in=1e6)
    assert again is not first
    spent = r"3\.00 of 5\.00 dollars spent, the next call could pass the bound; raise the budget"
    with pytest.raises(BadInput, match=spent):
        again.reserve("judge 'm'", 3, 0)
    raised = fresh_budget(dollars=8.0, dollars_in=1e6)
    raised.release(raised.reserve("judge 'm'", 3, 0))
    assert (raised.spent, raised.made) == (3.0, 2)
    file.unlink()
    assert fresh_budget(dollars=5.0, dollars_in=1e6).reserve("judge 'm'", 5, 0) == 5.0


def test_calls_are_counted_together_but_judge_and_detector_apart(file: Path) -> None:
    fresh_budget(calls=2).reserve("judge 'm'", 1, 0)
    fresh_budget(calls=2).reserve("judge 'm'", 1, 0)
    spent = "2 of 2 calls made, the bound; raise calls, answers so far are kept; all processes"
    with pytest.raises(BadInput, match=spent):
        fresh_budget(calls=2).reserve("judge 'm'", 1, 0)
    budget.shared_budget(SERVER, "detector", calls=2).reserve("detector 'm'", 1, 0)
    names = sorted(json.loads(file.read_text()))
    assert names == ["detector m at http://one/v1", "judge m at http://one/v1"]


def test_without_a_file_a_process_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BUDGET_FILE, raising=False)
    fresh_budget(calls=1).reserve("judge 'm'", 1, 0)
    budget = fresh_budget(calls=1)
    budget.reserve("judge 'm'", 1, 0)
    with pytest.raises(BadInput) as error:
        budget.reserve("judge 'm'", 1, 0)
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
    budget = Budget(dollars=9.0, dollars_in=1e6)
    budget.settle(budget.reserve("judge", 4, 0), SimpleNamespace(**counts))
    assert budget.spent == 4.0


@pytest.mark.parametrize("text", ["{", "[]", '{"judge m at http://one/v1": 3}'])
def test_a_broken_file_is_one_line(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(BadInput, match="delete it to count anew") as error:
        fresh_budget(calls=1).reserve("judge 'm'", 1, 0)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(BUDGET_FILE, str(tmp_path / "file" / "budget.json"))
    with pytest.raises(BadInput, match=rf"name another in \${BUDGET_FILE}"):
        fresh_budget(calls=1).reserve("judge 'm'", 1, 0)
    assert os.environ[BUDGET_FILE]
