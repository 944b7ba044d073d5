"""Rates, differences and agreements, each with its interval and its n (law 5). The prompt is the sampling unit: draws
of one prompt are alike, so whatever is pooled is resampled by prompt. A pooled rate is the mean of the prompts' rates,
so that a paired difference is exactly the difference of the two rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special  # type: ignore[import-untyped, unused-ignore]

from ipo_lib.records import BadInput

Tally = Sequence[tuple[int, int]]  # (k, n) of every prompt
FEW_PROMPTS = 30  # below this many, quantiles of a bootstrap are too narrow: Student's t instead
DECIMALS = 12  # that count when means are compared
NEARLY_ONE = 1 - 1e-15  # keeps Fisher's z of a perfect correlation finite
HOLDS, UNDECIDED, OTHER_WAY = "holds", "undecided", "the other way round"  # what a claim comes to
SEEDS = 6  # training seeds from which a method has an interval; fewer have a range
RANGE = "range of "  # how the method of an interval begins that is only the range of a few seeds
LARGEST_N = 10_000  # where the search for a sample size gives up


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; rates in [0, 1]. ``n`` counts trials, points or, if pooled, prompts."""

    value: float
    low: float
    high: float
    n: int
    method: str


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """``k`` of ``n`` with the Wilson score interval; nan and [0, 1] at n = 0. Raises BadInput unless 0 <= k <= n."""
    _check(k, n, confidence)
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0, "wilson")
    z = float(special.ndtri((1 + confidence) / 2))
    centre, spread = (
        (k + z * z / 2) / (n + z * z),
        z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z),
    )
    return Interval(
        k / n, centre - spread if k else 0.0, centre + spread if k < n else 1.0, n, "wilson"
    )


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """``k`` of ``n`` with the exact (Clopper-Pearson) interval: covers at least ``confidence`` at any rate."""
    _check(k, n, confidence)
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(k / n if n else math.nan, low, high, n, "clopper-pearson")


