"""Decoding on a GPU: the step of all rows is a CUDA graph.

Nothing moves that a graph reads or writes:

1. *Places*: their number is fixed. A row that has ended keeps its place until a new one takes it.
2. *Columns*: token i of a row stands in column i. So a step writes one column of each row, at the
   row's own length, and no row moves when another comes or goes.
3. *Buckets*: a step reads the first 256, 384, 512, 768, ... columns, as many as the longest row
   needs. Each bucket has a graph of its own.
4. *Memory*: as many places as fit beside the model. Where it is short nevertheless, half of the
   places go on from where their rows stood, and the other rows wait.

The draws are those of ``Decoder``: tests on a CPU compare the two.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ipo_lib.engines import memory
from ipo_lib.engines.decoding import ChooseTokens, Decoder, Row, TakeToken, head_width
from ipo_lib.engines.graphs import GraphedFunction, new_pool
from ipo_lib.records import BadInput, Ids

SMALLEST = 256  # columns of the first bucket
AHEAD = 512  # columns that a row is expected to need beside the longest prefix
SHARE = 0.8  # of the free memory, for keys and values; the rest is for the pass over new prefixes
LOG = logging.getLogger(__name__)


def bucket(columns: int) -> int:
    """The smallest bucket with that many columns: 256, 384, 512, 768, 1,024, ..."""
    width = SMALLEST
    while width < columns:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


class PlacedLayer(DynamicLayer):
    """One layer's keys and values, [places, key heads, columns, width].

    Attributes:
        lengths: [places], the column that the next step writes in each place.
        width: number of columns that a step reads.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Any = None
        self.values: Any = None
        self.lengths: Any = None
        self.width = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of each place in place; return the columns that the step reads."""
        column = self.lengths[:, None, None, None].expand_as(key_states)
        self.keys.scatter_(2, column, key_states)
        self.values.scatter_(2, column, value_states)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def widen(self, like: Tensor, places: int, columns: int) -> None:
        """Have more columns, and keep what is there.

        Args:
            like: keys of the model, [_, key heads, _, width].
            places: number of rows.
            columns: of each.
        """
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = like.new_zeros(places, like.shape[1], columns, like.shape[3])
            if old is not None:
                new[:, :, : old.shape[2]] = old
            setattr(self, name, new)
        self.is_initialized = True

    def copy_rows(self, places: Tensor, trunks: Any, trunk_index: Tensor, columns: Tensor) -> None:
        """Copy the beginnings of rows from trunks.

        Args:
            places: [new rows], where they go.
            trunks: a cache layer that holds the trunks as rows.
            trunk_index: [new rows], the trunk of each.
            columns: [new rows, length], the columns of its trunk, from column 0 on.
        """
        length = columns.shape[1]
        for mine, theirs in ((self.keys, trunks.keys), (self.values, trunks.values)):
            copied = theirs.transpose(1, 2)[trunk_index[:, None], columns]
            mine[places, :, :length] = copied.transpose(1, 2)


class CapturedDecoder(Decoder):
    """Continues prefixes with one model of ``ARCHITECTURES``; kept from call to call.

    Args:
        model: on any device.
        size: prefixes at a time, if memory suffices.
    """

    def __init__(self, model: Any, size: int) -> None:
        super().__init__(model, size)
        self.wanted = size
        self.planned = 0  # rows for which the present places were found
        self._forget()

    def decode(
        self, prefixes: Sequence[Ids], choose: ChooseTokens, take: TakeToken, patience: float = 0.0
    ) -> None:
        """As ``Decoder.decode``, with half of the places each time that memory is short.

        Raises:
            BadInput: memory does not suffice for one row.
        """
        texts = [[*prefix] for prefix in prefixes]
        going = list(range(len(prefixes)))

        def choose_for(rows: Sequence[int], logits: Tensor) -> Tensor:
            return choose([going[row] for row in rows], logits)

        def take_for(row: int, token: int) -> bool:
            texts[going[row]].append(token)
            ended = take(going[row], token)
            if ended:
                has_ended.add(going[row])
            return ended

        has_ended: set[int] = set()
        self._find_places(prefixes)
        while going:
            try:
                super().decode([tuple(texts[i]) for i in going], choose_for, take_for, patience)
                return
            except torch.OutOfMemoryError:
                longest = max(map(len, texts))
                if self.size == 1:
                    raise BadInput(
                        f"the GPU's memory does not suffice for one text of {longest} tokens "
                        "beside the model; quantize it, or lower max_tokens"
                    ) from None
                places = self.size // 2
            self._forget()  # outside of the handler, which keeps tensors alive
            self.size = places
            LOG.warning("GPU memory is short; %d texts at a time instead of %d", places, 2 * places)
            going = [index for index in range(len(texts)) if index not in has_ended]

    def _find_places(self, prefixes: Sequence[Ids]) -> None:
        """Set how many rows there are at a time."""
        wanted = min(self.wanted, len(prefixes))
        if self.capacity and wanted <= self.planned:
            return  # idle places take no time
        self._forget()
        self.size = self.planned = wanted
        if self.device.type == "cuda":
            columns = bucket(max(map(len, prefixes)) + AHEAD)
            room = SHARE * memory.free_bytes(self.device)
            self.size = max(1, min(wanted, int(room / (columns * self._bytes_of_a_column()))))

    def _bytes_of_a_column(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        settings = self.model.config
        heads = settings.num_key_value_heads * head_width(settings)
        numbers = 2 * settings.num_hidden_layers * heads
        return int(numbers * self.model.dtype.itemsize)

    def _forget(self) -> None:
        """Give up graphs, keys and values."""
        self.steps: dict[int, GraphedFunction] = {}
        self.capacity = 0  # columns
        self.rows = []
        self.cache = DynamicCache()
        layers = self.model.config.num_hidden_layers
        self.cache.layers = [PlacedLayer() for _ in range(layers)]
        self.pool = new_pool()
        if self.device.type == "cuda":
            memory.empty_cache()

    def _begin(self) -> None:
        super()._begin()
        self.rows = [None] * self.size

    def _drop_ended(self) -> None:
        """Keep the places of rows that have ended: a graph has a fixed number."""

    def _add(
        self, new: list[Row], trunk_index: Sequence[int], starts: Sequence[int], cache: Any
    ) -> None:
        places = [place for place, row in enumerate(self.rows) if row is None][: len(new)]
        for place, row in zip(places, new, strict=True):
            self.rows[place] = row
        length = max(row.length for row in new)
        self._widen(max(row.length for row in self.rows if row) + 1, cache.layers[0].keys)
        last = cache.layers[0].keys.shape[2] - 1
        # A short row's last columns are masked until it writes them.
        columns = self._integers(starts)[:, None] + torch.arange(length, device=self.device)
        arguments = self._integers(trunk_index), columns.clamp(max=last)
        for layer, trunks in zip(self.cache.layers, cache.layers, strict=True):
            layer.copy_rows(self._integers(places), trunks, *arguments)

    def _widen(self, columns: int, like: Tensor) -> None:
        """Have at least so many columns; graphs of fewer are given up, as addresses change."""
        if columns <= self.capacity:
            return
        self.steps.clear()
        self.pool = new_pool()  # a pool dies with its last graph
        self.capacity = bucket(columns)
        for layer in self.cache.layers:
            layer.widen(like, self.size, self.capacity)

    def _step(self) -> Tensor:
        rows = [row or Row(0, 0, 0) for row in self.rows]  # an ended row sees only itself
        tokens = self._integers([row.token for row in rows])
        lengths = self._integers([row.length for row in rows])
        width = bucket(max(row.length for row in rows) + 1)
        self._widen(width, self.cache.layers[0].keys)
        if width not in self.steps:
            forward = functools.partial(self._forward, width)
            self.steps[width] = GraphedFunction(forward, (tokens, lengths), self.pool)
        return self.steps[width](tokens, lengths)

    def _forward(self, width: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        """One step over ``width`` columns; writing a column again changes nothing."""
        for layer in self.cache.layers:
            layer.lengths, layer.width = lengths, width
        visible = torch.arange(width, device=self.device) <= lengths[:, None]
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._additive(visible[:, None, None]),
            position_ids=lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]
