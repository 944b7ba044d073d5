"""A full run of attacks: methods of the table ``rivals``, with several training seeds.

1. Trained models are attacked as in ``ipo_lib.experiments.attacks``; the counts of every prompt
   are kept (``load_attacks``).
2. A method's harm under an attack is a mean over prompts and seeds, with an interval over both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ipo_lib.experiments.attacks import AttackMaterial, AttackResult, measure_attacks
from ipo_lib.experiments.recipes import with_seed
from ipo_lib.experiments.results import RowDifference, row_difference
from ipo_lib.experiments.study import read_committed, selected_rows, trained_models, write_records
from ipo_lib.profiles.run import Run
from ipo_lib.records import TRACE
from ipo_lib.stats import Interval, two_way

RowCounts = tuple[tuple[int, int], ...]  # (harmful, judged) of every prompt, in order


@dataclass(frozen=True)
class AttackCell:
    """One method with one seed under one attack; (0, 0) where the attack cannot be made."""

    row: str
    seed: int
    attack: str
    traces: RowCounts
    answers: RowCounts
    judged: float


def load_attacks(
    run: Run,
    full: bool,
    material: AttackMaterial,
    names: Sequence[str],
    draws: int,
    methods: Sequence[str] = (),
) -> tuple[list[AttackCell], str]:
    """Trained rows of the table ``rivals`` under attack, and the date.

    Args:
        run: with the profile.
        full: measure now; False: read what was committed with the last full run.
        material: what attacks are made of.
        names: attacks.
        draws: responses of each prompt.
        methods: rows of the table; empty: all.
    """
    if not full:
        return read_committed(run.profile.name, "attacks", AttackCell, run.figures)
    rows = selected_rows(run, "rivals")
    rows = {row: changes for row, changes in rows.items() if not methods or row in methods}
    if not rows:
        return [], "never"
    cells = []
    seeds = run.profile.studies["rivals"].seeds
    for row, seed, folder in trained_models(run, rows, seeds, "attacks"):
        untouched = rows[row].get("recipe.data") == "none"
        if folder is None and not untouched:
            continue  # a method without a model of its own
        session = with_seed(run, seed).adapted(folder)
        for result in measure_attacks(run, session, names, material, draws):
            cells.append(_cell(row, seed, result, material))
    return cells, write_records(run, "attacks", rows, cells)


def _cell(row: str, seed: int, result: AttackResult, material: AttackMaterial) -> AttackCell:
    traces = [result.traces.get(prompt.id, (0, 0)) for prompt in material.prompts]
    answers = [result.answers.get(prompt.id, (0, 0)) for prompt in material.prompts]
    judged = round(result.judged, 4)
    return AttackCell(row, seed, result.attack, tuple(traces), tuple(answers), judged)


def rates_under(cells: Sequence[AttackCell], row: str, attack: str, part: str) -> list[list[float]]:
    """The harm of every prompt, [seeds, prompts]; nan where nothing was judged.

    Args:
        cells: of a full run.
        row: a method.
        attack: its name.
        part: TRACE or ANSWER.
    """
    table = []
    for cell in cells:
        if (cell.row, cell.attack) == (row, attack):
            counts = cell.traces if part == TRACE else cell.answers
            table.append([k / n if n else math.nan for k, n in counts])
    return table


def harm_under(cells: Sequence[AttackCell], row: str, attack: str, part: str) -> Interval:
    """The harm of a method under an attack, over prompts and seeds.

    Args:
        cells: of a full run.
        row: a method.
        attack: its name.
        part: TRACE or ANSWER.
    """
    return two_way(rates_under(cells, row, attack, part), (0.0, 1.0))


def compare_methods(
    cells: Sequence[AttackCell], row: str, other: str, attack: str, part: str
) -> RowDifference:
    """``row`` minus ``other`` under one attack, paired by prompt and seed.

    Args:
        cells: of a full run.
        row: a method.
        other: the method that is taken off.
        attack: its name.
        part: TRACE or ANSWER.
    """
    rates = np.array(rates_under(cells, row, attack, part))
    others = np.array(rates_under(cells, other, attack, part))
    return row_difference(row, other, f"{part} harm under <{attack}>", rates - others)
