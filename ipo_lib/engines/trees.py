"""Batches in which a shared prefix is read once.

1. Pairs with the same prefix and the same rejected suffix make a *tree*: the prefix, then its
   *leaves*, which are the rejected suffix and the chosen suffix of every pair. A tree is one row
   of a batch.
2. A token sees what precedes it in the prefix and in its own leaf. The positions of every leaf go
   on from the prefix's end. So a log-probability is that of a separate forward. On a GPU the mask
   is one of blocks (FlexAttention), elsewhere a dense one.
3. The LM head reads scored positions only. Each scored token belongs to a *segment*: a leaf, or the
   response part of a prefix.
4. Sums over segments give (chosen, rejected, prefix) of each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from ipo_lib.dpo import SFT, WHOLE, DpoSettings
from ipo_lib.engines.decoding import head_width
from ipo_lib.engines.lora import Pairs
from ipo_lib.records import Ids

HEAD = 2048  # scored positions whose logits are held at once
PADDING = -1  # in place of a leaf
COMPILED_KINDS = 64  # of batches, for which FlexAttention may be compiled
MIN_HEAD = 16  # numbers of a head that the kernels of FlexAttention need
Batch = dict[str, Tensor]


class Layout:
    """Trees as rows of token ids, and the tokens that are scored."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []  # token ids
        self.leaves: list[list[int]] = []  # of each token: the segment of its leaf, 0 in a prefix
        self.positions: list[list[int]] = []  # of each token: how many come before it in its text
        self.scored: list[tuple[int, ...]] = []  # (row, place that predicts, target, segment, kept)
        self.segments = 0

    def add_prefix(self, ids: Ids, first_scored: int) -> int:
        """Begin a row with a prefix, scored from one index on. Returns its segment."""
        row, segment = len(self.rows), self._next_segment()
        self.rows.append(list(ids))
        self.leaves.append([0] * len(ids))
        self.positions.append([*range(len(ids))])
        for index in range(first_scored, len(ids)):
            self.scored.append((row, index - 1, ids[index], segment, 1))
        return segment

    def add_leaf(self, ids: Ids, prefix_length: int, left_out: int = 0) -> int:
        """Add a suffix to the last row. Returns its segment.

        ``left_out`` of its first tokens do not count in its sum.
        """
        row, segment = len(self.rows) - 1, self._next_segment()
        start = len(self.rows[row])
        for index, token in enumerate(ids):
            place = start + index - 1 if index else prefix_length - 1
            self.scored.append((row, place, token, segment, int(index >= left_out)))
        self.rows[row] += ids[:-1]  # the last token predicts nothing
        self.leaves[row] += [segment] * (len(ids) - 1)
        self.positions[row] += range(prefix_length, prefix_length + len(ids) - 1)
        return segment

    def _next_segment(self) -> int:
        self.segments += 1
        return self.segments - 1


