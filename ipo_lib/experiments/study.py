"""A full run: the tables of ``notebooks/studies.yml``, each row trained with several seeds.

1. A *row* of a table says in settings what it changes in a profile. A *cell* is one row with one
   seed: the recipe is run and its model evaluated. The counts of every prompt are stored, so that
   each interval and paired test can be computed from the committed tables.
2. ``run_table`` makes all cells of a table and writes ``full-<table>.json`` among the figures.
3. ``load_table`` returns these cells, made now or read from the last full run.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.engines.progress import say
from ipo_lib.experiments.kl import Divergence, measure_divergence
from ipo_lib.experiments.study_cells import Cell, Changes, make_cell
from ipo_lib.profiles.reading import Yaml, checkout
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.profiles.settings import StudySettings
from ipo_lib.records import BadInput, Record, from_json
from ipo_lib.stats import pooled_rate
from ipo_lib.store import write_whole


def read_studies() -> dict[str, Any]:
    """``notebooks/studies.yml``: tables and claims."""
    return dict(yaml.load((checkout() / "notebooks" / "studies.yml").read_text("utf-8"), Yaml))


def read_tables() -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of every table: what each changes in a profile, by dotted name."""
    tables = {}
    for name, rows in read_studies()["tables"].items():
        tables[name] = {row: changes or {} for row, changes in rows.items()}
    return tables


def selected_rows(run: Run, table: str) -> dict[str, dict[str, Any]]:
    """The rows of a table that the profile runs.

    Raises:
        BadInput: the table, or a table or row that the profile names, is unknown.
    """
    tables, studies = read_tables(), run.profile.studies
    if table not in tables:
        raise BadInput(f"study: table {table!r} is unknown; known: {', '.join(tables)}")
    for name in studies:
        if name not in tables:
            raise BadInput(
                f"study: profile {run.profile.name!r} names table {name!r}; known: "
                f"{', '.join(tables)}"
            )
    if table not in studies:
        return {}
    selected = studies[table].rows or tuple(tables[table])
    for row in selected:
        if row not in tables[table]:
            raise BadInput(
                f"study: table {table!r} has no row {row!r}; known: {', '.join(tables[table])}"
            )
    return {row: changes for row, changes in tables[table].items() if row in selected}


def run_table(run: Run, table: str) -> list[Cell]:
    """Make every cell of a table and write ``full-<table>.json`` as they come."""
    settings = run.profile.studies.get(table, StudySettings())
    rows = selected_rows(run, table)
    workers = min(settings.workers, settings.seeds, os.cpu_count() or 1)
    if workers > 1:
        # Seeds of one row come after each other: cells of one seed build on the same data and
        # adapters, and would be in each other's way.
        by_row = []
        for row, changes in rows.items():
            by_row += [(row, changes, seed) for seed in range(settings.seeds)]
        _make_in_parallel(run, table, by_row, workers)
    by_seed = []
    for seed in range(settings.seeds):
        by_seed += [(row, changes, seed) for row, changes in rows.items()]
    cells: list[Cell] = []
    for done, (row, changes, seed) in enumerate(by_seed):
        say(done, len(by_seed), f"{table}: {row}, seed {seed}")
        cells.append(make_cell(run, row, changes, seed))
        write_records(run, table, rows, cells)
    return cells


def _make_in_parallel(
    run: Run, table: str, wanted: Sequence[tuple[str, Changes, int]], workers: int
) -> None:
    """Bring cells to the store from several processes, each with its share of the cores."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _share_cores, (workers,)) as pool:
        running = [pool.submit(_bring_to_store, run.opened_with, *cell) for cell in wanted]
        try:
            for done, _ in enumerate(as_completed(running), 1):
                say(done, len(wanted), f"{table}, {workers} at a time")
            for future in running:
                future.result()
        except BrokenProcessPool as error:
            raise BadInput(
                f"study: a process that made cells of {table!r} was killed; if memory ran out, run "
                f"again with -p studies.{table}.workers=1; finished cells are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _share_cores(workers: int) -> None:
    """Set up a process before torch is loaded; what it prints would mix with the notebook's."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _bring_to_store(
    opened: tuple[str, Changes, str, str], row: str, changes: Changes, seed: int
) -> None:
    """Make one cell. Bad input is met again where the cells are read, and is no failure here."""
    with suppress(BadInput):
        make_cell(open_run(*opened), row, changes, seed)


def write_records(run: Run, table: str, changes: Changes, records: Sequence[Any]) -> str:
    """Write the records of a full run, one on a line.

    Returns:
        Today's date, which is written with them.
    """
    run.figures.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    content = {
        "table": table,
        "profile": run.profile.name,
        "about": run.profile.about,
        "date": date,
        "changes": changes,
        "cells": [asdict(record) for record in records],
    }
    lines = json.dumps(content, separators=(",", ":")).replace('{"row"', '\n{"row"')
    write_whole(run.figures / f"full-{table}.json", lines + "\n")
    return date


