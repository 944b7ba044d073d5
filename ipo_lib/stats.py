"""Rates, differences and agreements, each with its confidence interval and its n.

1. The prompt is the unit of sampling: several draws of one prompt resemble each other. So a pooled
   rate is the mean of the prompts' rates, and its interval is over prompts.
2. The difference of two rates is paired by prompt: the mean of the prompts' differences.
3. A training method varies with its training seed, too: ``two_way`` counts prompts and seeds.
4. ``verdict`` and ``no_difference`` say what an interval means for a claim.
5. The sample sizes needed to show an effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special  # type: ignore[import-untyped, unused-ignore]

from ipo_lib.records import BadInput

Tally = Sequence[tuple[int, int]]  # (k, n) of each prompt
Limits = tuple[float, float]
FEW_PROMPTS = 30  # with fewer, bootstrap intervals are too narrow: Student's t instead
DECIMALS = 12  # means are compared after rounding to so many
NEARLY_ONE = 1 - 1e-15  # keeps Fisher's z of a perfect correlation finite
HOLDS, UNDECIDED, OTHER_WAY = "holds", "undecided", "the other way round"  # outcomes of a claim
WITHIN = "within the margin"  # another outcome: on no side for sure, but surely near
SEEDS = 6  # with fewer training seeds a method has a range and no interval
RANGE = "range of "  # begins the `method` of such a range
LARGEST_N = 10_000  # the search for a sample size ends here


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; rates are in [0, 1]."""

    value: float
    low: float
    high: float
    n: int  # trials or points; prompts, if pooled
    method: str


# ---------------------------------------------------------------------- one rate


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """The rate ``k / n`` with the Wilson score interval; nan and [0, 1] at n = 0."""
    _check_counts(k, n, confidence)
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0, "wilson")
    z = float(special.ndtri((1 + confidence) / 2))
    centre = (k + z * z / 2) / (n + z * z)
    spread = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    low = centre - spread if k else 0.0
    high = centre + spread if k < n else 1.0
    return Interval(k / n, low, high, n, "wilson")


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """The rate ``k / n`` with the exact interval, which covers at least at ``confidence``."""
    _check_counts(k, n, confidence)
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(k / n if n else math.nan, low, high, n, "clopper-pearson")


def newcombe(before: tuple[int, int], after: tuple[int, int]) -> Interval:
    """The difference of two rates, ``after`` minus ``before``, of independent draws.

    Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10).

    Args:
        before: (k, n) of the one.
        after: (k, n) of the other.
    """
    one, two = wilson(*before), wilson(*after)
    value = two.value - one.value
    below = math.hypot(two.value - two.low, one.high - one.value)
    above = math.hypot(two.high - two.value, one.value - one.low)
    return Interval(value, value - below, value + above, min(one.n, two.n), "newcombe")


# ---------------------------------------------------------------------- over prompts


