"""The nucleus of top-p sampling: to draw a token from it, and the probability of a token in it.

The *nucleus* holds the fewest most likely tokens whose probabilities sum to at least ``top_p``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipo_lib.records import BadInput

if TYPE_CHECKING:
    from torch import Tensor

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

    Args:
        logits: [rows, vocabulary].
        uniforms: [rows], random numbers in [0, 1).
        temperature: above 0.
        top_p: of the nucleus; 1: all tokens.
        head: number of tokens to sort. A wider nucleus is found by sorting all of them.
        banned: [rows], an id that is not drawn; -1: none.

    Returns:
        [rows], the ids.
    """
    vocabulary = logits.shape[-1]
    top_logits, top_ids = logits.topk(min(head, vocabulary))
    top_logits = top_logits.float()

    # 1. The softmax's denominator. One copy of the logits, changed in place: memory is the limit.
    weights = (logits - top_logits[:, :1]).div_(temperature).exp_()
    total = weights.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise BadInput("the model's logits are not finite; load it with dtype='float32'")
    if top_p >= 1:
        if banned is not None:
            has_ban = banned >= 0
            weights[has_ban, banned[has_ban]] = 0
        return _invert_cdf(weights.double(), uniforms)

    # 2. The probabilities of the nucleus, 0 outside it.
    probabilities = ((top_logits - top_logits[:, :1]) / temperature).double().exp() / total
    before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens
    nucleus = probabilities * (before < top_p)
    if banned is not None:
        allowed = top_ids != banned[:, None]
        nucleus *= allowed
        # Where the banned token was the whole nucleus, any other token may come.
        empty = nucleus.sum(-1, keepdim=True) == 0
        nucleus += empty * allowed * probabilities

    # 3. The draw.
    ids, order = top_ids.sort(-1)
    places = _invert_cdf(nucleus.gather(-1, order), uniforms)
    drawn = ids.gather(-1, places[:, None])[:, 0]

    # 4. Rows whose nucleus is wider than ``head`` are drawn again, from the whole vocabulary.
    wide = before[:, -1] < top_p
    if head < vocabulary and bool(wide.any()):
        wide_banned = None if banned is None else banned[wide]
        drawn[wide] = nucleus_draw(
            logits[wide], uniforms[wide], temperature, top_p, vocabulary, wide_banned
        )
    return drawn


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
