"""A trace as coloured text in a notebook: sentences by CSR or by verdict, marks where it turns, the draws behind each point.
Plain HTML: it opens without a server and runs no script. Redacted unless ``reveal``."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ipo_lib.plots import NEUTRAL_COLOUR, SAFE_COLOUR, UNSAFE_COLOUR
from ipo_lib.records import SAFE, UNSAFE, Rollout, Sentence

MARKS = {"cue": UNSAFE_COLOUR, "trigger": SAFE_COLOUR, "turning point": "#7B3294"}
COLOURS = {SAFE: SAFE_COLOUR, UNSAFE: UNSAFE_COLOUR}
STYLE = """<style>
.ipo{font:14px/1.6 system-ui,sans-serif;max-width:46em;color:#222;background:#fff;padding:.6em}
.ipo details{display:inline}.ipo details[open]{display:block;margin:.2em 0}
.ipo summary{display:inline;list-style:none;cursor:pointer}.ipo summary::-webkit-details-marker{display:none}
.ipo .s{padding:.1em .15em;border-radius:.2em}
.ipo .m{font-size:11px;font-weight:600;color:#fff;padding:.05em .4em;border-radius:.6em;margin-right:.25em}
.ipo .d{border-left:3px solid #ccc;margin:.2em 0 .4em 1em;padding-left:.7em;font-size:12.5px;max-height:18em;overflow:auto}
.ipo .k{font-size:12px;color:#555;margin-top:.5em}</style>"""
CSR, CSR_IS = "S", ", the share of continuations that end safe"
Draws = Sequence[tuple[str | None, str]]  # (label, text)


def show(
    rollout: Rollout,
    spans: Sequence[Sentence],
    values: Mapping[int, float],
    *,
    marks: Mapping[str, int | None] | None = None,
    draws: Mapping[int, Draws] | None = None,
    name: str = CSR,
    reveal: bool = False,
) -> Any:
    """The trace, each sentence tinted by ``values`` (by sentence index: 1 safe, 0 unsafe), which ``name`` names: CSR after it,
    or a verdict. ``marks``: the index at which cue, trigger, turning point or any other word stands, None: nowhere. ``draws``:
    the (label, text) behind the point after a sentence; a click on the sentence unfolds them."""
    pieces = []
    for span in spans:
        named = [name for name, index in (marks or {}).items() if index == span.index]
        pieces.append(
            _sentence(
                rollout,
                span,
                values.get(span.index),
                named,
                (draws or {}).get(span.index, ()),
                name,
                reveal,
            )
        )
    key = f"colour: {name}{CSR_IS * (name == CSR)}, from orange (0) to blue (1); grey: not measured"
    note = (
        key
        + ("; click a sentence for the draws behind it" if draws else "")
        + ("" if reveal else "; text redacted")
    )
    return _html(f'{STYLE}<div class="ipo">{" ".join(pieces)}<div class="k">{note}</div></div>')


def _sentence(
    rollout: Rollout,
    span: Sentence,
    value: float | None,
    marks: Sequence[str],
    draws: Draws,
    name: str,
    reveal: bool,
) -> str:
    known = value is not None and not math.isnan(value)
    title, colour = (
        (f"{name} = {value:.2f}", tint(value or 0.0)) if known else ("not measured", "#eeeeee")
    )
    text = html.escape(shown(rollout.text[span.char_start : span.char_end], reveal))
    chips = "".join(_chip(mark, MARKS.get(mark, NEUTRAL_COLOUR)) for mark in marks)
    said = f'{chips}<span class="s" title="{title}" style="background:{colour}">{text}</span>'
    if not draws:
        return said
    rows = "".join(_draw(label, drawn, reveal) for label, drawn in draws)
    return f'<details><summary>{said}</summary><div class="d">{title}, {len(draws)} draws<br>{rows}</div></details>'


def _draw(label: str | None, text: str, reveal: bool) -> str:
    chip = _chip(label or "not judged", COLOURS.get(label or "", NEUTRAL_COLOUR))
    return f"<div>{chip}{html.escape(shown(text, reveal))}</div>"


def _chip(word: str, colour: str) -> str:
    return f'<span class="m" style="background:{colour}">{html.escape(word)}</span>'


def shown(text: str, reveal: bool) -> str:
    """``text``, with every letter and digit blacked out unless ``reveal``; its shape stays."""
    return (
        text
        if reveal
        else "".join("█" if unicodedata.category(char)[0] in "LMN" else char for char in text)
    )


def tint(value: float) -> str:
    """A CSS colour between unsafe (0) and safe (1)."""
    ends = [
        [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        for colour in (UNSAFE_COLOUR, SAFE_COLOUR)
    ]
    red, green, blue = (
        round((1 - value) * low + value * high) for low, high in zip(*ends, strict=True)
    )
    return f"rgba({red},{green},{blue},0.30)"


def _html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)  # type: ignore[no-untyped-call]
