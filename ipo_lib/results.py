"""What the cells of a full run come to: rates with intervals over prompts, paired comparisons of rows, and the paper's claims
about methods, marked by a rule that was written down before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from ipo_lib.kl import FAR, Moved
from ipo_lib.records import from_json
from ipo_lib.stats import Interval, format_interval, mean, paired_difference, pooled_rate
from ipo_lib.study import Cell, written

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
LEVEL = 0.05


def names(cells: Sequence[Cell]) -> list[str]:
    """The rows, in order."""
    return list(dict.fromkeys(one.row for one in cells))


def seeds(cells: Sequence[Cell], row: str) -> list[int]:
    """The seeds a row was run with."""
    return sorted(one.seed for one in cells if one.row == row)


def pooled(cells: Sequence[Cell], row: str, measure: str, seeds: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(k, n) of every prompt of all sets that have the measure, summed over the row's seeds."""
    own = [one for one in cells if one.row == row and (not seeds or one.seed in seeds)]
    names = [name for name in (own[0].measured if own else ()) if name.endswith(f": {measure}")]
    counts = [np.array([pair for name in names for pair in one.measured[name]]).reshape(-1, 2) for one in own]
    return [(int(k), int(n)) for k, n in sum(counts[1:], counts[0])] if counts else []


def rate(cells: Sequence[Cell], row: str, measure: str) -> Interval:
    """The mean over prompts with its interval over prompts, all seeds of the row together."""
    return pooled_rate(pooled(cells, row, measure))


def summary(cells: Sequence[Cell], measures: Sequence[str], against: str = "") -> list[dict[str, Any]]:
    """One line a row: each measure with its interval and the range over seeds, the first one's paired difference from the row
    ``against``, pairs, tokens that were generated to make it."""
    lines = []
    for row in names(cells):
        own = [one for one in cells if one.row == row]
        line: dict[str, Any] = {"row": row, "seeds": len(own)}
        for measure in measures:
            by_seed = [100 * pooled_rate(pooled(cells, row, measure, [one.seed])).value for one in own]
            line[measure] = (
                f"{format_interval(rate(cells, row, measure)).partition(', n=')[0]} ({min(by_seed):.0f}-{max(by_seed):.0f})"
            )
        if against in names(cells):
            line[f"minus {against}"] = format_interval(compare(cells, row, against, measures[0]).change).partition(", n=")[0]
        line["pairs"], line["generated"] = (
            round(sum(values) / len(own)) for values in zip(*((o.pairs, o.tokens) for o in own), strict=True)
        )
        line["tokens an answer"] = round(sum(one.answer_tokens for one in own) / len(own), 1)
        lines.append(line | {"failed": ", ".join(f"seed {one.seed}: {one.failed}" for one in own if one.failed)})
    return lines


