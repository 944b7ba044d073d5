"""A short run of ``fuzz.py``, which tries a million inputs when it is asked to."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest

from ipo_lib.records import BadInput


def test_random_inputs_end_in_one_line_at_most() -> None:
    assert fuzz.run(9000, seed=1) == {}


def test_the_run_would_find_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "split_sentences", lambda written: [(0, max(len(written) - 1, 0))])
    assert fuzz.run(90, seed=1).total() > 5


def test_most_inputs_are_read_and_some_are_refused(tmp_path: Path) -> None:
    refused = 0
    for number in range(300):
        draw = random.Random(number)
        try:
            fuzz.try_judge(draw)
            fuzz.try_file(draw, tmp_path)
        except BadInput:
            refused += 1
    assert 0 < refused < 300
