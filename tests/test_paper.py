"""The paper's numbers are read from its tables, with their source."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ipo_lib.experiments import paper
from ipo_lib.records import BadInput

TABLES = Path(__file__).parents[1] / "figures" / "paper_tables"


def test_every_table_has_a_source_in_every_row() -> None:
    assert len(list(TABLES.glob("*.csv"))) > 10
    for path in TABLES.glob("*.csv"):
        assert {row["source"] for row in csv.DictReader(path.open())} <= {
            "note",
            "review",
            "reimpl",
        }, path


def test_a_number_comes_with_its_row_and_source() -> None:
    said = paper.reported(
        "fig4_rollout_diversity", "share_of_prompts_pct", model="DS-8B", safe_rollouts_in_group="0"
    )
    assert (said["value"], said["source"], said["table"]) == (
        36.2,
        "review",
        "fig4_rollout_diversity",
    )
    about = paper.reported(
        "fig5_csr", "value", quantity="share of safe trajectories with a safe turning point (%)"
    )
    assert (about["value"], about["said"]) == (90.0, ">90")


@pytest.mark.parametrize(
    ("table", "column", "where", "says"),
    [
        ("fig99", "value", {}, "fig5_csr"),
        ("fig5_csr", "valve", {}, "quantity"),
        ("fig5_csr", "value", {"quantity": "no"}, "no"),
    ],
)
def test_what_is_not_there_is_one_line(
    table: str, column: str, where: dict[str, str], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        paper.reported(table, column, **where)
