"""A sampler behind vLLM servers: token ids in, token ids out, one request per draw.

1. Each draw has its own seed, so that replicas and batches change no more than the last bits of its
   logits. All draws of a prompt go to one replica, whose cache holds their prefix.
2. A draw takes one request, or two where its first token is banned or its trace is cut short.
3. Scores come from the server's log-probabilities of a prompt. These know neither temperature nor
   top-p, so both are applied here.

What was answered before a failure is yielded first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.chat import CLOSE, Chat
from ipo_lib.engines import memory
from ipo_lib.engines.draws import OngoingDraw
from ipo_lib.engines.nucleus import EDGE
from ipo_lib.engines.openai_api import Declined, Server, Unanswered
from ipo_lib.engines.progress import Meter
from ipo_lib.engines.scoring import allow_strays
from ipo_lib.engines.transformers_sampler import adapter_hashes
from ipo_lib.records import BadInput, digest
from ipo_lib.sampling import Completion, Request, Sampling, request_lengths

BAN_BIAS = -100  # logit bias of a token that must not be drawn
# Without these a server takes the model's own defaults.
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
STOP_AT_CLOSE = {"stop": [CLOSE], "include_stop_str_in_output": True}


class ServerSampler:
    """A model behind vLLM (``vllm serve MODEL --enable-prefix-caching``).

    Args:
        server: the model and its replicas.
        chat: of the model.
        adapter: folder of a LoRA adapter that the servers can read. They load it by name
            (``--enable-lora`` with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``), unless
            ``--lora-modules`` names it already.
    """

    def __init__(self, server: Server, chat: Chat, *, adapter: Path | str | None = None) -> None:
        self.server = server
        self.chat = chat
        self.adapter = Path(adapter) if adapter else None
        self._adapter_hashes = adapter_hashes(adapter) if adapter else []
        if server.sleeps:
            memory.register(server)  # it may be awake since an earlier process

    def fingerprint(self) -> dict[str, Any]:
        """The model and revision as named, the adapter's hashes and the chat; asks no server."""
        return {
            "engine": "vllm",
            **self.server.identity(),
            "adapter": self._adapter_hashes,
            "chat": self.chat.fingerprint(),
        }

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Answers in the order of the requests; BadInput if one is too long or the servers fail."""
        self.server.wake()
        context = self.server.context()
        lengths = request_lengths(requests, context)
        meter, name = Meter(len(requests), "drawing"), self._served_name()

        def draw(index: int) -> Completion:
            limit = int(min(sampling.max_tokens, context - lengths[index]))
            ongoing = OngoingDraw(requests[index], limit, sampling, self.chat)
            completion = self._finish(ongoing, name, sampling)
            meter.step()
            return completion

        try:
            yield from self.server.each(range(len(requests)), draw)
        except (Unanswered, Declined) as error:
            raise BadInput(
                f"server: {error}; what was drawn is kept, run again when it is well"
            ) from None

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """The probability of each prefix token, from the server's likeliest tokens at its position.

        The ``tops`` likeliest tokens are known; the most that the others can hold is added.
        """
        if sampling.temperature > 1:
            raise BadInput(
                f"temperature {sampling.temperature}: behind a server tokens are scored up to 1; "
                "draw in process"
            )
        self.server.wake()
        request_lengths(requests, self.server.context())
        name = self._served_name()

        def score_one(index: int) -> tuple[int, list[float]]:
            return index, self._prefix_probabilities(requests[index], name, sampling)

        # After a failure, answers may come out of turn. They would be taken for those that failed.
        due = 0
        try:
            for index, probabilities in self.server.each(range(len(requests)), score_one):
                if index == due:
                    due += 1
                    yield probabilities
        except (Unanswered, Declined) as error:
            raise BadInput(f"server: {error}; run again when it is well") from None

    def _served_name(self) -> str:
        """The name under which the model, or the adapter on it, is served; loads the adapter."""
        if not self.adapter:
            return self.server.model
        name = f"ipo-{digest(self._adapter_hashes)}"
        body = {"lora_name": name, "lora_path": str(self.adapter.resolve())}
        for replica in range(len(self.server.urls)):
            if name not in self.server.models(replica):
                self._load_adapter(name, body, replica)
        return name

    def _load_adapter(self, name: str, body: Mapping[str, str], replica: int) -> None:
        def load(client: Any) -> Any:
            return {"": client.post("/load_lora_adapter", body=body, cast_to=object)}

        try:
            self.server.call(load, replica)
        except (Unanswered, Declined, BadInput) as error:
            if name in self.server.models(replica):  # another process has loaded it meanwhile
                return
            hint = f"start it with --enable-lora --lora-modules {name}={self.adapter}"
            url = self.server.urls[replica]
            raise BadInput(f"server {url} loads no adapter ({error}); {hint}") from None

    def _finish(self, draw: OngoingDraw, name: str, sampling: Sampling) -> Completion:
        """Make requests until the draw has ended."""
        reason = "length"
        while not draw.finish and reason == "length":
            while draw.due is not None and not draw.finish:  # the closing tag is put, not drawn
                draw.take(draw.due)
            if draw.finish:
                break
            choice = self._complete(draw.request, self._draw_body(draw, name, sampling))
            token_ids = getattr(choice, "token_ids", None)
            if token_ids is None:
                raise BadInput(
                    f"server {self.server.urls[0]} returns no token ids; use vLLM 0.10.2 or later"
                )
            reason = choice.finish_reason
            if not token_ids and reason == "length":
                raise Unanswered("an answer without a token that is not at its end")
            if any(draw.take(token) for token in token_ids):
                reason = "stop"
            elif draw.due is not None:
                reason = "length"
            if reason not in ("stop", "length"):
                raise Unanswered(f"a draw ended by {reason!r}")
        return draw.completion()

    def _draw_body(self, draw: OngoingDraw, name: str, sampling: Sampling) -> dict[str, Any]:
        """The request that goes on with a draw."""
        limit = draw.limit - draw.drawn
        if draw.budget and not draw.closed and draw.thinks and draw.forced is None:
            limit = min(limit, draw.budget - len(draw.taken))
        bias = {}
        if draw.banned >= 0:
            bias = {str(draw.banned): BAN_BIAS}
            limit = 1
        ids = {
            "return_token_ids": True,
            "stop_token_ids": [*self.chat.eos_ids],
            "skip_special_tokens": False,
        }
        stop = STOP_AT_CLOSE if sampling.until == "think" else {}
        return {
            "model": name,
            "prompt": [*draw.request.prompt_ids, *draw.taken],
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": draw.request.seed + draw.drawn,
            "logit_bias": bias,
            **NO_PENALTIES,
            "extra_body": {**ids, **PLAIN, **stop},
        }

    def _complete(self, request: Request, body: Mapping[str, Any]) -> Any:
        """The server's answer; requests with one prompt go to one replica."""
        replica = zlib.crc32(repr(tuple(request.prompt_ids)).encode()) % len(self.server.urls)
        response = self.server.call(lambda client: client.completions.create(**body), replica)
        return response.choices[0]

    def _prefix_probabilities(self, request: Request, name: str, sampling: Sampling) -> list[float]:
        """The probability of each prefix token of a request; a few may lie outside the nucleus."""
        body = {
            "model": name,
            "prompt": [*request.prompt_ids, *request.prefix_ids],
            "max_tokens": 1,
            "extra_body": {"prompt_logprobs": self.server.tops},
        }
        logprobs = self._complete(request, body).prompt_logprobs[len(request.prompt_ids) :]
        probabilities: list[float] = []
        strays: dict[int, float] = {}
        positions = zip(request.prefix_ids, logprobs, strict=True)
        for position, (token, likeliest) in enumerate(positions):
            tops = {int(key): float(entry["logprob"]) for key, entry in likeliest.items()}
            probabilities.append(token_probability(token, tops, sampling, EDGE))
            if not probabilities[-1]:
                strays[position] = token_probability(token, tops, sampling, 1.0)
        return allow_strays(probabilities, strays)


