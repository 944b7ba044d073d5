"""Panels: each function draws prepared numbers on given Axes and returns the Axes.

A line through a point is its interval; a hollow diamond is a number that the paper reports.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ipo_lib.plots.style import (
    GROUPS,
    NEUTRAL_COLOUR,
    RATE_COLOUR,
    SAFE_COLOUR,
    SERIES,
    UNSAFE_COLOUR,
    Style,
    set_height,
)
from ipo_lib.stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
REPORTED = "paper (second-hand)"  # the legend's name for the paper's numbers
NAME_WIDTH = 34  # characters of a row's name in one line
ROW, TEXT_LINE, MARGINS = 0.2, 0.13, 0.75  # inches: a row, each further line of its name, the rest
DOT: Style = {"marker": "o", "markersize": 3.5, "linestyle": "none"}
THIN: Style = {"linewidth": 0.7}
PLACE, PLACE_LINES = "place", (":", "--", "-.")  # upright lines in a curve, and how they differ
SMALL_LEGEND: Style = {"ncols": 2, "handlelength": 1.2, "columnspacing": 0.8, "fontsize": 6}


def csr_curve(
    rows: Rows | pd.DataFrame,
    ax: Axes,
    *,
    colour: str = SAFE_COLOUR,
    label: str = "",
    marker: str = "o",
    min_draws: int = 1,
    thresholds: Sequence[float] = (),
    places: Mapping[str, int | None] | None = None,
) -> Axes:
    """The safety ratio S_i against the cut (Fig 5a), with its interval as a band.

    Args:
        rows: from ``csr.curve_rows`` or ``csr_table``: ``cut``, ``s``, ``low``, ``high`` and ``n``
            of each cut.
        ax, colour: where to draw, and the colour of line and band.
        label: the line's name in the legend; empty for none.
        marker: of each point; empty for a line only.
        min_draws: the line goes only through cuts with at least this many judged draws.
        thresholds: values of S to draw as thin lines, such as those of Eq. 2 and 3.
        places: by name a cut to mark with an upright line, such as that of the first cue; None: it
            is left out. A name has one kind of line in all curves of a panel, named in the legend.
    """
    if not isinstance(rows, Sequence):
        rows = rows.to_dict("records")
    cuts, low, high = _columns(rows, "cut", "low", "high")
    ax.fill_between(cuts, low, high, color=colour, alpha=0.15, linewidth=0)
    measured = [row for row in rows if row["n"] >= min_draws]
    style: Style = {"color": colour, "marker": marker, "markersize": 2.5}
    ax.plot(*_columns(measured, "cut", "s"), label=label or None, **style)
    for value in thresholds:
        ax.axhline(value, color=NEUTRAL_COLOUR, **THIN)
    for name, cut in (places or {}).items():
        if cut is not None:
            _mark_place(ax, name, cut, colour)
    ax.set(xlabel="response tokens kept", ylabel="continuations that end safe", ylim=(-0.03, 1.03))
    if ax.get_legend_handles_labels()[1]:
        legend_above(ax, x=0.5, ncols=2)
    return ax


def _mark_place(ax: Axes, name: str, cut: int, colour: str) -> None:
    """An upright line at ``cut``; the first one of a name enters the name into the legend."""
    kinds: dict[Any, Any] = {}  # the kind of line of every name
    for line in ax.lines:
        if line.get_gid() == PLACE:
            kinds[line.get_label()] = line.get_linestyle()
    if name not in kinds:
        kinds[name] = PLACE_LINES[len(kinds) % len(PLACE_LINES)]
        ax.plot([], [], color=RATE_COLOUR, linestyle=kinds[name], label=name, gid=PLACE, **THIN)
    ax.axvline(cut, color=colour, linestyle=kinds[name], **THIN)


def rates(
    rows: Sequence[tuple[str, Interval]],
    ax: Axes,
    *,
    unit: str,
    reported: Mapping[str, float] | None = None,
) -> Axes:
    """Named rates with their intervals, one below the other.

    Args:
        rows: (name, rate), from top to bottom.
        ax, unit: where to draw, and the label of the x axis.
        reported: the paper's numbers by name, in percent.
    """
    reported = reported or {}
    for y, (name, rate) in enumerate(rows):
        _draw_rate(ax, rate, y, RATE_COLOUR)
        if name in reported:
            _draw_reported(ax, reported[name], y)
    _label_rows(ax, [name for name, _ in rows], unit)
    if reported:
        legend_above(ax, handletextpad=0.1)
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
    """Several rates in each row, such as one model before and after training.

    Args:
        rows: (name, rates), from top to bottom; None for a rate that was not measured.
        ax, unit: where to draw, and the label of the x axis.
        names, colours: of the rates within a row, in their order.
        reported: by row name the paper's rates in percent, in the order of ``names``, or None.
    """
    step = 0.5 / max(len(names), 1)
    for place, (row_name, row_rates) in enumerate(rows):
        row_reported = (reported or {}).get(row_name, ())
        columns = itertools.zip_longest(row_rates, row_reported[: len(row_rates)])
        for index, ((rate, percent), colour) in enumerate(zip(columns, colours, strict=False)):
            y = place + (index - (len(names) - 1) / 2) * step
            if rate is not None:
                _draw_rate(ax, rate, y, colour)
            if percent is not None:
                _draw_reported(ax, percent, y)
    for name, colour in zip(names, colours, strict=False):  # for the legend
        ax.plot([], [], color=colour, label=name, **DOT)
    _label_rows(ax, [name for name, _ in rows], unit)
    legend_above(ax, ncols=2, handletextpad=0.1, columnspacing=0.8)
    return ax


def bars(
    rows: Sequence[Interval],
    ax: Axes,
    *,
    title: str,
    alike: Sequence[float] = (),
    reported: float | None = None,
) -> Axes:
    """The share of prompts by the number of safe traces in a group (Fig 4).

    Args:
        rows: share of prompts with 0, 1, 2, ... safe traces.
        ax, title: the panel and its title.
        alike: the expected shares if all prompts had the same rate.
        reported: the paper's share of prompts without a safe trace, in percent.
    """
    numbers = range(len(rows))
    heights, errors = _in_percent(rows)
    error_bars: Style = {"yerr": errors, "error_kw": {"elinewidth": 0.7}}
    ax.bar(numbers, heights, color=NEUTRAL_COLOUR, alpha=0.5, **error_bars)
    if alike:
        percents = [100 * share for share in alike]
        style: Style = {"color": RATE_COLOUR, "marker": ".", "markersize": 3}
        ax.plot(numbers, percents, label="if prompts were alike", **style)
    if reported is not None:
        _draw_reported(ax, 0, reported)
    ax.set(xlabel="safe traces in a group", ylabel="prompts (%)", xticks=list(numbers))
    ax.set_title(title, fontsize=8)
    return ax


def lines(
    series: Mapping[str, Sequence[tuple[float, Interval]]],
    ax: Axes,
    *,
    xlabel: str,
    ylabel: str,
    colours: Sequence[str] = SERIES,
    reported: Sequence[tuple[float, float]] = (),
) -> Axes:
    """Rates against a number, one line per series.

    Args:
        series: by name the points (x, rate).
        ax, xlabel, ylabel: where to draw, and the labels of the axes.
        colours: of the series, in their order.
        reported: the paper's points (x, percent).
    """
    for (name, points), colour in with_colours(series, colours):
        x, intervals = _columns(points, 0, 1)
        y, errors = _in_percent(intervals)
        style: Style = {"color": colour, "marker": "o", "markersize": 3, "elinewidth": 0.7}
        ax.errorbar(x, y, yerr=errors, label=name, **style)
    if reported:
        x, percents = _columns(reported, 0, 1)
        _draw_reported(ax, x, percents, "D--", **THIN)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(-3, 103))
    _shorten_thousands(ax)
    legend_above(ax, ncols=2, handlelength=1.5, columnspacing=0.8)
    return ax


def scatter(x: Sequence[float], y: Sequence[float], ax: Axes, *, xlabel: str, ylabel: str) -> Axes:
    """One point per trace (Fig 5b), and the diagonal; points that coincide look darker.

    Args:
        x, y: two numbers per trace, at least 0.
        ax, xlabel, ylabel: where to draw, and the labels of the axes.
    """
    top = max([*x, *y, 1])
    limits = (-0.03 * top, 1.05 * top)
    faint: Style = {"alpha": 0.5, "markersize": 4, "markeredgewidth": 0}
    ax.plot([0, top], [0, top], ":", color=NEUTRAL_COLOUR, **THIN)
    ax.plot(x, y, "o", color=UNSAFE_COLOUR, **faint)
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=limits, ylim=limits)
    return ax


def training(rows: Rows, ax: Axes, *, names: Mapping[str, str], unit: str) -> Axes:
    """Training metrics against the step.

    Args:
        rows: logged metrics, each row with its ``step``.
        ax, unit: where to draw, and the label of the y axis.
        names: by metric its name in the legend. ``chosen`` and ``rejected`` have colours of their
            own.
    """
    sides = {"chosen": SAFE_COLOUR, "rejected": UNSAFE_COLOUR}
    for metric, label in names.items():
        colour = sides.get(label, RATE_COLOUR)
        ax.plot(*_columns(rows, "step", metric), color=colour, marker=".", label=label)
    ax.set(xlabel="step", ylabel=unit)
    ax.locator_params(axis="x", integer=True)
    legend_above(ax, ncols=3)
    return ax


def divergence(
    series: Mapping[str, Sequence[tuple[int, float, float, float]]], ax: Axes, *, xlabel: str
) -> Axes:
    """KL from the base model in nats by token (Fig 7): (offset, mean, low, high) of each model."""
    for (name, points), colour in with_colours(series):
        offsets, means, low, high = _columns(points, *range(4))
        ax.fill_between(offsets, low, high, color=colour, alpha=0.12, linewidth=0)
        ax.plot(offsets, means, color=colour, label=name)
    ax.set(xlabel=xlabel, ylabel="KL from the base (nats)")
    return ax


def rewards(series: Mapping[str, Sequence[Sequence[tuple[float, float]]]], ax: Axes) -> Axes:
    """GRPO's mean reward: (tokens generated so far, reward) of each seed's steps.

    Dots are steps. The line is the mean of the seeds at the same step, over a tenth of the steps.
    """
    for (name, by_seed), colour in with_colours(series):
        faint: Style = {"color": colour, "alpha": 0.3, "markersize": 3, "markeredgewidth": 0}
        ax.plot(*_columns([*itertools.chain(*by_seed)], 0, 1), ".", **faint)
        rows = [*itertools.chain(*zip(*by_seed, strict=False))]  # by step, then by seed
        chunk = len(by_seed) * max(len(rows) // len(by_seed) // 10, 1)
        smooth = [_chunk_means(column, chunk) for column in _columns(rows, 0, 1)]
        ax.plot(*smooth, color=colour, label=name)
    ax.set(xlabel="tokens generated", ylabel="mean reward")
    _shorten_thousands(ax)
    if series:
        legend_above(ax, **SMALL_LEGEND)
    return ax


def _shorten_thousands(ax: Axes) -> None:
    """Write 60000 as 60k under a horizontal axis of large numbers, so that labels have room."""
    from matplotlib.ticker import EngFormatter

    if ax.get_xlim()[1] >= 10_000:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _columns(rows: Sequence[Any], *keys: str | int) -> Iterator[list[Any]]:
    """One list for each key, which is a name or a place in every row."""
    for key in keys:
        yield [row[key] for row in rows]


def with_colours(
    series: Mapping[str, Any], colours: Sequence[str] = SERIES
) -> Iterator[tuple[tuple[str, Any], str]]:
    """Every (name, values) with its colour; the colours repeat."""
    return zip(series.items(), itertools.cycle(colours), strict=False)


def _in_percent(rows: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """The rates in percent, and their error bars: how far they reach down and up."""
    values = [100 * rate.value for rate in rows]
    down = [100 * (rate.value - rate.low) for rate in rows]
    up = [100 * (rate.high - rate.value) for rate in rows]
    return values, [down, up]


def _chunk_means(values: Sequence[float], size: int) -> list[float]:
    """The mean of every ``size`` values in a row."""
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(chunk) / len(chunk) for chunk in chunks]


def percent(rate: Interval) -> Interval:
    """The same rate and interval in percent."""
    value, low, high = 100 * rate.value, 100 * rate.low, 100 * rate.high
    return Interval(value, low, high, rate.n, rate.method)


def _draw_rate(ax: Axes, rate: Interval, y: float, colour: str) -> None:
    if math.isnan(rate.value):
        ax.text(0, y, "not measured", color=colour, fontsize=6, va="center")
        return
    scaled = percent(rate)
    ax.plot([scaled.low, scaled.high], [y, y], color=colour)
    ax.plot(scaled.value, y, color=colour, **DOT)


def _draw_reported(ax: Axes, x: Any, y: Any, fmt: str = "D", **style: Any) -> None:
    """The paper's numbers as hollow diamonds, named once in the legend of a panel."""
    named = REPORTED in ax.get_legend_handles_labels()[1]
    diamond: Style = {"color": "black", "fillstyle": "none", "markersize": 4.5, **style}
    label = None if named else REPORTED
    ax.plot(x, y, fmt, label=label, **diamond)


def _label_rows(ax: Axes, names: Sequence[str], unit: str) -> None:
    """Names down the side, wrapped where they are long, and percent along the bottom.

    The panel gets as high as its names need.
    """
    bottom = max(len(names), 1) - 0.5
    ax.set(xlim=(-3, 103))
    ax.set_xlabel(unit, loc="right")  # so that a long label stays inside the figure
    ax.set(yticks=range(len(names)), ylim=(bottom, -0.5))
    labels = [textwrap.fill(name, NAME_WIDTH) for name in names]
    ax.set_yticklabels(labels)
    lines = max([label.count("\n") for label in labels], default=0)
    set_height(ax, len(labels) * (ROW + TEXT_LINE * lines) + MARGINS)


def legend_above(ax: Axes, x: float = 0.4, **options: Any) -> None:
    """A legend above the panel, its middle at ``x`` of the panel's width."""
    ax.legend(loc="lower center", bbox_to_anchor=(x, 1.0), **options)
