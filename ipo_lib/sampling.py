"""What every sampler is asked and answers: token ids in, sampled token ids out.

The random numbers of a draw depend on its seed and on the position of the token alone. So a draw
does not change with the other draws in its batch, the batch size or a resumed run (in float32; in
bfloat16 logits vary with the batch's shape).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ipo_lib.records import SPARSE, BadInput, Ids, canonical


@dataclass(frozen=True)
class Sampling:
    """How to draw."""

    temperature: float = 0.6  # 0 is greedy
    top_p: float = 0.95
    max_tokens: int = 256  # sampled tokens of a draw
    until: str = "eos"  # "think": stop at the first sampled </think>, too
    # Budget forcing: close a trace that is still open after so many tokens; 0: never.
    think_tokens: int = field(default=0, metadata=SPARSE)

    def __post_init__(self) -> None:
        valid = (
            0 <= self.temperature < math.inf
            and 0 < self.top_p <= 1
            and self.max_tokens >= 1
            and self.until in ("think", "eos")
        )
        if not valid:
            raise BadInput(
                f"{self}: needs temperature >= 0, 0 < top_p <= 1, max_tokens >= 1, "
                "until 'think' or 'eos'"
            )
        if self.think_tokens and not 0 < self.think_tokens < self.max_tokens:
            raise BadInput(
                f"{self}: think_tokens must lie below max_tokens, "
                "or be 0 (a trace may take as long as it likes)"
            )


@dataclass(frozen=True)
class Request:
    """One draw to make after ``prompt_ids + prefix_ids``."""

    key: str  # names the draw
    prompt_ids: Ids
    prefix_ids: Ids
    seed: int
    ban: int | None = None  # a token that must not be drawn first


@dataclass(frozen=True)
class Completion:
    """What was drawn for a request, without prefix and EOS."""

    key: str  # of the request
    token_ids: Ids
    finish: str  # as in ``Rollout``
    forced: int | None = None  # as in ``Rollout``


class Sampler(Protocol):
    """A model in this process, a server, or a script."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the distribution of the draws, as JSON values; loads no model."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Answer every request once, in an order that the list of requests alone decides."""

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """For each request, the probability that ``sample`` draws each of its ``prefix_ids``."""


@runtime_checkable
class PausingSampler(Protocol):
    """A sampler that can answer most requests and leave the last ones for later."""

    @property
    def pauses(self) -> bool:
        """Whether it gains by that."""

    def sample_some(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """As ``sample``, without draws that still go on; these resume when asked for again."""


def draw_seed(base: int, *parts: object) -> int:
    """The 63-bit seed of a draw, hashed from a base seed and what names the draw."""
    hashed = hashlib.sha256(canonical([base, *parts]).encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


def request_lengths(requests: Sequence[Request], context: float) -> list[int]:
    """The number of tokens in each request; BadInput if one leaves no room in the context."""
    lengths = []
    for request in requests:
        length = len(request.prompt_ids) + len(request.prefix_ids)
        if not 0 < length < context:
            raise BadInput(
                f"request {request.key}: {length} prompt tokens, context {context}; shorten it"
            )
        lengths.append(length)
    return lengths
