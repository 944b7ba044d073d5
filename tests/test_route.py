"""The whole route, killed and run again.

Nothing finished is lost, nothing is drawn twice, the end is the same.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from models import tiny_model, tiny_tokenizer
from route import DRAWS, REAL_DRAWS
from scripted import PROMPTS, tree

from ipo_lib.profiles import reading

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
}
KILLS = 20


class Runs:
    """Runs of the route, each in its own forked process."""

    def __init__(self, kind: str, folder: Path) -> None:
        command = [sys.executable, str(TESTS / "route.py"), kind, str(folder)]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdin=-1, stdout=-1, text=True)

    def _line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def __call__(self, root: Path, wait: Callable[[], object] | None = None) -> int:
        """One run to its end, or killed when ``wait`` returns; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{root}\n")
        self.process.stdin.flush()
        child = self._line()
        if wait is not None:
            wait()
            with suppress(ProcessLookupError):  # it may have ended by then
                os.kill(child, signal.SIGKILL)
        return self._line()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def scripted_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs("scripted", tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), template="r1"))
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs("real", tiny_model(tmp_path_factory.mktemp("model"), template="r1"))
    yield runs
    runs.end()


def records(root: Path) -> dict[str, bytes]:
    """The whole records of every ledger."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("records.jsonl")}
    return {name: content[: content.rfind(b"\n") + 1] for name, content in found.items()}


def test_killed_at_random_the_store_and_the_figures_end_the_same(
    tmp_path: Path, scripted_runs: Runs
) -> None:
    def wait(root: Path, size: float, pause: float) -> None:
        """Until the records have grown to ``size`` bytes (above all of them.

        Until the figures are begun), and a bit more.
        """
        deadline = time.monotonic() + 60
        while sum(map(len, records(root).values())) < size and not (root / "figures").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(pause)

    began = time.monotonic()
    assert scripted_runs(tmp_path / "undisturbed") == 0
    length = time.monotonic() - began
    undisturbed = tree(tmp_path / "undisturbed")
    whole = records(tmp_path / "undisturbed")
    total = sum(map(len, whole.values()))
    stages_seen = {Path(name).parts[1] for name in whole}
    assert stages_seen == {"rollouts", "verdicts", "continuations", "interventions"}
    assert {Path(name).name for name in undisturbed if name.startswith("figures/")} == {
        "00-route.pdf",
        "00-route.png",
        "00-route.json",
    }
    clock, killed, unfinished = random.Random(0), 0, 0
    for number in range(KILLS):  # at random, most of them before the figures are written
        root, share = tmp_path / str(number), clock.random()
        size, pause = (share * total, 0.0) if number % 4 else (total + 1, share * length / 2)
        killed += scripted_runs(root, partial(wait, root, size, pause)) == -signal.SIGKILL
        left = records(root)
        unfinished += left != whole
        for name, content in left.items():
            assert whole[name].startswith(content)
        assert scripted_runs(root) == 0
        assert tree(root) == undisturbed
        assert len(whole) == len(records(root))
    assert killed >= KILLS // 2
    assert unfinished >= KILLS // 3


def test_a_run_that_is_done_changes_nothing(tmp_path: Path, scripted_runs: Runs) -> None:
    assert scripted_runs(tmp_path) == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    before = tree(tmp_path)
    assert scripted_runs(tmp_path) == 0
    assert tree(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == first


def test_draws_of_the_route_are_all_there(tmp_path: Path, scripted_runs: Runs) -> None:
    assert scripted_runs(tmp_path) == 0
    ledgers = sorted((tmp_path / "store" / "rollouts").iterdir())
    counts = sorted(len((ledger / "records.jsonl").read_bytes().splitlines()) for ledger in ledgers)
    assert counts == [len(PROMPTS) * 3, len(PROMPTS) * DRAWS]


def test_a_real_model_killed_twice_draws_all_and_none_twice(
    tmp_path: Path, real_runs: Runs
) -> None:
    root, total, kept = tmp_path / "killed", len(PROMPTS) * REAL_DRAWS, b""

    def grown() -> None:
        deadline = time.monotonic() + 60
        while len(b"".join(records(root).values())) <= len(kept):
            assert time.monotonic() < deadline
            time.sleep(0.003)

    for _ in range(2):
        assert real_runs(root, grown) == -signal.SIGKILL
        (now,) = records(root).values()
        assert now.startswith(kept)
        assert len(kept) < len(now)
        kept = now
        assert 0 < len(kept.splitlines()) < total
    assert real_runs(root) == 0
    (now,) = records(root).values()
    assert now.startswith(kept)
    rows = [json.loads(line) for line in now.splitlines()]
    drawn = [(row["record"]["prompt_id"], row["record"]["draw"]) for row in rows]
    assert sorted(drawn) == sorted(
        (prompt.id, draw) for prompt in PROMPTS for draw in range(REAL_DRAWS)
    )
    assert len({row["key"] for row in rows}) == len({row["record"]["id"] for row in rows}) == total
    assert (
        len({tuple(row["record"]["token_ids"]) for row in rows}) > 0.9 * total
    )  # draws are independent
    assert real_runs(tmp_path / "undisturbed") == 0
    (other,) = records(tmp_path / "undisturbed").values()
    assert {row["key"] for row in rows} == {json.loads(line)["key"] for line in other.splitlines()}


# the command, end to end

COMMAND = """
import sys
from ipo_lib.cli.app import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
SHORT = {"train_harmful": 12, "train_benign": 4, "direct": 4, "lookalike": 4, "sums": 4}


