"""The three tasks of ``notebooks/README.md``: their code runs and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ipo_lib
from ipo_lib.records import BadInput

PAGE = (Path(__file__).parents[1] / "notebooks" / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)


def test_each_task_is_short() -> None:
    assert len(BLOCKS) == 4  # the second task has a figure of its own
    assert max(len(code.splitlines()) for code, _ in BLOCKS) < 10
    assert "velurmun" in PAGE


def test_the_tasks_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IPO_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    figures = str(tmp_path / "figures")
    names = {"ipo": ipo_lib, "run": ipo_lib.open_run("tiny", figures=figures)}
    for code, shown in BLOCKS[:3]:
        exec(code.replace('open_run("tiny")', f'open_run("tiny", figures={figures!r})'), names)
        printed = capsys.readouterr().out
        # Draws differ from processor to processor: the columns are the same, and what was put.
        assert [line.split() for line in printed.splitlines()[:1]] == [
            line.split() for line in shown.splitlines()[:1]
        ]
        assert (len(printed.splitlines()) > 2) == bool(shown)
    for name in ("velurmun", "sentences"):
        assert (tmp_path / "my-figures" / f"{name}.png").is_file()
    with pytest.raises(BadInput, match="run notebook 06_ipo_training first"):
        exec(BLOCKS[3][0], names)
