"""DOOR: a sampler behind vLLM, any number of replicas: token ids in and out, one request a draw with its own seed. Whatever was
answered before a failure is handed on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.chat import CLOSE, Chat
from ipo_lib.engines.nucleus import EDGE
from ipo_lib.engines.openai_api import Declined, Server, Unanswered
from ipo_lib.engines.progress import Meter
from ipo_lib.engines.scoring import forgiven
from ipo_lib.engines.transformers_sampler import Row, adapter_hashes
from ipo_lib.records import BadInput, digest
from ipo_lib.sampling import Completion, Request, Sampling, fitting

BARRED = -100  # logit bias of a token that must not be drawn
PLAIN = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}  # else a server fills them from the model's own settings


class ServerSampler:
    """A model behind vLLM (``vllm serve MODEL --enable-prefix-caching``). A draw's seed is its own, so that replicas and batches
    do not matter but for the last bits of their logits. All draws of a prompt go to one replica, whose cache holds their prefix.
    ``adapter``: a LoRA folder that the servers can read, loaded by name (``--enable-lora``, and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` unless ``--lora-modules`` names it already)."""

    def __init__(self, server: Server, chat: Chat, *, adapter: Path | str | None = None) -> None:
        self.server, self.chat, self.adapter = server, chat, Path(adapter) if adapter else None
        self._adapter_hashes = adapter_hashes(adapter) if adapter else []

    def fingerprint(self) -> dict[str, Any]:
        """The model and its revision as they were named, the adapter's hashes and the chat; asks no server."""
        return {
            "engine": "vllm",
            **self.server.identity(),
            "adapter": self._adapter_hashes,
            "chat": self.chat.fingerprint(),
        }

    def _name(self) -> str:
        """The name under which the model, or the adapter on it, is served; an adapter is loaded where it is not (any more)."""
        if not self.adapter:
            return self.server.model
        name = f"ipo-{digest(self._adapter_hashes)}"
        for at in range(len(self.server.urls)):
            if name not in self.server.models(at):
                self._load(name, at)
        return name

    def _load(self, name: str, at: int) -> None:
        body = {"lora_name": name, "lora_path": str(self.adapter.resolve() if self.adapter else "")}
        try:
            self.server.call(
                lambda client: (
                    client.post("/load_lora_adapter", body=body, cast_to=object) or "loaded"
                ),
                at,
            )
        except (Unanswered, Declined, BadInput) as error:
            if name not in self.server.models(at):
                hint = f"start it with --enable-lora --lora-modules {name}={self.adapter}"
                raise BadInput(
                    f"server {self.server.urls[at]} loads no adapter ({error}); {hint}"
                ) from None

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """In the order of the requests; BadInput if one fills the context or the servers fail."""
        context = self.server.context()
        lengths = fitting(requests, context)
        meter, name = Meter(len(requests), "drawing"), self._name()

        def ask(place: int) -> Completion:
            request = requests[place]
            limit = int(min(sampling.max_tokens, context - lengths[place]))
            row = Row(request, limit, sampling, self.chat)
            found = self._finish(row, name, sampling)
            meter.step()
            return found

        try:
            yield from self.server.each(range(len(requests)), ask)
        except (Unanswered, Declined) as error:
            raise BadInput(
                f"server: {error}; what was drawn is kept, run again when it is well"
            ) from None

    def _finish(self, row: Row, name: str, sampling: Sampling) -> Completion:
        """Draw until the row has ended: in one request, or two where its first token is barred or its thinking cut short."""
        request, reason = row.request, "length"
        while not row.finish and reason == "length":
            while row.due is not None and not row.finish:
                row.take(row.due)
            if row.finish:
                break
            drawn, left = row.drawn, row.limit - row.drawn
            if row.budget and not row.closed and row.thinks and row.forced is None:
                left = min(left, row.budget - len(row.taken))
            bias = {str(row.barred): BARRED} if row.barred >= 0 else {}
            body = {
                "model": name,
                "prompt": [*request.prompt_ids, *row.taken],
                "max_tokens": 1 if bias else left,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": request.seed + drawn,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "logit_bias": bias,
            }
            stops = (
                {"stop": [CLOSE], "include_stop_str_in_output": True}
                if sampling.until == "think"
                else {}
            )
            more = {
                "return_token_ids": True,
                "stop_token_ids": [*self.chat.eos_ids],
                "skip_special_tokens": False,
            }
            choice = self._completion(
                request.prompt_ids, {**body, "extra_body": {**more, **PLAIN, **stops}}
            )
            if (ids := getattr(choice, "token_ids", None)) is None:
                raise BadInput(
                    f"server {self.server.urls[0]} returns no token ids; use vLLM 0.10.2 or later"
                )
            ended = any(row.take(token) for token in ids)
            reason = "stop" if ended else "length" if row.due is not None else choice.finish_reason
            if reason not in ("stop", "length"):
                raise Unanswered(f"a draw ended by {reason!r}")
        return row.completion()

    def _completion(self, prompt_ids: Sequence[int], body: Mapping[str, Any]) -> Any:
        at = zlib.crc32(repr(tuple(prompt_ids)).encode()) % len(self.server.urls)
        return self.server.call(lambda client: client.completions.create(**body), at).choices[0]

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """From the server's own log-probabilities of the prompt, which know neither temperature nor top-p: both are applied to
        the ``tops`` likeliest tokens, and what the others can hold at most is counted in the sum."""
        if sampling.temperature > 1:
            raise BadInput(
                f"temperature {sampling.temperature}: behind a server tokens are scored up to 1; draw in process"
            )
        fitting(requests, self.server.context())
        name = self._name()

        def ask(place: int) -> tuple[int, list[float]]:
            request = requests[place]
            ids = [*request.prompt_ids, *request.prefix_ids]
            body = {
                "model": name,
                "prompt": ids,
                "max_tokens": 1,
                "extra_body": {"prompt_logprobs": self.server.tops},
            }
            places = self._completion(request.prompt_ids, body).prompt_logprobs[
                len(request.prompt_ids) :
            ]
            tops = [
                {int(key): float(one["logprob"]) for key, one in place.items()} for place in places
            ]
            inside, strays = list[float](), dict[int, float]()
            for at, (own, top) in enumerate(zip(request.prefix_ids, tops, strict=True)):
                inside.append(chance(own, top, sampling, EDGE))
                if not inside[-1]:
                    strays[at] = chance(own, top, sampling, 1.0)
            return place, forgiven(inside, strays)

        due = 0  # after a failure others may come, but a score without its turn would be taken for another's
        try:
            for place, found in self.server.each(range(len(requests)), ask):
                if place == due:
                    due += 1
                    yield found
        except (Unanswered, Declined) as error:
            raise BadInput(f"server: {error}; run again when it is well") from None


def chance(own: int, tops: Mapping[int, float], sampling: Sampling, edge: float) -> float:
    """The probability of ``own`` under temperature and top-p, from the natural log-probabilities of the likeliest tokens and of
    ``own`` itself; 0 outside the nucleus, but for ``edge`` of mass as in ``nucleus.nucleus_mass``."""
    if not sampling.temperature:
        return float(tops[own] >= max(tops.values()))
    power = 1 / sampling.temperature
    others = [value for key, value in tops.items() if key != own] or [
        tops[own]
    ]  # own may lie far outside the likeliest
    least, rest = min(others), max(0.0, 1.0 - sum(map(math.exp, tops.values())))
    heated = {key: math.exp(value * power) for key, value in tops.items()}
    total = sum(heated.values()) + rest * math.exp(least * (power - 1))
    before = sum(value for value in heated.values() if value > heated[own]) / total
    if before >= sampling.top_p + edge:
        return 0.0
    kept, nucleus = 0.0, 0.0
    for value in sorted(heated.values(), reverse=True):
        if kept < sampling.top_p:
            nucleus += value / total
        kept += value / total
    nucleus = (
        1.0 if sampling.top_p >= 1 else nucleus + heated[own] / total * (before >= sampling.top_p)
    )
    return heated[own] / total / nucleus
