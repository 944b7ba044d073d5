"""What the cells of a full run come to: rates with intervals over prompts and seeds, paired comparisons of rows, and
the paper's claims about methods, marked by a rule that was written down before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from ipo_lib.experiments.kl import FAR, Divergence
from ipo_lib.experiments.study import Cell, read_studies
from ipo_lib.records import from_json
from ipo_lib.stats import (
    HOLDS,
    OTHER_WAY,
    SEEDS,
    UNDECIDED,
    Interval,
    format_interval,
    seed_p,
    two_way,
)

LEVEL = 0.05
COVERED = 0.95  # fewer responses judged decide nothing


def names(cells: Sequence[Cell]) -> list[str]:
    """The rows, in order."""
    return list(dict.fromkeys(one.row for one in cells))


def seeds(cells: Sequence[Cell], row: str) -> list[int]:
    """The seeds with which a row came to what it asks for."""
    return sorted(one.seed for one in done(cells, row))


def done(cells: Sequence[Cell], row: str) -> list[Cell]:
    """The cells of a row that are what the row asks for, one a seed."""
    return list({one.seed: one for one in cells if one.row == row and not one.failed}.values())


def by_seed(
    cells: Sequence[Cell], row: str, measure: str, seeds: Sequence[int] = ()
) -> list[list[float]]:
    """By seed the rate of every prompt of all sets that have the measure; nan where none of its responses was judged."""
    found = []
    for cell in done(cells, row):
        if not seeds or cell.seed in seeds:
            counts = [
                pair
                for name, own in cell.measured.items()
                if name.endswith(f": {measure}")
                for pair in own
            ]
            found.append([k / n if n else math.nan for k, n in counts])
    return found


def rate(cells: Sequence[Cell], row: str, measure: str) -> Interval:
    """The mean over prompts and seeds with its interval over both (``stats.two_way``): a range below six seeds."""
    return two_way(by_seed(cells, row, measure), (0.0, 1.0))


def bounds(cells: Sequence[Cell], row: str, measure: str) -> tuple[float, float]:
    """The rate with every response that was not judged counted out, and counted in: means over seeds."""
    found = []
    for cell in done(cells, row):
        k = unknown = total = 0.0
        for name, own in cell.measured.items():
            if name.endswith(f": {measure}"):
                judged = sum(n for _, n in own)
                share = cell.coverage.get(name, 1.0)
                asked = judged / share if share else judged
                k, unknown, total = (
                    k + sum(hits for hits, _ in own),
                    unknown + asked - judged,
                    total + asked,
                )
        if total:
            found.append((k / total, (k + unknown) / total))
    if not found:
        return 0.0, 1.0
    return sum(low for low, _ in found) / len(found), sum(high for _, high in found) / len(found)


def coverage(cells: Sequence[Cell], row: str, measure: str) -> float:
    """The share of responses that were judged, over sets and seeds; 1 where a measure reads judged ones alone."""
    shares = [
        value
        for one in done(cells, row)
        for name, value in one.coverage.items()
        if name.endswith(f": {measure}")
    ]
    return sum(shares) / len(shares) if shares else 1.0


def summary(
    cells: Sequence[Cell], measures: Sequence[str], against: str = ""
) -> list[dict[str, Any]]:
    """One line a row: each measure with its interval over prompts and seeds (its range below six seeds), the first one's
    bounds with all unjudged responses counted out and in and its paired difference from the row ``against``, pairs, tokens that
    were generated to make it, the share that was judged, and what failed."""
    lines = []
    for row in names(cells):
        own, line = done(cells, row), dict[str, Any](row=row)
        for measure in measures:
            line[measure] = _percent(rate(cells, row, measure))
        if measures:
            least, most = bounds(cells, row, measures[0])
            line[f"{measures[0]}, bounds"] = f"{100 * least:.1f} to {100 * most:.1f}"
        if against in names(cells):
            line[f"minus {against}"] = _percent(compare(cells, row, against, measures[0]).change)
        line |= {
            "seeds": len(own),
            "pairs": _mean([one.pairs for one in own]),
            "generated": _mean([one.tokens for one in own]),
        }
        line |= {"tokens an answer": _mean([one.answer_tokens for one in own])}
        line["judged"] = (
            f"{100 * min((coverage(cells, row, measure) for measure in measures), default=1.0):.1f} %"
        )
        failed = [
            f"seed {one.seed}: {one.failed}" for one in cells if one.row == row and one.failed
        ]
        lines.append(line | {"failed": "; ".join(failed)})
    return lines


MEASURES = {
    "trace harm": "harmful traces",
    "answer harm": "harmful answers",
    "refused": "benign refused",
    "correct": "right answers",
}


def markdown(cells: Sequence[Cell], against: str = "DPO on Part") -> list[str]:
    """A table for a page: one line a row, percent with 95 % intervals over prompts and seeds (below six seeds: the range);
    differences are from the row ``against``, or from the first where there is none of that name."""
    against = against if against in names(cells) else names(cells)[0]
    head = [
        "method",
        *MEASURES.values(),
        f"harmful traces minus {against}",
        "tokens to make",
        "seeds",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in names(cells):
        own = done(cells, row)
        shares = [_percent(rate(cells, row, measure)) for measure in MEASURES]
        change = (
            _percent(compare(cells, row, against, next(iter(MEASURES))).change)
            if row != against
            else ""
        )
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
        lines.append(
            {
                "row": row,
                **{
                    key: round(float(np.mean([one[key] for one in own if key in one])), 3)
                    for key in keys
                },
            }
        )
    return lines


def steps(cells: Sequence[Cell]) -> dict[str, list[tuple[float, float]]]:
    """By row GRPO's (tokens generated so far, mean reward) of every step and seed, where a row has any."""
    found = {
        row: sorted(step for one in done(cells, row) for step in one.steps) for row in names(cells)
    }
    return {row: own for row, own in found.items() if own}


