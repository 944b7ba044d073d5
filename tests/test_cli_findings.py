"""The table of findings: each row is the claim it names, of the profile it is about."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_every_finding_is_answered_by_a_profile() -> None:
    figures = checkout() / "figures"
    for finding in findings.read_findings():
        claims = [findings.find_claim(finding, name, figures / name) for name in PROFILES]
        assert any(claims), finding.finding
