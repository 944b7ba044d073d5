"""Figures: tidy rows and Axes in, Axes out; claims with their interval and n; ``save`` with a JSON sidecar, the same bytes."""

from __future__ import annotations

import itertools
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipo_lib import stats
from ipo_lib.engines.progress import in_kernel
from ipo_lib.records import BadInput
from ipo_lib.stats import Interval, format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
COLUMN = (3.4, 2.4)  # inches: one column of a two-column paper
SAFE_COLOUR, UNSAFE_COLOUR, NEUTRAL_COLOUR, AFTER_COLOUR = (
    "#0072B2",
    "#D55E00",
    "#777777",
    "#009E73",
)
SERIES = (
    SAFE_COLOUR,
    UNSAFE_COLOUR,
    AFTER_COLOUR,
    "#CC79A7",
    "#E69F00",
)  # Okabe-Ito: safe for colour-blind readers
GROUPS = (
    NEUTRAL_COLOUR,
    AFTER_COLOUR,
    "#CC79A7",
    SAFE_COLOUR,
)  # before, after stage 1, after stage 2
REPORTED = "paper (second-hand)"
LABEL = 34  # characters of a row's name before it goes on in a second line
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "lines.linewidth": 1.2,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
OF_TRACES = re.compile(r"\btraces?\b|\bcues?\b|<|\bKL\b|\bturn", re.I)
ORIGINS = ("calibrated", "emergent")
BUILT = " The world was built or fitted for this."
LOG2, LOG2_TOLERANCE = math.log(2), 1e-3  # the first DPO loss, before any step


def figure(columns: int = 1, rows: int = 1, width: float = 1.0) -> tuple[Figure, Any]:
    """An empty figure in the house style, ``width`` paper columns a panel, and its Axes (an array of several). A notebook does
    not show it before ``save`` does: pyplot has already closed it."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="ticks", palette=list(SERIES), rc=STYLE)
    fig, axes = plt.subplots(rows, columns, figsize=(COLUMN[0] * width * columns, COLUMN[1] * rows))
    plt.close(fig)
    return fig, axes


def csr_curve(
    rows: Rows,
    ax: Axes,
    *,
    colour: str = SAFE_COLOUR,
    label: str = "",
    marker: str = "o",
    least: int = 1,
) -> Axes:
    """S_i against the cut (Fig 5a) from ``csr.curve`` rows, with the interval as a band. A whole curve goes without ``marker``,
    its line only through points of at least ``least`` draws."""
    cut, low, high = ([row[name] for row in rows] for name in ("cut", "low", "high"))
    ax.fill_between(cut, low, high, color=colour, alpha=0.15, linewidth=0)
    cut, s = ([row[name] for row in rows if row["n"] >= least] for name in ("cut", "s"))
    ax.plot(cut, s, color=colour, marker=marker, markersize=2.5, label=label or None)
    ax.set(xlabel="response tokens kept", ylabel="continuations that end safe", ylim=(-0.03, 1.03))
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def rates(
    rows: Sequence[tuple[str, Interval]],
    ax: Axes,
    *,
    unit: str,
    reported: Mapping[str, float] | None = None,
) -> Axes:
    """Named rates as points with their intervals, top to bottom in the given order; ``reported``: the paper's, in percent."""
    for place, (name, rate) in enumerate(rows):
        _point(ax, rate, place, SAFE_COLOUR)
        if reported and name in reported:
            _reported(ax, reported[name], place)
    _rows(ax, [name for name, _ in rows], unit)
    if reported:
        ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), handletextpad=0.1)
    return ax


def groups(
    rows: Sequence[tuple[str, Sequence[Interval | None]]],
    ax: Axes,
    *,
    names: Sequence[str],
    unit: str,
    colours: Sequence[str] = GROUPS,
    reported: Mapping[str, Sequence[float | None]] | None = None,
) -> Axes:
    """Rows of several rates, one above the other in the order of ``names``; None where one was not measured. ``reported``: the
    paper's rates of a row, in percent, in the same order."""
    step = 0.5 / max(len(names), 1)
    for place, (label, sides) in enumerate(rows):
        for at, (rate, colour) in enumerate(zip(sides, colours, strict=False)):
            y = place + (at - (len(names) - 1) / 2) * step
            if rate is not None:
                _point(ax, rate, y, colour)
            if (said := (reported or {}).get(label, ())[at : at + 1]) and said[0] is not None:
                _reported(ax, said[0], y)
    for name, colour in zip(names, colours, strict=False):
        ax.plot([], [], "o", color=colour, markersize=3.5, label=name)
    _rows(ax, [label for label, _ in rows], unit)
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, handletextpad=0.1, columnspacing=0.8
    )
    return ax