def collate(pairs: Pairs, settings: DpoSettings, indices: Sequence[int] = ()) -> Batch:
    """Make a batch of trees.

    Args:
        pairs: the pairs of the batch.
        settings: what is scored, and the padding.
        indices: of each pair in the data set; without them 0, 1, ...

    Returns:
        By tree: ``ids``, ``positions``, and ``leaves``, the segment of each token's leaf (0 in a
        prefix), all [trees, length]. By scored token: its ``row``, the ``place`` that predicts
        it, its ``target``, its ``segment``, and whether it is ``kept`` in the sums [scored]. By
        pair: ``sides``, the segments of (chosen, rejected, prefix) [pairs, 3], ``weight`` and
        ``index`` [pairs]. And how many ``segments`` there are.
    """
    # 1. Pairs with the same prefix and rejected side share a tree.
    trees: dict[tuple[Ids, Ids, int], list[int]] = {}
    for number, pair in enumerate(pairs):
        trees.setdefault((pair.prompt_ids, pair.rejected_ids, pair.h), []).append(number)

    # 2. Lay out each tree: the prefix, the rejected leaf, the chosen leaves.
    layout = Layout()
    sides = torch.zeros(len(pairs), 3, dtype=torch.long)
    scores_prefix = WHOLE in (settings.scope, settings.sft_scope)
    for (prefix, rejected_ids, h), members in trees.items():
        length = len(prefix)
        prefix_segment = layout.add_prefix(prefix, length - h if scores_prefix else length)
        rejected_segment = 0  # not read by SFT
        if settings.loss != SFT:
            rejected_segment = layout.add_leaf(rejected_ids, length)
        for number in members:
            left_out = 0 if settings.score_trigger else pairs[number].given
            chosen_segment = layout.add_leaf(pairs[number].chosen_ids, length, left_out)
            sides[number] = torch.tensor([chosen_segment, rejected_segment, prefix_segment])

    # 3. Tensors, padded on the right.
    multiple = settings.pad_to_multiple_of
    width = -(-max(map(len, layout.rows)) // multiple) * multiple
    row, place, target, segment, kept = torch.tensor(layout.scored).T
    return {
        "ids": _pad(layout.rows, width, 0),
        "positions": _pad(layout.positions, width, 0),
        "leaves": _pad(layout.leaves, width, PADDING),
        "row": row,
        "place": place,
        "target": target,
        "segment": segment,
        "kept": kept,
        "sides": sides,
        "segments": torch.tensor(layout.segments),
        "weight": torch.tensor([pair.weight for pair in pairs]),
        "index": torch.tensor(indices or range(len(pairs))),
    }


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def sees(leaves: Tensor) -> Callable[[Any, Any, Any, Any], Any]:
    """The rule of the mask: a token sees itself and earlier ones of the prefix and of its own leaf.

    Args:
        leaves: of a batch, [trees, length].

    Returns:
        Whether the token at one place sees that at another, given the indices of a tree, of a head,
        and of the two places.
    """

    def rule(tree: Any, _head: Any, place: Any, other: Any) -> Any:
        in_prefix = leaves[tree, other] == 0
        same_leaf = leaves[tree, other] == leaves[tree, place]
        return (other <= place) & (in_prefix | same_leaf)

    return rule


def dense_mask(leaves: Tensor) -> Tensor:
    """The rule as a mask, [trees, 1, length, length]: True where a token sees another."""
    trees, width = leaves.shape
    tree = torch.arange(trees, device=leaves.device)[:, None, None]
    place = torch.arange(width, device=leaves.device)
    mask: Tensor = sees(leaves)(tree, None, place[:, None], place[None, :])
    return mask[:, None]


def block_mask(leaves: Tensor) -> Any:
    """The rule as FlexAttention takes it, which leaves out blocks of tokens that see nothing."""
    trees, width = leaves.shape
    device = str(leaves.device)
    return create_block_mask(sees(leaves), trees, None, width, width, device=device)


def has_block_kernels(model: Any, device: torch.device) -> bool:
    """Whether FlexAttention trains a model: on a GPU, with wide heads and without dropout.

    On a CPU it has no backward pass.
    """
    has_dropout = bool(getattr(model.config, "attention_dropout", 0.0))
    return device.type == "cuda" and head_width(model.config) >= MIN_HEAD and not has_dropout


class Scorer(nn.Module):
    """A causal LM with LoRA that returns the log-probability of every scored token of a batch.

    Args:
        model: a PEFT model.
        blocks: its attention is FlexAttention, with block masks. Where a third of the tokens are
            read, a dense mask still costs their square.
    """

    def __init__(self, model: Any, blocks: bool = False) -> None:
        super().__init__()
        self.model = model
        self.make_mask = block_mask if blocks else dense_mask
        if blocks:
            model.get_base_model().set_attn_implementation("flex_attention")
            # It is compiled for each kind of batch. Beyond the limit it would run uncompiled,
            # without a word, and hold whole score matrices.
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = COMPILED_KINDS

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Pass on what the trainer asks for to the base model, which has the layers."""
        self.model.get_base_model().activation_checkpointing_enable(**options)

    def forward(self, **batch: Tensor) -> Tensor:
        """One pass over the trees. Returns log-probabilities in float32 [scored]."""
        base = self.model.get_base_model()
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        hidden = decoder(
            input_ids=batch["ids"],
            position_ids=batch["positions"],
            attention_mask=self.make_mask(batch["leaves"]),
            use_cache=False,
        ).last_hidden_state
        states, target = hidden[batch["row"], batch["place"]], batch["target"]

        def score(states: Tensor, target: Tensor) -> Tensor:
            return -functional.cross_entropy(head(states).float(), target, reduction="none")

        if len(states) <= HEAD:
            return score(states, target)
        # HEAD positions of logits at a time, computed again in the backward pass.
        parts = zip(torch.split(states, HEAD), torch.split(target, HEAD), strict=True)
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])


def sum_logps(logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum and count the kept log-probabilities by (chosen, rejected, prefix) of each pair.

    Returns:
        (sums, counts), each [pairs, 3].
    """
    kept = batch["kept"].to(logps.dtype)
    zeros = torch.zeros(int(batch["segments"]), device=logps.device)
    totals = zeros.index_add(0, batch["segment"], logps * kept).float()
    counts = zeros.index_add(0, batch["segment"], kept)
    return totals[batch["sides"]], counts[batch["sides"]]
