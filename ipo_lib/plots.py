"""Figures: tidy rows and Axes in, Axes out; a trace as coloured text; ``save`` with a JSON sidecar, byte for byte stable."""

from __future__ import annotations

import html
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipo_lib.records import BadInput, Rollout, Sentence
from ipo_lib.stats import Interval, format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
COLUMN = (3.4, 2.4)  # inches: one column of a two-column paper
SAFE_COLOUR, UNSAFE_COLOUR, NEUTRAL_COLOUR, AFTER_COLOUR = "#0072B2", "#D55E00", "#777777", "#009E73"
SERIES = (SAFE_COLOUR, UNSAFE_COLOUR, AFTER_COLOUR, "#CC79A7", "#E69F00")  # Okabe-Ito: safe for colour-blind readers
SHIFT = 0.16  # how far two points of one row stand apart
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7, "pdf.fonttype": 42,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
    "savefig.dpi": 200, "lines.linewidth": 1.2, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip
ORIGINS = ("calibrated", "emergent")
LOG2, LOG2_TOLERANCE = math.log(2), 1e-3  # the first DPO loss, before any step


def figure(columns: int = 1, rows: int = 1, width: float = 1.0) -> tuple[Figure, Any]:
    """An empty figure in the house style, ``width`` paper columns a panel, and its Axes (an array of several)."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="ticks", palette=list(SERIES), rc=STYLE)
    return plt.subplots(rows, columns, figsize=(COLUMN[0] * width * columns, COLUMN[1] * rows))


def csr_curve(rows: Rows, ax: Axes, *, colour: str = SAFE_COLOUR, label: str = "") -> Axes:
    """S_i against the cut (Fig 5a) from ``csr.curve`` rows, with the interval as a band."""
    cut, s, low, high = ([row[name] for row in rows if row["n"]] for name in ("cut", "s", "low", "high"))
    ax.fill_between(cut, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(cut, s, color=colour, marker="o", markersize=2.5, label=label)
    ax.set(xlabel="response tokens kept", ylabel="continuations that end safe", ylim=(-0.03, 1.03))
    ax.legend(loc="best")
    return ax


def rates(rows: Sequence[tuple[str, Interval]], ax: Axes, *, unit: str) -> Axes:
    """Named rates as points with their intervals, top to bottom in the given order."""
    for place, (_, rate) in enumerate(rows):
        ax.plot([100 * rate.low, 100 * rate.high], [place, place], color=SAFE_COLOUR)
        ax.plot(100 * rate.value, place, "o", color=SAFE_COLOUR, markersize=4)
    _rows(ax, [name for name, _ in rows], unit)
    return ax


def before_after(rows: Rows, ax: Axes, *, names: tuple[str, str] = ("before", "after")) -> Axes:
    """``evaluation.compare`` rows: before and after, one above the other, each with its interval."""
    sides = zip(("before", "after"), (-SHIFT, SHIFT), (NEUTRAL_COLOUR, AFTER_COLOUR), names, strict=True)
    for side, shift, colour, name in sides:
        for place, row in enumerate(rows):
            ax.plot([100 * row[f"{side} low"], 100 * row[f"{side} high"]], [place + shift] * 2, color=colour)
            ax.plot(100 * row[side], place + shift, "o", color=colour, markersize=3.5, label=name if not place else None)
    _rows(ax, [f"{row['set']}: {row['measure']}" for row in rows], "share of responses (%)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, handletextpad=0.1)
    return ax


def _rows(ax: Axes, names: Sequence[str], unit: str) -> None:
    """Names down the side, percent along the bottom."""
    ax.set(xlabel=unit, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(-3, 103))


def training(rows: Rows, ax: Axes, *, names: Mapping[str, str], unit: str) -> Axes:
    """Training metrics (column -> label) against the step."""
    for colour, (name, label) in zip(SERIES, names.items(), strict=False):
        ax.plot([row["step"] for row in rows], [row[name] for row in rows], color=colour, label=label)
    ax.set(xlabel="step", ylabel=unit)
    ax.legend(loc="best")
    return ax


def show(rollout: Rollout, spans: Sequence[Sentence], values: Sequence[float | None], *, marks: Mapping[int, str],
         reveal: bool = False) -> Any:  # fmt: skip
    """A trace in colours: each sentence tinted by its value (1 safe, 0 unsafe), ``marks`` in front. ``reveal``: legible."""
    from IPython.display import HTML

    pieces = []
    for span, value in zip(spans, values, strict=True):
        known = value is not None and not math.isnan(value)
        text = shown(rollout.text[span.char_start : span.char_end], reveal)
        mark = f"<b>[{html.escape(marks[span.index])}]</b> " if span.index in marks else ""
        title, colour = (f"S = {value:.2f}", tint(value or 0.0)) if known else ("not measured", "#eeeeee")
        pieces.append(f'<span title="{title}" style="background:{colour}">{mark}{html.escape(text)}</span>')
    return HTML(f'<div style="line-height:1.7;max-width:46em">{" ".join(pieces)}</div>')  # type: ignore[no-untyped-call]


def shown(text: str, reveal: bool) -> str:
    """``text``, with every letter and digit blacked out unless ``reveal``; its shape stays."""
    return text if reveal else "".join("█" if unicodedata.category(char)[0] in "LMN" else char for char in text)


def tint(value: float) -> str:
    """A CSS colour between unsafe (0) and safe (1)."""
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (UNSAFE_COLOUR, SAFE_COLOUR)]
    red, green, blue = (round((1 - value) * low + value * high) for low, high in zip(*ends, strict=True))
    return f"rgba({red},{green},{blue},0.30)"


def claim(sentence: str, value: Interval, *, origin: str) -> dict[str, Any]:
    """A computed claim: ``sentence`` with its ``{}`` filled by the value, interval and n; ``origin`` one of ORIGINS."""
    if origin not in ORIGINS:
        raise BadInput(f"claim origin {origin!r} is unknown; known: {', '.join(ORIGINS)}")
    number, interval = None if math.isnan(value.value) else round(value.value, 6), [round(value.low, 6), round(value.high, 6)]
    said = {"claim": sentence.format(format_interval(value)), "value": number, "interval": interval}
    return {**said, "n": value.n, "method": value.method, "origin": origin}


def save(fig: Figure, folder: Path, name: str, claims: Rows, *, profile: str, about: str, artifacts: Mapping[str, Any],
         tokens: int = 0) -> None:  # fmt: skip
    """Write ``name``.pdf, .png and .json; the same input gives the same bytes. ``about`` stands under the figure; ``tokens``:
    what its data cost to generate."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    fig.supxlabel(f"profile {profile}: {about}", fontsize=6, color=NEUTRAL_COLOUR, wrap=True)
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    sidecar = {"profile": profile, "about": about, "claims": list(claims), "tokens": tokens}
    sidecar["artifacts"] = dict(sorted(artifacts.items()))
    (folder / f"{name}.json").write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plt.close(fig)