def _point(ax: Axes, rate: Interval, y: float, colour: str) -> None:
    if math.isnan(rate.value):
        ax.text(0, y, "not measured", color=colour, fontsize=6, va="center")
        return
    ax.plot([100 * rate.low, 100 * rate.high], [y, y], color=colour)
    ax.plot(100 * rate.value, y, "o", color=colour, markersize=3.5)


def _reported(ax: Axes, percent: float, y: float) -> None:
    """The paper's number as a hollow diamond, named once a panel."""
    named = REPORTED in ax.get_legend_handles_labels()[1]
    ax.plot(
        percent,
        y,
        "D",
        color="black",
        fillstyle="none",
        markersize=4.5,
        label=None if named else REPORTED,
    )


def _rows(ax: Axes, names: Sequence[str], unit: str) -> None:
    """Names down the side, percent along the bottom."""
    ax.set(
        xlabel=unit, yticks=range(len(names)), ylim=(max(len(names), 1) - 0.5, -0.5), xlim=(-3, 103)
    )
    lines = [textwrap.fill(name, LABEL) for name in names]
    ax.set_yticklabels(lines, fontsize=6 if any("\n" in line for line in lines) else None)


def bars(
    rows: Sequence[Interval],
    ax: Axes,
    *,
    title: str,
    alike: Sequence[float] = (),
    reported: float | None = None,
) -> Axes:
    """Fig 4: the share of prompts by how many of a group are safe; ``alike``: the shares if all prompts had one rate."""
    at = range(len(rows))
    gaps = [[100 * (r.value - r.low) for r in rows], [100 * (r.high - r.value) for r in rows]]
    ax.bar(
        at,
        [100 * r.value for r in rows],
        yerr=gaps,
        color=SAFE_COLOUR,
        alpha=0.5,
        error_kw={"elinewidth": 0.7},
    )
    if alike:
        ax.plot(
            at,
            [100 * x for x in alike],
            color=NEUTRAL_COLOUR,
            marker=".",
            markersize=3,
            label="if prompts were alike",
        )
    if reported is not None:
        ax.plot(0, reported, "D", color="black", fillstyle="none", markersize=4.5, label=REPORTED)
    ax.set(xlabel="safe traces in a group", ylabel="prompts (%)", xticks=list(at))
    ax.set_title(title, fontsize=8)
    return ax


def lines(
    series: Mapping[str, Sequence[tuple[float, Interval]]],
    ax: Axes,
    *,
    xlabel: str,
    ylabel: str,
    reported: Sequence[tuple[float, float]] = (),
) -> Axes:
    """Named rates against a number, each point with its interval; ``reported``: the paper's points, in percent."""
    for colour, (name, rows) in zip(itertools.cycle(SERIES), series.items(), strict=False):
        x, y = [x for x, _ in rows], [100 * rate.value for _, rate in rows]
        gaps = [
            [100 * (r.value - r.low) for _, r in rows],
            [100 * (r.high - r.value) for _, r in rows],
        ]
        ax.errorbar(
            x, y, yerr=gaps, color=colour, marker="o", markersize=3, elinewidth=0.7, label=name
        )
    if reported:
        x, y = [x for x, _ in reported], [y for _, y in reported]
        ax.plot(
            x,
            y,
            "D--",
            color="black",
            fillstyle="none",
            markersize=4.5,
            linewidth=0.7,
            label=REPORTED,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(-3, 103))
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, handlelength=1.5, columnspacing=0.8
    )
    return ax


