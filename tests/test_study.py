"""A full run in small: rows of the tables made, evaluated, stored and read again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import COUNT, open_small_run

from ipo_lib.experiments import study
from ipo_lib.experiments.study_cells import Cell, make_cell, settings_json
from ipo_lib.profiles import reading
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import GrpoSettings, Recipe
from ipo_lib.records import BadInput

TABLES = study.read_tables()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_small_run(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_a_profile_and_no_two_rows_of_a_table_are_the_same(table: str) -> None:
    plain = repr(reading.read_profile("tiny"))
    profiles = {}
    for row, changes in TABLES[table].items():
        profiles[row] = repr(reading.read_profile("tiny", changes))
        assert not changes or profiles[row] != plain
    assert len(set(profiles.values())) == len(profiles)


@pytest.mark.parametrize(
    "row",
    [
        "intervention at inference",
        "SFT, intervened",
        "SFT, stronger source",
        "DPO, natural pairs",
        "DPO on Part, weighted by change of S",
        "DPO on Part, then stage 2",
        "benign pairs mixed into stage 1",
        "DPO on Full",
        "DPO on Part, then GRPO, I[z]",
    ],
)
def test_rows_of_table_2(run: Run, row: str) -> None:
    cell = make_cell(run, row, TABLES["table2"][row], 0)
    assert cell.row == row
    if cell.failed:
        assert row.endswith("stage 2")
        assert cell.failed.startswith("stage 2 skipped")
    assert {len(counts) for counts in cell.measured.values()} == {COUNT}
    assert sum(n for _, n in cell.measured["direct: trace harm"]) > 0
    assert cell.answer_tokens > 20
    assert bool(cell.adapter) is (row != "intervention at inference")
    assert cell.tokens > 0 or row in ("intervention at inference", "SFT, stronger source")
    assert bool(cell.steps) is ("GRPO" in row)
    assert 0 <= cell.learned["traces with a trigger"] <= 1


def test_a_full_run_writes_what_a_later_one_reads(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, date = study.load_table(run, "table2", full=True)
    assert [(cell.row, cell.seed) for cell in cells] == [("base", 0), ("DPO on Part", 0)]
    assert cells[1].pairs > 0
    assert cells[1].tokens > cells[0].tokens == 0
    written = json.loads((run.figures / "full-table2.json").read_bytes())
    assert written["date"] == date
    assert written["changes"] == {"base": {"recipe.data": "none"}, "DPO on Part": {}}
    again = study.load_table(run, "table2", full=True)[0]
    assert again == cells  # from the store, seconds included

    root = run.figures.parent
    monkeypatch.setattr(study, "checkout", lambda: root)
    (root / "figures").mkdir(exist_ok=True)
    (root / "figures" / "tiny").symlink_to(run.figures, target_is_directory=True)
    assert study.read_committed("tiny", "table2", Cell) == (cells, date)
    assert study.read_committed("tiny", "table1", Cell) == ([], "never")


def test_a_cell_made_again_is_compared_with_the_committed_one() -> None:
    counts = ((0, 1), (1, 1), (1, 1), (1, 1))
    measured = {"direct: trace harm": counts, "direct: answer harm": counts}
    cell = Cell("DPO on Part", 0, 1, 1, 1.0, 1.0, "", {}, measured)
    same = "DPO on Part, seed 0: the same in every measure"
    assert study.describe_repeat([cell], cell) == same
    fresh_counts = ((0, 1), (0, 1), (0, 1), (1, 1))
    fresh = replace(cell, measured={**measured, "direct: trace harm": fresh_counts})
    moved = (
        "DPO on Part, seed 0; largest change: direct: trace harm, 75.0 % in the full run, "
        "25.0 % here"
    )
    assert study.describe_repeat([cell], fresh) == moved
    assert study.describe_repeat([cell], None) == "nothing"
    assert study.describe_repeat([replace(cell, seed=1)], fresh) == "nothing"


def test_a_row_that_cannot_be_trained_is_the_untouched_model(run: Run) -> None:
    cell = make_cell(run, "x", {"pairs.max_length": 8}, 0)
    assert (cell.pairs, cell.adapter) == (0, "")
    assert cell.failed.startswith("training: no pairs (")
    assert cell.measured == make_cell(run, "base", {"recipe.data": "none"}, 0).measured


def test_tables_and_rows_that_are_not_there_are_one_line(run: Run) -> None:
    with pytest.raises(BadInput, match="table 'table9' is unknown"):
        study.selected_rows(run, "table9")
    assert study.selected_rows(run, "table1") == {}  # a table that the profile does not run
    assert study.load_table(run, "table1", full=True)[0] == []
    with pytest.raises(BadInput, match="names table 'table9'"):
        study.selected_rows(run.changed({"studies": {"table9": {}}}), "table2")
    with pytest.raises(BadInput, match="has no row 'DPO'"):
        study.selected_rows(run.changed({"studies": {"table2": {"rows": ["DPO"]}}}), "table2")


def test_the_settings_of_a_cell_are_plain_values_and_new_fields_change_none() -> None:
    """``multiple`` of GRPO came after the first cells were stored."""
    assert settings_json((Recipe(pairs=3), {"a": 1.5})) == [
        {
            "data": "intervened",
            "detector": "profile",
            "triggers": "pool",
            "then": "",
            "pairs": 3,
            "weigh": False,
            "judge": "profile",
        },
        {"a": 1.5},
    ]
    assert "multiple" not in settings_json(GrpoSettings())
    assert settings_json(GrpoSettings(multiple=3.0))["multiple"] == 3.0


def test_kl_of_a_full_run_is_of_every_trained_row_and_nothing_is_written_without_one(
    run: Run,
) -> None:
    sets = ("train_harmful", "train_benign", 3)
    divergences, date = study.load_divergences(run, True, 1, *sets)
    # base has no adapter
    assert [(move.row, move.seed) for move in divergences] == [("DPO on Part", 0)]
    read_again = study.load_divergences(run, False, 0, "train_harmful", "", 0)
    assert read_again == (divergences, date)
    other = run.changed({"studies": {}})
    assert study.load_divergences(other, True, 1, *sets) == ([], "never")


def test_two_processes_make_the_cells_that_one_makes(run: Run, tmp_path: Path) -> None:
    """The last bits of a training differ with the number of threads, and with them what it draws.

    What comes before the training is equal.
    """
    tables = {"table2": {"seeds": 2, "rows": ["base", "DPO on Part"], "workers": 2}}
    both = open_small_run(tmp_path, {"studies": tables})
    wanted = [
        ("base", {}, 0),
        ("an unknown setting", {"recipe.data": "nothing"}, 0),
        ("DPO on Part", {}, 1),
    ]
    study._make_in_parallel(both, "table2", wanted, 2)
    with pytest.raises(BadInput, match="nothing"):  # what is refused there is refused again here
        make_cell(both, "", {"recipe.data": "nothing"}, 0)
    cell = make_cell(both, "DPO on Part", {}, 1)
    assert both.session.usage.tokens == {}
    alone = make_cell(run, "DPO on Part", {}, 1)
    assert (cell.pairs, cell.tokens, cell.counts) == (alone.pairs, alone.tokens, alone.counts)
    assert cell.measured.keys() == alone.measured.keys()
    assert cell.adapter


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_bring_to_store", _killed)
    message = r"killed; if memory ran out, run again with -p studies\.table2\.workers=1"
    with pytest.raises(BadInput, match=message):
        study._make_in_parallel(run, "table2", [("base", {}, 0)], 2)
