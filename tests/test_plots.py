"""Figures are the same bytes on the same input, say what they show, and hide what must not be read."""

from __future__ import annotations

import base64
import json
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
from ipo_lib.records import BadInput
from ipo_lib.stats import HOLDS, OTHER_WAY, UNDECIDED, Interval, pooled_rate, wilson

CURVE = [
    {"cut": 0, "s": 0.5, "low": 0.4, "high": 0.6, "n": 32},
    {"cut": 7, "s": math.nan, "low": 0.0, "high": 1.0, "n": 0},
    {"cut": 12, "s": 0.1, "low": 0.0, "high": 0.2, "n": 31},
]
ROWS = [
    (name, [wilson(11, 16), None, wilson(2, 16)])
    for name in ("direct: trace harm", "wrapped: trace harm")
]
STEPS = [{"step": at, "loss": 1.0 / at, "logps/chosen": -at} for at in range(1, 6)]


def draw(folder: Path) -> None:
    """Every kind of figure the library has, saved."""
    figure, axes = plots.figure(columns=2, rows=4)
    plots.csr_curve(CURVE, axes[0][0], label="unsafe trace")
    plots.rates(
        [("none", wilson(0, 0)), ("trigger", wilson(3, 16))],
        axes[0][1],
        unit="unsafe (%)",
        reported={"trigger": 60.0},
    )
    names = ("before", "after stage 1", "after stage 2")
    plots.groups(
        ROWS,
        axes[1][0],
        names=names,
        unit="harmful (%)",
        reported={"direct: trace harm": [69.0, None, 5.7]},
    )
    plots.training(
        STEPS, axes[1][1], names={"loss": "loss", "logps/chosen": "chosen"}, unit="loss (nats)"
    )
    plots.bars(
        [wilson(3, 9), wilson(6, 9)], axes[2][0], title="direct", alike=[0.5, 0.5], reported=36.2
    )
    plots.lines(
        {"a": [(0, wilson(9, 9)), (1, wilson(3, 9))]},
        axes[2][1],
        xlabel="x",
        ylabel="y",
        reported=[(0, 100.0), (1, 60.0)],
    )
    plots.scatter([1, 2, 2], [1, 3, 3], axes[3][0], xlabel="x", ylabel="y")
    claims = [plots.claim("Harm: {}.", pooled_rate([(1, 4), (3, 4)]), origin="emergent")]
    plots.save(
        figure,
        folder,
        "00-all",
        claims,
        profile="tiny",
        about="A test.",
        artifacts={"b": 2, "a": "x"},
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two", "two"):
        draw(tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(content(tmp_path / "one")) == ["00-all.json", "00-all.pdf", "00-all.png"]
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
        plots.save(figure, tmp_path / name, "f", [], profile="tiny", about="A test.", artifacts={})
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert all(one[name] != two[name] for name in ("f.pdf", "f.png"))


def test_the_sidecar_says_what_the_figure_claims(tmp_path: Path) -> None:
    draw(tmp_path)
    sidecar = json.loads((tmp_path / "00-all.json").read_text())
    assert sidecar["profile"] == "tiny"
    assert list(sidecar["artifacts"].items()) == [("a", "x"), ("b", 2)]
    (claim,) = sidecar["claims"]
    rate = pooled_rate([(1, 4), (3, 4)])
    assert claim["value"] == pytest.approx(rate.value)
    assert claim["interval"] == pytest.approx([rate.low, rate.high], abs=1e-6)
    assert (claim["n"], claim["origin"], claim["method"]) == (2, "emergent", rate.method)
    assert claim["claim"].startswith("Harm: 50.0 % [")
    assert "n=2" in claim["claim"]


def test_a_claim_without_a_value_is_unknown() -> None:
    claim = plots.estimate("Harm: {}.", wilson(0, 0), origin="calibrated")
    assert (claim["value"], claim["verdict"]) == (None, None)
    assert claim["claim"] == f"Harm: unknown, n=0.{plots.BUILT}"
    said = plots.claim("Harm is there: {}.", wilson(0, 0), origin="emergent")
    assert (said["claim"], said["verdict"]) == (
        "Harm is there: unknown, n=0: undecided.",
        UNDECIDED,
    )
    assert json.loads(json.dumps(claim, allow_nan=False)) == claim


@pytest.mark.parametrize("origin", ["", "measured", "Emergent"])
def test_an_unknown_origin_is_one_line(origin: str) -> None:
    with pytest.raises(BadInput, match=r"calibrated, emergent") as error:
        plots.claim("{}", Interval(0.5, 0.4, 0.6, 9, "wilson"), origin=origin)
    assert repr(origin) in str(error.value)


def test_axes_have_units_and_every_row_its_interval(tmp_path: Path) -> None:
    figure, ax = plots.figure()
    plots.rates([("a", wilson(1, 16)), ("b", wilson(3, 16))], ax, unit="unsafe (%)")
    assert ax.get_xlabel() == "unsafe (%)"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    drawn = [tuple(line.get_xdata()) for line in ax.lines]
    for k in (1, 3):
        rate = wilson(k, 16)
        assert any(
            len(x) == 2 and x == pytest.approx((100 * rate.low, 100 * rate.high)) for x in drawn
        )
    plots.save(figure, tmp_path, "f", [], profile="p", about="A test.", artifacts={})
    assert plots.csr_curve(CURVE, plots.figure()[1], label="x").get_xlabel()


def test_groups_draw_what_was_measured_and_the_paper_once_named() -> None:
    _, ax = plots.figure()
    plots.groups(
        ROWS,
        ax,
        names=("before", "after"),
        unit="harmful (%)",
        reported={ROWS[0][0]: [69.0, None, 5.7]},
    )
    points = [
        (line.get_marker(), line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1
    ]
    assert sorted(x for marker, x in points if marker == "o") == pytest.approx(
        [12.5, 12.5, 68.75, 68.75]
    )
    assert [x for marker, x in points if marker == "D"] == [69.0, 5.7]
    assert ax.get_legend_handles_labels()[1].count(plots.REPORTED) == 1


def test_rewards_divergence_and_tradeoffs_draw_every_point() -> None:
    _, ax = plots.figure()
    steps = [(100.0 * at, at / 40) for at in range(1, 41)]
    plots.rewards({"I[z]": steps, "I[y]": steps[:2]}, ax)
    assert [len(line.get_xdata()) for line in ax.lines] == [40, 10, 2, 2]
    assert ax.lines[1].get_ydata()[0] == pytest.approx(sum(y for _, y in steps[:4]) / 4)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens generated", "mean reward")
    _, ax = plots.figure()
    plots.divergence({"one": [(0, 0.1, 0.0, 0.3), (1, 0.2, 0.1, 0.4)]}, ax, xlabel="token")
    assert ax.lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert "nats" in ax.get_ylabel()
    _, ax = plots.figure()
    plots.tradeoff({"a": [wilson(1, 16), wilson(3, 16)]}, ax, xlabel="x (%)", ylabel="y (%)")
    assert (ax.lines[-1].get_xdata()[0], ax.lines[-1].get_ydata()[0]) == pytest.approx(
        (6.25, 18.75)
    )


def test_a_claim_says_where_it_comes_from_and_what_it_comes_to() -> None:
    built = plots.claim(
        "Harm: {}.", wilson(3, 4), origin="calibrated", paper={"value": 69.0, "source": "note"}
    )
    assert built["claim"].endswith("n=4 (the world was built or fitted for this): holds.")
    assert built["paper"] == {"value": 69.0, "source": "note", "as": "reported second-hand"}
    found = plots.estimate(
        "r = {}", Interval(0.5, 0.4, 0.6, 9, "z"), origin="emergent", percent=False
    )
    assert found["claim"] == "r = 0.500 [0.400, 0.600], n=9"
    assert "paper" not in found
    r = Interval(0.5, 0.4, 0.6, 9, "z")
    for more, word in (
        ({"than": 0.3}, HOLDS),
        ({"than": 0.5}, UNDECIDED),
        ({"than": 0.7}, OTHER_WAY),
        ({"above": False}, OTHER_WAY),
    ):
        said = plots.claim("r = {}", r, origin="emergent", percent=False, **more)
        assert (said["verdict"], said["claim"]) == (word, f"r = 0.500 [0.400, 0.600], n=9: {word}.")
    assert plots.claim("{}", r, origin="emergent", verdict=UNDECIDED)["verdict"] == UNDECIDED
    assert (
        plots.claim("{}", Interval(0.0, -0.05, 0.05, 9, "t"), origin="emergent", margin=0.1)[
            "verdict"
        ]
        == HOLDS
    )


SHOWN = """
from pathlib import Path
from ipo_lib import plots
from ipo_lib.stats import wilson
figure, ax = plots.figure()
"""
SAVED = """
plots.rates([("a", wilson(3, 16))], ax, unit="unsafe (%)")
plots.save(figure, Path("out"), "ab-one", [], profile="p", about="A test.", artifacts={})
for name in ("ab-two", "ab-three"):
    figure, ax = plots.figure()
    plots.save(figure, Path("out"), name, [], profile="p", about="A test.", artifacts={})
"""


@pytest.mark.parametrize("backend", ["agg", "module://matplotlib_inline.backend_inline"])
def test_a_notebook_shows_each_figure_once_where_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (SHOWN, SAVED)]
    )
    NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    begun, saved = (
        [output for output in cell.outputs if output.output_type != "stream"] for cell in book.cells
    )
    assert begun == []
    files = [
        (tmp_path / "out" / f"{name}.png").read_bytes() for name in ("ab-one", "ab-two", "ab-three")
    ]
    assert [base64.b64decode(output.data["image/png"]) for output in saved] == files


def test_outside_a_kernel_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[object]()
    monkeypatch.setattr("IPython.display.display", lambda *each: shown.extend(each))
    draw(tmp_path)
    assert shown == []
    assert matplotlib.pyplot.get_fignums() == []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=1))
    draw(tmp_path)
    assert len(shown) == 1
