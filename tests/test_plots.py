"""Figures: the same input gives the same bytes, and every point and interval is drawn."""

from __future__ import annotations

import base64
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot

from ipo_lib import plots
from ipo_lib.stats import wilson

CURVE = [
    {"cut": 0, "s": 0.5, "low": 0.4, "high": 0.6, "n": 32},
    {"cut": 7, "s": math.nan, "low": 0.0, "high": 1.0, "n": 0},
    {"cut": 12, "s": 0.1, "low": 0.0, "high": 0.2, "n": 31},
]
ROWS = [
    (name, [wilson(11, 16), None, wilson(2, 16)])
    for name in ("direct: trace harm", "wrapped: trace harm")
]
STEPS = [{"step": step, "loss": 1.0 / step, "logps/chosen": -step} for step in range(1, 6)]


def draw(folder: Path) -> None:
    """Every kind of figure the library has, saved."""
    figure, axes = plots.figure(columns=2, rows=4)
    plots.csr_curve(CURVE, axes[0][0], label="unsafe trace")
    named_rates = [("none", wilson(0, 0)), ("trigger", wilson(3, 16))]
    plots.rates(named_rates, axes[0][1], unit="unsafe (%)", reported={"trigger": 60.0})
    names = ("before", "after stage 1", "after stage 2")
    reported = {"direct: trace harm": [69.0, None, 5.7]}
    plots.groups(ROWS, axes[1][0], names=names, unit="harmful (%)", reported=reported)
    metrics = {"loss": "loss", "logps/chosen": "chosen"}
    plots.training(STEPS, axes[1][1], names=metrics, unit="loss (nats)")
    shares = [wilson(3, 9), wilson(6, 9)]
    plots.bars(shares, axes[2][0], title="direct", alike=[0.5, 0.5], reported=36.2)
    series = {"a": [(0, wilson(9, 9)), (1, wilson(3, 9))]}
    points = [(0, 100.0), (1, 60.0)]
    plots.lines(series, axes[2][1], xlabel="x", ylabel="y", reported=points)
    plots.scatter([1, 2, 2], [1, 3, 3], axes[3][0], xlabel="x", ylabel="y")
    plots.save(figure, folder, "00-all", caption="profile tiny: A test.")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two", "two"):
        draw(tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(content(tmp_path / "one")) == ["00-all.pdf", "00-all.png"]
    code = "import sys, pathlib, test_plots; test_plots.draw(pathlib.Path(sys.argv[1]))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "three")], env=environment, check=True
    )
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_other_input_gives_other_bytes(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("two", 4)):
        figure, ax = plots.figure()
        plots.rates([("trigger", wilson(count, 16))], ax, unit="unsafe (%)")
        plots.save(figure, tmp_path / name, "f", caption="A test.")
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert all(one[name] != two[name] for name in ("f.pdf", "f.png"))


def test_axes_have_units_and_every_row_its_interval(tmp_path: Path) -> None:
    figure, ax = plots.figure()
    plots.rates([("a", wilson(1, 16)), ("b", wilson(3, 16))], ax, unit="unsafe (%)")
    assert ax.get_xlabel() == "unsafe (%)"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    intervals = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    for k in (1, 3):
        rate = wilson(k, 16)
        limits = pytest.approx((100 * rate.low, 100 * rate.high))
        assert any(interval == limits for interval in intervals)
    plots.save(figure, tmp_path, "f", caption="A test.")
    assert plots.csr_curve(CURVE, plots.figure()[1], label="x").get_xlabel()


def test_groups_draw_what_was_measured_and_the_paper_once_named() -> None:
    _, ax = plots.figure()
    reported = {ROWS[0][0]: [69.0, None, 5.7]}
    plots.groups(ROWS, ax, names=("before", "after"), unit="harmful (%)", reported=reported)
    single = [line for line in ax.lines if len(line.get_xdata()) == 1]
    points = [(line.get_marker(), line.get_xdata()[0]) for line in single]
    measured = sorted(x for marker, x in points if marker == "o")
    assert measured == pytest.approx([12.5, 12.5, 68.75, 68.75])
    assert [x for marker, x in points if marker == "D"] == [69.0, 5.7]
    assert ax.get_legend_handles_labels()[1].count(plots.REPORTED) == 1


def test_rewards_divergence_and_tradeoffs_draw_every_point() -> None:
    _, ax = plots.figure()
    steps = [(100.0 * step, step / 40) for step in range(1, 41)]
    later = [(tokens + 50.0, reward + 1) for tokens, reward in steps[:3]]  # of another seed
    plots.rewards({"I[z]": [steps], "I[y]": [steps[:2], later]}, ax)
    assert [len(line.get_xdata()) for line in ax.lines] == [40, 10, 5, 2]
    assert ax.lines[1].get_ydata()[0] == pytest.approx(sum(y for _, y in steps[:4]) / 4)
    assert ax.lines[3].get_xdata().tolist() == [125, 225]  # means of the same step
    assert ax.lines[3].get_ydata() == pytest.approx([1 / 40 + 0.5, 2 / 40 + 0.5])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens generated", "mean reward")
    _, ax = plots.figure()
    plots.divergence({"one": [(0, 0.1, 0.0, 0.3), (1, 0.2, 0.1, 0.4)]}, ax, xlabel="token")
    assert ax.lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert "nats" in ax.get_ylabel()
    _, ax = plots.figure()
    plots.tradeoff({"a": [wilson(1, 16), wilson(3, 16)]}, ax, xlabel="x (%)", ylabel="y (%)")
    point = (ax.lines[-1].get_xdata()[0], ax.lines[-1].get_ydata()[0])
    assert point == pytest.approx((6.25, 18.75))


