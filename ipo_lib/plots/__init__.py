"""Figures: ``figure`` opens one, ``panels`` and ``planes`` draw on its Axes, ``save`` writes it."""

from ipo_lib.plots.panels import (
    REPORTED,
    bars,
    csr_curve,
    divergence,
    groups,
    lines,
    rates,
    rewards,
    scatter,
    training,
)
from ipo_lib.plots.planes import frontier, tradeoff
from ipo_lib.plots.style import (
    MEASURES,
    NEUTRAL_COLOUR,
    RATE_COLOUR,
    SAFE_COLOUR,
    SERIES,
    UNSAFE_COLOUR,
    figure,
    save,
)

__all__ = [
    "MEASURES",
    "NEUTRAL_COLOUR",
    "RATE_COLOUR",
    "REPORTED",
    "SAFE_COLOUR",
    "SERIES",
    "UNSAFE_COLOUR",
    "bars",
    "csr_curve",
    "divergence",
    "figure",
    "frontier",
    "groups",
    "lines",
    "rates",
    "rewards",
    "save",
    "scatter",
    "tradeoff",
    "training",
]
