"""One training in several processes: who writes, who waits, and which pairs each one reads.

``accelerate launch`` starts the processes.

Training is data parallel: every process holds the whole model and reads its share of each step's
pairs. A step's pairs are those of the settings (``batch_size`` x ``accumulation``), however many
processes there are, and so is its loss: the adapter is that of one process, to float error.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipo_lib.records import BadInput

LONGEST_WAIT = datetime.timedelta(days=7)  # the others wait while the first process samples
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def count() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def join(use_cpu: bool) -> None:
    """Meet the other processes of the launcher.

    Raises:
        BadInput: the launcher shards parameters.
    """
    for name, kind in SHARDED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            hint = "launch with plain data parallelism, without that option"
            raise BadInput(f"{kind}: only whole models are trained, one a process; {hint}")
    if count() > 1:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        Accelerator(cpu=use_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


def wait() -> None:
    """Wait until all processes have come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def broadcast(value: bool) -> bool:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def split(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """(pairs per forward, forwards per step) of each process, for steps of the same pairs.

    Raises:
        BadInput: neither number can be divided among the processes.
    """
    if accumulation % processes == 0:
        return batch_size, accumulation // processes
    if batch_size % processes == 0:
        return batch_size // processes, accumulation
    raise BadInput(
        f"{processes} processes: batch_size {batch_size} and accumulation {accumulation} cannot be "
        f"divided among them; make one a multiple of {processes}"
    )


@dataclass(frozen=True)
class Share:
    """What one process reads in one forward.

    The trainer divides a loss by the forwards of a step and averages it over processes. The weights
    undo that: the sum of all shares is the mean over the step's batches.
    """

    indices: tuple[int, ...]  # of pairs
    pair_weight: float  # of each pair's preference loss
    token_weight: float  # of the loss of each of their chosen tokens


def shares(
    batches: Sequence[Sequence[int]],
    tokens: Sequence[int],
    batch_size: int,
    accumulation: int,
    processes: int,
    rank: int,
) -> Iterator[Share]:
    """What one process reads of an epoch, forward by forward.

    Args:
        batches: the batches of a training in one process, in order; each has indices of pairs.
        tokens: by pair, its chosen tokens that count for the SFT loss.
        batch_size: pairs of a whole batch.
        accumulation: batches per step of a training in one process.
        processes: how many share the work.
        rank: the number of the process.

    Every process yields equally many shares. One that has nothing to read gets a pair of weight 0.
    """
    forward_size, _ = split(batch_size, accumulation, processes)
    whole_batches = forward_size == batch_size  # else each process reads a part of every batch
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        forwards = range(len(step))
        if whole_batches:
            rounds = -(-len(step) // processes)
            forwards = range(rank, rounds * processes, processes)
        scale = processes * len(forwards) / len(step)
        for index in forwards:
            batch = step[index] if index < len(step) else []
            part = batch if whole_batches else batch[rank::processes]
            if not part:
                yield Share((step[0][0],), 0.0, 0.0)
                continue
            batch_tokens = sum(tokens[pair] for pair in batch)
            yield Share(tuple(part), scale / len(batch), scale / max(batch_tokens, 1))