def short_profile(folder: Path) -> Path:
    """Profile ``tiny`` with small numbers."""
    path = reading.checkout() / "notebooks" / "profiles" / "tiny.yml"
    data: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    for name, count in SHORT.items():
        data["prompts"][name]["count"] = count
    data["csr"]["draws"], data["plan"] = 6, {"draws": 4, "traces": 4, "pool": 3}
    data["stage1"]["epochs"] = data["stage2"]["epochs"] = data["evaluation"]["draws"] = 1
    data["stage2"]["min_refusals"], data["min_coverage"] = 2, 0.5
    data["null_world"] = ""  # a second world is another run
    data["parameters"] = {"live_traces": 1, "synthetic": 60, "long": 36, "each": 12}
    data["evaluation"] |= {"harmful": ["direct"], "benign": ["lookalike"], "capability": ["sums"]}
    short = folder / "short.yml"
    short.write_text(yaml.safe_dump(data))
    return short


def images(path: Path, figures: Path) -> list[str]:
    """The names of the figures that an executed notebook shows as images.

    None of its outputs is the bare text of one.
    """
    outputs = [
        output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])
    ]
    texts = ["".join(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert [text for text in texts if text.startswith(("<Figure", "<Axes"))] == []
    names = {file.read_bytes(): file.stem for file in figures.glob("*.png")}
    shown = [
        base64.b64decode(output.data["image/png"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    return sorted(names[image] for image in shown)


def test_reproduce_runs_to_the_end_and_then_computes_nothing(tmp_path: Path) -> None:
    folders = ["--store", str(tmp_path / "store"), "--figures", str(tmp_path / "figures")]
    less = {
        "draws": 4,
        "candidates": 8,
        "group": 4,
        "safe_traces": 2,
        "losers": 1,
        "reverse_traces": 2,
        "unsafe_traces": 3,
        "placements": 5,
        "rounds": 1,
        "cues": 1,
        "reverse_draws": 2,
        "swap_draws": 1,
        "mixed_only": False,
        "own_draws": 4,
        "unseen_draws": 1,
        "attacks_made": "[template, prefill before the cue, prefill to the cue]",
    }
    small = [part for name, value in less.items() for part in ("-p", f"{name}={value}")]
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "reproduce",
        str(short_profile(tmp_path)),
        *small,
        *folders,
    ]

    def ipo() -> tuple[str, float]:
        started = time.monotonic()
        done = subprocess.run(
            command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout, time.monotonic() - started

    said, first = ipo()
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    figures = {
        "00-quickstart",
        "01-fig2-gap",
        "01-fig3-joint",
        "02-fig4-diversity",
        "03-fig5a-safe-turns",
        "03-sensitivity",
        "04-fig5b-cues",
        "04-sensitivity",
        "09-cost",
        "09-trust",
        "05-fig6-interventions",
        "05-fig6-triggers",
        "06-training",
        "06-harm-by-pairs",
        "06-fig7-kl",
        "07-table2",
        "11-attacks",
        "12-monitorability",
        "13-on-policy",
        "14-states",
    } | ({"06-stage-2"} & {path.stem for path in (tmp_path / "figures").iterdir()})
    assert names == {f"{name}.{kind}" for name in figures for kind in ("pdf", "png", "json")}
    for name in figures:
        sidecar = json.loads((tmp_path / "figures" / f"{name}.json").read_text("utf-8"))
        for claim in sidecar["claims"]:
            assert {"claim", "value", "interval", "n", "origin"} <= set(claim)
            assert claim["claim"] in said
    runs = list((tmp_path / "store" / "runs").rglob("*.ipynb"))
    shown = {path.stem: images(path, tmp_path / "figures") for path in runs}
    assert shown == {
        name: sorted(figure for figure in figures if figure[:2] == name[:2]) for name in shown
    }
    adapters = [
        path
        for path in (tmp_path / "store" / "adapters").iterdir()
        if (path / "done.json").is_file()
    ]
    assert 1 <= len(adapters) <= 2
    state = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again, second = ipo()
    assert again.count("up to date") == 14
    assert again.splitlines()[-1] == "False"  # no torch
    assert second < min(20, first)
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    } == state