def token_probability(
    token: int, tops: Mapping[int, float], sampling: Sampling, edge: float
) -> float:
    """The probability that a token is drawn under temperature and top-p.

    Args:
        token: the token's id.
        tops: natural log-probabilities of the likeliest tokens and of ``token``, by id.
        sampling: temperature and top-p.
        edge: probability by which the token may lie outside the nucleus and still count as its
            last, as in ``nucleus.nucleus_mass``.

    Returns:
        0 outside the nucleus.
    """
    if not sampling.temperature:
        return float(tops[token] >= max(tops.values()))
    power = 1 / sampling.temperature
    # 1. The sum over all tokens. ``token`` may be far less likely than the others in ``tops``, so
    #    the least likely of those bounds what a token that is not in ``tops`` can have.
    others = [logprob for key, logprob in tops.items() if key != token]
    least = min(others or [tops[token]])
    rest = max(0.0, 1.0 - sum(map(math.exp, tops.values())))
    heated = {key: math.exp(logprob * power) for key, logprob in tops.items()}
    total = sum(heated.values()) + rest * math.exp(least * (power - 1))
    # 2. Is the token in the nucleus?
    before = sum(mass for mass in heated.values() if mass > heated[token]) / total
    if before >= sampling.top_p + edge:
        return 0.0
    # 3. Its share of the nucleus.
    if sampling.top_p >= 1:
        return heated[token] / total
    kept, nucleus = 0.0, 0.0
    for mass in sorted(heated.values(), reverse=True):
        if kept < sampling.top_p:
            nucleus += mass / total
        kept += mass / total
    if before >= sampling.top_p:
        nucleus += heated[token] / total
    return heated[token] / total / nucleus
