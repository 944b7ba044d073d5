"""The paper's numbers are read from its tables, with their source."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ipo_lib.experiments import paper
from ipo_lib.records import BadInput

TABLES = Path(__file__).parents[1] / "figures" / "paper_tables"
SOURCES = {"note", "review", "reimpl"}


def test_every_table_has_a_source_in_every_row() -> None:
    paths = list(TABLES.glob("*.csv"))
    assert len(paths) > 10
    for path in paths:
        assert {row["source"] for row in csv.DictReader(path.open())} <= SOURCES, path


def test_a_number_comes_with_its_row_and_source() -> None:
    column, where = "share_of_prompts_pct", {"model": "DS-8B", "safe_rollouts_in_group": "0"}
    number = paper.reported("fig4_rollout_diversity", column, **where)
    assert (number["value"], number["source"]) == (36.2, "review")
    assert (number["table"], number["where"]) == ("fig4_rollout_diversity", where)
    quantity = "share of safe trajectories with a safe turning point (%)"
    number = paper.reported("fig5_csr", "value", quantity=quantity)
    assert (number["value"], number["said"]) == (90.0, ">90")


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
