"""The bill before a run: it bounds what the run then asks for, and holds the default profile to its budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ipo_lib import cost, profiles
from ipo_lib.reproduce import declared

HOUSE = Path(__file__).parents[1]
BUDGET = 450_000  # generated tokens of the default profile
RUN = ("sandbox", "tiny", "tiny-null")  # profiles with committed figures


def bill(settings: profiles.Profile) -> list[cost.Cost]:
    books = {name: declared(HOUSE / "notebooks" / f"{name}.ipynb") for name in settings.notebooks}
    own = {name: {key: settings.parameters.get(key, value) for key, (_, value) in known.items()} for name, known in books.items()}
    return cost.plan(settings, own)


def test_the_default_profile_keeps_its_budget() -> None:
    assert cost.paid(bill(profiles.read("sandbox"))) <= BUDGET


@pytest.mark.parametrize("name", RUN)
def test_what_a_run_asked_for_was_in_the_bill(name: str) -> None:
    """Counts are upper bounds and lengths are means, so a notebook may take less, and little more for its longer traces."""
    settings = profiles.read(name)
    planned, found = bill(settings), cost.measured(HOUSE / "figures" / name)
    costly = {
        book: tokens for book in settings.notebooks if (tokens := cost.paid(one for one in planned if one.notebook == book))
    }
    assert {book[:2] for book in costly} <= set(found) <= {book[:2] for book in settings.notebooks}
    assert len(costly) >= len(settings.notebooks) - 1  # 08 reads a full run and draws nothing
    for book, tokens in costly.items():
        assert 0.5 * tokens <= found[book[:2]] <= 1.1 * tokens


def test_every_notebook_has_a_bill_and_every_line_grows_with_its_setting() -> None:
    settings = profiles.read("sandbox")
    assert set(settings.notebooks) <= set(cost.NOTEBOOKS)
    once = {(one.notebook, one.what): one.rollouts for one in bill(settings)}
    twice = bill(replace(settings, csr=replace(settings.csr, draws=2 * settings.csr.draws)))
    changed = {(one.notebook, one.what) for one in twice if one.rollouts != once[one.notebook, one.what]}
    assert {what for _, what in changed} == {"CSR of two traces", "whole curves", "every sentence end"}
    longer = replace(settings, expected=replace(settings.expected, trace=2 * settings.expected.trace))
    assert cost.minutes(bill(longer), longer) > cost.minutes(bill(settings), settings)


def test_draws_that_notebooks_share_are_paid_for_once() -> None:
    lines = [
        cost.Cost("a", "x", 1, 10.0, pool="p"),
        cost.Cost("b", "y", 2, 25.0, pool="p"),
        cost.Cost("b", "z", 1, 5.0, pool="q"),
    ]
    assert cost.paid(lines) == 30
    settings = profiles.read("sandbox")
    with_02 = bill(settings)
    without = bill(replace(settings, notebooks=tuple(book for book in settings.notebooks if book != "02_rollout_diversity")))
    assert cost.paid(with_02) == cost.paid(without)  # its groups are the responses of 01 and the traces of 03


def test_measured_reads_the_largest_sidecar_of_a_notebook(tmp_path: Path) -> None:
    for name, tokens in (("06-a", 5), ("06-b", 7), ("07-c", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens": tokens}))
    assert cost.measured(tmp_path) == {"06": 7, "07": 2}
    settings = profiles.read("sandbox")
    said = cost.table(bill(settings), settings, cost.measured(tmp_path))
    assert "last run 7" in said
    assert f"about {cost.minutes(bill(settings), settings):.0f} minutes" in said.splitlines()[-1]