def against_tokens(
    cells: Sequence[Cell], rows: Sequence[str], measure: str
) -> list[tuple[float, Interval]]:
    """(tokens generated to make it, rate) of each row that has a cell, in rising order of tokens."""
    there = [row for row in rows if done(cells, row)]
    points = [
        (_mean([one.tokens for one in done(cells, row)]), rate(cells, row, measure))
        for row in there
    ]
    return sorted(points, key=lambda point: point[0])


@dataclass(frozen=True)
class RowDifference:
    """``row`` minus ``other`` on one measure, over prompts and the seeds that both have.

    ``p`` is the larger of two: signs of the prompts' mean differences flipped at random, and Student's t
    over the seeds' differences. A difference that only prompts, or only seeds, can tell from 0 is none.
    """

    row: str
    other: str
    measure: str
    change: Interval  # its range below six seeds
    by_seed: tuple[float, ...]  # the mean difference in each seed
    p: float
    coverage: float = 1.0  # the lower of the two rows' shares of judged responses


def compare(
    cells: Sequence[Cell], row: str, other: str, measure: str, against: str = ""
) -> RowDifference:
    """The paired difference of two rows by prompt and seed.

    Args:
        cells: of a table.
        row: its row.
        other: the row that is taken off.
        measure: of ``row``.
        against: the other row's measure, if it is not the same.
    """
    common = sorted({*seeds(cells, row)} & {*seeds(cells, other)})
    minus, own = (
        by_seed(cells, other, against or measure, common),
        by_seed(cells, row, measure, common),
    )
    shares = [coverage(cells, other, against or measure), coverage(cells, row, measure)]
    return compared(row, other, measure, np.array(own) - np.array(minus), min(shares))


