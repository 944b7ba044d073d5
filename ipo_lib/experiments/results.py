"""Tables of a full run: rates of each row with their intervals, and differences of rows.

1. A *row* is one way to train; a *cell* (``study_cells.Cell``) is one row with one seed.
2. A *measure*, such as ``trace harm``, may be taken on several prompt sets. The rate of a row is
   the mean over the prompts of all these sets and over seeds, with an interval over both. Fewer
   than six seeds have no such interval; the range of their means is given instead.
3. The *difference* of two rows is paired: by prompt, and by the seeds that both have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from ipo_lib.experiments.study_cells import UNSAFE_AFTER, Cell
from ipo_lib.records import SAFE
from ipo_lib.stats import Interval, format_interval, mean, seed_p, two_way

BASE = "base"  # the row of the untouched model
HOPELESS, OTHERS = "nearly always unsafe", "other prompts"  # strata of prompts
HOPELESS_RATE = 7 / 8
COLUMNS = {  # of the table for a page
    "trace harm": "harmful traces",
    "answer harm": "harmful answers",
    "refused": "benign refused",
    "correct": "right answers",
}


def row_names(cells: Sequence[Any]) -> list[str]:
    """The rows of cells (or of other records with a ``row``), in order."""
    return list(dict.fromkeys(cell.row for cell in cells))


def finished_cells(cells: Sequence[Cell], row: str) -> list[Cell]:
    """The cells of a row that are what the row asks for, one for each seed."""
    by_seed = {cell.seed: cell for cell in cells if cell.row == row and not cell.failed}
    return list(by_seed.values())


def finished_seeds(cells: Sequence[Cell], row: str) -> list[int]:
    """The seeds with which a row came to what it asks for."""
    return sorted(cell.seed for cell in finished_cells(cells, row))


def _sets_with(cell: Cell, measure: str) -> list[str]:
    """The entries of a cell with this measure, one for each prompt set."""
    return [name for name in cell.measured if name.endswith(f": {measure}")]


def rates_by_seed(
    cells: Sequence[Cell], row: str, measure: str, seeds: Sequence[int] | None = None
) -> list[list[float]]:
    """The rate of every prompt of all sets that have the measure, one list for each seed.

    Args:
        cells: of a table.
        row: its row.
        measure: such as ``trace harm``.
        seeds: those wanted; None: all.

    Returns:
        [seeds, prompts]; nan where none of a prompt's responses was judged.
    """
    table = []
    for cell in finished_cells(cells, row):
        if seeds is not None and cell.seed not in seeds:
            continue
        counts = [pair for name in _sets_with(cell, measure) for pair in cell.measured[name]]
        table.append([k / n if n else math.nan for k, n in counts])
    return table


def rate(cells: Sequence[Cell], row: str, measure: str) -> Interval:
    """The mean over prompts and seeds with its interval over both: a range below six seeds."""
    return two_way(rates_by_seed(cells, row, measure), (0.0, 1.0))


def bounds(cells: Sequence[Cell], row: str, measure: str) -> tuple[float, float]:
    """The rate if no unjudged response counts, and if every one counts; means over seeds."""
    lowest, highest = [], []
    for cell in finished_cells(cells, row):
        positive = unjudged = asked = 0.0
        for name in _sets_with(cell, measure):
            judged = sum(n for _, n in cell.measured[name])
            share = cell.coverage.get(name, 1.0)
            total = judged / share if share else judged
            positive += sum(k for k, _ in cell.measured[name])
            unjudged = unjudged + total - judged
            asked += total
        if asked:
            lowest.append(positive / asked)
            highest.append((positive + unjudged) / asked)
    if not lowest:
        return 0.0, 1.0
    return sum(lowest) / len(lowest), sum(highest) / len(highest)


def coverage(cells: Sequence[Cell], row: str, measure: str) -> float:
    """The mean share of judged responses over sets and seeds; 1 where a cell tells none."""
    shares = []
    for cell in finished_cells(cells, row):
        shares += [share for name, share in cell.coverage.items() if name.endswith(f": {measure}")]
    return sum(shares) / len(shares) if shares else 1.0


@dataclass(frozen=True)
class RowDifference:
    """``row`` minus ``other`` on one measure, over prompts and the seeds that both have."""

    row: str
    other: str
    measure: str
    change: Interval  # a range below six seeds
    by_seed: tuple[float, ...]  # the mean difference in each seed
    # The larger p of two tests: signs of the prompts' mean differences flipped at random, and
    # Student's t over the seeds' differences. A difference must show in prompts and in seeds.
    p: float
    coverage: float = 1.0  # the lower of the two rows' shares of judged responses


def compare(
    cells: Sequence[Cell], row: str, other: str, measure: str, against: str = "", among: str = ""
) -> RowDifference:
    """The paired difference of two rows by prompt and seed.

    Args:
        cells: of a table.
        row: a row of it.
        other: the row that is taken off.
        measure: of ``row``.
        against: measure of ``other``, if it is another.
        among: a stratum of prompts (``stratum``); empty: all prompts.
    """
    other_measure = against or measure
    seeds = sorted({*finished_seeds(cells, row)} & {*finished_seeds(cells, other)})
    rates = np.array(rates_by_seed(cells, row, measure, seeds))
    other_rates = np.array(rates_by_seed(cells, other, other_measure, seeds))
    judged = min(coverage(cells, row, measure), coverage(cells, other, other_measure))
    differences = rates - other_rates
    if among and differences.size:
        differences = differences[:, stratum(cells, among, measure)]
    return row_difference(row, other, measure, differences, judged)


def stratum(cells: Sequence[Cell], name: str, measure: str) -> np.ndarray[Any, Any]:
    """Which prompts are in a stratum, by how the untouched model does on them: [prompts].

    Args:
        cells: of a table with the row ``base``.
        name: ``HOPELESS``: at most one of eight responses is not positive on average, so that
            sampling gives hardly any pairs; ``OTHERS``: the other prompts.
        measure: what is counted, such as ``trace harm``.
    """
    base = np.array(rates_by_seed(cells, BASE, measure))
    hopeless: np.ndarray[Any, Any] = np.nanmean(base, axis=0) >= HOPELESS_RATE
    return hopeless if name == HOPELESS else ~hopeless


def row_difference(
    row: str, other: str, measure: str, differences: Any, coverage: float = 1.0, widest: float = 1.0
) -> RowDifference:
    """A comparison from differences by seed and prompt.

    Args:
        row: the row's name.
        other: name of the row that was taken off.
        measure: what is compared.
        differences: [seeds, prompts], nan where there is none.
        coverage: the share of responses that were judged.
        widest: differences lie within this much of 0.
    """
    table = np.array(differences, dtype=float)
    if not table.size:
        nothing = Interval(math.nan, -widest, widest, 0, "no prompts")
        return RowDifference(row, other, measure, nothing, (), 1.0, coverage)
    measured = table[:, ~np.isnan(table).all(axis=0)]  # prompts with a difference in some seed
    by_seed = tuple(_mean_without_nan(seed_row) for seed_row in measured)
    p_prompts = sign_flip_p(np.nanmean(measured, axis=0).tolist()) if measured.size else 1.0
    change = two_way(table.tolist(), (-widest, widest))
    p = max(p_prompts, seed_p(by_seed))
    return RowDifference(row, other, measure, change, by_seed, p, coverage)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a share, one value a seed, with Student's t over seeds; ``n`` counts seeds.

    The prompts are the same in all of them: how much depends on the prompts is not in the interval.
    """
    return replace(mean(values, (0.0, 1.0)), method="t over seeds")


