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
SEEDS, COVERED = 3, 0.95  # fewer seeds, or fewer responses judged, decide nothing


def names(cells: Sequence[Cell]) -> list[str]:
    """The rows, in order."""
    return list(dict.fromkeys(one.row for one in cells))


def seeds(cells: Sequence[Cell], row: str) -> list[int]:
    """The seeds with which a row came to what it asks for."""
    return sorted(one.seed for one in done(cells, row))


def done(cells: Sequence[Cell], row: str) -> list[Cell]:
    """The cells of a row that are what the row asks for, one a seed."""
    return list({one.seed: one for one in cells if one.row == row and not one.failed}.values())


def pooled(cells: Sequence[Cell], row: str, measure: str, seeds: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(k, n) of every prompt of all sets that have the measure, summed over the row's seeds."""
    own = [one for one in done(cells, row) if not seeds or one.seed in seeds]
    names = [name for name in (own[0].measured if own else ()) if name.endswith(f": {measure}")]
    counts = [np.array([pair for name in names for pair in one.measured[name]]).reshape(-1, 2) for one in own]
    return [(int(k), int(n)) for k, n in sum(counts[1:], counts[0])] if counts else []


def rate(cells: Sequence[Cell], row: str, measure: str) -> Interval:
    """The mean over prompts with its interval over prompts, all seeds of the row together."""
    return pooled_rate(pooled(cells, row, measure))


def coverage(cells: Sequence[Cell], row: str, measure: str) -> float:
    """The share of responses that were judged, over sets and seeds; 1 where a measure reads judged ones alone."""
    shares = [value for one in done(cells, row) for name, value in one.coverage.items() if name.endswith(f": {measure}")]
    return sum(shares) / len(shares) if shares else 1.0


def summary(cells: Sequence[Cell], measures: Sequence[str], against: str = "") -> list[dict[str, Any]]:
    """One line a row: each measure with its interval and the range over seeds, the first one's paired difference from the row
    ``against``, pairs, tokens that were generated to make it, the share that was judged, and what failed."""
    lines = []
    for row in names(cells):
        own, line = done(cells, row), dict[str, Any](row=row)
        for measure in measures:
            by_seed = [100 * pooled_rate(pooled(cells, row, measure, [one.seed])).value for one in own]
            line[measure] = _percent(rate(cells, row, measure)) + (f" ({min(by_seed):.0f}-{max(by_seed):.0f})" if own else "")
        if against in names(cells):
            line[f"minus {against}"] = _percent(compare(cells, row, against, measures[0]).change)
        line |= {"seeds": len(own), "pairs": _mean([one.pairs for one in own]), "generated": _mean([one.tokens for one in own])}
        line |= {"tokens an answer": _mean([one.answer_tokens for one in own])}
        line["judged"] = f"{100 * min((coverage(cells, row, measure) for measure in measures), default=1.0):.1f} %"
        failed = [f"seed {one.seed}: {one.failed}" for one in cells if one.row == row and one.failed]
        lines.append(line | {"failed": "; ".join(failed)})
    return lines


MEASURES = {
    "trace harm": "harmful traces",
    "answer harm": "harmful answers",
    "refused": "benign refused",
    "correct": "right answers",
}


def markdown(cells: Sequence[Cell], against: str = "DPO on Part") -> list[str]:
    """A table for a page: one line a row, percent with 95 % intervals over prompts, all seeds of a row together; differences are
    from the row ``against``, or from the first where there is none of that name."""
    against = against if against in names(cells) else names(cells)[0]
    head = ["method", *MEASURES.values(), f"harmful traces minus {against}", "tokens to make", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in names(cells):
        own = done(cells, row)
        shares = [_percent(rate(cells, row, measure)) for measure in MEASURES]
        change = _percent(compare(cells, row, against, next(iter(MEASURES))).change) if row != against else ""
        tokens = f"{_mean([one.tokens for one in own]):,}"
        lines.append(f"| {row} | {' | '.join(shares)} | {change} | {tokens} | {len(own)} |")
    return lines


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values)) if values else math.nan


def _percent(one: Interval) -> str:
    return format_interval(one).partition(", n=")[0].replace(" %", "")