def mean(
    values: Iterable[float],
    limits: Limits = (-1.0, 1.0),
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of one number per prompt, with its interval over prompts.

    Args:
        values: one number per prompt, in any order; nan is left out.
        limits: the numbers lie between these two.
        confidence: of the interval.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        The mean, with a BCa bootstrap interval; with Student's t below ``FEW_PROMPTS`` prompts;
        with an interval after Clopper-Pearson if all values are equal. ``n`` counts prompts.
    """
    rounded = [round(value, DECIMALS) for value in values if not math.isnan(value)]
    distinct, counts = np.unique(rounded, return_counts=True)
    n = int(counts.sum())
    _check_counts(0, n, confidence)
    if n == 0:
        return Interval(math.nan, *limits, 0, "no prompts")
    estimate = float(counts @ distinct) / n
    if len(distinct) == 1:
        # Equal values have no spread. As large a share of prompts as 0 of n does not exclude could
        # lie at either limit.
        unseen = clopper_pearson(0, n, confidence).high
        low, high = (estimate + unseen * (limit - estimate) for limit in limits)
        return Interval(estimate, low, high, n, "clopper-pearson on prompts")
    tail = (1 - confidence) / 2
    squares = float(counts @ (distinct - estimate) ** 2)
    if n < FEW_PROMPTS:
        spread = float(special.stdtrit(n - 1, 1 - tail)) * math.sqrt(squares / (n - 1) / n)
        return _clipped(estimate, spread, limits, n, "t on prompts")
    # BCa bootstrap (Efron 1987). To draw prompts with replacement is to draw how often each
    # distinct value comes.
    draws = np.random.default_rng(seed).multinomial(n, counts / n, resamples)
    means = draws @ distinct / n
    below = (1 - np.sign((means - estimate).round(DECIMALS)).mean()) / 2
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    shifted = bias + special.ndtri([tail, 1 - tail])
    cubes = float(counts @ (distinct - estimate) ** 3)
    levels = special.ndtr(bias + shifted / (1 - shifted * cubes / (6 * squares**1.5)))
    low, high = np.quantile(means, levels)
    return Interval(estimate, float(low), float(high), n, "bootstrap over prompts")


def pooled_rate(k_by_prompt: Tally, **options: Any) -> Interval:
    """The mean of the prompts' rates k / n, all prompts with one weight; without prompts of n = 0.

    ``options`` are those of ``mean``, which also says what interval it is.
    """
    return mean([wilson(k, n).value for k, n in k_by_prompt], (0.0, 1.0), **options)


def paired_difference(before: Tally, after: Tally, **options: Any) -> Interval:
    """The mean over prompts of the rate after minus the rate before, in [-1, 1].

    The prompts are the same, in the same order. Those without a judged draw on either side are left
    out. ``options`` are those of ``mean``.
    """
    _check_lengths("paired difference", before, after)
    pairs = zip(before, after, strict=True)
    return mean([wilson(*new).value - wilson(*old).value for old, new in pairs], **options)


# ---------------------------------------------------------------------- over prompts and seeds


def two_way(values: Sequence[Sequence[float]], limits: Limits = (-1.0, 1.0)) -> Interval:
    """The mean of one number per prompt and training seed, with its interval over both.

    Args:
        values: for each seed one number per prompt, the same prompts; nan where there is none.
        limits: the numbers lie between these two.

    Returns:
        From ``SEEDS`` seeds on: Student's t, where the variance of the mean is the sum of what
        prompts, seeds and the rest contribute (each at least 0), with Satterthwaite's degrees of
        freedom. With two to five seeds: their range, which is no interval. With one seed: the
        interval over prompts. ``n`` counts prompts. For the difference of two methods, give their
        differences as values.
    """
    table = _fill_holes(np.array([list(row) for row in values], dtype=float))
    seeds, prompts = table.shape
    if seeds == 1 or prompts == 0:
        return mean(table[0].tolist(), limits)
    by_seed, by_prompt = table.mean(axis=1), table.mean(axis=0)
    value = float(by_seed.mean())
    if seeds < SEEDS:
        low, high = float(by_seed.min()), float(by_seed.max())
        return Interval(value, low, high, prompts, f"{RANGE}{seeds} seeds")

    # 1. Mean squares of seeds, of prompts and of the rest, each over the number of values.
    seed_square = float(((by_seed - value) ** 2).sum()) / (seeds * (seeds - 1))
    rest = prompt_square = 0.0
    if prompts > 1:
        residuals = table - by_seed[:, None] - by_prompt[None, :] + value
        rest = float((residuals**2).sum()) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
        prompt_square = float(((by_prompt - value) ** 2).sum()) / (prompts * (prompts - 1))
    if seed_square + prompt_square == 0:  # nothing varies: as for prompts of one rate
        return mean(by_prompt.tolist(), limits)

    # 2. The variance of the mean, by component.
    prompt_part, seed_part = max(prompt_square - rest, 0.0), max(seed_square - rest, 0.0)
    variance = prompt_part + seed_part + rest

    # 3. Satterthwaite's degrees of freedom, at least those of the seeds.
    denominator = seed_part * seed_square / (seeds - 1)
    if prompts > 1:
        of_rest = rest**2 / ((seeds - 1) * (prompts - 1))
        denominator += prompt_part * prompt_square / (prompts - 1) + of_rest
    freedom = max(variance**2 / denominator, seeds - 1) if denominator else float(seeds - 1)
    spread = float(special.stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return _clipped(value, spread, limits, prompts, f"t over prompts and {seeds} seeds")


def _fill_holes(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The table [seeds, prompts] without prompts that have no number, and holes filled.

    A hole gets the mean of its row plus the mean of its column minus the mean of all.
    """
    if table.ndim != 2 or table.size == 0:
        return np.zeros((max(len(table), 1), 0))
    table = table[:, ~np.isnan(table).all(axis=0)]
    holes = np.isnan(table)
    if not holes.any():
        return table
    rows = np.array([np.nanmean(row) if not np.isnan(row).all() else np.nan for row in table])
    columns, whole = np.nanmean(table, axis=0), np.nanmean(table)
    guesses = np.where(np.isnan(rows), whole, rows)[:, None] + columns[None, :] - whole
    return np.where(holes, guesses, table)


def seed_p(by_seed: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that the mean over training seeds is 0, by Student's t.

    It is 1 with fewer than two seeds and where all values are 0; nan is left out.
    """
    values = np.array([value for value in by_seed if not math.isnan(value)], dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    if spread == 0:
        return 0.0
    return float(2 * special.stdtr(len(values) - 1, -abs(float(values.mean())) / spread))


# ---------------------------------------------------------------------- claims


def verdict(
    value: Interval, above: bool = True, than: float = 0.0, small: float | None = None
) -> str:
    """Whether the claim that a number lies above ``than`` holds (below, if not ``above``).

    ``holds`` or ``the other way round`` if the whole interval lies on one side, however near. If
    ``than`` is in the interval, ``within the margin`` if all of it is within ``small`` of ``than``,
    else ``undecided``. A range of a few seeds decides nothing.

    Args:
        value: the number with its interval.
        above: the claim says above; False: below.
        than: what the number is compared with.
        small: the margin. It changes no ``holds`` and no ``the other way round``. None: there is
            none.
    """
    if _decides_nothing(value):
        return UNDECIDED
    if value.low <= than <= value.high:
        within = small is not None and than - small <= value.low and value.high <= than + small
        return WITHIN if within else UNDECIDED
    return HOLDS if (value.low > than) == above else OTHER_WAY


def no_difference(value: Interval, margin: float) -> str:
    """Whether the claim of no difference holds: if the interval lies within ``margin`` of 0.

    ``the other way round`` if it lies wholly outside, else ``undecided``: that no difference was
    seen does not show that there is none.
    """
    if _decides_nothing(value):
        return UNDECIDED
    if -margin <= value.low and value.high <= margin:
        return HOLDS
    return OTHER_WAY if value.low > margin or value.high < -margin else UNDECIDED


def _decides_nothing(value: Interval) -> bool:
    return math.isnan(value.value) or value.method.startswith(RANGE)


# ---------------------------------------------------------------------- sample sizes


def power_of_mean(spread: float, n: int, effect: float) -> float:
    """The probability that the 95 % t interval of a mean excludes 0.

    ``spread`` is the standard deviation of one of ``n`` values, ``effect`` the true mean.
    """
    if n < 2 or math.isnan(spread):
        return 0.0
    if spread == 0:
        return 1.0
    bound = float(special.stdtrit(n - 1, 0.975))
    shift = abs(effect) / spread * math.sqrt(n)
    return float(1 - special.nctdtr(n - 1, shift, bound) + special.nctdtr(n - 1, shift, -bound))


def needed_for_mean(spread: float, effect: float, power: float = 0.8) -> int | None:
    """The number of values that show a mean of ``effect``; None if ``LARGEST_N`` are too few."""
    sizes = range(2, LARGEST_N)
    return next((n for n in sizes if power_of_mean(spread, n, effect) >= power), None)


def needed_for_rate(threshold: float) -> int:
    """The number of trials, all successes, that show a rate above ``threshold`` in [0, 1)."""
    if not 0 <= threshold < 1:
        raise BadInput(
            f"rate above {threshold}: no number of trials can show it; give a threshold in [0, 1)"
        )
    return next(n for n in range(1, LARGEST_N**2) if clopper_pearson(n, n).low > threshold)


def needed_for_correlation(r: float, other: float, power: float = 0.8) -> int | None:
    """The number of points that tell a correlation ``r`` from a fixed ``other``, by Fisher's z.

    None if the two are equal.
    """
    z, other_z = np.arctanh(np.clip([r, other], -NEARLY_ONE, NEARLY_ONE))
    gap = float(abs(z - other_z))
    if not gap or math.isnan(gap):
        return None
    wanted = float(special.ndtri(0.975) + special.ndtri(power))
    return max(4, math.ceil(3 + (wanted / gap) ** 2))


# ---------------------------------------------------------------------- agreement


def kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Cohen's kappa of two labellings; nan if chance alone agrees everywhere, or without labels."""
    _check_lengths("kappa", a, b)
    n = len(a)
    agreed = sum(left == right for left, right in zip(a, b, strict=True))
    chance = sum(a.count(label) * b.count(label) for label in set(a))  # times n squared: exact
    return (n * agreed - chance) / (n * n - chance) if n * n > chance else math.nan


def pearson(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Pearson's r with Fisher's z interval; nan if a side does not vary.

    Below four points the interval is [-1, 1].
    """
    _check_lengths("pearson", x, y)
    n = len(x)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Interval(math.nan, -1.0, 1.0, n, "fisher z")
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -NEARLY_ONE, NEARLY_ONE))
    spread = float(special.ndtri(0.975)) / math.sqrt(n - 3) if n > 3 else math.inf
    low, high = math.tanh(math.atanh(r) - spread), math.tanh(math.atanh(r) + spread)
    return Interval(r, low, high, n, "fisher z")


# ---------------------------------------------------------------------- text


def format_interval(interval: Interval, percent: bool = True) -> str:
    """An interval as text: ``62.5 % [55.1, 69.2], n=128`` or ``0.625 [0.551, 0.692], n=128``.

    The range of a few seeds reads ``62.5 % (55.1 to 69.2 in 3 seeds), n=128``.
    """
    if math.isnan(interval.value):
        return f"unknown, n={interval.n}"
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    numbers = []
    for number in (interval.value, interval.low, interval.high):
        numbers.append(f"{round(scale * number, digits) + 0.0:.{digits}f}")  # + 0.0: no "-0.0"
    value, low, high = numbers
    if interval.method.startswith(RANGE):
        seeds = interval.method.removeprefix(RANGE)
        return f"{value}{unit} ({low} to {high} in {seeds}), n={interval.n}"
    return f"{value}{unit} [{low}, {high}], n={interval.n}"


def _clipped(value: float, spread: float, limits: Limits, n: int, method: str) -> Interval:
    low, high = max(value - spread, limits[0]), min(value + spread, limits[1])
    return Interval(value, low, high, n, method)


def _check_counts(k: int, n: int, confidence: float) -> None:
    if not (0 <= k <= n and 0 < confidence < 1):
        raise BadInput(
            f"stats: {k} of {n} at confidence {confidence}; give 0 <= k <= n and 0 < confidence < 1"
        )


def _check_lengths(what: str, a: Sequence[Any], b: Sequence[Any]) -> None:
    if len(a) != len(b):
        raise BadInput(
            f"{what}: {len(a)} values against {len(b)}; "
            "give both for the same items in the same order"
        )
