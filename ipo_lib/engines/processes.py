"""Several processes of one training, started by ``accelerate launch``: who writes, who waits, who trains on which pairs.

Training is data parallel: every process holds the whole model and reads its share of each step's pairs.
A step's pairs are those of the settings (``batch_size`` x ``accumulation``), however many processes
there are, and so is its loss: the adapter is that of one process, to float error.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipo_lib.records import BadInput

LONGEST_WAIT = datetime.timedelta(days=7)  # while the first process samples, the others wait for it
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def count() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process writes what all of them make."""
    return rank() == 0


def join(use_cpu: bool) -> None:
    """Meet the other processes of the launcher. BadInput: it asks for sharded parameters."""
    for name, what in SHARDED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            hint = "launch with plain data parallelism, without that option"
            raise BadInput(f"{what}: only whole models are trained, one a process; {hint}")
    if count() > 1:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        Accelerator(cpu=use_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def agreed(value: bool) -> bool:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    said = [value]
    broadcast_object_list(said)
    return said[0]


def split(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """(pairs per forward, forwards per step) of each process, so that a step has as many pairs as before.

    BadInput: neither number can be divided among the processes.
    """
    if accumulation % processes == 0:
        return batch_size, accumulation // processes
    if batch_size % processes == 0:
        return batch_size // processes, accumulation
    sizes = f"batch_size {batch_size} and accumulation {accumulation}"
    raise BadInput(
        f"{processes} processes: {sizes} cannot be divided among them; make one a multiple of {processes}"
    )


@dataclass(frozen=True)
class Share:
    """What one process reads in one forward.

    ``pairs``: places of pairs. ``of_pairs``, ``of_tokens``: by pair, the weight of its preference loss
    and of each of its chosen tokens' losses. The trainer divides by the forwards of a step and averages
    over processes; the weights undo that, so that the sum is the mean over the step's batches.
    """

    pairs: tuple[int, ...]
    of_pairs: tuple[float, ...]
    of_tokens: tuple[float, ...]


def shares(
    batches: Sequence[Sequence[int]],
    tokens: Sequence[int],
    batch_size: int,
    accumulation: int,
    processes: int,
    own: int,
) -> Iterator[Share]:
    """What process ``own`` reads of an epoch, forward by forward.

    Args:
        batches: the batches of one process alone, in order; each is a list of places of pairs.
        tokens: by pair, its chosen tokens that count for the SFT loss.
        batch_size: pairs of a whole batch.
        accumulation: batches of a step of one process alone.
        processes: how many share the work.
        own: the number of this one.

    Every process yields as many shares. One that has nothing to read gets a pair of weight 0.
    """
    size, _ = split(batch_size, accumulation, processes)
    whole_batches = size == batch_size
    for first in range(0, len(batches), accumulation):
        step = batches[first : first + accumulation]
        rounds = -(-len(step) // processes)
        places = range(own, rounds * processes, processes) if whole_batches else range(len(step))
        scale = processes * len(places) / len(step)
        for at in places:
            batch = step[at] if at < len(step) else []
            mine = batch if whole_batches else batch[own::processes]
            if not mine:
                yield Share((step[0][0],), (0.0,), (0.0,))
                continue
            per_pair = scale / len(batch)
            per_token = scale / max(sum(tokens[one] for one in batch), 1)
            yield Share(tuple(mine), (per_pair,) * len(mine), (per_token,) * len(mine))