def scatter(x: Sequence[float], y: Sequence[float], ax: Axes, *, xlabel: str, ylabel: str) -> Axes:
    """Fig 5b: one point a trace, and the diagonal; equal points are drawn darker."""
    top = max([*x, *y, 1])
    ax.plot([0, top], [0, top], color=NEUTRAL_COLOUR, linewidth=0.7, linestyle=":")
    ax.plot(x, y, "o", color=UNSAFE_COLOUR, alpha=0.5, markersize=4, markeredgewidth=0)
    ax.set(
        xlabel=xlabel, ylabel=ylabel, xlim=(-0.03 * top, 1.05 * top), ylim=(-0.03 * top, 1.05 * top)
    )
    return ax


def frontier(
    series: Mapping[str, Mapping[str, tuple[Interval, Interval]]],
    ax: Axes,
    *,
    xlabel: str,
    ylabel: str,
) -> Axes:
    """Named points (x, y), each with both intervals, over a logarithmic x; one marker a series, one colour a name; y in
    percent."""
    names = list(dict.fromkeys(name for points in series.values() for name in points))
    colours = dict(
        zip(names, itertools.cycle((NEUTRAL_COLOUR, *SERIES, "#56B4E9", "black")), strict=False)
    )
    for marker, (label, points) in zip("osD^v", series.items(), strict=False):
        for name, (x, y) in points.items():
            ax.plot([x.low, x.high], [100 * y.value] * 2, color=colours[name], linewidth=0.7)
            ax.plot([x.value] * 2, [100 * y.low, 100 * y.high], color=colours[name], linewidth=0.7)
            ax.plot(x.value, 100 * y.value, marker, color=colours[name], markersize=4)
        ax.plot([], [], marker, color=NEUTRAL_COLOUR, fillstyle="none", markersize=4, label=label)
    for name in names:
        ax.plot([], [], "-", color=colours[name], linewidth=3, label=name)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        ncols=2,
        handlelength=1.2,
        columnspacing=0.8,
        fontsize=6,
    )
    return ax


def training(rows: Rows, ax: Axes, *, names: Mapping[str, str], unit: str) -> Axes:
    """Training metrics (column -> label) against the step."""
    for colour, (name, label) in zip(SERIES, names.items(), strict=False):
        ax.plot(
            [row["step"] for row in rows],
            [row[name] for row in rows],
            color=colour,
            marker=".",
            label=label,
        )
    ax.set(xlabel="step", ylabel=unit)
    ax.legend(loc="best")
    return ax


