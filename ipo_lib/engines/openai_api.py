"""One model behind OpenAI-compatible servers: asked with retries, many at a time, within a budget.

1. ``Server`` says which model is served where. Several urls are replicas of the same model.
2. ``Server.call`` makes one request and tries again, on the next replica, after a passing failure.
3. ``Server.each`` makes many requests at a time and returns the answers in order.
4. ``Budget`` bounds what may be spent, in one process or in all processes of a run.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput, canonical

TOPS = 20  # vLLM reports so many log-probabilities a position without a higher --max-logprobs
AHEAD = 4  # requests waiting for each that is in flight
KEYLESS = "none"  # the client wants some key even where the server does not
LONGEST_WAIT = 60.0  # seconds between two attempts
BUDGET_FILE = "IPO_BUDGET_FILE"  # environment variable: the file in which a whole run counts
MILLION = 1_000_000  # tokens that a price is for


class Unanswered(Exception):
    """No usable answer to one request, after all attempts; the text says why."""


class Declined(Exception):
    """The server turned one request down, and would again."""


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


@dataclass(frozen=True)
class Server:
    """One model behind one or several servers."""

    urls: tuple[str, ...]  # one per replica, each ending in /v1
    model: str  # the name under which it is served
    key: str = ""  # the environment variable that holds the key
    revision: str = ""  # for the record: a server does not tell it
    in_flight: int = 64  # requests at a time
    attempts: int = 6  # for one request; each on the next replica
    timeout: float = 600.0  # seconds of one attempt
    pause: float = 1.0  # seconds before the second attempt; doubles up to a minute
    tops: int = TOPS  # likeliest tokens asked for at each position in scoring

    def __post_init__(self) -> None:
        if not self.urls or not self.model or self.in_flight < 1 or self.attempts < 1:
            raise BadInput(
                f"server {list(self.urls)}, model {self.model!r}: name a url and a model; "
                "in_flight and attempts from 1"
            )
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise BadInput(
                    f"server {url!r}: write a whole url, for example http://localhost:8000/v1"
                )

    def identity(self) -> dict[str, Any]:
        """What decides the answers, as JSON values: the model, not where it is served."""
        return {"model": self.model, "revision": self.revision}

    @functools.cached_property
    def clients(self) -> list[Any]:
        """One official client per replica. BadInput: the package or the key is missing."""
        try:
            import openai
        except ImportError:
            raise BadInput(
                'servers need the official client; run pip install -e ".[api]"'
            ) from None
        if self.key and not os.environ.get(self.key):
            raise BadInput(
                f"model {self.model!r}: its key is not in ${self.key}; export {self.key}=..."
            )
        options: dict[str, Any] = {
            "api_key": os.environ[self.key] if self.key else KEYLESS,
            "max_retries": 0,  # ``call`` tries again, on another replica
            "timeout": self.timeout,
        }
        return [openai.OpenAI(base_url=url, **options) for url in self.urls]

    def models(self, replica: int = 0) -> dict[str, dict[str, Any]]:
        """What a replica serves, by name. BadInput when it does not answer."""
        try:
            listed = self.call(lambda client: client.models.list(), replica).data
        except (Unanswered, Declined) as error:
            url = self.urls[replica]
            raise BadInput(f"server {url}: {error}; start it, or correct the url") from None
        return {model.id: model.model_dump() for model in listed}

    def context(self) -> float:
        """Tokens that fit, where the servers tell. BadInput when one serves another model."""
        lengths = []
        for replica, url in enumerate(self.urls):
            models = self.models(replica)
            if self.model not in models:
                raise BadInput(
                    f"server {url} serves {', '.join(models)}, not {self.model!r}; "
                    "name one of these, or start another"
                )
            lengths.append(models[self.model].get("max_model_len") or math.inf)
        return min(lengths)

    def call(self, ask: Callable[[Any], Any], replica: int = 0) -> Any:
        """The answer to ``ask(client)``, from this replica or, after a failure, from the next.

        Raises:
            Unanswered: all attempts failed.
            Declined: the server turned the request down.
            BadInput: the key or the model is refused; every later request would be, too.
        """
        import openai
        import tenacity

        passing = (
            openai.APIConnectionError,
            openai.RateLimitError,
            openai.InternalServerError,
            openai.APIResponseValidationError,
            json.JSONDecodeError,
        )
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(passing),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_exponential_jitter(self.pause, LONGEST_WAIT, jitter=self.pause),
            reraise=True,
        )
        # A replica that is down is passed over: each attempt asks the next one.
        clients = itertools.cycle(self.clients[replica:] + self.clients[:replica])
        try:
            return retrying(lambda: _check_json(ask(next(clients))))
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            hint = "name the variable that holds its key"
            if self.key:
                hint = f"correct the key in ${self.key}"
            message = f"server {self.urls[replica]}: {_reason(error)}; {hint}"
            raise BadInput(message) from None
        except openai.NotFoundError as error:
            message = f"server {self.urls[replica]}: {_reason(error)}; name a model that it serves"
            raise BadInput(message) from None
        except passing as error:
            raise Unanswered(_reason(error)) from None
        except openai.APIStatusError as error:
            raise Declined(_reason(error)) from None

    def each(self, items: Sequence[Any], ask: Callable[[Any], Any]) -> Iterator[Any]:
        """``ask(item)`` of every item in order, many at a time.

        After a failure no more is asked. What is finished is yielded, then the failure is raised.
        """
        with ThreadPoolExecutor(self.in_flight) as pool:
            waiting: deque[Future[Any]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(ask, item))
                    if len(waiting) >= AHEAD * self.in_flight:
                        yield waiting[0].result()
                        waiting.popleft()
                while waiting:
                    yield waiting[0].result()
                    waiting.popleft()
            except (Exception, KeyboardInterrupt):
                # What is in flight is paid for, so it is waited for and handed on.
                for future in waiting:
                    future.cancel()
                running = [future for future in waiting if not future.cancelled()]
                wait(running)
                for future in running:
                    if future.exception() is None:
                        yield future.result()
                raise
            finally:
                pool.shutdown(cancel_futures=True)


def _check_json(answer: Any) -> Any:
    """The answer, unless the client could not parse it and returns its text or nothing."""
    if isinstance(answer, str) or answer is None:
        raise json.JSONDecodeError("not JSON", str(answer)[:40], 0)
    return answer


def _reason(error: Exception) -> str:
    """What a server said, in short.

    Its body is left out: it may hold the text it was asked about, or a part of the key.
    """
    status = getattr(error, "status_code", None)
    if status is None:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return first_line[:160]
    code = getattr(error, "code", None) or getattr(error, "type", None) or type(error).__name__
    return f"status {status} {code}"
