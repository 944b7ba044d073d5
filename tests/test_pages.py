"""The numbers of the pages are those of the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipo_lib.cli import pages
from ipo_lib.profiles.claims import claim
from ipo_lib.profiles.reading import checkout
from ipo_lib.records import BadInput
from ipo_lib.stats import Interval

PROFILES = ["sandbox", "tiny", "tiny-null"]


@pytest.mark.parametrize("page", ["figures/README.md", "README.md"])
def test_a_page_holds_the_numbers_of_the_committed_figures(page: str) -> None:
    text = (checkout() / page).read_text("utf-8")
    assert "ipo findings: begin" in text
    again = pages.updated(page, text, PROFILES, checkout() / "figures")
    assert again == text, "run: ipo findings --write"


def test_the_page_of_results_has_tables_and_marked_numbers() -> None:
    text = (checkout() / "figures" / "README.md").read_text("utf-8")
    blocks = [match["name"] for match in pages.BLOCK.finditer(text)]
    assert {"findings", "turning points", "table tiny table2", "claims tiny"} <= {*blocks}
    marks = list(pages.MARKED.finditer(text))
    assert len(marks) > 20
    counts = list(pages.PAIRS.finditer(text))
    assert counts
    # Every other comment would be a mark that stands behind no number.
    assert text.count("<!-- ") == 2 * len(blocks) + len(marks) + len(counts)


def write_kl(figures: Path, value: float) -> None:
    """One claim of a sidecar, about a difference of KL."""
    measured = Interval(value, value - 0.01, value + 0.02, 31, "made up")
    sentence = "Profile tiny, here: KL is higher than in the rest of the trace; {}."
    claims = [claim(sentence, measured, origin="emergent", percent=False)]
    (figures / "tiny").mkdir(exist_ok=True)
    (figures / "tiny" / "06-fig7-kl.json").write_text(json.dumps({"claims": claims}))


def test_a_marked_number_keeps_its_shape(tmp_path: Path) -> None:
    write_kl(tmp_path, 0.0461)
    old = "KL is 0.9 [0.1,\n  0.11] (n=2)<!-- tiny: KL --> nats"
    new = "KL is 0.0 [0.0,\n  0.07] (n=31)<!-- tiny: KL --> nats"
    assert pages.update_numbers(old, tmp_path) == new
    short = "KL is 0.044<!-- tiny: KL -->, 5 [4, 6] of which"
    assert pages.update_numbers(short, tmp_path).startswith(
        "KL is 0.046<!-- tiny: KL -->, 5 [4, 6]"
    )
    write_kl(tmp_path, -0.0461)
    fewer = "lower by 0.04 [0.01, 0.09]<!-- less tiny: KL = the other way round -->"
    assert "lower by 0.05 [0.03, 0.06]<" in pages.update_numbers(fewer, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.04<!-- tiny: KL -->", "was 0.04 and is -0.05 in tiny; write its sentence anew"),
        ("-0.04<!-- tiny: KL = holds -->", "'holds' is now 'the other way round' in tiny"),
        ("0.04<!-- tiny: drop -->", "mark 'drop': no finding has this name"),
        ("0.04<!-- tiny-null: KL -->", "the figures of tiny-null have no such claim"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    write_kl(tmp_path, -0.05)
    with pytest.raises(BadInput, match=message):
        pages.update_numbers(text, tmp_path)


def test_a_mean_of_pairs_is_read_from_the_table() -> None:
    figures = checkout() / "figures"
    cells = json.loads((figures / "tiny" / "full-table2.json").read_text())["cells"]
    pairs = [cell["pairs"] for cell in cells if cell["row"] == "DPO on Part"]
    text = "Of 3<!-- tiny pairs: DPO on Part --> pairs"
    expected = f"Of {sum(pairs) / len(pairs):.0f}<!-- tiny pairs: DPO on Part --> pairs"
    assert pages.updated("README.md", text, PROFILES, figures) == expected
    with pytest.raises(BadInput, match="has no row 'DPO on Parts'"):
        pages.updated("README.md", text.replace("Part ", "Parts "), PROFILES, figures)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_page_of_a_profile_holds_all_its_figures_and_claims(profile: str) -> None:
    folder = checkout() / "figures" / profile
    page = pages.profile_page(profile, folder)
    assert (folder / "README.md").read_text("utf-8") == page, "run: ipo findings --write"
    figures = sorted(path.stem for path in folder.glob("*.png"))
    assert (
        sorted(line[2:].partition("]")[0] for line in page.splitlines() if line[:2] == "![")
        == figures
    )
    claims = [json.loads(path.read_bytes())["claims"] for path in folder.glob("[0-9]*-*.json")]
    assert sum(line.startswith("- ") for line in page.splitlines()) == sum(map(len, claims))