def tradeoff(
    points: Mapping[str, Sequence[Interval]], ax: Axes, *, xlabel: str, ylabel: str
) -> Axes:
    """Named points of two rates (x, y), each with its interval, in percent."""
    for colour, marker, (name, (x, y)) in zip(
        itertools.cycle(SERIES), itertools.cycle("osD^v<>"), points.items(), strict=False
    ):
        ax.plot([100 * x.low, 100 * x.high], [100 * y.value] * 2, color=colour, linewidth=0.7)
        ax.plot([100 * x.value] * 2, [100 * y.low, 100 * y.high], color=colour, linewidth=0.7)
        ax.plot(100 * x.value, 100 * y.value, marker, color=colour, markersize=4, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if points:
        ax.legend(
            loc="lower center",
            bbox_to_anchor=(0.4, 1.0),
            ncols=2,
            handlelength=1.2,
            columnspacing=0.8,
            fontsize=6,
        )
    return ax


def divergence(
    series: Mapping[str, Sequence[tuple[int, float, float, float]]], ax: Axes, *, xlabel: str
) -> Axes:
    """KL in nats by token (Fig 7): (offset, mean, low, high) of each named model, the interval as a band."""
    for colour, (name, points) in zip(
        itertools.cycle((*SERIES, "#56B4E9", "black")), series.items(), strict=False
    ):
        x, y, low, high = ([point[at] for point in points] for at in range(4))
        ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        ax.plot(x, y, color=colour, label=name)
    ax.set(xlabel=xlabel, ylabel="KL from the base (nats)")
    return ax


def rewards(series: Mapping[str, Sequence[tuple[float, float]]], ax: Axes) -> Axes:
    """GRPO's mean reward a step against the tokens generated so far, a line through the means of tenths."""
    for colour, (name, steps) in zip(itertools.cycle(SERIES), series.items(), strict=False):
        x, y = ([step[side] for step in steps] for side in (0, 1))
        ax.plot(x, y, ".", color=colour, alpha=0.3, markersize=3, markeredgewidth=0)
        size = max(len(steps) // 10, 1)
        parts = [steps[at : at + size] for at in range(0, len(steps), size)]
        means = [
            [sum(step[side] for step in part) / len(part) for part in parts] for side in (0, 1)
        ]
        ax.plot(*means, color=colour, label=name)
    ax.set(xlabel="tokens generated", ylabel="mean reward")
    if series:
        ax.legend(
            loc="lower center",
            bbox_to_anchor=(0.4, 1.0),
            ncols=2,
            handlelength=1.2,
            columnspacing=0.8,
            fontsize=6,
        )
    return ax


def claim(
    sentence: str,
    value: Interval,
    *,
    origin: str,
    above: bool = True,
    than: float = 0.0,
    margin: float | None = None,
    verdict: str = "",
    percent: bool = True,
    paper: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A claim that a number can hold up or refute; its sentence ends in what it comes to.

    Args:
        sentence: with ``{}`` where the number, its interval and n belong.
        value: the number.
        origin: calibrated (the world was built or fitted to show it: not a finding) or emergent.
        above: the claim says that the number lies above ``than``; False: below.
        than: what the number is compared with.
        margin: the claim says instead that there is no difference, up to this much.
        verdict: what the claim comes to where a rule of its own decides (``results.verdicts``).
        percent: whether the number is printed as percent.
        paper: what ``paper.reported`` found, said beside it.
    """
    said = verdict or (
        stats.verdict(value, above, than) if margin is None else stats.no_difference(value, margin)
    )
    found = estimate(sentence.rstrip("."), value, origin=origin, percent=percent, paper=paper)
    built = f" ({BUILT.strip().rstrip('.').lower()})" if origin == ORIGINS[0] else ""
    text = found["claim"].removesuffix(BUILT) + f"{built}: {said}."
    return found | {"claim": text, "verdict": said}


def estimate(
    sentence: str,
    value: Interval,
    *,
    origin: str,
    percent: bool = True,
    paper: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A measured number that claims nothing; arguments as in ``claim``."""
    if origin not in ORIGINS:
        raise BadInput(f"claim origin {origin!r} is unknown; known: {', '.join(ORIGINS)}")
    number, interval = (
        None if math.isnan(value.value) else round(value.value, 6),
        [round(value.low, 6), round(value.high, 6)],
    )
    text = sentence.format(format_interval(value, percent)) + BUILT * (origin == ORIGINS[0])
    said = {
        "claim": text,
        "value": number,
        "interval": interval,
        "n": value.n,
        "method": value.method,
        "origin": origin,
    }
    return (
        said
        | {"verdict": None}
        | ({"paper": {**paper, "as": "reported second-hand"}} if paper else {})
    )


def withheld(claims: Rows, profile: str, closed: Interval) -> list[Mapping[str, Any]]:
    """The claims of a model that closes less than half of its traces: none that speaks of traces, and one that says so."""
    said = f"Profile {profile}: traces that were closed: {{}}. Under half: {{held}} claims about traces are withheld."
    kept = [one for one in claims if not OF_TRACES.search(one["claim"])]
    return [
        *kept,
        estimate(said.replace("{held}", str(len(claims) - len(kept))), closed, origin=ORIGINS[1]),
    ]


def save(
    fig: Figure,
    folder: Path,
    name: str,
    claims: Rows,
    *,
    profile: str,
    about: str,
    artifacts: Mapping[str, Any],
    tokens: int = 0,
) -> None:
    """Write ``name``.pdf, .png and .json; the same input gives the same bytes. ``about`` stands under the figure; ``tokens``:
    what its data cost to generate. In a notebook the written image is shown, whatever backend matplotlib has there."""
    folder.mkdir(parents=True, exist_ok=True)
    fig.supxlabel(f"profile {profile}: {about}", fontsize=6, color=NEUTRAL_COLOUR, wrap=True)
    fig.savefig(
        folder / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None}
    )
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    sidecar = {"profile": profile, "about": about, "claims": list(claims), "tokens": tokens}
    sidecar["artifacts"] = dict(sorted(artifacts.items()))
    (folder / f"{name}.json").write_text(
        json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if in_kernel():
        from IPython.display import Image, display

        display(Image(filename=str(folder / f"{name}.png")))  # type: ignore[no-untyped-call]
