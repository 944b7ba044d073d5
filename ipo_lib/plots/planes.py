"""Panels in which both axes are measured: cost against quality, one rate against another."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ipo_lib.plots.panels import SMALL_LEGEND, THIN, legend_above, percent, with_colours
from ipo_lib.plots.style import NEUTRAL_COLOUR, SERIES, UNSAFE_COLOUR, Style
from ipo_lib.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def frontier(
    series: Mapping[str, Mapping[str, tuple[Interval, Interval]]],
    ax: Axes,
    *,
    xlabel: str,
    ylabel: str,
) -> Axes:
    """Cost against quality: a marker for each series, a colour for each name within it.

    Args:
        series: by series and name the point (x, rate), both with intervals.
        ax, xlabel, ylabel: where to draw, and the labels; x is logarithmic, y in percent.
    """
    names = list(dict.fromkeys(itertools.chain.from_iterable(series.values())))
    palette = itertools.cycle((NEUTRAL_COLOUR, *SERIES))
    colours = dict(zip(names, palette, strict=False))
    for marker, (label, points) in zip("osD^v", series.items(), strict=False):
        for name, (x, y) in points.items():
            _draw_cross(ax, x, percent(y), marker, colours[name])
        hollow: Style = {"color": NEUTRAL_COLOUR, "fillstyle": "none", "markersize": 4}
        ax.plot([], [], marker, label=label, **hollow)
    for name in names:
        ax.plot([], [], "-", color=colours[name], linewidth=3, label=name)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_minor_formatter("")  # no mathtext: a label may hold a dollar sign
    legend_above(ax, **SMALL_LEGEND)
    return ax


def tradeoff(
    points: Mapping[str, Sequence[Interval]],
    ax: Axes,
    *,
    xlabel: str,
    ylabel: str,
    warned: Collection[str] = (),
) -> Axes:
    """Two rates against each other, one named point per model.

    Args:
        points: by name the two rates (x, y).
        ax, xlabel, ylabel: where to draw, and the labels of the axes, in percent.
        warned: names whose points are drawn in the colour of what is unsafe, with a ring.
    """
    markers = itertools.cycle("osD^v<>")
    for ((name, (x, y)), usual), marker in zip(with_colours(points), markers, strict=False):
        colour = UNSAFE_COLOUR if name in warned else usual
        if name in warned:
            ring: Style = {"color": colour, "fillstyle": "none", "markersize": 9}
            ax.plot(100 * x.value, 100 * y.value, "o", **ring)
        _draw_cross(ax, percent(x), percent(y), marker, colour, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if points:
        legend_above(ax, **SMALL_LEGEND)
    return ax


def _draw_cross(ax: Axes, x: Interval, y: Interval, fmt: str, colour: str, **more: Any) -> None:
    """A point with a horizontal and a vertical interval."""
    ax.plot([x.low, x.high], [y.value, y.value], color=colour, **THIN)
    ax.plot([x.value, x.value], [y.low, y.high], color=colour, **THIN)
    ax.plot(x.value, y.value, fmt, color=colour, markersize=4, **more)
