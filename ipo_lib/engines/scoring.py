"""The probabilities of given texts: shared passes over prompts, and tolerance for 16-bit logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ipo_lib.records import Ids

if TYPE_CHECKING:
    from torch import Tensor

PromptAndText = tuple[Ids, Ids]

SHARED = 64  # tokens up to which a text may share the pass over its prompt with others
ROWS = 8  # texts that share one: each holds a copy of the prompt's keys and values
STRAYS = 0.02  # share of tokens, and always one, that 16-bit logits may put outside the nucleus


def group_by_prompt(
    items: Sequence[PromptAndText], batch_size: int
) -> Iterator[list[PromptAndText]]:
    """Cut prompts and texts, in order, into lists that share a pass over the prompt.

    A list holds up to ``batch_size`` short texts after one prompt, or one text alone.
    """
    for (_, short), group in itertools.groupby(items, key=_prompt_and_shortness):
        texts = list(group)
        size = min(batch_size, ROWS) if short else 1
        for first in range(0, len(texts), size):
            yield texts[first : first + size]


def _prompt_and_shortness(item: PromptAndText) -> tuple[Ids, bool]:
    prompt, text = item
    return prompt, len(text) <= SHARED


def hidden_states(model: Any, prompt: Ids, texts: Sequence[Ids]) -> list[Tensor]:
    """For each text after one prompt, the last hidden states that draw its tokens.

    Returns:
        [tokens, width] for each text.
    """
    import torch

    decoder, device = model.get_decoder(), model.device
    if len(texts) == 1:
        ids = torch.tensor([prompt + texts[0]], device=device)
        output = decoder(input_ids=ids, use_cache=False)
        return [output.last_hidden_state[0, len(prompt) - 1 : -1]]
    # 1. Read the prompt once: its last state draws the first token of every text.
    read = decoder(input_ids=torch.tensor([prompt], device=device), use_cache=True)
    first = read.last_hidden_state[0, -1:]
    # 2. Read the texts as one batch after it, padded on the right, where no token sees the padding.
    longest = max(map(len, texts)) - 1  # the last token of a text draws nothing
    if longest < 1:
        return [first[: len(text)] for text in texts]
    padded = []
    for text in texts:
        padding = [0] * (longest - len(text[:-1]))
        padded.append([*text[:-1], *padding])
    cache = read.past_key_values
    cache.batch_repeat_interleave(len(texts))
    ids = torch.tensor(padded, device=device)
    output = decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    states = []
    for row, text in zip(output.last_hidden_state, texts, strict=True):
        states.append(torch.cat([first, row])[: len(text)])
    return states


def allow_strays(probabilities: Sequence[float], strays: Mapping[int, float]) -> list[float]:
    """A text's probabilities where those of its strays are put in, if they are few.

    Args:
        probabilities: of each token of a text that the model has drawn.
        strays: by position, the probability of each token that lies outside its nucleus, as if it
            were the last one inside. Few of them are due to rounding in 16 bits; many show that
            another model has drawn the text.
    """
    allowed = list(probabilities)
    if len(strays) <= max(1, STRAYS * len(allowed)):
        for position, probability in strays.items():
            allowed[position] = probability
    return allowed


def set_forced_to_one(
    probabilities: list[float],
    ids: Sequence[int],
    forced: int | None,
    closes: Callable[[Sequence[int]], bool],
) -> list[float]:
    """Probabilities with 1 at the tokens of a forced closing tag: nothing else could come.

    Args:
        probabilities: of each token.
        ids: the tokens.
        forced: position of the first token that was put and not drawn; None: none was.
        closes: whether the last of some tokens completes the tag.
    """
    if forced is None:
        return probabilities
    last = forced
    while last < len(ids) - 1 and not closes(ids[forced : last + 1]):
        last += 1
    with_ones = list(probabilities)
    for position in range(forced, last + 1):
        with_ones[position] = 1.0
    return with_ones
