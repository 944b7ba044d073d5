"""A run of the store in small, for tests that kill it: every record is a function of its key.

python store_route.py run ROOT SIZE [CRASH_AT]   two ledgers and an artifact; kills itself at the
                                                 change of the disk numbered CRASH_AT (0: never)
python store_route.py append ROOT WORKER         one of several workers that append the same keys
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.store import Ledger, Store

KEYS = [f"k{index}" for index in range(300)]  # that the workers append


class Changes:
    """Counts the changes of the disk in this process, and kills it at one of them."""

    def __init__(self, crash_at: int) -> None:
        self.crash_at = crash_at
        self.count = 0
        for name in ("write", "replace", "unlink", "mkdir", "ftruncate", "fsync"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        for name in ("open", "write_text", "write_bytes"):
            setattr(Path, name, self._watched(name, getattr(Path, name)))

    def _watched(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.crash_at:
                if name.startswith("write"):  # killed in the middle of it
                    target, content = arguments
                    change(target, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return watched


def record(key: str) -> dict[str, Any]:
    text = f"thinking about {key} \u00e9\u2028 " * (1 + len(key) % 7)
    return {"text": text, "token_ids": list(range(len(key)))}


def fill(ledger: Ledger, keys: Sequence[str], batch: int) -> None:
    missing = ledger.missing(keys)
    for first in range(0, len(missing), batch):
        ledger.append((key, record(key)) for key in missing[first : first + batch])
    ledger.finish()


def run_route(root: Path, size: int) -> None:
    """Rollouts, an adapter and verdicts, each where it is missing; ``size`` draws a prompt."""
    store = Store(root)
    rollouts = [f"prompt-{prompt}/{draw}" for prompt in range(4) for draw in range(size)]
    fill(store.ledger("rollouts", 1, {"draws": size}), rollouts, 4)
    adapter = store.artifact("adapter", 1, {"epochs": 2})

    def build(folder: Path) -> None:
        (folder / "weights").mkdir()
        for name in ("weights/a.bin", "weights/b.bin", "card.md"):
            (folder / name).write_bytes(name.encode() * 5000)

    adapter.make(build)
    verdicts = [str(index) for index in range(16)]
    fill(store.ledger("verdicts", 2, {"judge": "exact"}), verdicts, 8)


def append_keys(root: Path, worker: int) -> None:
    """Append batches of KEYS, which overlap with those of the other workers."""
    sys.stdin.readline()  # all begin at once
    ledger = Store(root).ledger("rollouts", 1, {})
    for start in range(0, 300, 3):
        first = start + worker * 40
        keys = [KEYS[place % 300] for place in range(first, first + 7)]
        ledger.append((key, {"key": key, "text": "x" * 3000}) for key in keys)
    ledger.finish()


def main(what: str, root: str, number: str, crash_at: str = "") -> None:
    if what == "append":
        append_keys(Path(root), int(number))
        return
    changes = Changes(int(crash_at)) if crash_at else None
    print("go", flush=True)
    run_route(Path(root), int(number))
    print("changes", changes.count if changes else 0, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
