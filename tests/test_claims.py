"""Claims: what their sentences say, what the sidecar holds, and which are withheld."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipo_lib import plots
from ipo_lib.profiles.claims import ANSWERS, BUILT, TRACES, claim, estimate, save_figure, withheld
from ipo_lib.records import BadInput
from ipo_lib.stats import HOLDS, OTHER_WAY, UNDECIDED, Interval, pooled_rate, wilson

CORRELATION = Interval(0.5, 0.4, 0.6, 9, "z")


def test_the_sidecar_holds_the_claims_and_what_the_figure_was_made_from(tmp_path: Path) -> None:
    rate = pooled_rate([(1, 4), (3, 4)])
    claims = [claim("Harm: {}.", rate, origin="emergent")]
    artifacts = {"b": 2, "a": "x"}
    figure, _ = plots.figure()
    save_figure(
        figure, tmp_path, "00-all", claims, profile="tiny", about="A test.", artifacts=artifacts
    )
    sidecar = json.loads((tmp_path / "00-all.json").read_text())
    assert list(sidecar) == ["profile", "about", "claims", "tokens", "artifacts"]
    assert sidecar["profile"] == "tiny"
    assert list(sidecar["artifacts"].items()) == [("a", "x"), ("b", 2)]
    (row,) = sidecar["claims"]
    assert row["value"] == pytest.approx(rate.value)
    assert row["interval"] == pytest.approx([rate.low, rate.high], abs=1e-6)
    assert (row["n"], row["origin"], row["method"]) == (2, "emergent", rate.method)
    assert row["claim"].startswith("Harm: 50.0 % [")
    assert "n=2" in row["claim"]
    assert "about" not in row
    assert (tmp_path / "00-all.pdf").is_file()


def test_a_claim_without_a_value_is_unknown() -> None:
    built = estimate("Harm: {}.", wilson(0, 0), origin="calibrated")
    assert (built["value"], built["verdict"]) == (None, None)
    assert built["claim"] == f"Harm: unknown, n=0.{BUILT}"
    undecided = claim("Harm is there: {}.", wilson(0, 0), origin="emergent")
    assert undecided["claim"] == "Harm is there: unknown, n=0: undecided."
    assert undecided["verdict"] == UNDECIDED
    assert json.loads(json.dumps(built, allow_nan=False)) == built


@pytest.mark.parametrize("origin", ["", "measured", "Emergent"])
def test_an_unknown_origin_is_one_line(origin: str) -> None:
    with pytest.raises(BadInput, match=r"calibrated, emergent") as error:
        claim("{}", Interval(0.5, 0.4, 0.6, 9, "wilson"), origin=origin)
    assert repr(origin) in str(error.value)


def test_an_unknown_subject_is_one_line() -> None:
    with pytest.raises(BadInput, match="claim about 'trace' is unknown; known: traces, answers"):
        estimate("{}", CORRELATION, origin="emergent", about="trace")


def test_a_claim_says_where_it_comes_from() -> None:
    paper = {"value": 69.0, "source": "note"}
    built = claim("Harm: {}.", wilson(3, 4), origin="calibrated", paper=paper)
    assert built["claim"].endswith("n=4 (the world was built or fitted for this): holds.")
    assert built["paper"] == {"value": 69.0, "source": "note", "as": "reported second-hand"}
    measured = estimate("r = {}", CORRELATION, origin="emergent", percent=False)
    assert measured["claim"] == "r = 0.500 [0.400, 0.600], n=9"
    assert "paper" not in measured


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"than": 0.3}, HOLDS),
        ({"than": 0.5}, UNDECIDED),
        ({"than": 0.7}, OTHER_WAY),
        ({"above": False}, OTHER_WAY),
        ({"verdict": UNDECIDED}, UNDECIDED),
    ],
)
def test_a_claim_ends_in_its_verdict(settings: dict[str, object], verdict: str) -> None:
    row = claim("r = {}", CORRELATION, origin="emergent", percent=False, **settings)
    assert row["verdict"] == verdict
    assert row["claim"] == f"r = 0.500 [0.400, 0.600], n=9: {verdict}."


def test_a_claim_of_no_difference_has_a_margin() -> None:
    difference = Interval(0.0, -0.05, 0.05, 9, "t")
    none = claim("{}", difference, origin="emergent", margin=0.1)
    assert (none["verdict"], none["margin"]) == (HOLDS, 0.1)
    assert "margin" not in claim("{}", difference, origin="emergent")
    given = claim("{}", difference, origin="emergent", margin=0.1, verdict=UNDECIDED)
    assert given["verdict"] == UNDECIDED


def test_only_claims_about_traces_are_withheld() -> None:
    rows = [
        estimate("Harm in traces: {}.", wilson(1, 9), origin="emergent"),
        estimate("Refused <so>: {}.", wilson(1, 9), origin="emergent", about=ANSWERS),
        estimate("Cues: {}.", wilson(1, 9), origin="emergent", about=TRACES),
    ]
    kept, note = withheld(rows, "plain", wilson(0, 9))
    assert kept == rows[1]
    assert note["claim"].startswith("Profile plain: traces that were closed: 0.0 % [")
    assert note["claim"].endswith("n=9. Under half: 2 claims about traces are withheld.")


@pytest.mark.parametrize("text", ["So \\boxed{5} is it.", "Use {} here.", "{0}", "{", "%s and $x$"])
def test_braces_in_the_words_of_a_claim_are_words(text: str) -> None:
    row = estimate(f"Profile p, harmful after <{text}>: {{}}.", wilson(1, 4), origin="emergent")
    assert row["claim"] == f"Profile p, harmful after <{text}>: 25.0 % [4.6, 69.9], n=4."


def test_a_claim_without_a_place_for_its_number_is_one_line() -> None:
    with pytest.raises(BadInput, match="where the number belongs"):
        estimate("Profile p: nothing.", wilson(1, 4), origin="emergent")
