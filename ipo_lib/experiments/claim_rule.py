"""The paper's claims about methods, and the rule that decides what each comes to.

``notebooks/studies.yml`` writes a claim as one or more *comparisons*: a row is said to have less
(or more) of a measure than another row. The rule was written down before the runs it judges:

1. Each comparison becomes a paired difference over prompts and seeds, with a p (``RowDifference``).
2. Holm's procedure at 5 % over all comparisons of all claims says which p are small enough.
3. A comparison is *clear* if its p is small enough, its interval excludes 0, at least six seeds
   were trained, their mean differences all have one sign, and 95 % of the responses were judged.
4. A clear comparison holds if the sign is the one said, and goes the other way round if not.
5. A claim goes the other way round if one of its comparisons does. It holds if all of them hold.
   Otherwise it is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ipo_lib.experiments.kl import KL_BOUND, Divergence
from ipo_lib.experiments.results import BASE, RowDifference, compare, row_difference, row_names
from ipo_lib.experiments.study import read_studies
from ipo_lib.experiments.study_cells import Cell
from ipo_lib.records import from_json
from ipo_lib.stats import HOLDS, OTHER_WAY, SEEDS, UNDECIDED

LEVEL = 0.05  # of Holm's procedure
MIN_COVERAGE = 0.95  # share of judged responses below which nothing is decided
KL = "KL"  # the measure that comes from divergences, not from cells


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim: ``row`` is said to have less of ``measure`` than ``other``."""

    row: str
    other: str  # "": of KL alone, the row is compared with 0
    measure: str
    less: bool = True  # False: it is said to have more
    against: str = ""  # the measure of ``other``, if it is another
    among: str = ""  # a stratum of prompts (``results.stratum``); "": all
    kind: str = "harm after training"  # by which a profile says whether its world was built for it


def read_claims() -> dict[str, list[Comparison]]:
    """The paper's claims about methods, each as comparisons of rows."""
    claims = read_studies()["claims"]
    return {
        name: [from_json(Comparison, comparison) for comparison in comparisons]
        for name, comparisons in claims.items()
    }


def decide_claims(cells: Sequence[Cell], divergences: Sequence[Divergence]) -> list[dict[str, Any]]:
    """The paper's claims whose rows were all run, with every comparison behind them.

    Args:
        cells: of a table.
        divergences: how far models moved, for the claims about KL.

    Returns:
        One line for each comparison, with the verdict on its claim.
    """
    claims = read_claims()
    measured = {}
    for name, comparisons in claims.items():
        if all(_was_run(comparison, cells, divergences) for comparison in comparisons):
            measured[name] = [
                (_measure(comparison, cells, divergences), comparison.less)
                for comparison in comparisons
            ]
    verdicts = apply_rule(measured)
    lines = []
    for name, differences in measured.items():
        for (difference, _), comparison in zip(differences, claims[name], strict=True):
            compared = f"{difference.row} minus {difference.other or 'elsewhere'}"
            measure = difference.measure
            if comparison.against:
                compared, measure = difference.row, f"{measure} minus {comparison.against}"
            lines.append(
                {
                    "claim": name,
                    "verdict": verdicts[name],
                    "comparison": compared,
                    "measure": measure,
                    "change": difference.change,
                    "by seed": [round(value, 3) for value in difference.by_seed],
                    "p": round(difference.p, 4),
                    "kind": claims[name][0].kind,
                }
            )
    return lines


def _was_run(
    comparison: Comparison, cells: Sequence[Cell], divergences: Sequence[Divergence]
) -> bool:
    """Whether there is a record of every row of a comparison."""
    rows = row_names(divergences if comparison.measure == KL else cells)
    needed = {comparison.row, comparison.other} - {""}
    if comparison.among:
        needed.add(BASE)
    return needed.issubset(rows)


def _measure(
    comparison: Comparison, cells: Sequence[Cell], divergences: Sequence[Divergence]
) -> RowDifference:
    """The difference that a comparison is about."""
    row, other = comparison.row, comparison.other
    if comparison.measure == KL:
        return compare_divergence(divergences, row, other)
    measure, against = comparison.measure, comparison.against
    return compare(cells, row, other, measure, against, comparison.among)


def compare_divergence(
    divergences: Sequence[Divergence], row: str, other: str = "", matched: bool = False
) -> RowDifference:
    """KL where S changes most minus KL elsewhere, in nats per token, over prompts and seeds.

    Args:
        divergences: how far each model moved.
        row: the model's name.
        other: a model whose own number is taken off, such as one trained on pairs cut at random.
        matched: "elsewhere" is the same place in other traces, not the rest of the trace.
    """
    differences = _local_divergence(divergences, row, matched)
    if other:
        others = _local_divergence(divergences, other, matched)
        seeds = differences.index.intersection(others.index)
        differences = differences.loc[seeds] - others.reindex(
            index=seeds, columns=differences.columns
        )
    return row_difference(row, other, KL, differences.to_numpy(), widest=KL_BOUND)


def _local_divergence(divergences: Sequence[Divergence], row: str, matched: bool) -> pd.DataFrame:
    """How much more KL there is where S changes most: [seeds, prompts], nan without a trace."""
    by_seed = {}
    for divergence in divergences:
        by_prompt = dict(divergence.matched if matched else divergence.where)
        if divergence.row == row and by_prompt:
            by_seed[divergence.seed] = by_prompt
    table = pd.DataFrame.from_dict(by_seed, orient="index", dtype=float)
    return table.sort_index().sort_index(axis=1)


def apply_rule(claims: Mapping[str, Sequence[tuple[RowDifference, bool]]]) -> dict[str, str]:
    """What each claim comes to by the rule above.

    Args:
        claims: by name, the differences that a claim is about, each with whether less is claimed.

    Returns:
        By name: holds, undecided or the other way round.
    """
    p_values = [difference.p for pairs in claims.values() for difference, _ in pairs]
    largest_p = holm_threshold(p_values)
    verdicts = {}
    for name, pairs in claims.items():
        outcomes = {_decide(difference, less, largest_p) for difference, less in pairs}
        if OTHER_WAY in outcomes:
            verdicts[name] = OTHER_WAY
        else:
            verdicts[name] = HOLDS if outcomes == {HOLDS} else UNDECIDED
    return verdicts


def holm_threshold(p_values: Iterable[float]) -> float:
    """The largest p that passes Holm's procedure at ``LEVEL``; minus infinity if none does."""
    largest = -math.inf
    ordered = sorted(p_values)
    for place, p in enumerate(ordered):
        if p > LEVEL / (len(ordered) - place):
            break
        largest = p
    return largest


def _decide(difference: RowDifference, less: bool, largest_p: float) -> str:
    """What one comparison comes to (steps 3 and 4)."""
    change = difference.change
    signs = {float(np.sign(value)) for value in difference.by_seed if not math.isnan(value)}
    is_clear = (
        difference.p <= largest_p
        and (change.high < 0 or change.low > 0)
        and len(difference.by_seed) >= SEEDS
        and signs in ({-1.0}, {1.0})
        and difference.coverage >= MIN_COVERAGE
    )
    if not is_clear:
        return UNDECIDED
    claimed = -1.0 if less else 1.0
    return HOLDS if signs == {claimed} else OTHER_WAY
