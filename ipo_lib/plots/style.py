"""How figures look: sizes and colours; to open an empty figure, and to write a finished one.

``figure`` opens an empty figure in the style of ``ipo.mplstyle``. ``save`` writes PDF and PNG, for
the same input the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]  # options of matplotlib
STYLE_FILE = Path(__file__).with_name("ipo.mplstyle")
WIDTH, HEIGHT = 3.4, 2.4  # inches of a panel: one column of a two-column paper
# One colour for one thing. Blue and vermilion are never used for anything but safe and unsafe.
SAFE_COLOUR = "#0072B2"
UNSAFE_COLOUR = "#D55E00"
NEUTRAL_COLOUR = "#777777"  # what a sentence or a model is compared with
RATE_COLOUR = "#222222"  # a rate that stands alone
GREEN, PINK, ORANGE, SKY_BLUE, PURPLE = "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B3294"
SERIES = (GREEN, PINK, ORANGE, SKY_BLUE, PURPLE, RATE_COLOUR)  # methods, settings, detectors
GROUPS = (NEUTRAL_COLOUR, GREEN, PINK, ORANGE)  # before, after stage 1, after stage 2
MEASURES = (RATE_COLOUR, SKY_BLUE, PURPLE)  # of traces, of answers, refusals


def figure(columns: int = 1, rows: int = 1, width: float = 1.0) -> tuple[Figure, Any]:
    """An empty figure and its Axes (one, or an array of several), ``width`` paper columns each."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    import seaborn as sns

    style = dict(mpl.rc_params_from_file(STYLE_FILE, use_default_template=False))
    sns.set_theme(style="ticks", palette=list(SERIES), rc=style)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH * width * columns, HEIGHT * rows))
    plt.close(fig)  # a notebook shows it only when ``save`` does
    return fig, axes


def set_height(ax: Axes, inches: float) -> None:
    """Make a panel's row of its figure at least so high, and leave the others as they are."""
    place = ax.get_subplotspec()
    if place is None:
        return
    grid, row = place.get_gridspec(), place.rowspan.start
    ratios: Any = grid.get_height_ratios()  # of heights to HEIGHT
    heights = [HEIGHT * float(ratio) for ratio in ratios]
    heights[row] = max(heights[row], inches)
    grid.set_height_ratios([height / HEIGHT for height in heights])
    whole: Any = ax.figure
    whole.set_figheight(sum(heights))


def save(fig: Figure, folder: Path | str, name: str, *, caption: str) -> None:
    """Write ``name``.pdf and ``name``.png with a caption below the figure.

    A notebook shows the written image, whatever backend matplotlib has there.

    Args:
        fig, caption: the figure, and the small text below it.
        folder, name: where to write, and the files' name without ending.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fig.supxlabel(caption, fontsize=6, color=NEUTRAL_COLOUR, wrap=True)
    no_dates: Style = dict.fromkeys(("CreationDate", "Producer", "Creator"))
    fig.savefig(folder / f"{name}.pdf", metadata=no_dates)
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    if _in_kernel():
        from IPython.display import Image, display

        display(Image(filename=str(folder / f"{name}.png")))  # type: ignore[no-untyped-call]


def _in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
