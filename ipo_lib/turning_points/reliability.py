"""How well a recorded curve knows where its trace turns: the split-half reliability.

On a recorded curve, S comes from a dozen continuations at each token. So the turn has an error of
measurement, and whatever is correlated with it seems less correlated than it is (Spearman 1904).

1. The continuations at each token are split at random into two halves. Each half is a curve of its
   own, with a turn of its own.
2. r of these two turns, over traces, is the reliability of half a recording. That of the whole one
   is 2 r / (1 + r) (Spearman 1910, Brown 1910).
3. Nothing is correlated with the turn by more than the root of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ipo_lib.csr import CsrSettings
from ipo_lib.records import TurningPoint
from ipo_lib.stats import Interval
from ipo_lib.turning_points.benchmark import true_turns
from ipo_lib.turning_points.curves import Curve, Way


def split_in_halves(curve: Curve, random: np.random.Generator) -> tuple[Curve, Curve]:
    """Two curves of the same trace, each with half of the continuations at every token.

    Args:
        curve: a recorded curve; its weights are numbers of continuations.
        random: decides which continuation goes where.
    """
    halves: tuple[list[list[Way]], list[list[Way]]] = ([], [])
    for ways in curve.ways:
        weights = np.array([weight for weight, _, _ in ways], dtype=int)
        first = weights
        if len(ways):
            first = random.multivariate_hypergeometric(weights, int(weights.sum()) // 2)
        for half, counts in zip(halves, (first, weights - first), strict=True):
            kept = []
            for count, (_, safe, tokens) in zip(counts.tolist(), ways, strict=True):
                if count:
                    kept.append((float(count), safe, tokens))
            half.append(kept)
    first_half, second_half = halves
    return Curve(curve.trace, first_half), Curve(curve.trace, second_half)


def turns_by_halves(
    curves: Sequence[Curve], kind: str, csr: CsrSettings, random: np.random.Generator
) -> tuple[list[TurningPoint], list[TurningPoint]]:
    """The turning point of each curve by one random half of its continuations, and by the other.

    Args:
        curves: recorded curves.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule.
        random: decides which continuation goes where.
    """
    pairs = [split_in_halves(curve, random) for curve in curves]
    one, other = ([pair[side] for pair in pairs] for side in range(2))
    return true_turns(one, kind, csr), true_turns(other, kind, csr)


def turn_reliability(
    curves: Sequence[Curve],
    kind: str,
    csr: CsrSettings,
    splits: int = 4,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The reliability of turning points on recorded curves, between 0 and 1; nan without turns.

    Args:
        curves: recorded curves.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule.
        splits: random splits, over which r is averaged.
        resamples: bootstrap samples of the prompts.
        seed: of the splits and of the bootstrap.

    Returns:
        With a 95 % bootstrap interval; ``n`` counts the traces that turn in both halves of most
        splits.
    """
    random = np.random.default_rng(seed)
    # Tokens before the turn by each half, [2, splits, traces]; nan: no turn.
    turns = np.full((2, splits, len(curves)), np.nan)
    for split in range(splits):
        for side, found in enumerate(turns_by_halves(curves, kind, csr, random)):
            turns[side, split] = [np.nan if turn.sentence is None else turn.token for turn in found]
    value, drawn = _reliability(turns, np.ones(len(curves))), []
    prompts, prompt_of = np.unique([curve.prompt_id for curve in curves], return_inverse=True)
    for _ in range(resamples if len(prompts) else 0):
        often = random.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)))
        drawn.append(_reliability(turns, often[prompt_of].astype(float)))
    known = [one for one in drawn if not np.isnan(one)]
    low, high = np.quantile(known, (0.025, 0.975)).tolist() if known else (-1.0, 1.0)
    in_both = ~np.isnan(turns).any(0)
    n = int((in_both.mean(0) > 0.5).sum()) if len(curves) else 0
    return Interval(value, low, high, n, "bootstrap over prompts")


def _reliability(turns: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    """2 r / (1 + r) for the mean r over splits; traces count by their weight."""
    values = []
    for first, second in zip(*turns, strict=True):
        weight = np.where(np.isnan(first) | np.isnan(second), 0.0, weights)
        if not weight.any():
            continue
        x, y = np.nan_to_num(first), np.nan_to_num(second)
        x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
        spread = np.sqrt((weight @ x**2) * (weight @ y**2))
        if spread > 0:
            values.append(float(weight @ (x * y) / spread))
    r = float(np.mean(values)) if values else np.nan
    return 2 * r / (1 + r) if r > -1 else np.nan
