"""Several processes of one training: shares of a step, and two real ones beside one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ipo_lib.cli import app
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import checkpoints, lora, processes
from ipo_lib.records import BadInput

SMALL = (
    "prompts.train_harmful.count=10",
    "prompts.train_benign.count=4",
    "plan.pool=4",
    "plan.draws=2",
    "stage2.min_refusals=1000",
    "stage2.refusing_prefix=false",
    "stage2.benign_draws=1",
    "stage1.keep=0",
    "stage1.epochs=1",
    "stage1.batch_size=4",
    "sampling.max_tokens=256",
)


@pytest.mark.parametrize(
    ("size", "accumulation", "count"), [(4, 2, 2), (4, 1, 2), (4, 1, 4), (1, 8, 4), (3, 6, 2)]
)
@pytest.mark.parametrize("pairs", [1, 5, 24, 31])
def test_shares_of_all_processes_are_the_step_of_one(
    size: int, accumulation: int, count: int, pairs: int
) -> None:
    """Averaged over forwards and processes, each pair weighs what it does in one process."""
    tokens = [3 + index % 5 for index in range(pairs)]
    batches = [list(range(start, min(start + size, pairs))) for start in range(0, pairs, size)]
    shares_by_rank = []
    for rank in range(count):
        shares = processes.shares(batches, tokens, size, accumulation, count, rank)
        shares_by_rank.append(list(shares))
    assert len(set(map(len, shares_by_rank))) == 1  # else one process would wait for ever

    _, forwards = processes.split(size, accumulation, count)
    for step in range(-(-len(batches) // accumulation)):
        step_batches = batches[step * accumulation : (step + 1) * accumulation]
        pair_weights, token_weights = {}, {}
        for batch in step_batches:
            batch_tokens = sum(tokens[pair] for pair in batch)
            for pair in batch:
                pair_weights[pair] = 1 / len(batch) / len(step_batches)
                token_weights[pair] = 1 / batch_tokens / len(step_batches)
        shared_pairs = dict.fromkeys(pair_weights, 0.0)
        shared_tokens = dict.fromkeys(pair_weights, 0.0)
        for shares_of_one in shares_by_rank:
            step_shares = shares_of_one[step * forwards : (step + 1) * forwards]
            scale = len(step_shares) * count
            for share in step_shares:
                for pair in share.indices:
                    shared_pairs[pair] += share.pair_weight / scale
                    shared_tokens[pair] += share.token_weight / scale
        assert shared_pairs == pytest.approx(pair_weights)
        assert shared_tokens == pytest.approx(token_weights)


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
    """The trainer would copy the model to both."""

    class Arguments:
        _n_gpu = 2

        @property
        def n_gpu(self) -> int:
            return self._n_gpu

    assert lora.limit_to_one_gpu(Arguments()).n_gpu == 1


def test_notebooks_are_not_run_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"ipo reproduce in 2 processes .* launch ipo train"):
        app.reproduce_profile("tiny")


def test_stock_trl_is_refused_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ipo_lib.engines.trl_trainer import make_trainer

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="engine trl trains in one process"):
        make_trainer([], tmp_path, DpoSettings(), tmp_path, None)


def start_training(store: Path, count: int) -> subprocess.Popen[str]:
    """``ipo train tiny`` on the smallest data, for several processes on CPUs by accelerate."""
    command = [sys.executable, "-m"]
    if count > 1:
        command += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        command += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
        ]
    command += ["ipo_lib.cli", "train", "tiny", "--store", str(store)]
    for setting in SMALL:
        command += ["-p", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", checkpoints.VARIABLE: "0"}
    environment.pop("WORLD_SIZE", None)
    environment.pop("RANK", None)
    return subprocess.Popen(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ipo_train(store: Path, count: int) -> str:
    """What a training prints that runs to its end."""
    training = start_training(store, count)
    output, errors = training.communicate(timeout=300)
    assert training.returncode == 0, errors[-3000:]
    return output


def kill_at_a_checkpoint(store: Path, count: int) -> None:
    """Start a training, and kill all its processes once it has written a checkpoint."""
    training = start_training(store, count)
    deadline = time.monotonic() + 300
    while not list(store.glob(f"adapters/*/building/*/{checkpoints.MARK}")):
        assert training.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    launcher = psutil.Process(training.pid)
    for process in (launcher, *launcher.children(recursive=True)):
        process.kill()
    training.communicate(timeout=60)


def test_two_processes_that_were_killed_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    ipo_train(tmp_path / "whole", 2)
    kill_at_a_checkpoint(tmp_path / "killed", 2)
    (building,) = (tmp_path / "killed" / "adapters").glob("*/building")
    assert list(building.glob(f"*/{checkpoints.MARK}"))
    ipo_train(tmp_path / "killed", 2)
    assert not building.exists()
    for file in (tmp_path / "whole" / "adapters").rglob("*"):
        if file.is_file():
            killed = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
            assert killed.read_bytes() == file.read_bytes(), file.name


def test_two_processes_end_with_the_adapter_of_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    outputs, names, weights = [], [], []
    for count in (1, 2):
        store = tmp_path / str(count)
        outputs.append(ipo_train(store, count))
        (folder,) = (store / "adapters").iterdir()
        names.append(folder.name)
        weights.append(load_file(folder / "files" / "adapter_model.safetensors"))
    assert names[0] == names[1]
    largest = max(float(value.abs().max()) for value in weights[0].values())
    for name, value in weights[0].items():
        assert float((value - weights[1][name]).abs().max()) < 1e-4 * largest, name
    assert outputs[1].count("stage 1:") == 1  # the first process speaks for all
    assert outputs[0].splitlines()[0] == outputs[1].splitlines()[0]