OPENS = """
from pathlib import Path
from ipo_lib import plots
from ipo_lib.stats import wilson
figure, ax = plots.figure()
"""
SAVES = """
plots.rates([("a", wilson(3, 16))], ax, unit="unsafe (%)")
plots.save(figure, Path("out"), "ab-one", caption="A test.")
for name in ("ab-two", "ab-three"):
    figure, ax = plots.figure()
    plots.save(figure, Path("out"), name, caption="A test.")
"""


def shown_outputs(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What a cell shows besides printed text."""
    return [output for output in cell.outputs if output.output_type != "stream"]


@pytest.mark.parametrize("backend", ["agg", "module://matplotlib_inline.backend_inline"])
def test_a_notebook_shows_each_figure_once_where_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    cells = [nbformat.v4.new_code_cell(source) for source in (OPENS, SAVES)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    after_opening, after_saving = map(shown_outputs, notebook.cells)
    assert after_opening == []
    names = ("ab-one", "ab-two", "ab-three")
    files = [(tmp_path / "out" / f"{name}.png").read_bytes() for name in names]
    images = [base64.b64decode(output.data["image/png"]) for output in after_saving]
    assert images == files


def test_outside_a_kernel_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[object]()
    monkeypatch.setattr("IPython.display.display", lambda *each: shown.extend(each))
    draw(tmp_path)
    assert shown == []
    assert matplotlib.pyplot.get_fignums() == []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=1))
    draw(tmp_path)
    assert len(shown) == 1


def test_a_panel_grows_with_its_names_and_leaves_the_others_as_they_are() -> None:
    figure, (upper, lower) = plots.figure(rows=2)
    before = figure.get_figheight()
    rows = [
        (f"a name that fills more than one line of the side {at}", wilson(3, 16))
        for at in range(12)
    ]
    plots.rates(rows, lower, unit="unsafe (%)")
    assert figure.get_figheight() > before + 2
    figure.draw_without_rendering()
    heights = [ax.get_window_extent().height for ax in (upper, lower)]
    assert heights[1] > 1.5 * heights[0]
    labels = [label.get_window_extent() for label in lower.get_yticklabels()]
    assert all(label.y0 > below.y1 for label, below in itertools.pairwise(labels))


@pytest.mark.parametrize("most", [0.2, 80, 190_000, 500_000])
def test_the_labels_of_an_axis_do_not_overlap(most: float) -> None:
    figure, ax = plots.figure()
    points = [(most / 3, wilson(6, 10)), (most, wilson(1, 10))]
    plots.lines({"a": points}, ax, xlabel="tokens generated for training", ylabel="harm (%)")
    figure.canvas.draw()
    labels = [text for text in ax.get_xticklabels() if text.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) > 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_curve_shows_its_thresholds_and_places() -> None:
    rows = [{"cut": cut, "s": 0.5, "low": 0.3, "high": 0.7, "n": 8} for cut in (0, 10, 20)]
    _, ax = plots.figure()
    plots.csr_curve(rows, ax, thresholds=(0.9, 0.1), places={"cue": 10, "end": None})
    flat = [set(line.get_ydata()) for line in ax.lines]
    assert {0.9} in flat
    assert {0.1} in flat
    assert ax.get_legend_handles_labels()[1] == ["cue"]
    # A second curve in the panel: equal names share a kind of line and their entry.
    places = {"turn": 5, "cue": 15}
    plots.csr_curve(rows, ax, colour=plots.UNSAFE_COLOUR, label="unsafe", places=places)
    assert ax.get_legend_handles_labels()[1] == ["cue", "unsafe", "turn"]
    upright = {}
    for line in ax.lines:
        where = {*line.get_xdata()}
        if len(where) == 1:
            upright[where.pop()] = line.get_linestyle()
    assert upright[10] == upright[15] != upright[5]


def test_safe_and_unsafe_have_colours_that_nothing_else_has() -> None:
    others = {*plots.SERIES, *plots.MEASURES, plots.NEUTRAL_COLOUR, plots.RATE_COLOUR}
    assert not {plots.SAFE_COLOUR, plots.UNSAFE_COLOUR} & others
    _, ax = plots.figure()
    names = {"a": "chosen", "b": "rejected", "c": "margin"}
    plots.training([{"step": 1, "a": 1, "b": 2, "c": 3}], ax, names=names, unit="nats")
    colours = [line.get_color() for line in ax.lines]
    assert colours == [plots.SAFE_COLOUR, plots.UNSAFE_COLOUR, plots.RATE_COLOUR]


def test_dollar_signs_in_names_are_no_mathematics(tmp_path: Path) -> None:
    figure, ax = plots.figure()
    plots.rates([("costs $5 and $x_{ more$", wilson(1, 4))], ax, unit="share (%)")
    plots.save(figure, tmp_path, "dollars", caption="a $ in $\\frac{ a caption")
    assert (tmp_path / "dollars.png").stat().st_size > 1000


def test_a_method_that_is_warned_of_is_drawn_in_the_colour_of_harm_with_a_ring() -> None:
    figure, ax = plots.figure()
    points = {name: (wilson(3, 10), wilson(1, 10)) for name in ("honest", "hiding")}
    plots.tradeoff(points, ax, xlabel="x", ylabel="y", warned=["hiding"])
    colours = {line.get_label(): line.get_color() for line in ax.lines}
    assert colours["hiding"] == plots.UNSAFE_COLOUR != colours["honest"]
    rings = [line for line in ax.lines if line.get_markersize() == 9]
    assert [line.get_color() for line in rings] == [plots.UNSAFE_COLOUR]
    figure.clear()
