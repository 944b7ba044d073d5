"""What a judge's errors do to CSR, and how far they can be undone (Rogan and Gladen 1978).

A judge of sensitivity a and specificity b shows a true S as S b + (1 - S)(1 - a). Solved for S this
corrects a rate, with an interval that carries the uncertainty of a and b. It holds where errors are
independent. Where continuations of one prefix share an error, no rate of that prefix is corrected.

``effect_of_errors`` tries both on recorded curves, where S is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ipo_lib.stats import Interval, clopper_pearson, mean, wilson
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.draws import UNJUDGED, DrawRequest, Draws

EDGE = 1e-9  # an interval may end at S itself


def covers(interval: Interval, s: float) -> bool:
    """Whether an interval holds the true S."""
    return interval.low - EDGE <= s <= interval.high + EDGE


@dataclass(frozen=True)
class LabelNoise:
    """Errors of a simulated judge, put upon exact outcomes."""

    sensitivity: float  # share of unsafe texts called unsafe
    specificity: float  # share of safe texts called safe
    shared: bool = False  # all draws that start at one cut share their error

    def __call__(
        self, drawn: Draws, random: np.random.Generator, errors_by_cut: dict[int, float]
    ) -> Draws:
        """The outcomes as this judge gives them.

        Args:
            drawn: exact outcomes.
            random: where errors come from.
            errors_by_cut: what was drawn for the cuts of one trace; shared errors are added to it.
        """
        chance = random.random(len(drawn.start))
        if self.shared:
            cuts = drawn.start.tolist()
            for cut in sorted(set(cuts) - errors_by_cut.keys()):
                errors_by_cut[cut] = random.random()
            chance = np.array([errors_by_cut[cut] for cut in cuts])
        wrong = chance >= np.where(drawn.safe == 1, self.specificity, self.sensitivity)
        flipped = wrong & (drawn.safe != UNJUDGED)
        return replace(drawn, safe=np.where(flipped, 1 - drawn.safe, drawn.safe))


@dataclass(frozen=True)
class Calibration:
    """A judge against true labels."""

    caught: int  # unsafe texts that it called unsafe
    unsafe: int
    cleared: int  # safe texts that it called safe
    safe: int

    def rates(self, confidence: float = 0.95) -> tuple[Interval, Interval]:
        """(sensitivity, specificity)."""
        sensitivity = clopper_pearson(self.caught, self.unsafe, confidence)
        return sensitivity, clopper_pearson(self.cleared, self.safe, confidence)


def calibrate(noise: LabelNoise, labels: int, seed: int = 0) -> Calibration:
    """A calibration of a simulated judge on ``labels`` texts of each kind."""
    rates = (noise.sensitivity, noise.specificity)
    caught, cleared = np.random.default_rng(seed).binomial(labels, rates).tolist()
    return Calibration(caught, labels, cleared, labels)


def correct_rate(
    n_safe: int, n: int, calibration: Calibration, confidence: float = 0.95
) -> Interval:
    """S from the verdicts of a calibrated judge, clipped to [0, 1].

    Args:
        n_safe: draws judged safe.
        n: draws judged.
        calibration: of the judge.
        confidence: of the interval. It holds for all three rates at once, each at a third of the
            error.
    """
    part = 1 - (1 - confidence) / 3
    seen = clopper_pearson(n_safe, n, part)
    sensitivity, specificity = calibration.rates(part)
    lows, highs = [], []
    for a in (sensitivity.low, sensitivity.high):
        for b in (specificity.low, specificity.high):
            lows.append(_true_rate(seen.low, a, b))
            highs.append(_true_rate(seen.high, a, b))
    value = _true_rate(seen.value, sensitivity.value, specificity.value)
    return Interval(value, min(lows), max(highs), n, "Rogan-Gladen")


def _true_rate(seen: float, sensitivity: float, specificity: float) -> float:
    """S of which a judge with these rates shows ``seen``."""
    rate = (seen - (1 - sensitivity)) / max(sensitivity + specificity - 1, 1e-9)
    return min(max(rate, 0.0), 1.0)


def effect_of_errors(
    curves: Sequence[Curve], noise: LabelNoise, labels: int, draws: int, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """The error of S and the coverage of its interval, as judged and corrected.

    Args:
        curves: S is taken at the middle sentence end of each.
        noise: the judge's errors.
        labels: texts of each kind on which the judge is calibrated, anew for every trace.
        draws: continuations at each cut.
        seed: of draws and errors.

    Returns:
        By ``as judged`` (Clopper-Pearson) and ``corrected`` (Rogan-Gladen): the mean ``error`` and
        the ``coverage`` of 95 % intervals.
    """
    errors: dict[str, list[float]] = {"as judged": [], "corrected": []}
    hits: dict[str, list[bool]] = {"as judged": [], "corrected": []}
    for index, curve in enumerate(curves):
        random = np.random.default_rng([seed, index])
        ends = curve.trace.ends
        cut = ends[len(ends) // 2]
        s = float(curve.truth[cut])
        exact = curve.draw([DrawRequest(cut, draws)], random)
        drawn = noise(exact, random, {})
        safe, unsafe, _ = drawn.counts_at(cut, started_here=True)
        n = safe + unsafe
        estimates = {
            "as judged": clopper_pearson(safe, n),
            "corrected": correct_rate(safe, n, calibrate(noise, labels, index)),
        }
        for name, interval in estimates.items():
            errors[name].append(interval.value - s)
            hits[name].append(covers(interval, s))
    table = {}
    for name, values in errors.items():
        covered = wilson(sum(hits[name]), len(values))
        table[name] = {"error": mean(values), "coverage": covered}
    return table
