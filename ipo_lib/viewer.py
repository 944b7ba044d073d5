"""A trace as coloured text in a notebook, with marks at its cue, trigger and turning point.

Each sentence is tinted by a number between 0 (unsafe) and 1 (safe): the safety ratio S after it,
printed with its counts and its interval, or a verdict. A click on a sentence unfolds the
continuations drawn after it. The page is plain HTML without scripts. Words are blacked out unless
``reveal`` is set.
"""

from __future__ import annotations

import functools
import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from ipo_lib.plots import NEUTRAL_COLOUR, SAFE_COLOUR, UNSAFE_COLOUR
from ipo_lib.records import SAFE, UNSAFE, CsrPoint, Rollout, Sentence
from ipo_lib.stats import wilson

MARK_COLOURS = {
    "cue": UNSAFE_COLOUR,
    "detector's guess": UNSAFE_COLOUR,
    "trigger": SAFE_COLOUR,
    "turning point": "#7B3294",
}
LABEL_COLOURS = {SAFE: SAFE_COLOUR, UNSAFE: UNSAFE_COLOUR}
PAIR_COLOURS = {"chosen": SAFE_COLOUR, "rejected": UNSAFE_COLOUR}
NOT_MEASURED_COLOUR = "#eeeeee"
NOT_JUDGED = "not judged"
HIDDEN = regex.compile(r"[A-Za-z0-9]|[^\p{ASCII}\p{P}\p{Z}]")  # what redaction blacks out
CSR = "S"  # the name of a value that is a safety ratio
Draws = Sequence[tuple[str | None, str]]  # (label or None, text) of each continuation


