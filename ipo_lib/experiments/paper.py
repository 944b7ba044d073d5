"""The paper's numbers as reported second-hand: the tables of ``figures/paper_tables``, each row with its source."""

from __future__ import annotations

import csv
from functools import cache
from typing import Any

from ipo_lib.profiles.reading import checkout
from ipo_lib.records import BadInput


@cache
def table(name: str) -> tuple[dict[str, str], ...]:
    """All rows of a table by its file name without ``.csv``."""
    if not (path := checkout() / "figures" / "paper_tables" / f"{name}.csv").is_file():
        known = ", ".join(sorted(one.stem for one in path.parent.glob("*.csv")))
        raise BadInput(f"paper table {name!r} is unknown; known: {known}")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def reported(name: str, column: str, **where: str) -> dict[str, Any]:
    """The number in ``column`` of the first row that matches: its value, table, row and source (note, review or reimpl)."""
    rows = [
        row for row in table(name) if all(row.get(key) == value for key, value in where.items())
    ]
    if not rows or column not in rows[0]:
        raise BadInput(
            f"paper table {name!r} has no {column!r} where {where}; columns: {', '.join(table(name)[0])}"
        )
    said = rows[0][column].strip("~<>= %")
    return {
        "value": float(said),
        "said": rows[0][column],
        "table": name,
        "where": where,
        "source": rows[0]["source"],
    }
