"""The table of findings: each row is the claim it names, of the profile it is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipo_lib.cli import findings
from ipo_lib.cli.findings import Finding
from ipo_lib.profiles.claims import claim, estimate
from ipo_lib.profiles.reading import checkout
from ipo_lib.stats import wilson

PROFILES = ["sandbox", "tiny", "tiny-null"]


def write_claims(folder: Path) -> None:
    claims = [
        claim("Profile tiny-null: more traces turn; {}", wilson(9, 90), origin="emergent"),
        claim("Profile tiny: more traces turn; {}", wilson(60, 90), origin="calibrated", than=0.5),
        estimate("Profile tiny: r is {}.", wilson(1, 4), origin="emergent", percent=False),
    ]
    folder.mkdir()
    (folder / "fig.json").write_text(json.dumps({"claims": claims}))


def test_a_finding_is_the_claim_about_its_own_profile(tmp_path: Path) -> None:
    write_claims(tmp_path / "tiny")
    turn, r = Finding("turns", "fig", "more traces turn"), Finding("r", "fig", "r is", unit="")
    found = findings.find_claim(turn, "tiny", tmp_path / "tiny")
    assert findings.describe(found) == "66.7 [56.4, 75.5], n=90 **holds***"
    of_null = findings.find_claim(turn, "tiny-null", tmp_path / "tiny")
    assert findings.describe(of_null) == "10.0 [5.4, 17.9], n=90 **holds**"
    number = findings.find_claim(r, "tiny", tmp_path / "tiny")
    assert findings.describe(number, r.unit) == "0.250 [0.046, 0.699], n=4"
    assert findings.find_claim(turn, "plain", tmp_path / "tiny") is None
    assert findings.find_claim(turn, "tiny", tmp_path / "nowhere") is None
    assert findings.describe(None) == ""
    assert found is not None
    alike = found | {"margin": 0.1, "origin": "emergent"}  # the claim is that there is none
    assert findings.describe(alike) == "66.7 [56.4, 75.5], n=90 **no difference**"
    assert "**undecided**" in findings.describe(alike | {"verdict": "undecided"})


HELD_OUT = "more traces end safe after <held-out trigger> than <neutral sentence>; {}"


@pytest.mark.parametrize(
    ("null", "said"),
    [((0, 60), "no difference"), ((40, 60), "the other way round"), ((1, 20), "undecided")],
)
def test_what_the_null_world_shows_too_is_void(
    tmp_path: Path, null: tuple[int, int], said: str
) -> None:
    """A margin of 10 points: 0 of 60 is no difference, 40 of 60 is one, 1 of 20 decides nothing."""
    void = said == "the other way round"
    held = claim(f"Profile tiny, {HELD_OUT}", wilson(50, 60), origin="emergent")
    about_null = f"Profile tiny-null, {HELD_OUT}"
    nothing = claim(about_null, wilson(*null), origin="calibrated", margin=0.1)
    for name, claims in (("tiny", [held, nothing]), ("tiny-null", [nothing])):
        (tmp_path / name).mkdir()
        sidecar = tmp_path / name / "05-fig6-interventions.json"
        sidecar.write_text(json.dumps({"claims": claims}))
    (row,) = findings.markdown(["tiny", "tiny-null"], tmp_path)[2:]
    of_tiny, of_null = row.split(" | ")[-2:]
    assert ("**void**" in of_tiny, "**holds**" in of_tiny) == (void, not void)
    assert "void" not in of_null
    (line,) = findings.verdicts("tiny", tmp_path / "tiny", ["05_x"], "tiny-null")
    assert line.split()[0] == ("void" if void else "holds")
    (alone,) = findings.verdicts("tiny", tmp_path / "tiny", ["05_x"])
    assert alone.startswith("holds ")
    assert findings.verdicts("tiny", tmp_path / "tiny", ["00_x", "15_x"], "tiny-null") == []
    (null_line,) = findings.verdicts("tiny-null", tmp_path / "tiny-null", ["05_x"])
    assert null_line.startswith(f"{said}  ")


def test_every_finding_is_answered_by_a_profile() -> None:
    figures = checkout() / "figures"
    for finding in findings.read_findings():
        claims = [findings.find_claim(finding, name, figures / name) for name in PROFILES]
        assert any(claims), finding.finding


def test_what_the_null_world_confirms_is_void() -> None:
    """But for the probe of notebook 14, which claims to read, not that something is a cause."""
    null = checkout() / "figures" / "tiny-null"
    confirmed = set()
    for finding in findings.read_findings():
        found = findings.find_claim(finding, "tiny-null", null)
        if found and found["verdict"] == "holds" and "margin" not in found:
            confirmed.add(finding)
    void = {finding for finding in findings.read_findings() if finding.void}
    shown = {finding for finding in confirmed - void if finding.shown}
    assert void
    assert void <= confirmed
    assert {finding.figure for finding in shown} == {"14-states"}
    table = findings.markdown(PROFILES, checkout() / "figures")
    (row,) = [line for line in table if "three resets" in line]
    assert row.count("**void**") == 2
    lines = findings.verdicts("tiny", checkout() / "figures" / "tiny", ["11_attacks"])
    assert [line.split()[0] for line in lines if "three resets" in line] == ["void"]