def show(
    rollout: Rollout,
    spans: Sequence[Sentence],
    values: Mapping[int, float | CsrPoint],
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
        values: by sentence index a number from 0 (unsafe) to 1 (safe), or the counts behind S. They
            give the colour.
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
        measured = isinstance(values.get(span.index), CsrPoint)
        number = f' <span class="n">{title}</span> ' if measured else ""
        words = [word for word, index in marks.items() if index == span.index]
        chips = [_chip(word, MARK_COLOURS.get(word, NEUTRAL_COLOUR)) for word in words]
        piece = f'{"".join(chips)}<span class="s" {style}>{text}</span>{number}'
        if draws.get(span.index):
            piece = _unfolding(piece, title, draws[span.index], reveal)
        pieces.append(piece)
    # The page is complete: neither a server nor a script is needed to open it.
    key = _colour_key(name if values else "", bool(draws), reveal)
    body = f'<div class="ipo">{" ".join(pieces)}<div class="k">{key}</div></div>'
    return _html_object(f"<style>\n{_style_sheet()}</style>{body}")


def shown(text: str, reveal: bool) -> str:
    """``text``; unless ``reveal``, all but punctuation, spaces and ASCII signs is blacked out.

    So no letter can be read in another dress: circled or squared, as a flag, in Braille, as an
    invisible tag or in a private area of Unicode.
    """
    return text if reveal else HIDDEN.sub("█", text)


def tint(value: float) -> str:
    """A CSS colour from unsafe (0) over white (1/2) to safe (1)."""
    end = UNSAFE_COLOUR if value < 0.5 else SAFE_COLOUR
    channels = [str(int(end[start : start + 2], 16)) for start in (1, 3, 5)]
    return f"rgba({','.join(channels)},{0.55 * abs(2 * value - 1):.2f})"


def show_pair(shared: str, chosen: str, rejected: str, reveal: bool = False) -> Any:
    """A preference pair as an HTML object: what both sides share, then the two sides.

    Args:
        shared: text of the first *h* tokens of both.
        chosen: how the corrected trace goes on.
        rejected: how the original went on.
        reveal: show the words.
    """
    parts = []
    sides = {
        "shared": (shared, "#eeeeee"),
        "chosen": (chosen, tint(1)),
        "rejected": (rejected, tint(0)),
    }
    for name, (text, colour) in sides.items():
        words = html.escape(shown(text.strip(), reveal))
        chip = _chip(name, PAIR_COLOURS.get(name, NEUTRAL_COLOUR))
        parts.append(f'<p>{chip}<span class="s" style="background:{colour}">{words}</span></p>')
    return _html_object(f'<style>\n{_style_sheet()}</style><div class="ipo">{"".join(parts)}</div>')


def side_by_side(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """Several traces beside each other, as an HTML object that a notebook displays.

    Args:
        rows: of each row its heading, and by title what ``show`` returned.
    """
    parts = []
    for heading, views in rows:
        columns = [
            f'<div style="flex:1"><b>{html.escape(title)}</b>{view.data}</div>'
            for title, view in views.items()
        ]
        parts.append(f"<p><b>{html.escape(heading)}</b></p>")
        parts.append(f'<div style="display:flex;gap:1em">{"".join(columns)}</div>')
    return _html_object("".join(parts))


@functools.cache
def _style_sheet() -> str:
    return Path(__file__).with_name("viewer.css").read_text("utf-8").rstrip()


def _value_title(value: float | CsrPoint | None, name: str) -> tuple[str, str]:
    """What is said of a sentence's value, and its colour."""
    if isinstance(value, CsrPoint) and value.n:
        interval = wilson(value.n_safe, value.n)
        counts = f"{value.n_safe} of {value.n} [{interval.low:.2f}, {interval.high:.2f}]"
        return f"{name} = {value.s:.2f}, {counts}", tint(value.s)
    if value is None or isinstance(value, CsrPoint) or math.isnan(value):
        return "not measured", NOT_MEASURED_COLOUR
    return f"{name} = {value:.2f}", tint(value)


def _colour_key(name: str, has_draws: bool, reveal: bool) -> str:
    """The line below the trace that explains it; ``name``: of the values, if there are any."""
    parts = []
    if name:
        meaning = ", the share of continuations that end safe" if name == CSR else ""
        scale = "from orange (0) over white (1/2) to blue (1)"
        parts.append(f"colour: {name}{meaning}, {scale}; grey: not measured")
    if has_draws:
        parts.append("click a sentence for the draws behind it")
    if not reveal:
        parts.append("text redacted")
    return "; ".join(parts)


def outcome_html(title: str, draws: Draws, reveal: bool = False) -> str:
    """Continuations with a heading, the unsafe ones first, as HTML text.

    Args:
        title: the heading.
        draws: label (None: not judged) and text of each.
        reveal: show the words.
    """
    body = f'<b>{html.escape(title)}</b><div class="d">{_drawn_rows(draws, reveal)}</div>'
    return f'<style>\n{_style_sheet()}</style><div class="ipo">{body}</div>'


def _unfolding(sentence: str, title: str, draws: Draws, reveal: bool) -> str:
    """A sentence that unfolds its continuations on a click."""
    labels = Counter(label or NOT_JUDGED for label, _ in draws)
    kinds = [label for label in (UNSAFE, SAFE, NOT_JUDGED) if labels[label]]
    counts = ", ".join(f"{labels[label]} {label}" for label in kinds)
    rows = _drawn_rows(draws, reveal)
    unfolded = f'<div class="d">{title}; draws: {counts}<br>{rows}</div>'
    return f"<details><summary>{sentence}</summary>{unfolded}</details>"


def _drawn_rows(draws: Draws, reveal: bool) -> str:
    """Continuations, the unsafe ones first."""
    rows = []
    for label, text in sorted(draws, key=lambda draw: (draw[0] != UNSAFE, draw[0] != SAFE)):
        chip = _chip(label or NOT_JUDGED, LABEL_COLOURS.get(label or "", NEUTRAL_COLOUR))
        rows.append(f"<div>{chip}{html.escape(shown(text, reveal))}</div>")
    return "".join(rows)


def _chip(word: str, colour: str) -> str:
    # Also inline: JupyterLab drops the style sheet of a notebook that it does not trust yet.
    style = f"background:{colour};color:#fff;padding:0 .4em;margin-right:.25em"
    return f'<span class="m" style="{style}">{html.escape(word)}</span>'


def _html_object(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)  # type: ignore[no-untyped-call]