def load_table(run: Run, name: str, full: bool) -> tuple[list[Cell], str]:
    """The cells of a table and their date; none where the profile does not run it.

    Args:
        run: with the profile.
        name: the table.
        full: make the cells now; False: read those committed with the last full run.
    """
    if not selected_rows(run, name):
        return [], "never"
    if full:
        return run_table(run, name), datetime.date.today().isoformat()
    return read_committed(run.profile.name, name, Cell, run.figures)


def read_committed(
    profile: str, table: str, kind: type[Record], figures: Path | None = None
) -> tuple[list[Record], str]:
    """The records of a profile's last full run and its date.

    Args:
        profile: its name.
        table: the table, or ``kl``.
        kind: of the records, such as ``Cell``.
        figures: folder to look into before that of the checkout.

    Returns:
        No records and "never" where there was no full run.
    """
    folders = [figures] if figures else []
    for folder in (*folders, checkout() / "figures" / profile):
        path = folder / f"full-{table}.json"
        if path.is_file():
            content = json.loads(path.read_bytes())
            return [from_json(kind, record) for record in content["cells"]], content["date"]
    return [], "never"


def load_divergences(
    run: Run, full: bool, seeds: int, harmful: str, benign: str, count: int
) -> tuple[list[Divergence], str]:
    """How far each trained row of table 2 moved from the untouched model, and the date.

    Args:
        run: with the profile.
        full: measure now; False: read what was committed with the last full run.
        seeds: seeds of each row.
        harmful: prompt set of stage 1, whose traces are measured.
        benign: prompt set of stage 2, whose traces are measured, too.
        count: traces of each model.
    """
    if not full:
        return read_committed(run.profile.name, "kl", Divergence, run.figures)
    rows = selected_rows(run, "table2")
    if not rows:
        return [], "never"
    seeds = min(seeds, run.profile.studies["table2"].seeds)
    divergences: list[Divergence] = []
    prompts = run.prompts(harmful), run.prompts(benign)
    for row, seed, folder in trained_models(run, rows, seeds, "KL", harmful, benign):
        if folder:
            divergences.append(measure_divergence(run, row, seed, folder, *prompts, count))
    return divergences, write_records(run, "kl", rows, divergences)


def trained_models(
    run: Run,
    rows: Mapping[str, Changes],
    seeds: int,
    what: str,
    harmful: str = "train_harmful",
    benign: str = "train_benign",
) -> Iterator[tuple[str, int, Path | None]]:
    """Row, seed and adapter folder of every model of a table; no folder: the untouched model.

    Args:
        run: with the profile.
        rows: of a table.
        seeds: of each row.
        what: is done with the models, for the progress bar.
        harmful: prompt set of stage 1.
        benign: prompt set of stage 2.
    """
    total = seeds * len(rows)
    for seed in range(seeds):
        for place, (row, changes) in enumerate(rows.items()):
            cell = make_cell(run, row, changes, seed, harmful, benign)
            say(seed * len(rows) + place, total, f"{what}: {row}, seed {seed}")
            folder = run.session.store.root / "adapters" / cell.adapter / "files"
            yield row, seed, folder if cell.adapter else None


def make_again(run: Run, table: str, row: str) -> Cell | None:
    """A row of a table, made anew with the first seed; None where no row is named."""
    if not row:
        return None
    rows = selected_rows(run, table)
    if row not in rows:
        raise BadInput(
            f"again {row!r}: not in {table} of this profile; its rows: {', '.join(rows)}"
        )
    return make_cell(run, row, rows[row], 0)


def describe_repeat(cells: Sequence[Cell], fresh: Cell | None) -> str:
    """How a cell that was made again differs most from the committed one, in points."""
    if fresh is None:
        return "nothing"
    committed = [cell for cell in cells if (cell.row, cell.seed) == (fresh.row, fresh.seed)]
    if not committed:
        return "nothing"
    changes = []
    for name, new in fresh.measured.items():
        if name in committed[0].measured:
            before = pooled_rate(committed[0].measured[name]).value
            after = pooled_rate(new).value
            unknown = math.isnan(before) or math.isnan(after)
            changes.append((-1.0 if unknown else abs(after - before), name, before, after))
    _, name, before, after = max(changes, key=lambda change: change[0])
    if before == after:
        return f"{fresh.row}, seed {fresh.seed}: the same in every measure"
    return (
        f"{fresh.row}, seed {fresh.seed}; largest change: {name}, {100 * before:.1f} % in the full "
        f"run, {100 * after:.1f} % here"
    )
