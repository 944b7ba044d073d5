"""Decoding of many draws at once, sharing what they have in common.

1. *Trunks*: of the prefixes that begin alike, the longest is read (prefilled) once. Each row, a
   draw in progress, copies the keys and values of its trunk up to the cut where it goes on.
2. *Steps*: all rows are decoded together, one token a step.
3. *Refilling*: the place of a row that has ended goes to the next prefix.

Every row is right-aligned: its last token stands in the last used column of the cache, whatever
its length, so that a step writes one column for all rows. Columns left of a row's start are
masked.

The model is the one of transformers. This module adds a cache of preallocated columns and an
attention function, through transformers' extension points.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from ipo_lib.records import Ids

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # tested; other models are decoded by transformers
ATTENTION = "ipo_grouped"
ROOM = 64  # columns allocated ahead of the last used one
PREFILL = 4096  # tokens of one prefill, padding included
REFILL = 0.75  # share of rows still going under which free places are filled, or given up

# Prefixes by index and their logits [rows, vocabulary] -> the ids to go on with, [rows].
ChooseTokens = Callable[[Sequence[int], Tensor], Tensor]
# The index of a prefix and its new token -> whether its row has ended.
TakeToken = Callable[[int, int], bool]


def head_width(settings: Any) -> int:
    """How many numbers one attention head has, by the settings of a model."""
    width = getattr(settings, "head_dim", None)
    return int(width or settings.hidden_size // settings.num_attention_heads)


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in which the heads of a group are queries of their one key head.

    So keys are never repeated.

    Args:
        module: the attention layer (transformers hands it over; it is not used).
        query: [rows, heads, length, width].
        key: [rows, key heads, columns, width].
        value: as ``key``.
        attention_mask: [rows, 1, length, columns], added to the scores.
        scaling: factor of the scores.

    Returns:
        [rows, length, heads, width], and no weights.
    """
    rows, heads, length, width = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    folded = query.reshape(rows, key_heads, groups * length, width)
    if length > 1:
        mask = attention_mask.repeat(1, 1, groups, 1)
    else:
        mask = attention_mask.expand(-1, -1, groups, -1)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, heads, length, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION, grouped_attention)


