"""Scores: a prompt read once for several texts after it, and the 16-bit drift that is forgiven."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ipo_lib.records import Ids

if TYPE_CHECKING:
    from torch import Tensor

SHARED = 64  # tokens up to which a text may share the pass over its prompt with others
ROWS = 8  # texts that share one: each holds a copy of the prompt's keys and values
STRAYS = 0.02  # share of tokens, and always one, that 16-bit logits may put outside the nucleus


def together(asked: Sequence[tuple[Ids, Ids]], most: int) -> Iterator[list[tuple[Ids, Ids]]]:
    """The (prompt, text) in order, in lists that share a pass.

    A list holds up to ``most`` short texts after one prompt, or one text alone.
    """
    alike = itertools.groupby(asked, key=lambda one: (one[0], len(one[1]) <= SHARED))
    for (_, short), group in alike:
        rows = list(group)
        size = min(most, ROWS) if short else 1
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def states(model: Any, prompt: Ids, texts: Sequence[Ids]) -> list[Tensor]:
    """For every text the last hidden states that draw its tokens, ``[tokens, width]`` each."""
    import torch

    decoder, device = model.get_decoder(), model.device
    if len(texts) == 1:
        ids = torch.tensor([prompt + texts[0]], device=device)
        return [decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]]
    # 1. The prompt once: its last state draws the first token of every text.
    read = decoder(input_ids=torch.tensor([prompt], device=device), use_cache=True)
    first = read.last_hidden_state[0, -1:]
    # 2. The texts as one batch behind it, padded on the right, where no token sees the padding.
    longest = max(map(len, texts)) - 1  # the last token of a text draws nothing
    if longest < 1:
        return [first[: len(text)] for text in texts]
    padded = [[*text[:-1], *[0] * longest][:longest] for text in texts]
    cache, ids = read.past_key_values, torch.tensor(padded, device=device)
    cache.batch_repeat_interleave(len(texts))
    behind = decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    every = [torch.cat([first, row]) for row in behind.last_hidden_state]
    return [row[: len(text)] for row, text in zip(every, texts, strict=True)]


def forgiven(found: Sequence[float], strays: Mapping[int, float]) -> list[float]:
    """Probabilities of a response's own tokens, with those of ``strays`` (by place) put in where
    they are few enough to be drift."""
    few = len(strays) <= max(1, STRAYS * len(found))
    return [strays.get(at, chance) if few else chance for at, chance in enumerate(found)]


def certain_where_put(
    chances: list[float],
    ids: Sequence[int],
    forced: int | None,
    closes: Callable[[Sequence[int]], bool],
) -> list[float]:
    """Probabilities with 1 at the tokens of a closing tag that was put: nothing else could come.

    Args:
        chances: of each token.
        ids: the tokens.
        forced: place of the first token that was put; None: none was.
        closes: whether the last of some tokens completes the tag.
    """
    if forced is None:
        return chances
    last = next(
        (at for at in range(forced, len(ids)) if closes(ids[forced : at + 1])), len(ids) - 1
    )
    return [1.0 if forced <= at <= last else chance for at, chance in enumerate(chances)]