def pooled_rate(
    k_by_prompt: Tally, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of the prompts' rates ``k / n``, every prompt with the same weight; prompts with n = 0 are left out.
    BCa bootstrap over prompts; Student's t on the prompts' rates below 30 prompts; Clopper-Pearson on prompts when all
    prompts have one rate, as at 0 and 100 %. ``Interval.n`` counts the prompts that had a draw."""
    return _mean(
        [wilson(k, n).value for k, n in k_by_prompt], (0.0, 1.0), confidence, resamples, seed
    )


def paired_difference(
    before: Tally, after: Tally, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over prompts of rate after - rate before, in [-1, 1]; the same prompts in the same order on both sides.
    Prompts without a draw on either side are left out; intervals as in ``pooled_rate``."""
    _check_pairs("paired difference", before, after)
    differences = [
        wilson(*new).value - wilson(*old).value for old, new in zip(before, after, strict=True)
    ]
    return _mean(differences, (-1.0, 1.0), confidence, resamples, seed)


def _mean(
    x: list[float], limits: tuple[float, float], confidence: float, resamples: int, seed: int
) -> Interval:
    """The mean of one number per prompt and its interval in ``limits``; nan is left out, the order does not matter."""
    values, counts = np.unique(
        [round(one, DECIMALS) for one in x if not math.isnan(one)], return_counts=True
    )
    n, tail = int(counts.sum()), (1 - confidence) / 2
    _check(0, n, confidence)
    if n == 0:
        return Interval(math.nan, *limits, 0, "no prompts")
    value = float(counts @ values) / n
    if (
        len(values) == 1
    ):  # no spread to learn from: as many prompts as may go unseen could lie at either limit
        low, high = (
            value + clopper_pearson(0, n, confidence).high * (limit - value) for limit in limits
        )
        return Interval(value, low, high, n, "clopper-pearson on prompts")
    squares, cubes = (float(counts @ (values - value) ** power) for power in (2, 3))
    if n < FEW_PROMPTS:
        spread = float(special.stdtrit(n - 1, 1 - tail)) * math.sqrt(squares / (n - 1) / n)
        return Interval(
            value, max(value - spread, limits[0]), min(value + spread, limits[1]), n, "t on prompts"
        )
    # BCa (Efron 1987); drawing how often each distinct value comes is drawing prompts with replacement.
    means = np.random.default_rng(seed).multinomial(n, counts / n, resamples) @ values / n
    below = (1 - np.sign((means - value).round(DECIMALS)).mean()) / 2
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    shifted = bias + special.ndtri([tail, 1 - tail])
    low, high = np.quantile(
        means, special.ndtr(bias + shifted / (1 - shifted * cubes / (6 * squares**1.5)))
    )
    return Interval(value, float(low), float(high), n, "bootstrap over prompts")


def two_way(
    values: Sequence[Sequence[float]],
    limits: tuple[float, float] = (-1.0, 1.0),
    confidence: float = 0.95,
) -> Interval:
    """The mean of one number a prompt and training seed, and its interval over both.

    Args:
        values: by seed, one number for each of the same prompts; nan where there is none.
        limits: the numbers lie between these.
        confidence: of the interval.

    Returns:
        With ``SEEDS`` seeds or more: the variance of the mean is the sum of what prompts, seeds and the
        rest contribute (none below 0), with Student's t on Satterthwaite's degrees of freedom. With two
        to five seeds: their range, and no interval. With one: the interval over prompts. ``n`` counts
        prompts. The difference of two methods is the mean of their differences by seed and prompt.
    """
    table = _filled(np.array([list(row) for row in values], dtype=float))
    seeds, prompts = table.shape
    if seeds == 1 or prompts == 0:
        return _mean(table[0].tolist() if seeds else [], limits, confidence, 2000, 0)
    by_seed = table.mean(axis=1)
    value = float(by_seed.mean())
    if seeds < SEEDS:
        return Interval(
            value, float(by_seed.min()), float(by_seed.max()), prompts, f"{RANGE}{seeds} seeds"
        )
    by_prompt = table.mean(axis=0)
    if prompts == 1:
        rest, of_prompts = 0.0, 0.0
    else:
        left = table - by_seed[:, None] - by_prompt[None, :] + value
        rest = float((left**2).sum()) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
        of_prompts = float(((by_prompt - value) ** 2).sum()) / (prompts * (prompts - 1))
    of_seeds = float(((by_seed - value) ** 2).sum()) / (seeds * (seeds - 1))
    if of_seeds + of_prompts == 0:  # nothing varies: as for prompts of one rate
        return _mean(by_prompt.tolist(), limits, confidence, 2000, 0)
    own_prompts, own_seeds = max(of_prompts - rest, 0.0), max(of_seeds - rest, 0.0)
    variance = own_prompts + own_seeds + rest
    freedom = own_seeds * of_seeds / (seeds - 1)
    if prompts > 1:
        freedom += own_prompts * of_prompts / (prompts - 1) + rest**2 / (
            (seeds - 1) * (prompts - 1)
        )
    degrees = max(variance**2 / freedom, seeds - 1) if freedom else float(seeds - 1)
    spread = float(special.stdtrit(degrees, (1 + confidence) / 2)) * math.sqrt(variance)
    low, high = max(value - spread, limits[0]), min(value + spread, limits[1])
    return Interval(value, low, high, prompts, f"t over prompts and {seeds} seeds")


def _filled(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The table without prompts that have no number at all; a hole is filled from its row's and its column's mean."""
    if table.ndim != 2 or table.size == 0:
        return np.zeros((max(len(table), 1), 0))
    table = table[:, ~np.isnan(table).all(axis=0)]
    holes = np.isnan(table)
    if not holes.any():
        return table
    rows = np.array([np.nanmean(row) if not np.isnan(row).all() else np.nan for row in table])
    columns, whole = np.nanmean(table, axis=0), np.nanmean(table)
    guess = np.where(np.isnan(rows), whole, rows)[:, None] + columns[None, :] - whole
    return np.where(holes, guess, table)


def seed_p(by_seed: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 by Student's t over seeds; 1 with fewer than two seeds or where nothing differs."""
    values = np.array([one for one in by_seed if not math.isnan(one)], dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    if spread == 0:
        return 0.0
    return float(2 * special.stdtr(len(values) - 1, -abs(float(values.mean())) / spread))


def verdict(value: Interval, above: bool = True, than: float = 0.0) -> str:
    """What the claim that a number lies above ``than`` (below it, if not ``above``) comes to.

    ``holds`` or ``the other way round`` where the whole interval lies on that side, else ``undecided``;
    a range of a few seeds decides nothing.
    """
    if math.isnan(value.value) or value.method.startswith(RANGE):
        return UNDECIDED
    if value.low > than:
        return HOLDS if above else OTHER_WAY
    if value.high < than:
        return OTHER_WAY if above else HOLDS
    return UNDECIDED


def no_difference(value: Interval, margin: float) -> str:
    """What the claim of no difference comes to: ``holds`` where the interval lies within ``margin`` of 0.

    ``the other way round`` where it lies wholly outside, else ``undecided``: not to see a difference is
    not to have shown that there is none.
    """
    if math.isnan(value.value) or value.method.startswith(RANGE):
        return UNDECIDED
    if -margin <= value.low and value.high <= margin:
        return HOLDS
    return OTHER_WAY if value.low > margin or value.high < -margin else UNDECIDED


def power_of_mean(spread: float, n: int, effect: float, confidence: float = 0.95) -> float:
    """The probability that a t interval of a mean excludes 0.

    Args:
        spread: standard deviation of one value.
        n: number of values.
        effect: the true mean.
        confidence: of the interval.
    """
    if n < 2 or math.isnan(spread):
        return 0.0
    if spread == 0:
        return 1.0
    bound = float(special.stdtrit(n - 1, (1 + confidence) / 2))
    shift = abs(effect) / spread * math.sqrt(n)
    return float(1 - special.nctdtr(n - 1, shift, bound) + special.nctdtr(n - 1, shift, -bound))


def needed_for_mean(spread: float, effect: float, power: float = 0.8) -> int | None:
    """How many values show a mean of ``effect`` with this power; None where ``LARGEST_N`` do not."""
    return next((n for n in range(2, LARGEST_N) if power_of_mean(spread, n, effect) >= power), None)


def needed_for_rate(threshold: float, confidence: float = 0.95) -> int:
    """How many trials, all of them successes, show that a rate is above ``threshold`` in [0, 1)."""
    if not 0 <= threshold < 1:
        raise BadInput(
            f"rate above {threshold}: no number of trials can show it; give a threshold in [0, 1)"
        )
    return next(
        n for n in range(1, LARGEST_N**2) if clopper_pearson(n, n, confidence).low > threshold
    )


def needed_for_correlation(
    r: float, other: float, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """How many pairs tell a correlation of ``r`` from a known one of ``other``, by Fisher's z; None where they are equal."""
    gap = abs(
        math.atanh(np.clip(r, -NEARLY_ONE, NEARLY_ONE))
        - math.atanh(np.clip(other, -NEARLY_ONE, NEARLY_ONE))
    )
    if not gap or math.isnan(gap):
        return None
    wanted = float(special.ndtri((1 + confidence) / 2) + special.ndtri(power))
    return max(4, math.ceil(3 + (wanted / gap) ** 2))


def mean(
    values: Sequence[float],
    limits: tuple[float, float] = (-1.0, 1.0),
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of one number a prompt, each within ``limits``; nan is left out, intervals as in ``pooled_rate``."""
    return _mean(list(values), limits, confidence, resamples, seed)


def detection(found: Sequence[int | None], truth: Sequence[int | None]) -> dict[str, Interval]:
    """How well a detector finds the one place (an index, or None) per item: ``precision``, the share of its finds that are at
    the true place, and ``recall``, the share of true places found; Wilson intervals, so one item a prompt, please."""
    _check_pairs("detection", found, truth)
    hits = sum(a is not None and a == b for a, b in zip(found, truth, strict=True))
    sides = {"precision": found, "recall": truth}
    return {
        name: wilson(hits, sum(one is not None for one in side)) for name, side in sides.items()
    }


def kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Cohen's kappa of two labellings; nan when chance alone agrees everywhere (or nothing was labelled)."""
    _check_pairs("kappa", a, b)
    n, agreed = len(a), sum(x == y for x, y in zip(a, b, strict=True))
    chance = sum(a.count(label) * b.count(label) for label in set(a))  # times n squared, exact
    return (n * agreed - chance) / (n * n - chance) if n * n > chance else math.nan


def pearson(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Interval:
    """Pearson's r in [-1, 1] with Fisher's z interval; nan when a side does not vary, [-1, 1] below four points."""
    _check_pairs("pearson", x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Interval(math.nan, -1.0, 1.0, len(x), "fisher z")
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -NEARLY_ONE, NEARLY_ONE))
    spread = (
        float(special.ndtri((1 + confidence) / 2)) / math.sqrt(len(x) - 3)
        if len(x) > 3
        else math.inf
    )
    return Interval(
        r, math.tanh(math.atanh(r) - spread), math.tanh(math.atanh(r) + spread), len(x), "fisher z"
    )


def format_interval(i: Interval, percent: bool = True) -> str:
    """``62.5 % [55.1, 69.2], n=128``, or ``0.625 [0.551, 0.692], n=128``; ``unknown, n=0`` without a value; and for a range of
    a few seeds ``62.5 % (55.1 to 69.2 in 3 seeds), n=128``."""
    if math.isnan(i.value):
        return f"unknown, n={i.n}"
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    value, low, high = (
        f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in (i.value, i.low, i.high)
    )  # no "-0.0"
    if i.method.startswith(RANGE):
        return f"{value}{unit} ({low} to {high} in {i.method.removeprefix(RANGE)}), n={i.n}"
    return f"{value}{unit} [{low}, {high}], n={i.n}"


def _check(k: int, n: int, confidence: float) -> None:
    if not (0 <= k <= n and 0 < confidence < 1):
        raise BadInput(
            f"stats: {k} of {n} at confidence {confidence}; give 0 <= k <= n and 0 < confidence < 1"
        )


def _check_pairs(what: str, a: Sequence[Any], b: Sequence[Any]) -> None:
    if len(a) != len(b):
        raise BadInput(
            f"{what}: {len(a)} values against {len(b)}; give both for the same items in the same order"
        )
