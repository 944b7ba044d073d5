"""Figures are the same bytes on the same input, say what they show, and hide what must not be read."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("MPLBACKEND", "agg")

from ipo_lib import plots
from ipo_lib.records import BadInput, Rollout, Sentence
from ipo_lib.stats import Interval, pooled_rate, wilson

CURVE = [
    {"cut": 0, "s": 0.5, "low": 0.4, "high": 0.6, "n": 32},
    {"cut": 7, "s": math.nan, "low": 0.0, "high": 1.0, "n": 0},
    {"cut": 12, "s": 0.1, "low": 0.0, "high": 0.2, "n": 31},
]
COMPARED = [
    {
        "set": name,
        "measure": "trace harm",
        "before": 0.7,
        "before low": 0.6,
        "before high": 0.8,
        "after": 0.1,
        "after low": 0.0,
        "after high": 0.2,
        "difference": -0.6,
        "difference low": -0.7,
        "difference high": -0.5,
    }
    for name in ("direct", "wrapped")
]
STEPS = [{"step": at, "loss": 1.0 / at, "logps/chosen": -at} for at in range(1, 6)]


def draw(folder: Path) -> None:
    """Every kind of figure the library has, saved."""
    figure, axes = plots.figure(columns=2, rows=2)
    plots.csr_curve(CURVE, axes[0][0], label="unsafe trace")
    plots.rates([("none", wilson(0, 0)), ("trigger", wilson(3, 16))], axes[0][1], unit="unsafe (%)")
    plots.before_after(COMPARED, axes[1][0], names=("before", "after stage 1"))
    plots.training(STEPS, axes[1][1], names={"loss": "loss", "logps/chosen": "chosen"}, unit="loss (nats)")
    claims = [plots.claim("Harm: {}.", pooled_rate([(1, 4), (3, 4)]), origin="emergent")]
    plots.save(figure, folder, "00-all", claims, profile="tiny", about="A test.", artifacts={"b": 2, "a": "x"})


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
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "three")], env=environment, check=True)
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
    claim = plots.claim("Harm: {}.", wilson(0, 0), origin="calibrated")
    assert claim["value"] is None
    assert claim["claim"] == "Harm: unknown, n=0."
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
        assert any(len(x) == 2 and x == pytest.approx((100 * rate.low, 100 * rate.high)) for x in drawn)
    plots.save(figure, tmp_path, "f", [], profile="p", about="A test.", artifacts={})
    for plot in (plots.csr_curve(CURVE, plots.figure()[1], label="x"), plots.before_after(COMPARED, plots.figure()[1])):
        assert plot.get_xlabel()


# coloured traces


def trace(*texts: str) -> tuple[Rollout, list[Sentence]]:
    whole, spans, at = "".join(texts), [], 0
    for index, text in enumerate(texts):
        spans.append(Sentence(index, at, at + len(text), at, at + len(text)))
        at += len(text)
    return Rollout("r", "p", 0, tuple(range(len(whole))), whole, "stop", 0, "s"), spans


def visible(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_words_are_hidden_unless_revealed() -> None:
    rollout, spans = trace("Grind the ", "powder 42 times.")
    hidden = plots.show(rollout, spans, [0.1, None], marks={}).data
    assert not re.search(r"[A-Za-z0-9]", visible(hidden))
    assert visible(hidden).count("█") == sum(char.isalnum() for char in rollout.text)
    for word in ("Grind", "powder", "42"):
        assert word not in hidden
    shown = visible(plots.show(rollout, spans, [0.1, None], marks={}, reveal=True).data)
    assert "Grind the " in shown
    assert "powder 42 times." in shown


@given(st.text())
def test_no_letter_and_no_digit_survives(text: str) -> None:
    rollout, spans = trace(text or "x")
    hidden = visible(plots.show(rollout, spans, [0.5], marks={}).data)
    assert not [
        char
        for char in hidden.replace("&amp;", "")
        .replace("&lt;", "")
        .replace("&gt;", "")
        .replace("&quot;", "")
        .replace("&#x27;", "")
        if unicodedata.category(char)[0] in "LN"
    ]


def test_what_a_model_writes_is_text_not_markup() -> None:
    rollout, spans = trace("<script>alert(1)</script>", "</span>")
    for reveal in (True, False):
        html = plots.show(rollout, spans, [1.0, 0.0], marks={0: "<cue>"}, reveal=reveal).data
        assert "<script" not in html
        assert "<cue>" not in html
        assert html.count("</span>") == 2


def test_colour_and_title_follow_the_value() -> None:
    rollout, spans = trace("a ", "b ", "c ", "d")
    html = plots.show(rollout, spans, [0.0, 1.0, None, math.nan], marks={1: "cue"}).data
    colours = re.findall(r"background:([^\"]*)", html)
    assert len(set(colours)) == 3
    assert colours[2] == colours[3]
    assert re.findall(r'title="([^"]*)"', html) == ["S = 0.00", "S = 1.00", "not measured", "not measured"]
    assert html.index("S = 1.00") < html.index("[cue]") < html.index("not measured")
