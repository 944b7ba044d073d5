"""How far a long verb is: a bar where somebody looks on, one line a minute in a log. A notebook's kernel writes it to a small
file that ``ipo`` names in the environment; ``ipo`` shows it. A kernel that ``ipo`` did not start writes on its own line."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "IPO_PROGRESS"
EVERY, LINE_EVERY, WIDTH = (
    1.0,
    60.0,
    30,
)  # seconds between two looks, and between two lines of a log; characters of the bar


class Meter:
    """Counts what is done of ``total`` and says so, at most once in EVERY seconds and at the end."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done, self.last = total, what, 0, time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        if self.done == self.total or time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            say(self.done, self.total, self.what)


def say(done: int, total: int, what: str) -> None:
    """Tell whoever looks on."""
    if path := os.environ.get(FILE):
        temporary = Path(path).with_suffix(
            f".{os.getpid()}"
        )  # another worker may run the same notebooks
        temporary.write_text(json.dumps([what, done, total]))
        os.replace(temporary, path)
    elif in_kernel():
        print(f"\r{line(what, done, total)}", end="\r" if done >= total else "", flush=True)


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel. Without one nothing is shown, and IPython is not loaded."""
    if (module := sys.modules.get("IPython")) is None:
        return False
    return hasattr(module.get_ipython(), "kernel")


def line(what: str, done: int, total: int, started: float | None = None) -> str:
    """One line: a bar, the counts, and with ``started`` (``time.monotonic``) how long it has taken."""
    full = WIDTH * min(done, total) // max(total, 1)
    spent = "" if started is None else f"  {time.monotonic() - started:.0f} s"
    return f"{what:28} [{'#' * full}{'.' * (WIDTH - full)}] {done:,} of {total:,}{spent}"


@contextmanager
def watched(path: Path, name: str) -> Iterator[None]:
    """While the body runs, show on stderr what its kernels say in ``path``."""
    terminal, stop, started = sys.stderr.isatty(), threading.Event(), time.monotonic()
    path.unlink(missing_ok=True)
    before, os.environ[FILE] = os.environ.get(FILE), str(path)

    def look() -> None:
        shown = ""
        while not stop.wait(EVERY if terminal else LINE_EVERY):
            try:
                what, done, total = json.loads(path.read_text())
            except (OSError, ValueError):  # nothing said yet
                what, done, total = "starting", 0, 0
            said = line(f"{name[:2]} {what}", done, total, started)
            print(
                f"\r{said:{len(shown)}}" if terminal else said,
                end="" if terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
            shown = said
        if terminal and shown:
            print("\r" + " " * len(shown), end="\r", file=sys.stderr, flush=True)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)
        os.environ.pop(FILE)
        if before is not None:
            os.environ[FILE] = before
