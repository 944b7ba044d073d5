"""The nucleus of top-p sampling: drawing from it by inverse CDF, and the probability of a token under it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipo_lib.records import BadInput

if TYPE_CHECKING:
    from torch import Tensor

EDGE = 0.01  # mass by which a token may lie outside its nucleus and still count as drawn from it
HEAD = 64  # most likely tokens looked at before the whole vocabulary is sorted for top-p


def nucleus_draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_p: float,
    head: int = HEAD,
    barred: Tensor | None = None,
) -> Tensor:
    """One id a row by inverse CDF, in order of ids, over its nucleus: the fewest top tokens with mass >= ``top_p``.
    ``logits`` [rows, vocabulary], ``uniforms`` [rows] in [0, 1). ``barred`` [rows]: an id of the nucleus that is not drawn (-1:
    none). Exact: a nucleus wider than ``head`` sorts all."""
    size = logits.shape[-1]
    values, ids = logits.topk(min(head, size))
    values = values.float()
    # One copy of the vocabulary's width, then in place: a step of many rows is bound by memory.
    every = (logits - values[:, :1]).div_(temperature).exp_()
    total = every.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise BadInput("the model's logits are not finite; load it with dtype='float32'")
    if top_p >= 1:
        if barred is not None:
            every[barred >= 0, barred[barred >= 0]] = 0
        return _invert(every.double(), uniforms)
    mass = ((values - values[:, :1]) / temperature).double().exp() / total
    before = mass.cumsum(-1) - mass
    kept = mass * (before < top_p)
    if barred is not None:
        kept *= (free := ids != barred[:, None])
        alone = kept.sum(-1, keepdim=True) == 0  # it was the whole nucleus: then any other token
        kept += alone * free * mass
    mass = kept
    ids, order = ids.sort(-1)
    drawn = ids.gather(-1, _invert(mass.gather(-1, order), uniforms)[:, None])[:, 0]
    if head < size and bool((wide := before[:, -1] < top_p).any()):
        left = barred if barred is None else barred[wide]
        drawn[wide] = nucleus_draw(logits[wide], uniforms[wide], temperature, top_p, size, left)
    return drawn


def nucleus_mass(
    logits: Tensor, ids: Tensor, temperature: float, top_p: float, edge: float = EDGE
) -> Tensor:
    """The probability with which ``nucleus_draw`` draws ``ids`` [rows] from ``logits`` [rows, vocabulary], in float64; 0 outside
    the nucleus. Within ``edge`` of it a token counts as its last one: 16-bit logits drift with the batch's shape."""
    if not temperature:
        return (logits.argmax(-1) == ids).double()
    mass = (logits.double() / temperature).softmax(-1)
    own = mass.gather(-1, ids[:, None])[:, 0]
    before = (mass * (mass > own[:, None])).sum(-1)
    ordered = mass.sort(-1, descending=True).values
    total = (ordered * (ordered.cumsum(-1) - ordered < top_p)).sum(-1)
    inside = own / (total + own * (before >= top_p))
    return inside * (before < top_p + edge)


def _invert(mass: Tensor, uniforms: Tensor) -> Tensor:
    cdf = mass.cumsum(-1)
    return (
        (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1).clamp(max=mass.shape[-1] - 1)
    )  # never a place without mass
