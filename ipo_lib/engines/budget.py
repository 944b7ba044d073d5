"""What may be spent on a server, in one process or in all processes of a run."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipo_lib.engines.openai_api import Server
from ipo_lib.records import BadInput, canonical

BUDGET_FILE = "IPO_BUDGET_FILE"  # environment variable: the file in which a whole run counts
MILLION = 1_000_000  # tokens that a price is for


@dataclass
class Budget:
    """What may be spent on a server.

    The highest cost of a request is reserved before it is made, so that many requests in flight
    cannot pass the bound together. Without a ``file`` the process counts alone. With one, all
    processes and resumes of a run read and write the counts there.
    """

    dollars: float = 0.0  # bound; 0: none
    calls: int = 0  # bound; 0: none
    dollars_in: float = 0.0  # price of a million tokens read
    dollars_out: float = 0.0  # price of a million tokens generated
    spent: float = 0.0  # dollars so far
    made: int = 0  # calls so far
    file: Path | None = None
    name: str = ""  # under which the file keeps the counts
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.dollars and not (self.dollars_in or self.dollars_out):
            raise BadInput(
                f"a budget of {self.dollars} dollars needs dollars_in and dollars_out, the prices "
                "of a million tokens"
            )

    def reserve(self, who: str, read: int, written: int) -> float:
        """Reserve the most that a request can cost, and count the call.

        Args:
            who: asks; named in messages.
            read: characters sent, an upper bound of the tokens read.
            written: the most tokens that the answer may have.

        Returns:
            The dollars reserved.

        Raises:
            BadInput: the request could pass a bound.
        """
        most = self._cost(read, written)
        kept = "answers so far are kept"
        if self.file:
            kept += f"; all processes of this run count in {self.file}, delete it to count anew"
        with self._counted():
            if self.calls and self.made >= self.calls:
                raise BadInput(
                    f"{who}: {self.made} of {self.calls} calls made, the bound; raise calls, {kept}"
                )
            if self.dollars and self.spent + most > self.dollars:
                spent = f"{self.spent:.2f} of {self.dollars:.2f} dollars spent"
                raise BadInput(
                    f"{who}: {spent}, the next call could pass the bound; raise the budget, {kept}"
                )
            self.spent += most
            self.made += 1
        return most

    def release(self, reserved: float) -> None:
        """Free what was reserved for a request that the server declined: it is not billed."""
        with self._counted():
            self.spent -= reserved

    def settle(self, reserved: float, usage: Any) -> None:
        """Replace the reserved cost by the real one, where the server's ``usage`` tells it."""
        read = getattr(usage, "prompt_tokens", None)
        written = getattr(usage, "completion_tokens", None)
        if read is not None and written is not None:
            with self._counted():
                self.spent += self._cost(read, written) - reserved

    def _cost(self, read: int, written: int) -> float:
        return (read * self.dollars_in + written * self.dollars_out) / MILLION

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Hold the lock; with a file, read the counts from it and write back what changed."""
        if not self.file:
            with self.lock:
                yield
            return
        with self.lock, _locked(self.file):
            budgets = _read_budgets(self.file)
            before = budgets.get(self.name, {})
            self.spent = float(before.get("dollars", 0.0))
            self.made = int(before.get("calls", 0))
            yield
            after = {"dollars": self.spent, "calls": self.made}
            if after != before:
                text = json.dumps({**budgets, self.name: after}, indent=1, sort_keys=True)
                temporary = self.file.with_suffix(".tmp")  # nobody else's, since we hold the lock
                temporary.write_text(text + "\n", encoding="utf-8")
                os.replace(temporary, self.file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock beside a budget's file; it ends with its process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise BadInput(
            f"budget file {file}: {error.strerror}; name another in ${BUDGET_FILE}, or none"
        ) from None
    with lock:
        yield


def _read_budgets(file: Path) -> dict[str, dict[str, float]]:
    """The counts in a budget file by name; none if the file is missing."""
    try:
        budgets = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise BadInput(
            f"budget file {file} cannot be read ({error}); repair it, or delete it to count anew"
        ) from None
    if not isinstance(budgets, dict) or not all(isinstance(row, dict) for row in budgets.values()):
        raise BadInput(
            f"budget file {file} holds no budgets; repair it, or delete it to count anew"
        )
    return budgets


_BUDGETS: dict[str, Budget] = {}


def shared_budget(server: Server, purpose: str = "", **bounds: float) -> Budget:
    """The one budget of this process for a server, a purpose and these bounds.

    Where ``$IPO_BUDGET_FILE`` names a file, all processes that are given it count there. Raised
    bounds go on from the counts in it.

    Args:
        server: the model and its urls.
        purpose: such as ``judge`` or ``detector``, which have budgets of their own.
        bounds: fields of ``Budget``.
    """
    file = os.environ.get(BUDGET_FILE, "")
    path = Path(file).absolute() if file else None
    name = f"{purpose} {server.model} at {', '.join(server.urls)}".strip()
    budget = Budget(**bounds, file=path, name=name)  # type: ignore[arg-type]
    return _BUDGETS.setdefault(canonical([name, bounds, file]), budget)
