"""Progress of long steps: bars, by tqdm, and a count of the tokens that were generated.

1. A step of the library shows its bar in the Jupyter kernel that it runs in, on the error stream.
   Outside a kernel nothing is shown.
2. ``ipo reproduce`` runs notebooks in kernels of their own. Papermill hands their error stream to a
   ``Relay``, which shows the bars on the terminal, or about once a minute in a log.
3. It also names a file to each kernel, in which the kernel counts the tokens that it generates.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

from tqdm import tqdm

SECONDS_PER_UPDATE = 1.0  # and the shortest loop that shows a bar
SECONDS_PER_LOG_LINE = 60.0
ERASE_LINE = "\r\x1b[K"
GENERATED_FILE = "IPO_GENERATED_FILE"  # environment variable


class Meter:
    """The bar of a loop whose steps are counted here."""

    def __init__(self, total: int, what: str) -> None:
        self.bar = tqdm(
            total=total,
            desc=what,
            disable=not in_kernel(),
            position=0,  # an inner loop's bar is shown in place of the outer one's
            leave=False,
            delay=SECONDS_PER_UPDATE,
            mininterval=SECONDS_PER_UPDATE,
            miniters=1,
        )

    def step(self) -> None:
        """One more step is done."""
        self.bar.update()
        if self.bar.n == self.bar.total:
            self.bar.close()


def say(done: int, total: int, what: str) -> None:
    """Show once that ``done`` of ``total`` steps are done, where somebody else counts them."""
    if in_kernel():
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}"
        bar = tqdm.format_meter(done, total, 0.0, prefix=what, bar_format=layout)
        print(f"\r{bar}", end="", file=sys.stderr, flush=True)


def count_generated(tokens: int) -> None:
    """Add a line with a number of tokens to the file that ``$IPO_GENERATED_FILE`` names, if any."""
    path = os.environ.get(GENERATED_FILE)
    if path and tokens:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{tokens}\n")


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel; IPython is not loaded to find out."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Relay:
    """A stream that shows the bars among a kernel's errors and warnings, and drops the rest."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal = sys.stderr.isatty()
        self.last_line = time.monotonic()

    def write(self, text: str) -> None:
        """Show the last bar in a text; each bar begins with a carriage return."""
        _, carriage_return, last = text.rpartition("\r")
        bar = last.partition("\n")[0].rstrip()
        if not carriage_return or not bar:
            return
        line = f"{self.name} {bar}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(ERASE_LINE + line[:width], end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last_line >= SECONDS_PER_LOG_LINE:
            self.last_line = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Papermill asks for it; every line is flushed as it is written."""

    def close(self) -> None:
        """Clear the last bar from the terminal."""
        if self.terminal:
            print(ERASE_LINE, end="", file=sys.stderr, flush=True)
