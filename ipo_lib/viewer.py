"""A trace as coloured text in a notebook, with marks at its cue, trigger and turning point.

Each sentence is tinted by a number between 0 (unsafe) and 1 (safe): the safety ratio after it, or a
verdict. A click on a sentence unfolds the continuations drawn after it. The page is plain HTML
without scripts. Words are blacked out unless ``reveal`` is set.
"""

from __future__ import annotations

import functools
import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.plots import NEUTRAL_COLOUR, SAFE_COLOUR, UNSAFE_COLOUR
from ipo_lib.records import SAFE, UNSAFE, Rollout, Sentence

MARK_COLOURS = {"cue": UNSAFE_COLOUR, "trigger": SAFE_COLOUR, "turning point": "#7B3294"}
LABEL_COLOURS = {SAFE: SAFE_COLOUR, UNSAFE: UNSAFE_COLOUR}
NOT_MEASURED_COLOUR = "#eeeeee"
CSR = "S"  # the name of a value that is a safety ratio
Draws = Sequence[tuple[str | None, str]]  # (label or None, text) of each continuation


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
    """The trace as an HTML object that a notebook displays.

    Args:
        rollout: holds the trace.
        spans: its sentences.
        values: by sentence index a number from 0 (unsafe) to 1 (safe), which gives the colour.
        marks: by word, such as ``cue`` or ``trigger``, the sentence index where it stands, or None.
        draws: by sentence index the continuations after it, as (label, text).
        name: what ``values`` are; ``S`` is the safety ratio after a sentence.
        reveal: show the words.
    """
    marks, draws = marks or {}, draws or {}
    pieces = []
    for span in spans:
        text = html.escape(shown(rollout.text[span.char_start : span.char_end], reveal))
        title, colour = _value_title(values.get(span.index), name)
        style = f'title="{title}" style="background:{colour}"'
        words = [word for word, index in marks.items() if index == span.index]
        chips = [_chip(word, MARK_COLOURS.get(word, NEUTRAL_COLOUR)) for word in words]
        piece = f'{"".join(chips)}<span class="s" {style}>{text}</span>'
        if draws.get(span.index):
            piece = _unfolding(piece, title, draws[span.index], reveal)
        pieces.append(piece)
    # The page is complete: neither a server nor a script is needed to open it.
    key = _colour_key(name, bool(draws), reveal)
    body = f'<div class="ipo">{" ".join(pieces)}<div class="k">{key}</div></div>'
    return _html_object(f"<style>\n{_style_sheet()}</style>{body}")


def shown(text: str, reveal: bool) -> str:
    """``text``; unless ``reveal``, every letter, mark and digit is blacked out."""
    if reveal:
        return text
    return "".join("█" if unicodedata.category(char)[0] in "LMN" else char for char in text)


def tint(value: float) -> str:
    """A CSS colour between unsafe (0) and safe (1)."""
    channels = []
    for start in (1, 3, 5):  # red, green and blue in "#RRGGBB"
        low = int(UNSAFE_COLOUR[start : start + 2], 16)
        high = int(SAFE_COLOUR[start : start + 2], 16)
        channels.append(str(round((1 - value) * low + value * high)))
    return f"rgba({','.join(channels)},0.30)"


@functools.cache
def _style_sheet() -> str:
    return Path(__file__).with_name("viewer.css").read_text("utf-8").rstrip()


def _value_title(value: float | None, name: str) -> tuple[str, str]:
    """What a sentence's tooltip says, and its colour."""
    if value is None or math.isnan(value):
        return "not measured", NOT_MEASURED_COLOUR
    return f"{name} = {value:.2f}", tint(value)


def _colour_key(name: str, has_draws: bool, reveal: bool) -> str:
    """The line below the trace that explains it."""
    meaning = ", the share of continuations that end safe" if name == CSR else ""
    key = f"colour: {name}{meaning}, from orange (0) to blue (1); grey: not measured"
    if has_draws:
        key += "; click a sentence for the draws behind it"
    return key if reveal else f"{key}; text redacted"


def _unfolding(sentence: str, title: str, draws: Draws, reveal: bool) -> str:
    """A sentence that unfolds its continuations on a click."""
    rows = []
    for label, text in draws:
        chip = _chip(label or "not judged", LABEL_COLOURS.get(label or "", NEUTRAL_COLOUR))
        rows.append(f"<div>{chip}{html.escape(shown(text, reveal))}</div>")
    unfolded = f'<div class="d">{title}, {len(draws)} draws<br>{"".join(rows)}</div>'
    return f"<details><summary>{sentence}</summary>{unfolded}</details>"


def _chip(word: str, colour: str) -> str:
    return f'<span class="m" style="background:{colour}">{html.escape(word)}</span>'


def _html_object(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)  # type: ignore[no-untyped-call]