def compared(
    row: str, other: str, measure: str, differences: Any, coverage: float = 1.0, widest: float = 1.0
) -> RowDifference:
    """A comparison from the differences by seed and prompt.

    Args:
        row, other, measure: what is compared.
        differences: [seeds, prompts], nan where there is none.
        coverage: the share of responses that were judged.
        widest: differences lie within this much of 0.
    """
    table = np.array(differences, dtype=float)
    if not table.size:
        return RowDifference(
            row,
            other,
            measure,
            Interval(math.nan, -widest, widest, 0, "no prompts"),
            (),
            1.0,
            coverage,
        )
    known = table[:, ~np.isnan(table).all(axis=0)]
    every = tuple(float(np.nanmean(one)) if not np.isnan(one).all() else math.nan for one in known)
    over_prompts = sign_flip(np.nanmean(known, axis=0).tolist()) if known.size else 1.0
    return RowDifference(
        row,
        other,
        measure,
        two_way(table.tolist(), (-widest, widest)),
        every,
        max(over_prompts, seed_p(every)),
        coverage,
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 under random signs, by permutation; 1 where nothing differs."""
    if not any(differences):
        return 1.0
    found = scipy_stats.permutation_test(
        (np.array(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        rng=0,
        vectorized=True,
    )
    return float(found.pvalue)


def located(
    found: Sequence[Divergence], row: str, other: str = "", matched: bool = False
) -> RowDifference:
    """KL where S changes most minus elsewhere, in nats a token, over prompts and seeds.

    Args:
        found: how far each model moved.
        row: the model's name.
        other: a model whose own number is taken off, such as one trained on pairs cut at random.
        matched: "elsewhere" is the same place in other traces, not the rest of the trace.
    """
    own = _where(found, row, matched)
    if not other:
        return compared(row, "", "KL", _table(own, sorted(own), own), widest=FAR)
    minus = _where(found, other, matched)
    common = sorted(own.keys() & minus.keys())
    sides = [_table(one, common, own) for one in (own, minus)]
    return compared(row, other, "KL", sides[0] - sides[1] if common else [], widest=FAR)


def _where(found: Sequence[Divergence], row: str, matched: bool) -> dict[int, dict[str, float]]:
    """By seed and prompt how much more KL there is where S changes most."""
    rows = {
        one.seed: dict(one.matched if matched else one.where) for one in found if one.row == row
    }
    return {seed: own for seed, own in rows.items() if own}


def _table(
    by_seed: Mapping[int, Mapping[str, float]],
    seeds: Sequence[int],
    like: Mapping[int, Mapping[str, float]],
) -> Any:
    """[seeds, prompts] of the prompts that any seed of ``like`` has."""
    prompts = sorted({prompt for own in like.values() for prompt in own})
    return np.array(
        [[by_seed[seed].get(prompt, math.nan) for prompt in prompts] for seed in seeds], dtype=float
    )


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim: ``row`` is said to have ``less`` of ``measure`` than ``other`` (of ``against``, if that is
    another). ``kind``: of claim, by which a profile says whether its world was built to show it."""

    row: str
    other: str
    measure: str
    less: bool = True
    against: str = ""
    kind: str = "harm after training"


def claims() -> dict[str, list[Comparison]]:
    """The paper's claims about methods, each as comparisons of rows."""
    return {
        name: [from_json(Comparison, one) for one in own]
        for name, own in read_studies()["claims"].items()
    }


def judged(cells: Sequence[Cell], moves: Sequence[Divergence]) -> list[dict[str, Any]]:
    """The paper's claims with every comparison behind them and what they come to by the rule of ``verdicts``."""
    found: dict[str, list[tuple[RowDifference, bool]]] = {}
    for name, own in (known_claims := claims()).items():
        moved_rows = {one.row for one in moves}
        known = [
            one
            for one in own
            if {one.row, *([one.other] if one.other else [])}
            <= (moved_rows if one.measure == "KL" else {*names(cells)})
        ]
        if len(known) == len(own):
            found[name] = [
                (
                    located(moves, one.row, one.other)
                    if one.measure == "KL"
                    else compare(cells, one.row, one.other, one.measure, one.against),
                    one.less,
                )
                for one in known
            ]
    said = verdicts(found)
    return [
        {
            "claim": name,
            "verdict": said[name],
            "row": one.row,
            "minus": one.other or "elsewhere",
            "measure": one.measure,
            "change": one.change,
            "by seed": [round(value, 3) for value in one.by_seed],
            "p": round(one.p, 4),
            "kind": known_claims[name][0].kind,
        }
        for name, own in found.items()
        for one, _ in own
    ]


def verdicts(claims: Mapping[str, Sequence[tuple[RowDifference, bool]]]) -> dict[str, str]:
    """What each claim comes to. A claim is comparisons with whether the row is said to have *less*: it holds if in each the sign
    is as said in all seeds, at least SEEDS of them, the interval over prompts and seeds excludes 0, the larger p survives Holm
    over all comparisons of all claims and COVERED of the responses were judged; it is the other way round if one of them is; else
    it is undecided."""
    every = sorted((one.p, id(one)) for own in claims.values() for one, _ in own)
    passed: set[int] = set()
    for place, (p, key) in enumerate(every):
        if p > LEVEL / (len(every) - place):
            break
        passed.add(key)

    def decided(one: RowDifference, less: bool) -> str:
        sign = -1 if less else 1
        signs = {
            math.copysign(1, value * sign) if value else 0
            for value in one.by_seed
            if not math.isnan(value)
        }
        clear = (
            id(one) in passed and (one.change.high < 0 or one.change.low > 0) and len(signs) == 1
        )
        clear = clear and len(one.by_seed) >= SEEDS and one.coverage >= COVERED
        return UNDECIDED if not clear or 0 in signs else HOLDS if 1 in signs else OTHER_WAY

    said = {}
    for name, own in claims.items():
        found = [decided(one, less) for one, less in own]
        said[name] = (
            OTHER_WAY
            if OTHER_WAY in found
            else HOLDS
            if found and set(found) == {HOLDS}
            else UNDECIDED
        )
    return said