def _mean_without_nan(values: np.ndarray[Any, Any]) -> float:
    """The mean of the values that are not nan; nan if none is left."""
    return math.nan if np.isnan(values).all() else float(np.nanmean(values))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 under random signs, by permutation; 1 where nothing differs."""
    if not any(differences):
        return 1.0
    test = scipy_stats.permutation_test(
        (np.array(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        rng=0,
        vectorized=True,
    )
    return float(test.pvalue)


def summary(
    cells: Sequence[Cell], measures: Sequence[str], against: str = ""
) -> list[dict[str, Any]]:
    """One line for each row of a table, to be shown in a notebook.

    Args:
        cells: of the table.
        measures: whose rates are shown. The first one is also shown with its bounds, and with its
            paired difference from the row ``against``.
        against: a row; none of that name: no difference is shown.

    Returns:
        Lines that also tell seeds, pairs, tokens generated to make the model, tokens of an answer,
        the share of judged responses and, where cells failed, why.
    """
    rows = row_names(cells)
    lines = []
    for row in rows:
        finished = finished_cells(cells, row)
        line: dict[str, Any] = {"row": row}
        for measure in measures:
            line[measure] = _percent(rate(cells, row, measure))
        if measures:
            least, most = bounds(cells, row, measures[0])
            line[f"{measures[0]}, bounds"] = f"{100 * least:.1f} to {100 * most:.1f}"
        if against in rows:
            line[f"minus {against}"] = _percent(compare(cells, row, against, measures[0]).change)
        line["seeds"] = len(finished)
        line["pairs"] = _rounded_mean([cell.pairs for cell in finished])
        line["generated"] = _rounded_mean([cell.tokens for cell in finished])
        line["tokens an answer"] = _rounded_mean([cell.answer_tokens for cell in finished])
        judged = min((coverage(cells, row, measure) for measure in measures), default=1.0)
        line["judged"] = f"{100 * judged:.1f} %"
        failed = [cell for cell in cells if cell.row == row and cell.failed]
        if failed:
            line["failed"] = "; ".join(f"seed {cell.seed}: {cell.failed}" for cell in failed)
        lines.append(line)
    return lines


def markdown(cells: Sequence[Cell], against: str = "DPO on Part") -> list[str]:
    """A table for a page: one line for each row, in percent with 95 % intervals.

    Args:
        cells: of a table.
        against: the row that differences are taken from; none of that name: the first row.
    """
    rows = row_names(cells)
    against = against if against in rows else rows[0]
    change_column = f"harmful traces minus {against}"
    counted = {
        "judged": "judged",
        "pairs": "pairs",
        "generated": "tokens to make",
        "seeds": "seeds",
    }
    head = ["method", *COLUMNS.values(), change_column, *counted.values()]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for line in summary(cells, list(COLUMNS), against):
        rates = [line[measure] for measure in COLUMNS]
        change = "" if line["row"] == against else line[f"minus {against}"]
        counts = [f"{line[name]:,}" if name != "judged" else line[name] for name in counted]
        columns = [line["row"], *rates, change, *counts]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _rounded_mean(values: Sequence[float]) -> float:
    """The mean of numbers, as a whole number; nan without numbers."""
    return round(sum(values) / len(values)) if values else math.nan


def _percent(interval: Interval) -> str:
    """An interval in percent, without the sign and the n."""
    text = format_interval(interval).partition(", n=")[0].replace(" %", "")
    return re.sub(r" in \d+ seeds\)", ")", text)  # another column says how many


def trace_statistics(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What the traces of every row are like (``learned.describe_traces``): means over its seeds."""
    lines = []
    for row in row_names(cells):
        means = pd.DataFrame([cell.learned for cell in finished_cells(cells, row)]).mean()
        lines.append({"row": row} | {name: round(value, 3) for name, value in means.items()})
    return lines


