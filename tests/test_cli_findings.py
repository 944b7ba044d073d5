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


@pytest.mark.parametrize(("page", "front"), [("figures/README.md", False), ("README.md", True)])
def test_the_pages_hold_the_table_of_the_committed_figures(page: str, front: bool) -> None:
    text = (checkout() / page).read_text("utf-8")
    lines = findings.markdown(PROFILES, checkout() / "figures", front)
    assert len(lines) > (6 if front else 25)
    assert findings.replace_table(text, lines) == text, "run: ipo findings --write"


def test_every_finding_is_answered_by_a_profile() -> None:
    figures = checkout() / "figures"
    for finding in findings.read_findings():
        claims = [findings.find_claim(finding, name, figures / name) for name in PROFILES]
        assert any(claims), finding.finding


@pytest.mark.parametrize("profile", PROFILES)
def test_the_page_of_a_profile_holds_all_its_figures_and_claims(profile: str) -> None:
    folder = checkout() / "figures" / profile
    page = findings.profile_page(profile, folder)
    assert (folder / "README.md").read_text("utf-8") == page, "run: ipo findings --write"
    figures = sorted(path.stem for path in folder.glob("*.png"))
    assert (
        sorted(line[2:].partition("]")[0] for line in page.splitlines() if line[:2] == "![")
        == figures
    )
    claims = [json.loads(path.read_bytes())["claims"] for path in folder.glob("[0-9]*-*.json")]
    assert sum(line.startswith("- ") for line in page.splitlines()) == sum(map(len, claims))
