"""Many draws at once, sharing what they have in common: rows whose ids begin alike are prefilled once, from whatever cut
they go on, and decoded together; a finished row's place goes to the next request. The model is transformers' own: this
adds a cache of preallocated columns and an attention function, through its extension points.

Every row is right-aligned: its last token stands in the last used column, whatever its length, so that a step writes one
column for all rows. Columns left of a row's start are masked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from ipo_lib.records import Ids

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
)  # where this is tested; other models are decoded by ``generate``
ATTENTION = "ipo_grouped"
ROOM = 64  # columns allocated ahead of the last used one
PREFILL = 4096  # tokens of one prefill, padding included
REFILL = 0.75  # share of rows still going under which free places are filled, or given up

Draw = Callable[[Sequence[int], torch.Tensor], torch.Tensor]
Take = Callable[[int, int], bool]


def grouped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in which the heads of a group are queries of their one key head, so that keys are never repeated.
    ``query`` [rows, heads, length, width], ``key`` [rows, key heads, columns, width], mask [rows, 1, length, columns]."""
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(rows, key.shape[1], groups * length, width)
    mask = (
        attention_mask.repeat(1, 1, groups, 1)
        if length > 1
        else attention_mask.expand(-1, -1, groups, -1)
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(rows, heads, length, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION, grouped)


class Columns(DynamicLayer):
    """One layer's keys and values, [rows, key heads, columns, width], of which the first ``used`` columns count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Any = None
        self.values: Any = None
        self.used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns in place; return the used ones."""
        at, self.used = self.used, self.used + key_states.shape[2]
        if self.used > self.keys.shape[2]:
            self.keys, self.values = (
                torch.nn.functional.pad(one, (0, 0, 0, ROOM)) for one in (self.keys, self.values)
            )
        self.keys[:, :, at : self.used] = key_states
        self.values[:, :, at : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def join(
        self,
        kept: torch.Tensor,
        trunks: Any,
        which: torch.Tensor,
        columns: torch.Tensor,
        width: int,
    ) -> None:
        """Keep the rows ``kept`` in their last ``width`` columns; append rows that take ``columns`` of trunk ``which``."""
        for name in ("keys", "values"):
            new, old = getattr(trunks, name), getattr(self, name)
            out = new.new_zeros(len(kept) + len(which), new.shape[1], width + ROOM, new.shape[3])
            if len(kept):
                span = min(width, self.used)
                out[: len(kept), :, width - span : width] = old[
                    kept, :, self.used - span : self.used
                ]
            if len(which):
                out[len(kept) :, :, :width] = new.transpose(1, 2)[
                    which[:, None], columns
                ].transpose(1, 2)
            setattr(self, name, out)
        self.used, self.is_initialized = width, True


@dataclass
class Row:
    """A request in flight: its place in the list of requests, the last token and how many stand before it."""

    request: int
    token: int
    length: int


def trunks_of(prefixes: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """The longest of the sequences that begin alike, and for each sequence the trunk it is a beginning of. In sorted
    order a sequence stands directly before those that go on from it."""
    order = sorted(range(len(prefixes)), key=lambda place: prefixes[place])
    trunks: list[Ids] = []
    which = [0] * len(prefixes)
    for place in reversed(order):
        if not trunks or trunks[-1][: len(prefixes[place])] != prefixes[place]:
            trunks.append(prefixes[place])
        which[place] = len(trunks) - 1
    return trunks, which


class Decoder:
    """Decodes requests with one model of ``ARCHITECTURES``, at most ``size`` rows at a time."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size, self.device = model, size, model.device
        model.set_attn_implementation(ATTENTION)
        self.rows: list[Row | None] = []
        self.cache: Any = DynamicCache()
        self.cache.layers = [Columns() for _ in range(model.config.num_hidden_layers)]

    @torch.inference_mode()
    def decode(
        self, prefixes: Sequence[Ids], draw: Draw, take: Take, patience: float = 0.0
    ) -> None:
        """Draw tokens after every prefix until ``take(request, token)`` says that its row has ended.

        Args:
            prefixes: where each request begins.
            draw: turns the logits [rows, vocabulary] of the requests it is given into one id each.
            take: a request and its drawn token; whether its row has ended.
            patience: leave off when no request waits and at most this share of the places is still
                going, unless that is all there was; 0: go on to the end.
        """
        waiting, self.rows = deque(range(len(prefixes))), []
        while waiting or any(self.rows):
            live = sum(row is not None for row in self.rows)
            if not waiting and 0 < live <= patience * self.size and live < len(prefixes):
                return
            while waiting and live <= REFILL * self.size and live < self.size:
                live += self._admit(waiting, prefixes, self.size - live)
            if live <= REFILL * len(self.rows):
                self._join([], [], None)
            logits = self._step()
            going = [place for place, row in enumerate(self.rows) if row]
            live_logits = logits if len(going) == len(self.rows) else logits[going]
            tokens = draw([row.request for row in self.rows if row], live_logits).tolist()
            for place, token in zip(going, tokens, strict=True):
                row = self.rows[place]
                assert row is not None
                row.token, row.length = token, row.length + 1
                if take(row.request, token):
                    self.rows[place] = None

    def _admit(self, waiting: deque[int], prefixes: Sequence[Ids], free: int) -> int:
        """Prefill the next requests, as many as fit into ``free`` places and one forward pass; how many they were."""
        taken: list[int] = []
        trunks: list[Ids] = []
        which: list[int] = []
        while waiting and len(taken) < free:
            wider = trunks_of([prefixes[one] for one in (*taken, waiting[0])])
            if taken and len(wider[0]) * max(map(len, wider[0])) > PREFILL:
                break
            (trunks, which), taken = wider, [*taken, waiting.popleft()]
        width = max(map(len, trunks))
        ids = torch.tensor(
            [[0] * (width - len(one)) + [*one] for one in trunks], device=self.device
        )
        starts = torch.tensor([width - len(one) for one in trunks], device=self.device)
        place = torch.arange(width, device=self.device)
        seen = (place[None, :] <= place[:, None]) & (place >= starts[:, None, None]) | torch.eye(
            width, dtype=torch.bool, device=self.device
        )
        cache = DynamicCache()
        self.model(
            input_ids=ids,
            attention_mask=self._additive(seen[:, None]),
            past_key_values=cache,
            use_cache=True,
            position_ids=(place - starts[:, None]).clamp(min=0),
            logits_to_keep=1,
        )
        # A row holds all but its last token, which its first step feeds.
        new = [Row(one, prefixes[one][-1], len(prefixes[one]) - 1) for one in taken]
        self._join(new, [(trunk, width - len(trunks[trunk])) for trunk in which], cache)
        return len(new)

    def _join(self, new: list[Row], trunks: list[tuple[int, int]], cache: Any) -> None:
        """Rebuild the cache without ended rows, with the new ones, in as few columns as the longest needs."""
        kept = [place for place, row in enumerate(self.rows) if row]
        rows = [row for row in self.rows if row] + new
        width = max(row.length for row in rows)
        which = torch.tensor([trunk for trunk, _ in trunks], dtype=torch.long, device=self.device)
        shift = torch.tensor(
            [start + row.length - width for (_, start), row in zip(trunks, new, strict=True)],
            device=self.device,
        )
        columns = (shift[:, None] + torch.arange(width, device=self.device)).clamp(min=0).long()
        index = torch.tensor(kept, dtype=torch.long, device=self.device)
        for number, layer in enumerate(self.cache.layers):
            layer.join(index, cache.layers[number] if cache else layer, which, columns, width)
        self.rows = list(rows)

    def _step(self) -> torch.Tensor:
        """The next logits of every row, [rows, vocabulary] in the model's dtype."""
        used = self.cache.layers[0].used
        rows = [
            row or Row(0, 0, 0) for row in self.rows
        ]  # an ended row goes on as one that sees only itself
        lengths = torch.tensor([row.length for row in rows], device=self.device)
        seen = torch.arange(used + 1, device=self.device) >= (used - lengths)[:, None]
        ids = torch.tensor([[row.token] for row in rows], device=self.device)
        out = self.model(
            input_ids=ids,
            attention_mask=self._additive(seen[:, None, None]),
            position_ids=lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device).masked_fill_(
            ~seen, float("-inf")
        )


def generate(
    model: Any, prefixes: Sequence[Ids], first: int, steps: int, draw: Draw, take: Take
) -> None:
    """The same by transformers' own ``generate``, for architectures that are not in ``ARCHITECTURES``; requests are
    numbered from ``first`` and end within ``steps``."""
    gaps = [max(map(len, prefixes)) - len(prefix) for prefix in prefixes]
    ids = torch.tensor(
        [[0] * gap + [*prefix] for gap, prefix in zip(gaps, prefixes, strict=True)],
        device=model.device,
    )
    mask = torch.tensor(
        [[0] * gap + [1] * (ids.shape[1] - gap) for gap in gaps], device=model.device
    )
    ended = [False] * len(prefixes)

    def process(_: Any, scores: torch.Tensor) -> torch.Tensor:
        live = [row for row, end in enumerate(ended) if not end]
        scores[live, draw([first + row for row in live], scores[live].float())] = float(
            "inf"
        )  # a greedy generate takes it
        return scores

    def stop(sofar: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        for row, token in enumerate(sofar[:, -1].tolist()):
            ended[row] = ended[row] or take(first + row, token)
        return torch.tensor(ended, device=model.device)

    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[process],
        stopping_criteria=[stop],
    )
