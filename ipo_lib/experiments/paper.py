"""The paper's numbers as others reported them: the tables of ``figures/paper_tables``.

Each row names its source: ``note``, ``review`` or ``reimpl`` (a reimplementation).
"""

from __future__ import annotations

import csv
from functools import cache
from typing import Any

from ipo_lib.profiles.reading import checkout
from ipo_lib.records import BadInput


@cache
def table(name: str) -> tuple[dict[str, str], ...]:
    """All rows of a table by its file name without ``.csv``."""
    path = checkout() / "figures" / "paper_tables" / f"{name}.csv"
    if not path.is_file():
        names = sorted(other.stem for other in path.parent.glob("*.csv"))
        raise BadInput(f"paper table {name!r} is unknown; known: {', '.join(names)}")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def reported(name: str, column: str, **where: str) -> dict[str, Any]:
    """The number in a column of the first row that matches.

    Args:
        name: of the table.
        column: of the number.
        where: values that the row has in other columns.

    Returns:
        ``value`` as a number, ``said`` as it is written, and its table, row and source.
    """
    rows = table(name)
    for row in rows:
        if all(row.get(key) == value for key, value in where.items()) and column in row:
            return {
                "value": float(row[column].strip("~<>= %")),
                "said": row[column],
                "table": name,
                "where": where,
                "source": row["source"],
            }
    raise BadInput(
        f"paper table {name!r} has no {column!r} where {where}; columns: {', '.join(rows[0])}"
    )
