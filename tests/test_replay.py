"""Recorded curves: the format in and out, whoever wrote it; exact truth; the same through the doors of sampler and judge."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from ipo_lib.csr import CsrSettings
from ipo_lib.judging import Exchange
from ipo_lib.records import SAFE, UNSAFE, BadInput
from ipo_lib.sampling import Request, Sampling
from ipo_lib.sandbox import curves as made_up
from ipo_lib.store import Store
from ipo_lib.turning_points import benchmark, curves, locate
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive
from ipo_lib.turning_points.curves import Flips, Tape
from ipo_lib.turning_points.exhaustive import UNKNOWN, Ask, exhaustive

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
    (one,) = curves.load(write(tmp_path / "f.jsonl", LINE))
    assert one.truth.tolist() == pytest.approx(
        [0.5 * (0.8 + 0.2 * 0.25) + 0.5 * 0.75, 0.85, 0.85, 1.0, 1.0]
    )
    drawn = one.draw([Ask(0, 4000)], np.random.default_rng(0))
    assert (drawn.left == 0).mean() == pytest.approx(0.5, abs=0.04)
    assert set(drawn.tokens[drawn.left == 0].tolist()) == {9, 5}
    assert set(drawn.tokens[drawn.left == 2].tolist()) == {6}
    assert set(drawn.tokens[drawn.left == 4].tolist()) == {4}
    assert set(drawn.safe[drawn.left == 4].tolist()) == {1}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = made_up.curves(9, 2)
    for name in ("f.jsonl", "f.jsonl.gz"):
        curves.save(tmp_path / name, made)
        again = curves.load(tmp_path / name)
        assert [one.trace.id for one in again] == [one.trace.id for one in made]
        for a, b in zip(again, made, strict=True):
            assert a.truth.tolist() == pytest.approx(b.truth.tolist(), abs=1e-4)
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
    drawn = b.draw([Ask(0, 500)], np.random.default_rng(0))
    assert set(drawn.safe[drawn.left == 2].tolist()) == {UNKNOWN}
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
    made = made_up.curves(6, 2)
    blind = [replace(one, trace=replace(one.trace, label=None)) for one in made[:2]]
    csr = CsrSettings()
    rows = benchmark.compare(
        [*blind, *made[2:]], benchmark.estimators(SAFE, csr, SearchSettings()), SAFE, csr
    )
    assert {len(own) for own in rows.values()} == {4}
    assert math.isnan(blind[0].truth[0])


@pytest.mark.parametrize(
    ("change", "said"),
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
    ],
)
def test_a_bad_line_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as error:
        curves.load(write(tmp_path / "f.jsonl", LINE, LINE | {"id": "bad"} | change))
    assert "line 2" in str(error.value)
    assert "'bad'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    for name in LINE:
        with pytest.raises(BadInput, match=f"line 1: no {name}"):
            curves.load(
                write(
                    tmp_path / "f.jsonl", {key: value for key, value in LINE.items() if key != name}
                )
            )
    with pytest.raises(BadInput, match="two traces have one id"):
        curves.load(write(tmp_path / "f.jsonl", LINE, LINE))
    for content in (b"", b"{", b"[1]", b"\xff\xfe", gzip.compress(b"{}")[:-9]):
        path = tmp_path / ("g.jsonl.gz" if content[:2] == b"\x1f\x8b" else "g.jsonl")
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"replay file|line 1"):
            curves.load(path)
    with pytest.raises(BadInput, match="No such file"):
        curves.load(tmp_path / "none.jsonl")


def test_draws_of_a_trace_do_not_depend_on_its_neighbours() -> None:
    made, search = made_up.curves(9, 2), SearchSettings()
    every = curves.find_on_curves(
        made, lambda trace: adaptive(trace, SAFE, CsrSettings(), search), 5
    )
    alone = curves.find_on_curves(
        made[4:5], lambda trace: adaptive(trace, SAFE, CsrSettings(), search), 5
    )
    assert alone == {made[4].trace.id: every[made[4].trace.id]}
    assert every != curves.find_on_curves(
        made, lambda trace: adaptive(trace, SAFE, CsrSettings(), search), 6
    )


def test_the_doors_give_the_same_draws_in_distribution(tmp_path: Path) -> None:
    (one,) = made_up.curves(1, 3, ["sharp"], 40)
    tape = Tape([one])
    plan = exhaustive(one.trace, SAFE, CsrSettings(draws=400))
    asks = plan.send(None)  # type: ignore[arg-type]
    direct = one.draw(asks, np.random.default_rng(0))
    prompts, known = tape.prompts, {one.trace.id: one.trace}
    search = {one.trace.id: exhaustive(one.trace, SAFE, CsrSettings(draws=400))}
    _, drawn = locate.run_searches(
        tape.session(Store(tmp_path)), prompts, known, search, "trace", Sampling()
    )
    through = locate.as_draws(one.trace.token_ids, drawn[one.trace.id])
    assert (through.born == direct.born).all()
    for name in ("left", "safe", "tokens"):
        assert ks_2samp(getattr(through, name), getattr(direct, name)).pvalue > 1e-3, name


def test_a_search_through_the_doors_resumes_and_draws_nothing_twice(tmp_path: Path) -> None:
    made = made_up.curves(12, 4, length=50)
    known = {one.trace.id: one.trace for one in made}

    class Dies(Tape):
        """A tape that stops after some draws."""

        left = 10**9

        def sample(self, requests: Any, sampling: Sampling) -> Any:
            for completion in super().sample(requests, sampling):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
                yield completion

    def run(root: Path, left: int = 10**9) -> tuple[Any, int]:
        tape = Dies(made)
        tape.left = left
        searches = {
            key: adaptive(trace, SAFE, CsrSettings(), SearchSettings())
            for key, trace in known.items()
        }
        found, _ = locate.run_searches(
            tape.session(Store(root)), tape.prompts, known, searches, "trace", Sampling()
        )
        return found, left - tape.left

    whole, needed = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", needed // 2)
    again, rest = run(tmp_path / "killed")
    assert again == whole
    assert needed // 2 <= needed - rest + 64 * 3
    assert run(tmp_path / "killed")[1] == 0


def test_the_tape_scores_bans_and_refuses(tmp_path: Path) -> None:
    (one,) = made_up.curves(1, 3, ["sharp"], 40)
    tape, ids = Tape([one]), one.trace.token_ids
    request = Request("k", (0,), ids[:10], 1)
    assert next(tape.score([Request("k", (0,), (*ids[:3], -7), 1)], Sampling())) == [
        *one.trace.p[:3],
        0.0,
    ]
    forks = [
        next(tape.sample([Request("k", (0,), ids[:10], seed, ban=ids[10])], Sampling()))
        for seed in range(50)
    ]
    assert all(fork.token_ids[0] != ids[10] for fork in forks)
    assert len(next(tape.sample([request], Sampling())).token_ids) > 0
    with pytest.raises(BadInput, match="does not begin as trace"):
        next(tape.sample([Request("k", (0,), (-7,), 1)], Sampling()))
    (verdict,) = tape.judge([Exchange("r", one.trace.id, tape.decode(ids), "trace")])
    assert verdict.label == one.trace.label
    assert tape.fingerprint() != Tape(made_up.curves(1, 4, ["sharp"], 40)).fingerprint()


def test_flips_come_at_their_rates_singly_or_by_prefix() -> None:
    (one,) = made_up.curves(1, 3, ["locked"], 60)
    exact = one.draw([Ask(cut, 200) for cut in one.trace.ends], np.random.default_rng(0))
    for shared in (False, True):
        wrong = [
            Flips(0.9, 0.8, shared)(exact, np.random.default_rng(seed), {}).safe != exact.safe
            for seed in range(200)
        ]
        rate = np.mean([each[exact.safe == 1].mean() for each in wrong])
        assert rate == pytest.approx(0.2, abs=0.03)
        spread = np.mean([each[exact.born == one.trace.ends[0]].std() for each in wrong])
        assert bool(spread < 0.2) is shared
    memory: dict[int, float] = {}
    twice = [
        Flips(0.5, 0.5, True)(exact, np.random.default_rng(seed), memory).safe for seed in (0, 1)
    ]
    assert (twice[0] == twice[1]).all()
