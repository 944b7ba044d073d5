"""The nucleus of top-p sampling: to draw a token from it, and the probability of a token in it.

The *nucleus* holds the fewest most likely tokens whose probabilities sum to at least ``top_p``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ipo_lib.records import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from ipo_lib.engines.graphs import GraphedFunction

EDGE = 0.01  # probability by which a token may lie outside its nucleus and still count as drawn
HEAD = 64  # most likely tokens that are looked at before the whole vocabulary is sorted


def nucleus_draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_p: float,
    head: int = HEAD,
    banned: Tensor | None = None,
) -> Tensor:
    """Draw one token id for each row from its nucleus, by inverse CDF in the order of ids.

    A GPU is waited for once, and again where a nucleus is wider than ``head``.

    Args:
        logits: [rows, vocabulary].
        uniforms: [rows], random numbers in [0, 1) in float64, on any device.
        temperature: above 0.
        top_p: of the nucleus; 1: all tokens.
        head: number of tokens to sort. A wider nucleus is found by sorting all of them.
        banned: [rows], an id that is not drawn; -1: none. On any device.

    Returns:
        [rows], the ids, on the CPU.
    """
    import torch

    if banned is None:
        banned = torch.full(uniforms.shape, -1)
    rows, vocabulary = logits.shape
    if logits.is_cuda and head == HEAD:
        places = 1 << (rows - 1).bit_length()  # so that few graphs serve every number of rows
        draw = _graphed(places, vocabulary, logits.dtype, logits.device, temperature, top_p)
        drawn = draw(logits, uniforms, banned)[:rows].cpu()
    else:
        here = uniforms.to(logits.device), banned.to(logits.device)
        drawn = _draw_from_head(logits, *here, temperature, top_p, head).cpu()
    ids: Tensor = drawn[:, 0]
    is_wide, is_finite = drawn[:, 1], drawn[:, 2]
    if not bool(is_finite.all()):
        raise BadInput("the model's logits are not finite; load it with dtype='float32'")

    # Rows whose nucleus is wider than ``head`` are drawn again, from the whole vocabulary.
    wide = is_wide.nonzero()[:, 0]
    if len(wide):
        ids[wide] = nucleus_draw(
            logits[wide.to(logits.device)],
            uniforms.cpu()[wide],
            temperature,
            top_p,
            vocabulary,
            banned.cpu()[wide],
        )
    return ids


def _draw_from_head(
    logits: Tensor, uniforms: Tensor, banned: Tensor, temperature: float, top_p: float, head: int
) -> Tensor:
    """Draw from each row's ``head`` likeliest tokens; never waits for a GPU.

    Args:
        logits: [rows, vocabulary].
        uniforms: [rows], on the same device.
        banned: [rows], an id that is not drawn, or -1; on the same device.
        temperature: above 0.
        top_p: of the nucleus; 1: all tokens, whatever ``head`` is.
        head: number of tokens to sort.

    Returns:
        [rows, 3]: the id; whether the nucleus is wider than ``head``, and the id to be drawn again;
        whether the logits are finite.
    """
    import torch

    vocabulary = logits.shape[-1]
    top_logits, top_ids = logits.topk(min(head, vocabulary))
    top_logits = top_logits.float()

    # 1. The softmax's denominator. One copy of the logits, changed in place: memory is the limit.
    weights = (logits - top_logits[:, :1]).div_(temperature).exp_()
    total = weights.sum(-1, keepdim=True)
    finite = total[:, 0].isfinite()
    if top_p >= 1:
        place = banned.clamp(min=0)[:, None]
        weights.scatter_(1, place, weights.gather(1, place) * (banned < 0)[:, None])
        drawn = _invert_cdf(weights.double(), uniforms)
        return torch.stack([drawn, torch.zeros_like(drawn), finite.long()], 1)

    # 2. The probabilities of the nucleus, 0 outside it.
    probabilities = ((top_logits - top_logits[:, :1]) / temperature).double().exp() / total
    before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens
    allowed = top_ids != banned[:, None]
    nucleus = probabilities * (before < top_p) * allowed
    # Where the banned token was the whole nucleus, any other token may come.
    empty = (nucleus.sum(-1, keepdim=True) == 0) & (banned >= 0)[:, None]
    nucleus += empty * allowed * probabilities

    # 3. The draw.
    ids, order = top_ids.sort(-1)
    places = _invert_cdf(nucleus.gather(-1, order), uniforms)
    drawn = ids.gather(-1, places[:, None])[:, 0]
    wide = (before[:, -1] < top_p) & (head < vocabulary)
    return torch.stack([drawn, wide.long(), finite.long()], 1)


@functools.lru_cache(maxsize=16)
def _graphed(
    rows: int, vocabulary: int, dtype: Any, device: Any, temperature: float, top_p: float
) -> GraphedFunction:
    """``_draw_from_head`` as a graph: it consists of some forty small kernels."""
    import torch

    from ipo_lib.engines.graphs import GraphedFunction

    def draw(logits: Tensor, uniforms: Tensor, banned: Tensor) -> Tensor:
        return _draw_from_head(logits, uniforms, banned, temperature, top_p, HEAD)

    logits = torch.zeros(rows, vocabulary, dtype=dtype, device=device)
    uniforms = torch.zeros(rows, dtype=torch.float64, device=device)
    banned = torch.full((rows,), -1, device=device)
    return GraphedFunction(draw, (logits, uniforms, banned))


def nucleus_mass(
    logits: Tensor, ids: Tensor, temperature: float, top_p: float, edge: float = EDGE
) -> Tensor:
    """The probability with which ``nucleus_draw`` draws an id; 0 outside the nucleus.

    Args:
        logits: [rows, vocabulary].
        ids: [rows].
        temperature: of the draws; 0 is greedy.
        top_p: of the nucleus.
        edge: probability by which an id may lie outside the nucleus and count as its last one:
            16-bit logits vary with the batch's shape.

    Returns:
        [rows], in float64.
    """
    if not temperature:
        return (logits.argmax(-1) == ids).double()
    probabilities = (logits.double() / temperature).softmax(-1)
    chosen = probabilities.gather(-1, ids[:, None])[:, 0]
    before = (probabilities * (probabilities > chosen[:, None])).sum(-1)
    ordered = probabilities.sort(-1, descending=True).values
    total = (ordered * (ordered.cumsum(-1) - ordered < top_p)).sum(-1)
    within_nucleus = chosen / (total + chosen * (before >= top_p))
    return within_nucleus * (before < top_p + edge)


def _invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """For each row the first place where the cumulated weights exceed uniform * total."""
    cdf = weights.cumsum(-1)
    places = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)
    return places.clamp(max=weights.shape[-1] - 1)
