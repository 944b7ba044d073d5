"""Recorded curves: the file format, exact truth, and the same draws through sampler and judge."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import RecordedWorld
from scipy.stats import ks_2samp

from ipo_lib.csr import CsrSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, TurningPoint
from ipo_lib.sampling import Sampling
from ipo_lib.sandbox import curves as made_up
from ipo_lib.store import Store
from ipo_lib.turning_points import benchmark, curves, locate
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive
from ipo_lib.turning_points.draws import UNJUDGED, DrawRequest, Search, Trace
from ipo_lib.turning_points.exhaustive import exhaustive

LINE: dict[str, Any] = {
    "id": "a",
    "token_ids": [5, 6, 7, 8],
    "sentence_ends": [2, 4],
    "p_token": [0.5, 1.0, 0.8, 1.0],
    "leave": [[[3, 1, 9], [1, 0, 5]], [], [[1, 0.25, 4]], []],
    "label": "safe",
}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_line_by_hand(tmp_path: Path) -> None:
    (curve,) = curves.load(write(tmp_path / "f.jsonl", LINE))
    assert curve.truth.tolist() == pytest.approx(
        [0.5 * (0.8 + 0.2 * 0.25) + 0.5 * 0.75, 0.85, 0.85, 1.0, 1.0]
    )
    drawn = curve.draw([DrawRequest(0, 4000)], np.random.default_rng(0))
    assert (drawn.departure == 0).mean() == pytest.approx(0.5, abs=0.04)
    assert set(drawn.tokens[drawn.departure == 0].tolist()) == {9, 5}
    assert set(drawn.tokens[drawn.departure == 2].tolist()) == {6}
    assert set(drawn.tokens[drawn.departure == 4].tolist()) == {4}
    assert set(drawn.safe[drawn.departure == 4].tolist()) == {1}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = made_up.curves(9, 2)
    for name in ("f.jsonl", "f.jsonl.gz"):
        curves.save(tmp_path / name, written)
        read = curves.load(tmp_path / name)
        assert [curve.id for curve in read] == [curve.id for curve in written]
        for curve, original in zip(read, written, strict=True):
            assert curve.truth.tolist() == pytest.approx(original.truth.tolist(), abs=1e-4)
    first = (tmp_path / "f.jsonl.gz").read_bytes()
    curves.save(tmp_path / "f.jsonl.gz", curves.load(tmp_path / "f.jsonl.gz"))
    assert (tmp_path / "f.jsonl.gz").read_bytes() == first


def test_labels_grids_and_unjudged_ways(tmp_path: Path) -> None:
    sparse = LINE | {
        "id": "b",
        "label": 0,
        "grid": [0, 2],
        "p_token": [0.5, 0.8],
        "leave": [[[1, 1, 9]], [[1, None, 4]]],
    }
    dense = LINE | {
        "id": "c",
        "label": None,
        "grid": [0, 2],
        "p_token": [0.5, 0.9, 0.8, 1.0],
        "leave": [[[1, 1, 9]], [[1, 0, 4]]],
    }
    extra = LINE | {"id": "d", "label": True, "model": "somebody's"}
    b, c, d = curves.load(write(tmp_path / "f.jsonl", sparse, dense, extra))
    assert (b.trace.label, c.trace.label, d.trace.label) == (UNSAFE, None, SAFE)
    assert b.trace.p == (0.5, 1.0, 0.8, 1.0)
    assert b.truth[0] == pytest.approx(0.5)
    drawn = b.draw([DrawRequest(0, 500)], np.random.default_rng(0))
    assert set(drawn.safe[drawn.departure == 2].tolist()) == {UNJUDGED}
    assert c.ways[1] == c.ways[0]
    assert math.isnan(c.truth[0])


def test_what_others_round_or_spread_is_read(tmp_path: Path) -> None:
    rounded = LINE | {"id": "r", "p_token": [0.5, 0.99, 0.8, 1.0000001]}
    zero = LINE | {"id": "z", "p_token": [0.0, 1, 0.8, 1]}
    grid = LINE | {
        "id": "g",
        "grid": [0, 2],
        "leave": [[[1, 1, 9]], [], [[1, 0, 4]], []],
        "p_token": [0.5, 0.9, 0.8, 0.95],
    }
    r, z, g = curves.load(write(tmp_path / "f.jsonl", rounded, zero, grid))
    assert r.trace.p == (0.5, 1.0, 0.8, 1.0)
    assert 0 < z.trace.p[0] < 1e-6
    assert g.ways[1] == g.ways[0]
    assert g.ways[3] == g.ways[2]


def test_an_unlabelled_curve_is_left_out_of_comparisons() -> None:
    recorded = made_up.curves(6, 2)
    blind = [replace(curve, trace=replace(curve.trace, label=None)) for curve in recorded[:2]]
    csr = CsrSettings()
    estimators = benchmark.estimators(SAFE, csr, SearchSettings())
    rows = benchmark.compare([*blind, *recorded[2:]], estimators, SAFE, csr)
    assert {len(results) for results in rows.values()} == {4}
    assert math.isnan(blind[0].truth[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"p_token": [0.5, 0.9, 0.8, 1.0]},
            "position 1 is left with probability 0.10, but its leave is empty; record it",
        ),
        ({"leave": [[], [], [], []]}, "position 0 and 1 more is left"),
        ({"leave": [[], []]}, "leave has 2 entries for 4 tokens"),
        ({"p_token": [0.5]}, "p_token has 1 entries for 4 tokens"),
        ({"sentence_ends": [2, 9]}, r"must rise within 1\.\.4"),
        ({"sentence_ends": [4, 2]}, "sentence_ends must rise"),
        ({"grid": [2, 0]}, "grid must rise"),
        ({"label": "maybe"}, "label is 'maybe'; give safe or 1"),
        ({"p_token": [1.5, 1, 1, 1]}, r"lie in \[0, 1\]"),
        ({"leave": [[[1, 2, 3]], [], [[1, 1, 1]], []]}, r"lie in \[0, 1\]"),
        ({"label": 0.5}, "label is 0.5"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": "abc"}, "the format stands in ipo_lib.turning_points.curves"),
        ({"leave": [[7], [], [], []]}, "the format stands"),
        ({"prompt": "why?"}, "expected settings for .*, found 'why"),
        ({"prompt": {"id": "p"}}, "text. is missing"),
    ],
)
def test_a_bad_line_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        curves.load(write(tmp_path / "f.jsonl", LINE, LINE | {"id": "bad"} | change))
    assert "line 2" in str(error.value)
    assert "'bad'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    for name in LINE:
        without = {key: value for key, value in LINE.items() if key != name}
        with pytest.raises(BadInput, match=f"line 1: no {name}"):
            curves.load(write(tmp_path / "f.jsonl", without))
    with pytest.raises(BadInput, match="two traces have one id"):
        curves.load(write(tmp_path / "f.jsonl", LINE, LINE))
    for content in (b"", b"{", b"[1]", b"\xff\xfe", gzip.compress(b"{}")[:-9]):
        path = tmp_path / ("g.jsonl.gz" if content[:2] == b"\x1f\x8b" else "g.jsonl")
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"replay file|line 1"):
            curves.load(path)
    with pytest.raises(BadInput, match="No such file"):
        curves.load(tmp_path / "none.jsonl")


def search(trace: Trace) -> Search:
    return adaptive(trace, SAFE, CsrSettings(), SearchSettings())


def test_draws_of_a_trace_do_not_depend_on_its_neighbours() -> None:
    recorded = made_up.curves(9, 2)
    fifth = recorded[4]
    every = curves.run_on_curves(recorded, search, 5)
    assert curves.run_on_curves([fifth], search, 5) == {fifth.id: every[fifth.id]}
    assert every != curves.run_on_curves(recorded, search, 6)


def test_sampler_and_judge_give_the_same_draws_in_distribution(tmp_path: Path) -> None:
    (curve,) = made_up.curves(1, 3, ["sharp"], 40)
    csr = CsrSettings(draws=400)
    requests = next(exhaustive(curve.trace, SAFE, csr))
    direct = curve.draw(requests, np.random.default_rng(0))
    world, traces = RecordedWorld([curve]), {curve.id: curve.trace}
    searches = {curve.id: exhaustive(curve.trace, SAFE, csr)}
    session = world.session(Store(tmp_path))
    _, drawn = locate.run_searches(session, world.prompts, traces, searches, "trace", Sampling())
    through = locate.as_draws(curve.trace.token_ids, drawn[curve.id])
    assert (through.start == direct.start).all()
    for name in ("departure", "safe", "tokens"):
        assert ks_2samp(getattr(through, name), getattr(direct, name)).pvalue > 1e-3, name


def test_a_killed_search_goes_on_and_draws_nothing_twice(tmp_path: Path) -> None:
    recorded = made_up.curves(4, 4, length=50)
    traces = {curve.id: curve.trace for curve in recorded}

    def run(root: Path, most: int = 10**9) -> tuple[dict[str, TurningPoint], int]:
        """The turns and the number of draws; killed before it draws more than ``most``."""
        drawn = 0

        def count() -> None:
            nonlocal drawn
            if drawn == most:
                raise KeyboardInterrupt
            drawn += 1

        world = RecordedWorld(recorded, count)
        searches = {key: search(trace) for key, trace in traces.items()}
        session = world.session(Store(root))
        turns, _ = locate.run_searches(
            session, world.prompts, traces, searches, "trace", Sampling()
        )
        return turns, drawn

    whole, needed = run(tmp_path / "whole")
    assert needed > 6 * 64  # else the bound below says nothing
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", needed // 2)
    again, rest = run(tmp_path / "killed")
    assert again == whole
    assert needed // 2 <= needed - rest + 64 * 3
    assert run(tmp_path / "killed")[1] == 0