class ColumnCache(DynamicLayer):
    """One layer's keys and values, [rows, key heads, columns, width]; ``used`` columns count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Any = None
        self.values: Any = None
        self.used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns in place; return the used ones."""
        first = self.used
        self.used += key_states.shape[2]
        if self.used > self.keys.shape[2]:
            self.keys = pad(self.keys, (0, 0, 0, ROOM))
            self.values = pad(self.values, (0, 0, 0, ROOM))
        self.keys[:, :, first : self.used] = key_states
        self.values[:, :, first : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def rebuild(
        self, kept: Tensor, trunks: Any, trunk_index: Tensor, columns: Tensor, width: int
    ) -> None:
        """Drop rows, append rows that are copied from trunks, and set the number of columns.

        Args:
            kept: [kept rows], the rows that stay, with their last ``width`` columns.
            trunks: a cache layer that holds the trunks as rows.
            trunk_index: [new rows], the trunk of each new row.
            columns: [new rows, width], the columns of its trunk that it copies.
            width: number of used columns afterwards.
        """
        self.keys = self._rebuilt(self.keys, kept, trunks.keys, trunk_index, columns, width)
        self.values = self._rebuilt(self.values, kept, trunks.values, trunk_index, columns, width)
        self.used = width
        self.is_initialized = True

    def _rebuilt(
        self,
        old: Tensor,
        kept: Tensor,
        trunks: Tensor,
        trunk_index: Tensor,
        columns: Tensor,
        width: int,
    ) -> Tensor:
        key_heads, head_width = trunks.shape[1], trunks.shape[3]
        rows = len(kept) + len(trunk_index)
        new = trunks.new_zeros(rows, key_heads, width + ROOM, head_width)
        if len(kept):
            span = min(width, self.used)
            last_columns = old[kept, :, self.used - span : self.used]
            new[: len(kept), :, width - span : width] = last_columns
        if len(trunk_index):
            copied = trunks.transpose(1, 2)[trunk_index[:, None], columns]
            new[len(kept) :, :, :width] = copied.transpose(1, 2)
        return new


@dataclass
class Row:
    """A prefix that is being continued."""

    index: int  # of the prefix
    token: int  # the last token
    length: int  # number of tokens before it


def find_trunks(prefixes: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """The longest of the prefixes that begin alike, and the index of each prefix's trunk.

    In sorted order a prefix stands directly before those that go on from it.
    """
    order = sorted(range(len(prefixes)), key=prefixes.__getitem__)
    trunks: list[Ids] = []
    trunk_index = [0] * len(prefixes)
    for index in reversed(order):
        prefix = prefixes[index]
        if not trunks or trunks[-1][: len(prefix)] != prefix:
            trunks.append(prefix)
        trunk_index[index] = len(trunks) - 1
    return trunks, trunk_index


class Decoder:
    """Continues prefixes with one model of ``ARCHITECTURES``, at most ``size`` at a time."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size, self.device = model, size, model.device
        self.rows: list[Row | None] = []  # None: has ended
        self.cache: Any = DynamicCache()
        self.cache.layers = [ColumnCache() for _ in range(model.config.num_hidden_layers)]

    @torch.inference_mode()
    def decode(
        self, prefixes: Sequence[Ids], choose: ChooseTokens, take: TakeToken, patience: float = 0.0
    ) -> None:
        """Continue every prefix until ``take`` says that its row has ended.

        Args:
            prefixes: where each row begins.
            choose: turns the logits of some prefixes into one id each.
            take: receives a prefix's index and its new token; whether its row has ended.
            patience: leave off when no prefix waits and at most this share of the places is
                still going, unless that is all there was; 0: go on to the end.
        """
        waiting = deque(range(len(prefixes)))
        self._begin()
        while waiting or any(self.rows):
            # 1. Leave off where few rows are left, fill free places, give up places of ended rows.
            live = sum(row is not None for row in self.rows)
            if not waiting and 0 < live <= patience * self.size and live < len(prefixes):
                return
            while waiting and live <= REFILL * self.size and live < self.size:
                live += self._admit(waiting, prefixes, self.size - live)
            if live <= REFILL * len(self.rows):
                self._drop_ended()
            # 2. One step.
            logits = self._step()
            places = [place for place, row in enumerate(self.rows) if row]
            rows = [row for row in self.rows if row]
            if len(rows) < len(self.rows):
                logits = logits[places]
            tokens = choose([row.index for row in rows], logits).tolist()
            for place, row, token in zip(places, rows, tokens, strict=True):
                row.token = token
                row.length += 1
                if take(row.index, token):
                    self.rows[place] = None

    def _admit(self, waiting: deque[int], prefixes: Sequence[Ids], free: int) -> int:
        """Prefill the next prefixes, as many as fit into ``free`` places and one pass.

        Returns:
            The number of new rows.
        """
        # 1. Which prefixes go together.
        admitted: list[int] = []
        trunks: list[Ids] = []
        trunk_index: list[int] = []
        while waiting and len(admitted) < free:
            candidates = [*admitted, waiting[0]]
            wider, wider_index = find_trunks([prefixes[index] for index in candidates])
            if admitted and len(wider) * max(map(len, wider)) > PREFILL:
                break
            trunks, trunk_index, admitted = wider, wider_index, candidates
            waiting.popleft()

        # 2. One pass over their trunks, right-aligned. A padding token sees only itself.
        width = max(map(len, trunks))
        starts = [width - len(trunk) for trunk in trunks]
        padded = []
        for start, trunk in zip(starts, trunks, strict=True):
            padded.append([0] * start + [*trunk])
        first = self._integers(starts)
        column = torch.arange(width, device=self.device)
        causal = column[None, :] <= column[:, None]
        in_trunk = column >= first[:, None, None]
        itself = torch.eye(width, dtype=torch.bool, device=self.device)
        visible = causal & in_trunk | itself
        cache = DynamicCache()
        self.model(
            input_ids=self._integers(padded),
            attention_mask=self._additive(visible[:, None]),
            past_key_values=cache,
            use_cache=True,
            position_ids=(column - first[:, None]).clamp(min=0),
            logits_to_keep=1,
        )

        # 3. A row holds all but its last token, which its first step feeds.
        rows = []
        for index in admitted:
            *before, last = prefixes[index]
            rows.append(Row(index, last, len(before)))
        self._add(rows, trunk_index, [starts[trunk] for trunk in trunk_index], cache)
        return len(rows)

    def _begin(self) -> None:
        self.model.set_attn_implementation(ATTENTION)
        self.rows = []

    def _drop_ended(self) -> None:
        """Give up the places of rows that have ended."""
        self._add([], [], [], None)

    def _add(
        self, new: list[Row], trunk_index: Sequence[int], starts: Sequence[int], cache: Any
    ) -> None:
        """Rebuild the cache without ended rows, in as few columns as the longest row needs.

        Args:
            new: rows to append.
            trunk_index: for each of them, the index of its trunk.
            starts: for each of them, the trunk's first column.
            cache: of the trunks; None without new rows.
        """
        kept = [place for place, row in enumerate(self.rows) if row]
        rows = [row for row in self.rows if row] + new
        width = max(row.length for row in rows)
        ends = [start + row.length for start, row in zip(starts, new, strict=True)]
        # A short row's first columns are masked, whatever they hold.
        shift = self._integers(ends)[:, None] - width
        columns = (shift + torch.arange(width, device=self.device)).clamp(min=0)
        kept_rows, trunk_rows = self._integers(kept), self._integers(trunk_index)
        for number, layer in enumerate(self.cache.layers):
            source = layer if cache is None else cache.layers[number]
            layer.rebuild(kept_rows, source, trunk_rows, columns, width)
        self.rows = list(rows)

    def _step(self) -> Tensor:
        """The next logits of every row, [rows, vocabulary] in the model's dtype."""
        used = self.cache.layers[0].used
        rows = [row or Row(0, 0, 0) for row in self.rows]  # an ended row sees only itself
        lengths = self._integers([row.length for row in rows])[:, None]
        visible = torch.arange(used + 1, device=self.device) >= used - lengths
        output = self.model(
            input_ids=self._integers([[row.token] for row in rows]),
            attention_mask=self._additive(visible[:, None, None]),
            position_ids=lengths,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _integers(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _additive(self, visible: Tensor) -> Tensor:
        """A mask to add to scores: 0 where a column is visible, else minus infinity."""
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(~visible, float("-inf"))


def decode_by_generate(
    model: Any,
    prefixes: Sequence[Ids],
    first: int,
    steps: int,
    choose: ChooseTokens,
    take: TakeToken,
) -> None:
    """Continue prefixes by transformers' ``generate``, for models not in ``ARCHITECTURES``.

    Args:
        model: any causal language model.
        prefixes: where each row begins; all are decoded in one batch.
        first: index of the first prefix, as ``choose`` and ``take`` know it.
        steps: tokens by which every row has ended.
        choose: turns the logits of some prefixes into one id each.
        take: receives a prefix's index and its new token; whether its row has ended.
    """
    width = max(map(len, prefixes))
    padded, mask = [], []
    for prefix in prefixes:
        gap = width - len(prefix)
        padded.append([0] * gap + [*prefix])
        mask.append([0] * gap + [1] * len(prefix))
    ended = [False] * len(prefixes)

    def raise_chosen(_: Any, scores: Tensor) -> Tensor:
        live = [row for row, end in enumerate(ended) if not end]
        tokens = choose([first + row for row in live], scores[live].float())
        scores[live, tokens] = float("inf")  # a greedy generate takes it
        return scores

    def stop(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        for row, token in enumerate(ids[:, -1].tolist()):
            ended[row] = ended[row] or take(first + row, token)
        return torch.tensor(ended, device=model.device)

    model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[raise_chosen],
        stopping_criteria=[stop],
    )