def trait_by_seed(cells: Sequence[Cell], row: str, trait: str) -> list[float]:
    """One number of ``learned`` for each seed of a row; nan where a seed has none."""
    return [cell.learned.get(trait, math.nan) for cell in finished_cells(cells, row)]


def hidden_harm(cells: Sequence[Cell]) -> dict[str, Interval]:
    """By method, hidden harm minus that of the untouched model, over prompts and seeds.

    Prompts without a safe trace of both models tell nothing and are left out.
    """
    measure = UNSAFE_AFTER[SAFE]
    methods = [row for row in row_names(cells) if row != BASE]
    return {row: compare(cells, row, BASE, measure).change for row in methods}


def methods_that_hide(cells: Sequence[Cell]) -> list[str]:
    """The methods whose hidden harm is clearly above the untouched model's."""
    return [row for row, change in hidden_harm(cells).items() if change.low > 0]


def reward_steps(cells: Sequence[Cell]) -> dict[str, list[list[tuple[float, float]]]]:
    """By row, a list for each seed: GRPO's (tokens generated so far, mean reward) at its steps."""
    steps = {}
    for row in row_names(cells):
        by_seed = [list(cell.steps) for cell in finished_cells(cells, row) if cell.steps]
        if by_seed:
            steps[row] = by_seed
    return steps


def against_tokens(
    cells: Sequence[Cell], rows: Sequence[str], measure: str
) -> list[tuple[float, Interval]]:
    """(tokens generated to make it, rate) of each row that has a cell, in rising order."""
    points = []
    for row in rows:
        finished = finished_cells(cells, row)
        if finished:
            tokens = _rounded_mean([cell.tokens for cell in finished])
            points.append((tokens, rate(cells, row, measure)))
    return sorted(points, key=lambda point: point[0])
