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
    centre, spread = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return Interval(k / n, centre - spread if k else 0.0, centre + spread if k < n else 1.0, n, "wilson")


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """``k`` of ``n`` with the exact (Clopper-Pearson) interval: covers at least ``confidence`` at any rate."""
    _check(k, n, confidence)
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(k / n if n else math.nan, low, high, n, "clopper-pearson")


def pooled_rate(k_by_prompt: Tally, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of the prompts' rates ``k / n``, every prompt with the same weight; prompts with n = 0 are left out.
    BCa bootstrap over prompts; Student's t on the prompts' rates below 30 prompts; Clopper-Pearson on prompts when all
    prompts have one rate, as at 0 and 100 %. ``Interval.n`` counts the prompts that had a draw."""
    return _mean([wilson(k, n).value for k, n in k_by_prompt], (0.0, 1.0), confidence, resamples, seed)


def paired_difference(before: Tally, after: Tally, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over prompts of rate after - rate before, in [-1, 1]; the same prompts in the same order on both sides.
    Prompts without a draw on either side are left out; intervals as in ``pooled_rate``."""
    _check_pairs("paired difference", before, after)
    differences = [wilson(*new).value - wilson(*old).value for old, new in zip(before, after, strict=True)]
    return _mean(differences, (-1.0, 1.0), confidence, resamples, seed)


def _mean(x: list[float], limits: tuple[float, float], confidence: float, resamples: int, seed: int) -> Interval:
    """The mean of one number per prompt and its interval in ``limits``; nan is left out, the order does not matter."""
    values, counts = np.unique([round(one, DECIMALS) for one in x if not math.isnan(one)], return_counts=True)
    n, tail = int(counts.sum()), (1 - confidence) / 2
    _check(0, n, confidence)
    if n == 0:
        return Interval(math.nan, *limits, 0, "no prompts")
    value = float(counts @ values) / n
    if len(values) == 1:  # no spread to learn from: as many prompts as may go unseen could lie at either limit
        low, high = (value + clopper_pearson(0, n, confidence).high * (limit - value) for limit in limits)
        return Interval(value, low, high, n, "clopper-pearson on prompts")
    squares, cubes = (float(counts @ (values - value) ** power) for power in (2, 3))
    if n < FEW_PROMPTS:
        spread = float(special.stdtrit(n - 1, 1 - tail)) * math.sqrt(squares / (n - 1) / n)
        return Interval(value, max(value - spread, limits[0]), min(value + spread, limits[1]), n, "t on prompts")
    # BCa (Efron 1987); drawing how often each distinct value comes is drawing prompts with replacement.
    means = np.random.default_rng(seed).multinomial(n, counts / n, resamples) @ values / n
    below = (1 - np.sign((means - value).round(DECIMALS)).mean()) / 2
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    shifted = bias + special.ndtri([tail, 1 - tail])
    low, high = np.quantile(means, special.ndtr(bias + shifted / (1 - shifted * cubes / (6 * squares**1.5))))
    return Interval(value, float(low), float(high), n, "bootstrap over prompts")


def mean(values: Sequence[float], limits: tuple[float, float] = (-1.0, 1.0), *, confidence: float = 0.95, resamples: int = 2000,
         seed: int = 0) -> Interval:  # fmt: skip
    """The mean of one number a prompt, each within ``limits``; nan is left out, intervals as in ``pooled_rate``."""
    return _mean(list(values), limits, confidence, resamples, seed)


def detection(found: Sequence[int | None], truth: Sequence[int | None]) -> dict[str, Interval]:
    """How well a detector finds the one place (an index, or None) per item: ``precision``, the share of its finds that are at
    the true place, and ``recall``, the share of true places found; Wilson intervals, so one item a prompt, please."""
    _check_pairs("detection", found, truth)
    hits = sum(a is not None and a == b for a, b in zip(found, truth, strict=True))
    sides = {"precision": found, "recall": truth}
    return {name: wilson(hits, sum(one is not None for one in side)) for name, side in sides.items()}


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
    spread = float(special.ndtri((1 + confidence) / 2)) / math.sqrt(len(x) - 3) if len(x) > 3 else math.inf
    return Interval(r, math.tanh(math.atanh(r) - spread), math.tanh(math.atanh(r) + spread), len(x), "fisher z")


def format_interval(i: Interval, percent: bool = True) -> str:
    """``62.5 % [55.1, 69.2], n=128``, or ``0.625 [0.551, 0.692], n=128``; ``unknown, n=0`` without a value."""
    if math.isnan(i.value):
        return f"unknown, n={i.n}"
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    value, low, high = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in (i.value, i.low, i.high))  # no "-0.0"
    return f"{value}{unit} [{low}, {high}], n={i.n}"


def _check(k: int, n: int, confidence: float) -> None:
    if not (0 <= k <= n and 0 < confidence < 1):
        raise BadInput(f"stats: {k} of {n} at confidence {confidence}; give 0 <= k <= n and 0 < confidence < 1")


def _check_pairs(what: str, a: Sequence[Any], b: Sequence[Any]) -> None:
    if len(a) != len(b):
        raise BadInput(f"{what}: {len(a)} values against {len(b)}; give both for the same items in the same order")
