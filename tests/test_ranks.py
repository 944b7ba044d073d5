"""Several processes of one training: shares of a step, and two real ones beside one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ipo_lib.cli import reproduce
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import lora, processes
from ipo_lib.records import BadInput

SMALL = (
    "prompts.train_harmful.count=6",
    "prompts.train_benign.count=4",
    "plan.pool=2",
    "plan.draws=2",
    "stage2.min_refusals=1000",
    "stage2.refusing_prefix=false",
    "stage2.benign_draws=1",
    "stage1.keep=0",
    "stage1.epochs=1",
    "stage1.batch_size=4",
    "sampling.max_tokens=120",
)


def of_all(
    batches: list[list[int]], tokens: list[int], size: int, accumulation: int, processes: int
) -> list[list[Any]]:
    """Every process's shares of an epoch."""
    return [
        list(processes.shares(batches, tokens, size, accumulation, processes, own))
        for own in range(processes)
    ]


@pytest.mark.parametrize(
    ("size", "accumulation", "processes"), [(4, 2, 2), (4, 1, 2), (4, 1, 4), (1, 8, 4), (3, 6, 2)]
)
@pytest.mark.parametrize("count", [1, 5, 24, 31])
def test_shares_of_all_processes_are_the_step_of_one(
    size: int, accumulation: int, processes: int, count: int
) -> None:
    """Averaged over forwards and processes, as the trainer does, each pair weighs what it does alone."""
    tokens = [3 + at % 5 for at in range(count)]
    batches = [list(range(at, min(at + size, count))) for at in range(0, count, size)]
    found = of_all(batches, tokens, size, accumulation, processes)
    assert len({len(own) for own in found}) == 1  # else one process would wait for ever
    _, forwards = processes.split(size, accumulation, processes)
    steps = -(-len(batches) // accumulation)
    for step in range(steps):
        alone = batches[step * accumulation : (step + 1) * accumulation]
        wanted = {pair: 1 / len(batch) / len(alone) for batch in alone for pair in batch}
        wanted_tokens = {
            pair: 1 / sum(tokens[one] for one in batch) / len(alone)
            for batch in alone
            for pair in batch
        }
        weights, of_tokens = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
        for own in found:
            part = own[step * forwards : (step + 1) * forwards]
            for share in part:
                for pair, weight, token in zip(
                    share.pairs, share.of_pairs, share.of_tokens, strict=True
                ):
                    weights[pair] += weight / len(part) / processes
                    of_tokens[pair] += token / len(part) / processes
        assert weights == pytest.approx(wanted)
        assert of_tokens == pytest.approx(wanted_tokens)


def test_a_step_that_cannot_be_divided_is_refused() -> None:
    assert processes.split(16, 1, 2) == (8, 1)
    assert processes.split(1, 64, 8) == (1, 8)
    with pytest.raises(
        BadInput, match=r"3 processes: batch_size 4 and accumulation 2 .* multiple of 3"
    ):
        processes.split(4, 2, 3)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_parameters_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(BadInput, match="only whole models are trained, one a process; launch"):
        processes.join(use_cpu=True)


def test_two_visible_gpus_without_a_launcher_are_one() -> None:
    """Where the trainer sees two GPUs and nobody launched two processes, it would copy the model to both."""

    class Arguments:
        _n_gpu = 2

        @property
        def n_gpu(self) -> int:
            return self._n_gpu

    assert lora.on_one_gpu(Arguments()).n_gpu == 1


def test_notebooks_are_not_run_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"ipo reproduce in 2 processes .* launch ipo train"):
        reproduce.reproduce("tiny")


def test_stock_trl_is_refused_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ipo_lib.engines.trl_trainer import trainer

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="engine trl trains in one process"):
        trainer([], tmp_path, DpoSettings(), tmp_path, None)


def ipo_train(store: Path, processes: int) -> str:
    """``ipo train tiny`` on the smallest data, alone or as ``accelerate launch`` starts it on CPUs."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
    ]
    start = launcher if processes > 1 else [sys.executable, "-m"]
    given = [word for name in SMALL for word in ("-p", name)]
    free = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [*start, "ipo_lib.cli.reproduce", "train", "tiny", *given, "--store", str(store)],
        env={**free, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_end_with_the_adapter_of_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    said = {count: ipo_train(tmp_path / str(count), count) for count in (1, 2)}
    folders = {count: sorted((tmp_path / str(count) / "adapters").iterdir()) for count in said}
    assert [one.name for one in folders[1]] == [one.name for one in folders[2]]
    assert len(folders[2]) == 1
    one, two = (
        load_file(folders[count][0] / "files" / "adapter_model.safetensors") for count in (1, 2)
    )
    largest = max(float(value.abs().max()) for value in one.values())
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4 * largest
    assert said[2].count("stage 1:") == 1  # the first process speaks for all
    assert said[1].splitlines()[0] == said[2].splitlines()[0]
