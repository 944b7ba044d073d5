"""Which models lie in a GPU's memory: where it is short, one makes room for the next.

A run has several models: the base, an adapted one, a guard, and one in training. A 7-8 B model
takes 15 GiB in 16 bits, so not all of them fit beside the keys and values of a batch.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, Protocol

RESERVE = 8 * 2**30  # bytes that stay free beside a model, for keys and values of a batch
_HOLDERS: list[weakref.ref[Any]] = []  # who holds a model, the one loaded longest ago first


class Holder(Protocol):
    """An object that holds a model and can load it again."""

    def release(self) -> None:
        """Let the model go."""


def register(holder: Holder) -> None:
    """Note that ``holder`` has loaded a model."""
    # Two servers may be equal, and yet only one of them known to be awake.
    alive = [reference for reference in _HOLDERS if reference() is not None]
    _HOLDERS[:] = [reference for reference in alive if reference() is not holder]
    _HOLDERS.append(weakref.ref(holder))


def make_room(device: str, size: int) -> int:
    """Release models until one of ``size`` bytes fits on a GPU beside RESERVE; return how many.

    On other devices nothing is released.
    """
    released = 0
    if device.startswith("cuda") and _HOLDERS:
        empty_cache()  # what torch keeps for itself counts as used
    while device.startswith("cuda") and _HOLDERS and free_bytes(device) < size + RESERVE:
        released += _release_oldest()
        empty_cache()
    return released


def release_all(device: str, keep: Holder | None = None) -> int:
    """Release all models on a GPU but ``keep``; return how many.

    Training does so before it loads its own, and a server on the same GPU before it wakes.
    """
    released = 0
    if keep is not None:
        _HOLDERS[:] = [reference for reference in _HOLDERS if reference() is not keep]
    while device.startswith("cuda") and _HOLDERS:
        released += _release_oldest()
    if keep is not None:
        register(keep)
    if released:
        empty_cache()
    return released


def _release_oldest() -> bool:
    """Release the model loaded longest ago; False where its holder is gone."""
    holder = _HOLDERS[0]()
    if holder is not None:
        holder.release()
    _HOLDERS.pop(0)
    return holder is not None


def free_bytes(device: Any) -> int:
    """Free bytes on a GPU, such as "cuda" or "cuda:1"."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def empty_cache() -> None:
    """Give freed memory back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
