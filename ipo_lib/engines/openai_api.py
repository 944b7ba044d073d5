"""One model behind OpenAI-compatible servers: asked with retries, many at a time.

1. ``Server`` says which model is served where. Several urls are replicas of the same model.
2. ``Server.call`` makes one request and tries again, on the next replica, after a passing failure.
   ``server_policy`` says what a failure means.
3. ``Server.each`` makes many requests at a time and returns the answers in order.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from ipo_lib.engines import memory
from ipo_lib.engines.replies import Reply, read_reply
from ipo_lib.engines.server_policy import (
    ADAPT,
    AGAIN,
    DECLINED,
    NEW_LIMIT,
    NO_SYSTEM,
    NO_TEMPERATURE,
    Failure,
    failure_inside,
    sort_failure,
)
from ipo_lib.records import BadInput

TOPS = 20  # vLLM reports so many log-probabilities a position without a higher --max-logprobs
AHEAD = 4  # requests waiting for each that is in flight
KEYLESS = "none"  # the client wants some key even where the server does not
LONGEST_WAIT = 60.0  # seconds between two attempts
LOG = logging.getLogger(__name__)
AWAKE = "awake"  # in ``adaptations`` of a server that sleeps


class Unanswered(Exception):
    """No usable answer to one request, after all attempts; the text says why."""


class Declined(Exception):
    """The server turned one request down, and would again."""


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
    # Words of an error, as a pattern in lower case: a request that fails so is left out. "": none
    leave_out: str = ""
    # A vLLM server on this machine's GPU that gives up its memory while a model is loaded here.
    sleeps: bool = False
    adaptations: set[str] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.urls or not self.model or self.in_flight < 1 or self.attempts < 1:
            raise BadInput(
                f"server {list(self.urls)}, model {self.model!r}: name a url and a model; "
                "in_flight and attempts from 1"
            )
        try:
            re.compile(self.leave_out)
        except re.error as error:
            raise BadInput(
                f"server: leave_out {self.leave_out!r} is no pattern ({error}); give a few words"
            ) from None
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise BadInput(
                    f"server {url!r}: write a whole url, for example http://localhost:8000/v1"
                )
            if urlsplit(url).username or urlsplit(url).password:
                raise BadInput(
                    "server: a url with a name or password would be written down with the run; "
                    "name the environment variable that holds the key with `key`"
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

    def wake(self) -> None:
        """Before requests to a server that sleeps: models in this process leave the GPU to it.

        Raises:
            BadInput: the server was started without sleep mode, or does not answer.
        """
        if not self.sleeps or AWAKE in self.adaptations:
            return
        memory.release_all("cuda", keep=self)
        try:
            self._switch("wake_up")
        except Unanswered as error:
            raise BadInput(f"server {self.urls[0]}: {error}; start it again") from None
        self.adaptations.add(AWAKE)

    def release(self) -> None:
        """Put the server to sleep: its weights go to the CPU's memory, keys and values are lost.

        A server that does not answer holds no memory.

        Raises:
            BadInput: the server was started without sleep mode.
        """
        self.adaptations.discard(AWAKE)
        try:
            self._switch("sleep?level=1")
        except Unanswered as error:
            LOG.warning("server %s: %s; taken for asleep", self.urls[0], error)

    def _switch(self, path: str) -> None:
        for replica, url in enumerate(self.urls):
            whole = f"{url.removesuffix('/v1')}/{path}"

            def ask(client: Any, to: str = whole) -> Any:
                return {"": client.post(to, cast_to=object)}

            try:
                self.call(ask, replica)
            except (Declined, BadInput) as error:
                raise BadInput(
                    f"{error}; {whole} was asked for: start vLLM with --enable-sleep-mode and "
                    "VLLM_SERVER_DEV_MODE=1, or set sleeps to false"
                ) from None

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

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int, temperature: float
    ) -> Reply:
        """What the model answers to messages.

        A model may not take ``max_tokens``, a temperature or a system message. Then it is asked
        otherwise, from then on.

        Args:
            messages: each with a role and a content.
            max_tokens: of the answer.
            temperature: of the answer; a server's own, where the model takes none.

        Raises:
            Unanswered, Declined, BadInput: as ``call``.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }

        def ask(client: Any) -> Any:
            return client.chat.completions.create(**adapted(body, self.adaptations))

        reply = read_reply(self.call(ask, adapts=True))
        return replace(reply, text=self.hidden(reply.text), missing=self.hidden(reply.missing))

    def hidden(self, text: str) -> str:
        """A text without the key, which a server may send back."""
        secret = os.environ.get(self.key, "") if self.key else ""
        return text.replace(secret, "***") if secret else text

    def call(self, ask: Callable[[Any], Any], replica: int = 0, adapts: bool = False) -> Any:
        """The answer to ``ask(client)``, from this replica or, after a failure, from the next.

        Args:
            ask: makes the request.
            replica: the first one to ask.
            adapts: ``ask`` heeds ``adaptations``.

        Raises:
            Unanswered: all attempts failed.
            Declined: the server turned this request down, and answers others.
            BadInput: every later request would fail, too, until somebody mends it.
        """
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unanswered),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_exponential_jitter(self.pause, LONGEST_WAIT, jitter=self.pause),
            reraise=True,
        )
        # A replica that is down is passed over: each attempt asks the next one.
        clients = itertools.cycle(self.clients[replica:] + self.clients[:replica])

        def attempt() -> Any:
            client = next(clients)
            while True:
                known = set(self.adaptations)
                answer, failure = self._try(ask, client)
                if failure is None:
                    return answer
                if failure.kind == ADAPT and adapts and failure.adaptation not in known:
                    self.adaptations.add(failure.adaptation)
                    continue
                if failure.kind == AGAIN:
                    raise Unanswered(failure.reason)
                if failure.kind == DECLINED:
                    raise Declined(failure.reason)
                remedy = failure.remedy or "the model does not take what it was sent"
                raise BadInput(f"server {self.urls[replica]}: {failure.reason}; {remedy}")

        return retrying(attempt)

    def _try(self, ask: Callable[[Any], Any], client: Any) -> tuple[Any, Failure | None]:
        """One request: its answer, or its failure."""
        import openai

        try:
            answer = ask(client)
        except openai.APIStatusError as error:
            return None, sort_failure(error.status_code, error.body, self.key, self.leave_out)
        except (openai.APIError, json.JSONDecodeError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            return None, Failure(AGAIN, self.hidden(first_line)[:160])
        if isinstance(answer, str) or answer is None:
            return None, Failure(AGAIN, "not JSON")
        inside = failure_inside(answer)
        if inside:
            return None, sort_failure(*inside, self.key, self.leave_out)
        return answer, None

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
            except (Exception, KeyboardInterrupt, SystemExit):
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


def adapted(body: Mapping[str, Any], adaptations: Iterable[str]) -> dict[str, Any]:
    """A chat request as a model takes it.

    Args:
        body: of the request.
        adaptations: what the model was seen not to take.
    """
    body = dict(body)
    if NEW_LIMIT in adaptations:
        body["max_completion_tokens"] = body.pop("max_tokens")
    if NO_TEMPERATURE in adaptations:
        del body["temperature"]
    if NO_SYSTEM in adaptations and body["messages"][0]["role"] == "system":
        system, user, *others = body["messages"]
        joined = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        body["messages"] = [joined, *others]
    return body
