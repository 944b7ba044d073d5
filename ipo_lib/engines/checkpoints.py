"""Checkpoints of a training, so that one that was killed goes on from its last checkpoint.

1. After a step, a checkpoint is written if ``seconds()`` have passed since the last one. It holds
   the adapter, the optimizer, the states of the random generators and the log.
2. Its mark is written last. A checkpoint without one is not read: a kill has torn it. The mark
   names the training, by its settings and data, so that another one does not go on from it.
3. A training that goes on takes the steps that are left, in the same order. So its adapter is the
   one of a training that was not killed.
4. A training that has ended leaves no checkpoint.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from ipo_lib.engines import processes
from ipo_lib.records import BadInput
from ipo_lib.store import write_whole

VARIABLE = "IPO_CHECKPOINT_SECONDS"
SECONDS = 600.0
FOLDERS = "checkpoint-*"  # the names that transformers gives
MARK = "whole"  # a file in a checkpoint that is complete; it holds the name of the training


def seconds() -> float:
    """Seconds between two checkpoints: ``$IPO_CHECKPOINT_SECONDS``, else ten minutes.

    Raises:
        BadInput: the variable is no number, or a negative one.
    """
    text = os.environ.get(VARIABLE) or str(SECONDS)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise BadInput(f"{VARIABLE} {text!r} is no time; give seconds, 0 or more")
    return value


def latest(out: Path, training: str) -> Path | None:
    """The last complete checkpoint of a training in its folder; None where there is none.

    Args:
        out: the folder.
        training: its name, as given to ``callback``.
    """
    marks = out.glob(f"{FOLDERS}/{MARK}")
    whole = [mark.parent for mark in marks if mark.read_text("utf-8") == training]
    return max(whole, key=_step, default=None)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def remove(out: Path, but: Path | None = None) -> None:
    """Remove the checkpoints of a training, all but one."""
    for folder in out.glob(FOLDERS):
        if folder != but:
            shutil.rmtree(folder)


def callback(out: Path, training: str) -> Any:
    """A callback that makes a transformers trainer write checkpoints.

    Args:
        out: the folder of the training.
        training: its name, which depends on all that decides the adapter.
    """
    import transformers

    every = seconds()
    written = time.monotonic()

    class Checkpoints(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            is_due = time.monotonic() - written >= every and state.global_step < state.max_steps
            control.should_save = processes.broadcast(is_due)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal written
            written = time.monotonic()
            processes.wait()  # each process has written the state of its random generators
            if state.is_world_process_zero:
                checkpoint = out / f"checkpoint-{state.global_step}"
                write_whole(checkpoint / MARK, training)
                remove(out, but=checkpoint)

    return Checkpoints()
