"""Figures: tidy rows and Axes in, Axes out; a trace as coloured text; ``save`` with a JSON sidecar, byte for byte stable."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipo_lib.records import BadInput, Rollout, Sentence
from ipo_lib.stats import Interval, format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = (3.4, 2.4)  # inches: one column of a two-column paper
SAFE_COLOUR, UNSAFE_COLOUR, NEUTRAL_COLOUR, BEFORE_COLOUR, AFTER_COLOUR = "#0072B2", "#D55E00", "#999999", "#999999", "#009E73"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: safe for colour-blind readers
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
    "pdf.fonttype": 42, "savefig.dpi": 200, "lines.linewidth": 1.2, "axes.linewidth": 0.6,
}  # fmt: skip
ORIGINS = ("calibrated", "emergent")
LOG2, LOG2_TOLERANCE = math.log(2), 1e-3  # the first DPO loss, before any step


def figure(columns: int = 1, rows: int = 1, width: float = 1.0) -> tuple[Figure, Any]:
    """An empty figure of ``width`` columns in the house style, and its Axes (an array when there are several)."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="ticks", palette=list(SERIES), rc=STYLE)
    return plt.subplots(rows, columns, figsize=(COLUMN[0] * width * columns, COLUMN[1] * rows))


def csr_curve(rows: Sequence[Mapping[str, Any]], ax: Axes, *, colour: str = SAFE_COLOUR, label: str = "") -> Axes:
    """S_i against the cut (Fig 5a) from ``csr.curve`` rows, with the interval as a band."""
    known = [row for row in rows if row["n"]]
    cuts = [row["cut"] for row in known]
    ax.fill_between(cuts, [row["low"] for row in known], [row["high"] for row in known], color=colour, alpha=0.18, linewidth=0)
    ax.plot(cuts, [row["s"] for row in known], color=colour, marker="o", markersize=2.5)
    if label and cuts:
        ax.annotate(label, (cuts[-1], known[-1]["s"]), xytext=(4, 0), textcoords="offset points", color=colour, va="center", fontsize=7)
    ax.set(xlabel="response tokens kept", ylabel="continuations that end safe", ylim=(-0.03, 1.03))
    return ax


def rates(rows: Sequence[tuple[str, Interval]], ax: Axes, *, unit: str = "harmful traces (%)", colour: str = SAFE_COLOUR) -> Axes:
    """Named rates as points with their intervals, top to bottom in the given order."""
    names = [name for name, _ in rows]
    for place, (_, rate) in enumerate(rows):
        if not math.isnan(rate.value):
            ax.plot([100 * rate.low, 100 * rate.high], [place, place], color=colour)
            ax.plot(100 * rate.value, place, "o", color=colour, markersize=4)
    ax.set(xlabel=unit, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(-3, 103))
    return ax


def before_after(rows: Sequence[Mapping[str, Any]], ax: Axes, *, names: tuple[str, str] = ("before", "after")) -> Axes:
    """``evaluation.compare`` rows: before and after side by side; the interval drawn is that of the after rate."""
    for place, row in enumerate(rows):
        values = [100 * row["before"], 100 * row["after"]]
        ax.plot(values, [place, place], color=NEUTRAL_COLOUR, linewidth=0.8, zorder=1)
        ax.plot([100 * row["after low"], 100 * row["after high"]], [place, place], color=AFTER_COLOUR, linewidth=2.5, alpha=0.4)
        for value, colour, name in zip(values, (BEFORE_COLOUR, AFTER_COLOUR), names, strict=True):
            ax.plot(value, place, "o", color=colour, markersize=4.5, label=name if place == 0 else None, zorder=2)
    labels = [f"{row['set']}: {row['measure']}" for row in rows]
    ax.set(xlabel="share of responses (%)", yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5), xlim=(-3, 103))
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.16), ncols=2, handletextpad=0.1)
    return ax


def training(rows: Sequence[Mapping[str, float]], ax: Axes, *, names: Sequence[str], unit: str) -> Axes:
    """Training metrics against the step, each labelled at its end."""
    for colour, name in zip(SERIES, names, strict=False):
        found = [(row["step"], row[name]) for row in rows if name in row]
        if found:
            ax.plot(*zip(*found, strict=True), color=colour)
            ax.annotate(name, found[-1], xytext=(3, 0), textcoords="offset points", color=colour, fontsize=6, va="center")
    ax.set(xlabel="step", ylabel=unit)
    ax.margins(x=0.28)
    return ax


def show(rollout: Rollout, spans: Sequence[Sentence], values: Sequence[float | None], *, marks: Mapping[int, str] | None = None,
         reveal: bool = False) -> Any:  # fmt: skip
    """A trace as coloured text: each sentence tinted by its value (1 safe, 0 unsafe, None grey), ``marks`` named in front.

    Words are blacked out unless ``reveal``. Returns IPython HTML.
    """
    from IPython.display import HTML

    pieces = []
    for span, value in zip(spans, values, strict=True):
        text = rollout.text[span.char_start : span.char_end]
        shown = html.escape(text if reveal else redact(text))
        mark = f"<b>[{html.escape(marks[span.index])}]</b> " if marks and span.index in marks else ""
        title = "not measured" if value is None or math.isnan(value) else f"S = {value:.2f}"
        pieces.append(f'<span title="{title}" style="background:{tint(value)}">{mark}{shown}</span>')
    return HTML(f'<div style="line-height:1.7;max-width:46em">{" ".join(pieces)}</div>')


def redact(text: str) -> str:
    """``text`` with every letter and digit blacked out; its shape stays."""
    return "".join("█" if char.isalnum() else char for char in text)


def tint(value: float | None) -> str:
    """A CSS colour between unsafe (0) and safe (1)."""
    if value is None or math.isnan(value):
        return "#eeeeee"
    ends = [tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) for colour in (UNSAFE_COLOUR, SAFE_COLOUR)]
    mix = [round((1 - value) * low + value * high) for low, high in zip(*ends, strict=True)]
    return f"rgba({mix[0]},{mix[1]},{mix[2]},0.30)"


def claim(sentence: str, value: Interval, *, origin: str, percent: bool = True) -> dict[str, Any]:
    """A computed claim: ``sentence`` with ``{}`` filled by the value, its interval and n. ``origin`` is honest about calibration."""
    if origin not in ORIGINS:
        raise BadInput(f"claim origin {origin!r} is unknown; known: {', '.join(ORIGINS)}")
    number = None if math.isnan(value.value) else round(value.value, 6)
    return {"claim": sentence.format(format_interval(value, percent)), "value": number, "interval": [round(value.low, 6), round(value.high, 6)],
            "n": value.n, "method": value.method, "origin": origin}  # fmt: skip


def save(fig: Figure, folder: Path, name: str, claims: Sequence[Mapping[str, Any]], *, profile: str, artifacts: Mapping[str, Any]) -> None:
    """Write ``name``.pdf, .png and .json into ``folder``; the same input gives the same bytes."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    sidecar = {"profile": profile, "claims": list(claims), "artifacts": dict(sorted(artifacts.items()))}
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    (folder / f"{name}.json").write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plt.close(fig)