def taught(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What the traces of every row are like: means over its seeds."""
    lines = []
    for row in names(cells):
        own = [one.learned for one in done(cells, row)]
        keys = dict.fromkeys(key for one in own for key in one)
        lines.append({"row": row, **{key: round(float(np.mean([one[key] for one in own if key in one])), 3) for key in keys}})
    return lines


def steps(cells: Sequence[Cell]) -> dict[str, list[tuple[float, float]]]:
    """By row GRPO's (tokens generated so far, mean reward) of every step and seed, where a row has any."""
    found = {row: sorted(step for one in done(cells, row) for step in one.steps) for row in names(cells)}
    return {row: own for row, own in found.items() if own}


@dataclass(frozen=True)
class Compared:
    """``row`` minus ``other`` on one measure: over prompts, all common seeds together; the sign in each seed; a sign-flip
    p; the lower of the two rows' shares of judged responses."""

    row: str
    other: str
    measure: str
    change: Interval
    by_seed: tuple[float, ...]
    p: float
    coverage: float = 1.0


def compare(cells: Sequence[Cell], row: str, other: str, measure: str, against: str = "") -> Compared:
    """The paired difference of two rows by prompt, on the seeds that both have; ``against``: the other's measure, if not the
    same."""
    common, asked = sorted({*seeds(cells, row)} & {*seeds(cells, other)}), ((other, against or measure), (row, measure))
    sides = [pooled(cells, name, what, common) for name, what in asked]
    by_seed = [paired_difference(*(pooled(cells, name, what, [seed]) for name, what in asked)).value for seed in common]
    differences = [b[0] / b[1] - a[0] / a[1] for a, b in zip(*sides, strict=True) if a[1] and b[1]]
    shares = [coverage(cells, name, what) for name, what in asked]
    return Compared(row, other, measure, paired_difference(*sides), tuple(by_seed), sign_flip(differences), min(shares))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 under random signs, by permutation; 1 where nothing differs."""
    if not any(differences):
        return 1.0
    found = scipy_stats.permutation_test(
        (np.array(differences),), np.mean, permutation_type="samples", n_resamples=9999, rng=0, vectorized=True
    )
    return float(found.pvalue)


def located(found: Sequence[Moved], row: str) -> Compared:
    """KL where S changes most minus elsewhere, in nats, as a comparison: over prompts, the seeds of the row together."""
    own = [[value for _, value in one.where] for one in found if one.row == row and one.where]
    means = np.array(own).mean(0).tolist() if own else []
    by_seed = tuple(float(np.mean(one)) for one in own)
    return Compared(row, "", "KL", mean(means, (-FAR, FAR)), by_seed, sign_flip(means))


@dataclass(frozen=True)
class Said:
    """One comparison of a claim: ``row`` is said to have ``less`` of ``measure`` than ``other`` (of ``against``, if that is
    another). ``kind``: of claim, by which a profile says whether its world was built to show it."""

    row: str
    other: str
    measure: str
    less: bool = True
    against: str = ""
    kind: str = "harm after training"


def claims() -> dict[str, list[Said]]:
    """The paper's claims about methods, each as comparisons of rows."""
    return {name: [from_json(Said, one) for one in own] for name, own in written()["claims"].items()}


def judged(cells: Sequence[Cell], moves: Sequence[Moved]) -> list[dict[str, Any]]:
    """The paper's claims with every comparison behind them and what they come to by the rule of ``verdicts``."""
    found: dict[str, list[tuple[Compared, bool]]] = {}
    for name, own in (known_claims := claims()).items():
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
             "change": one.change, "by seed": [round(value, 3) for value in one.by_seed], "p": round(one.p, 4),
             "kind": known_claims[name][0].kind}
            for name, own in found.items() for one, _ in own]  # fmt: skip


def verdicts(claims: Mapping[str, Sequence[tuple[Compared, bool]]]) -> dict[str, str]:
    """What each claim comes to. A claim is comparisons with whether the row is said to have *less*: it holds if in each the sign
    is as said in all seeds, at least SEEDS of them, the interval excludes 0, p survives Holm over all comparisons of all claims
    and COVERED of the responses were judged; it does not hold if one is so the other way round; else it is undecided."""
    every = sorted((one.p, id(one)) for own in claims.values() for one, _ in own)
    passed: set[int] = set()
    for place, (p, key) in enumerate(every):
        if p > LEVEL / (len(every) - place):
            break
        passed.add(key)

    def decided(one: Compared, less: bool) -> str:
        sign = -1 if less else 1
        signs = {math.copysign(1, value * sign) if value else 0 for value in one.by_seed if not math.isnan(value)}
        clear = id(one) in passed and (one.change.high < 0 or one.change.low > 0) and len(signs) == 1
        clear = clear and len(one.by_seed) >= SEEDS and one.coverage >= COVERED
        return UNDECIDED if not clear or 0 in signs else HOLDS if 1 in signs else FAILS

    said = {}
    for name, own in claims.items():
        found = [decided(one, less) for one, less in own]
        said[name] = FAILS if FAILS in found else HOLDS if found and set(found) == {HOLDS} else UNDECIDED
    return said
