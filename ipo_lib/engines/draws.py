"""Draws in progress: what each has drawn so far, which token may come next, and when it ends.

*Budget forcing* (``Sampling.think_tokens``): where the trace is still open when its budget is
spent, the tokens of ``</think>`` are put next. They are taken like drawn ones, but need no random
number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ipo_lib.chat import CLOSE, OPEN, Chat
from ipo_lib.engines.nucleus import nucleus_draw
from ipo_lib.engines.progress import Meter
from ipo_lib.sampling import Completion, Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class OngoingDraw:
    """One request as it is drawn.

    Args:
        request: what to draw.
        limit: number of tokens to draw at most.
        sampling: when to stop, and the budget of the trace.
        chat: of the model.

    Attributes:
        taken: the prefix and all tokens after it.
        finish: why the draw ended; "" while it goes on.
        closed: whether the trace was closed.
        thinks: whether the trace was open before the first token.
        forced: position in ``taken`` of the closing tag that was put; None: none was.
    """

    def __init__(self, request: Request, limit: int, sampling: Sampling, chat: Chat) -> None:
        self.request = request
        self.limit = limit
        self.until = sampling.until
        self.budget = sampling.think_tokens
        self.chat = chat
        self.uniforms = np.random.Generator(np.random.PCG64(request.seed)).random(limit)
        self.taken = [*request.prefix_ids]
        self.finish = ""
        self.forced: int | None = None
        self.closing_tag = self._closing_tag()
        self._pending: list[int] = []  # tokens of the closing tag that come next
        prefix = chat.decode(request.prefix_ids) if self.budget else ""
        self.closed = CLOSE in prefix
        self.thinks = chat.opened or OPEN in prefix
        self._spend_budget()

    def _closing_tag(self) -> Sequence[int]:
        """The tokens that close a trace; none without a budget."""
        if not self.budget:
            return ()
        before_answer = "\n\n" if self.until == "eos" else ""
        return self.chat.encode(f"\n{CLOSE}{before_answer}")

    @property
    def drawn(self) -> int:
        """The number of tokens that were sampled, neither given nor put."""
        new = len(self.taken) - len(self.request.prefix_ids)
        if self.forced is None:
            return new
        return new - (len(self.closing_tag) - len(self._pending))

    @property
    def uniform(self) -> float:
        """The random number of the next draw; any number where the next token is put."""
        return float(self.uniforms[min(self.drawn, self.limit - 1)])

    @property
    def due(self) -> int | None:
        """The token that is put next; None: the next one is drawn."""
        return self._pending[0] if self._pending else None

    @property
    def banned(self) -> int:
        """The id that the next draw must not be; -1: none."""
        is_first = len(self.taken) == len(self.request.prefix_ids)
        return self.request.ban if is_first and self.request.ban is not None else -1

    def take(self, token: int) -> bool:
        """Add a drawn or put token; return whether the draw has ended."""
        if self._pending:
            self._pending.pop(0)
        elif token in self.chat.eos_ids:
            self.finish = "stop"
            return True
        self.taken.append(token)
        closes = False
        if self.until == "think" or self.budget:
            closes = self.chat.closes(self.taken[-len(CLOSE) :])
        self.closed |= closes
        if self._pending:
            return False
        self._spend_budget()
        if closes and self.until == "think":
            self.finish = "think"
        elif self.drawn == self.limit and not self._pending:
            self.finish = "length"
        return bool(self.finish)

    def completion(self) -> Completion:
        """What was drawn for the request."""
        ids = tuple(self.taken[len(self.request.prefix_ids) :])
        return Completion(self.request.key, ids, self.finish or "stop", self.forced)

    def _spend_budget(self) -> None:
        """Put the closing tag next, where an open trace has used up its budget."""
        may_force = self.budget and not self.closed and self.forced is None
        if not may_force or len(self.taken) < self.budget:
            return
        if self.thinks or OPEN in self.chat.decode(self.taken):
            self.forced = len(self.taken)
            self._pending = [*self.closing_tag]


class DrawBatch:
    """Draws that are decoded together: chooses their next tokens, and hands these out."""

    def __init__(self, draws: Sequence[OngoingDraw], sampling: Sampling, meter: Meter) -> None:
        self.draws = draws
        self.sampling = sampling
        self.meter = meter

    def choose(self, live: Sequence[int], logits: Tensor) -> Tensor:
        """The next token of some draws, by their index, from their logits [rows, vocabulary]."""
        draws = [self.draws[index] for index in live]
        tokens = self._sample(draws, logits)
        for row, draw in enumerate(draws):
            if draw.due is not None:
                tokens[row] = draw.due
        return tokens

    def _sample(self, draws: Sequence[OngoingDraw], logits: Tensor) -> Tensor:
        import torch

        banned = None
        if any(draw.banned >= 0 for draw in draws):
            banned = torch.tensor([draw.banned for draw in draws])
        if not self.sampling.temperature:
            if banned is not None:
                banned = banned.to(logits.device)
                has_ban = banned >= 0
                logits[has_ban, banned[has_ban]] = -math.inf
            return logits.argmax(-1).cpu()
        uniforms = torch.tensor([draw.uniform for draw in draws], dtype=torch.float64)
        return nucleus_draw(
            logits, uniforms, self.sampling.temperature, self.sampling.top_p, banned=banned
        )

    def take(self, index: int, token: int) -> bool:
        """Give a draw its next token; return whether it has ended."""
        ended = self.draws[index].take(token)
        if ended:
            self.meter.step()
        return ended
