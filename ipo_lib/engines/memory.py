"""Which models lie in a GPU's memory: where it is short, one makes room for the next.

A run has several models: the base, an adapted one, a guard, and one in training. A 7-8 B model takes
15 GiB in 16 bits, so not all of them fit beside the keys and values of a batch.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, Protocol

RESERVE = 8 * 2**30  # bytes that stay free beside a model, for keys and values of a batch
_HOLDERS: list[weakref.ref[Any]] = []  # who holds a model, the one loaded longest ago first


class Holder(Protocol):
    """Somebody who holds a model and can load it again."""

    def release(self) -> None:
        """Let the model go."""


def held(holder: Holder) -> None:
    """Note that ``holder`` has loaded a model."""
    _HOLDERS[:] = [one for one in _HOLDERS if one() not in (None, holder)]
    _HOLDERS.append(weakref.ref(holder))


def make_room(device: str, size: int) -> int:
    """Let models go until one of ``size`` bytes fits on a GPU beside RESERVE; how many went. Elsewhere nothing goes."""
    gone = 0
    while device.startswith("cuda") and _HOLDERS and free() < size + RESERVE:
        holder = _HOLDERS.pop(0)()
        if holder is not None:
            holder.release()
            gone += 1
        collect()
    return gone


def release_all(device: str) -> int:
    """Let all models on a GPU go, as training is about to load its own; how many went."""
    gone = 0
    while device.startswith("cuda") and _HOLDERS:
        holder = _HOLDERS.pop(0)()
        if holder is not None:
            holder.release()
            gone += 1
    if gone:
        collect()
    return gone


def free() -> int:
    """Free bytes on the GPU."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def collect() -> None:
    """Give freed memory back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
