"""DOOR: token ids in, sampled token ids out. A draw's uniforms depend on its own seed and the step alone, so it does
not change with batch mates, batch size or a resume (in float32; bfloat16 logits drift with the batch's shape)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ipo_lib.records import SPARSE, BadInput, Ids, canonical

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Sampling:
    """How to draw: temperature 0 is greedy; ``until`` "think" stops at the first ``</think>`` sampled, "eos" not."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 256  # sampled tokens of a draw
    until: str = "eos"
    # budget forcing: after so many tokens of an open trace the closing tag is put; 0: never
    think_tokens: int = field(default=0, metadata=SPARSE)

    def __post_init__(self) -> None:
        known = (
            0 <= self.temperature < math.inf
            and 0 < self.top_p <= 1
            and self.until in ("think", "eos")
        )
        if not known or self.max_tokens < 1:
            raise BadInput(
                f"{self}: needs temperature >= 0, 0 < top_p <= 1, max_tokens >= 1, until 'think' or 'eos'"
            )
        if not (self.think_tokens == 0 or 0 < self.think_tokens < self.max_tokens):
            raise BadInput(
                f"{self}: think_tokens must lie below max_tokens, or be 0 (a trace may take as long as it likes)"
            )


@dataclass(frozen=True)
class Request:
    """One draw to make after ``prompt_ids + prefix_ids``, named by ``key``."""

    key: str
    prompt_ids: Ids
    prefix_ids: Ids
    seed: int
    ban: int | None = (
        None  # the first token drawn is another one: a draw given that it leaves a trace here
    )


@dataclass(frozen=True)
class Completion:
    """The ids of one request, without prefix and EOS; ``finish`` and ``forced`` as in ``records.Rollout``."""

    key: str
    token_ids: Ids
    finish: str
    forced: int | None = None


class Sampler(Protocol):
    """The door: a model, a server or a script."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the distribution of the answers, as JSON values; loads no model."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Every request answered once, batch by batch, in an order that the list of requests alone decides."""

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """For each request, in order, the probability with which ``sample`` would draw each of its own ``prefix_ids``."""


def draw_seed(base: int, *parts: object) -> int:
    """The 63-bit seed of one draw: SHA-256 over the base seed and what names the draw (prompt, cut, draw index...)."""
    return (
        int.from_bytes(hashlib.sha256(canonical([base, *parts]).encode()).digest()[:8], "big") >> 1
    )


def fitting(requests: Sequence[Request], context: float) -> list[int]:
    """The length of every request; BadInput if one leaves no room in ``context`` tokens."""
    lengths = [len(request.prompt_ids) + len(request.prefix_ids) for request in requests]
    for request, length in zip(requests, lengths, strict=True):
        if not 0 < length < context:
            raise BadInput(
                f"request {request.key}: {length} prompt tokens, context {context}; shorten it"
            )
    return lengths


@runtime_checkable
class PausingSampler(Protocol):
    """A sampler that can answer most requests and leave the last ones for later."""

    @property
    def pauses(self) -> bool:
        """Whether it gains by that."""

    def sample_some(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """As ``sample``, without those that still go on; they go on when they are asked for again."""