def taught(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What the traces of every row are like: means over its seeds."""
    lines = []
    for row in names(cells):
        own = [one.learned for one in cells if one.row == row]
        keys = dict.fromkeys(key for one in own for key in one)
        lines.append({"row": row, **{key: round(float(np.mean([one[key] for one in own if key in one])), 3) for key in keys}})
    return lines


def steps(cells: Sequence[Cell]) -> dict[str, list[tuple[float, float]]]:
    """By row GRPO's (tokens generated so far, mean reward) of every step and seed."""
    return {row: sorted(step for one in cells if one.row == row for step in one.steps) for row in names(cells)
            if any(one.steps for one in cells if one.row == row)}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """``row`` minus ``other`` on one measure: over prompts, all common seeds together; the sign in each seed; a sign-flip p."""

    row: str
    other: str
    measure: str
    change: Interval
    by_seed: tuple[float, ...]
    p: float


def compare(cells: Sequence[Cell], row: str, other: str, measure: str, against: str = "") -> Compared:
    """The paired difference of two rows by prompt, on the seeds that both have; ``against``: the other's measure, if not the
    same."""
    common, asked = sorted({*seeds(cells, row)} & {*seeds(cells, other)}), ((other, against or measure), (row, measure))
    sides = [pooled(cells, name, what, common) for name, what in asked]
    by_seed = [paired_difference(*(pooled(cells, name, what, [seed]) for name, what in asked)).value for seed in common]
    differences = [b[0] / b[1] - a[0] / a[1] for a, b in zip(*sides, strict=True) if a[1] and b[1]]
    return Compared(row, other, measure, paired_difference(*sides), tuple(by_seed), sign_flip(differences))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 under random signs, by permutation; 1 where nothing differs."""
    if not any(differences):
        return 1.0
    found = scipy_stats.permutation_test(
        (np.array(differences),), np.mean, permutation_type="samples", n_resamples=9999, rng=0, vectorized=True
    )
    return float(found.pvalue)


def located(found: Sequence[Moved], row: str) -> Compared:
    """KL where S changes most minus elsewhere, in nats, as a comparison: over traces, the seeds of the row together."""
    own = [one.where for one in found if one.row == row and one.where]
    means = np.array(own).mean(0).tolist() if own else []
    by_seed = tuple(float(np.mean(one)) for one in own)
    return Compared(row, "", "KL", mean(means, (-FAR, FAR)), by_seed, sign_flip(means))


@dataclass(frozen=True)
class Said:
    """One comparison of a claim: ``row`` is said to have ``less`` of ``measure`` than ``other`` (of ``against``, if that is
    another)."""

    row: str
    other: str
    measure: str
    less: bool = True
    against: str = ""


def claims() -> dict[str, list[Said]]:
    """The paper's claims about methods, each as comparisons of rows."""
    return {name: [from_json(Said, one) for one in own] for name, own in written()["claims"].items()}


def judged(cells: Sequence[Cell], moves: Sequence[Moved]) -> list[dict[str, Any]]:
    """The paper's claims with every comparison behind them and what they come to by the rule of ``verdicts``."""
    found: dict[str, list[tuple[Compared, bool]]] = {}
    for name, own in claims().items():
        known = [one for one in own if one.measure == "KL" or {one.row, one.other} <= {*names(cells)}]
        if len(known) == len(own):
            found[name] = [
                (
                    located(moves, one.row)
                    if one.measure == "KL"
                    else compare(cells, one.row, one.other, one.measure, one.against),
                    one.less,
                )
                for one in known
            ]
    said = verdicts(found)
    return [{"claim": name, "verdict": said[name], "row": one.row, "minus": one.other or "elsewhere", "measure": one.measure,
             "change": one.change, "by seed": [round(value, 3) for value in one.by_seed], "p": round(one.p, 4)}
            for name, own in found.items() for one, _ in own]  # fmt: skip


def verdicts(claims: Mapping[str, Sequence[tuple[Compared, bool]]]) -> dict[str, str]:
    """What each claim comes to. A claim is comparisons with whether the row is said to have *less*: it holds if in each the sign
    is as said in all seeds, the interval excludes 0 and p survives Holm over all comparisons of all claims; it does not hold if
    one is so the other way round; else it is undecided."""
    every = sorted((one.p, id(one)) for own in claims.values() for one, _ in own)
    passed: set[int] = set()
    for place, (p, key) in enumerate(every):
        if p > LEVEL / (len(every) - place):
            break
        passed.add(key)

    def decided(one: Compared, less: bool) -> str:
        sign = -1 if less else 1
        signs = {math.copysign(1, value * sign) if value else 0 for value in one.by_seed}
        clear = id(one) in passed and (one.change.high < 0 or one.change.low > 0) and len(signs) == 1
        return UNDECIDED if not clear or 0 in signs else HOLDS if 1 in signs else FAILS

    said = {}
    for name, own in claims.items():
        found = [decided(one, less) for one, less in own]
        said[name] = FAILS if FAILS in found else HOLDS if found and set(found) == {HOLDS} else UNDECIDED
    return said
