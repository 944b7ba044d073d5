"""One model behind OpenAI-compatible servers, any number of replicas: asked with retries, many at a time, within a budget."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput, canonical

TOPS = 20  # likeliest tokens that a server reports at each position unless it was started with a higher --max-logprobs
AHEAD = 4  # requests waiting for each that is in flight
KEYLESS = "none"  # the client wants some key even where the server does not
BUDGET_FILE = (
    "IPO_BUDGET_FILE"  # the environment variable that names the file in which a whole run counts
)
MILLION = 1_000_000  # tokens that a price is for


class Unanswered(Exception):
    """No usable answer to one request, after all attempts; the text says why."""


class Declined(Exception):
    """The server turned one request down, and would again."""


@dataclass
class Budget:
    """What may be spent on a server: ``dollars`` at the prices for a million tokens, and ``calls`` (0: no bound).

    Every request is reckoned at its most before it is made, so that many in flight cannot pass the bound
    together. Without a ``file`` this process counts alone. With one, what is ``spent`` and how many calls
    are ``made`` stands there under ``name``, for all processes and resumes of a run.
    """

    dollars: float = 0.0
    calls: int = 0
    dollars_in: float = 0.0
    dollars_out: float = 0.0
    spent: float = 0.0
    made: int = 0
    file: Path | None = None
    name: str = ""
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.dollars and not (self.dollars_in or self.dollars_out):
            raise BadInput(
                f"a budget of {self.dollars} dollars needs dollars_in and dollars_out, the prices of a million tokens"
            )

    def reserve(self, who: str, read: int, written: int) -> float:
        """The most that a request of ``read`` characters and ``written`` tokens can cost, taken off. BadInput: it is too much."""
        most = (read * self.dollars_in + written * self.dollars_out) / MILLION
        with self._counted():
            kept = "answers so far are kept"
            if self.file:
                kept += f"; all processes of this run count in {self.file}, delete it to count anew"
            if self.calls and self.made >= self.calls:
                raise BadInput(
                    f"{who}: {self.made} of {self.calls} calls made, the bound; raise calls, {kept}"
                )
            if self.dollars and self.spent + most > self.dollars:
                spent = f"{self.spent:.2f} of {self.dollars:.2f} dollars spent"
                raise BadInput(
                    f"{who}: {spent}, the next call could pass the bound; raise the budget, {kept}"
                )
            self.spent, self.made = self.spent + most, self.made + 1
        return most

    def release(self, reserved: float) -> None:
        """Put back what was reserved for a request that the server turned down: it is not billed."""
        with self._counted():
            self.spent -= reserved

    def settle(self, reserved: float, used: Any) -> None:
        """Put what a request did cost in the place of what was reserved; where the server does not tell, the reserve stays."""
        read, written = (
            getattr(used, name, None) for name in ("prompt_tokens", "completion_tokens")
        )
        if read is not None and written is not None:
            paid = (read * self.dollars_in + written * self.dollars_out) / MILLION
            with self._counted():
                self.spent += paid - reserved

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Hold the lock, and the file's where there is one; what is changed inside is written there."""
        if not self.file:
            with self.lock:
                yield
            return
        with self.lock, _locked(self.file):
            every = _counts(self.file)
            own = every.get(self.name, {})
            self.spent, self.made = float(own.get("dollars", 0.0)), int(own.get("calls", 0))
            yield
            new = {"dollars": self.spent, "calls": self.made}
            if new != own:
                written = self.file.with_suffix(".tmp")  # the lock makes it ours
                written.write_text(
                    json.dumps({**every, self.name: new}, indent=1, sort_keys=True) + "\n",
                    encoding="utf-8",
                )
                os.replace(written, self.file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """The lock beside a budget's file; it ends with its process. BadInput where the file system has none to give."""
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


def _counts(file: Path) -> dict[str, dict[str, float]]:
    """What a budget's file says by name; nothing where there is none yet."""
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise BadInput(
            f"budget file {file} cannot be read ({error}); mend it, or delete it to count anew"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise BadInput(f"budget file {file} holds no budgets; mend it, or delete it to count anew")
    return found


@dataclass(frozen=True)
class Server:
    """One model behind one or several ``urls`` (each ending in ``/v1``). ``key``: the environment variable that holds the key,
    which goes nowhere else. ``in_flight`` requests at a time; each is tried ``attempts`` times, the next replica after a failure,
    with waits from ``pause`` seconds up, doubling to a minute. ``revision`` is for the record: a server does not tell it.
    ``tops``: how many of the likeliest tokens a position are asked for in scoring (vLLM's ``--max-logprobs`` bounds it)."""

    urls: tuple[str, ...]
    model: str
    key: str = ""
    revision: str = ""
    in_flight: int = 64
    attempts: int = 6
    timeout: float = 600.0
    pause: float = 1.0
    tops: int = TOPS

    def __post_init__(self) -> None:
        if not self.urls or not self.model or self.in_flight < 1 or self.attempts < 1:
            raise BadInput(
                f"server {list(self.urls)}, model {self.model!r}: name a url and a model; in_flight and attempts from 1"
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
        """One official client a replica. BadInput: the package or the key is missing."""
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
        key = os.environ[self.key] if self.key else KEYLESS
        return [
            openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=self.timeout)
            for url in self.urls
        ]

    def models(self, at: int = 0) -> dict[str, dict[str, Any]]:
        """What a replica serves, by name. BadInput when it does not answer."""
        try:
            return {
                one.id: one.model_dump()
                for one in self.call(lambda client: client.models.list(), at).data
            }
        except (Unanswered, Declined) as error:
            raise BadInput(f"server {self.urls[at]}: {error}; start it, or mend the url") from None

    def context(self) -> float:
        """Tokens that fit, where the servers say so. BadInput when one of them serves another model."""
        found = []
        for at, url in enumerate(self.urls):
            served = self.models(at)
            if self.model not in served:
                raise BadInput(
                    f"server {url} serves {', '.join(served)}, not {self.model!r}; name one of these, or start another"
                )
            found.append(served[self.model].get("max_model_len") or math.inf)
        return min(found)

    def call(self, ask: Callable[[Any], Any], at: int = 0) -> Any:
        """The answer to ``ask(client)``, replica ``at`` first. Unanswered: all attempts failed; Declined: the server turned the
        request down. BadInput: key or model refused, which no later request would mend."""
        import openai
        import tenacity

        soft = (
            openai.APIConnectionError,
            openai.RateLimitError,
            openai.InternalServerError,
            json.JSONDecodeError,
            openai.APIResponseValidationError,
        )
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(soft),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_exponential_jitter(self.pause, 60.0, jitter=self.pause),
            reraise=True,
        )
        try:
            for attempt in tries:
                with attempt:
                    found = ask(
                        self.clients[
                            (at + attempt.retry_state.attempt_number - 1) % len(self.clients)
                        ]
                    )
                    if isinstance(found, str) or found is None:
                        raise json.JSONDecodeError("not JSON", str(found)[:40], 0)
                    return found
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            hint = (
                f"mend the key in ${self.key}"
                if self.key
                else "name the variable that holds its key"
            )
            raise BadInput(f"server {self.urls[at]}: {_said(error)}; {hint}") from None
        except openai.NotFoundError as error:
            raise BadInput(
                f"server {self.urls[at]}: {_said(error)}; name a model that it serves"
            ) from None
        except soft as error:
            raise Unanswered(_said(error)) from None
        except openai.APIStatusError as error:
            raise Declined(_said(error)) from None
        raise AssertionError("tenacity ended without an answer")  # pragma: no cover

    def each(self, asked: Sequence[Any], ask: Callable[[Any], Any]) -> Iterator[Any]:
        """The answers in order, many in flight. After a failure nothing more is asked; what is finished is handed on first."""
        with ThreadPoolExecutor(self.in_flight) as pool:
            waiting: list[Future[Any]] = []
            try:
                for one in asked:
                    waiting.append(pool.submit(ask, one))
                    if len(waiting) >= AHEAD * self.in_flight:
                        yield waiting[0].result()
                        waiting.pop(0)
                while waiting:
                    yield waiting[0].result()
                    waiting.pop(0)
            except (Exception, KeyboardInterrupt):
                for future in waiting:
                    future.cancel()
                wait(running := [future for future in waiting if not future.cancelled()])
                yield from (future.result() for future in running if future.exception() is None)
                raise
            finally:
                pool.shutdown(cancel_futures=True)


_BUDGETS: dict[str, Budget] = {}


def budget(server: Server, purpose: str = "", **bounds: float) -> Budget:
    """The one budget of this process for a server, a purpose (a judge's and a detector's are two) and these bounds. Where
    ``$IPO_BUDGET_FILE`` names a file, all processes that are given it count there, and raised bounds go on from what it says."""
    file, name = (
        os.environ.get(BUDGET_FILE, ""),
        f"{purpose} {server.model} at {', '.join(server.urls)}".strip(),
    )
    made = Budget(**bounds, file=Path(file).absolute() if file else None, name=name)  # type: ignore[arg-type]
    return _BUDGETS.setdefault(canonical([name, bounds, file]), made)


def _said(error: Exception) -> str:
    """What a server said, in short and without its body, which may hold the text it was asked about or a part of the key."""
    if (status := getattr(error, "status_code", None)) is not None:
        return f"status {status} {getattr(error, 'code', None) or getattr(error, 'type', None) or type(error).__name__}"
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
