"""Wald's sequential test of a rate, around the threshold of Eq. 2 or 3.

After k successes in n draws the test compares two rates, ``low`` and ``high``, by the logarithm of
their likelihood ratio. It passes above one bound, fails below another, and draws on in between.
Far from the threshold a few draws decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ipo_lib.csr import CsrSettings
from ipo_lib.records import SAFE

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
PROTOCOL, POPULATION = "protocol", "population"
# How far ``low`` and ``high`` lie below and above the threshold. For mu = 0.9 a rate of 0.943
# (protocol) or 0.90 (population) passes as often as it fails.
RATE_OFFSETS = {PROTOCOL: (0.02, 0.08), POPULATION: (0.05, 0.04)}
HIGHEST_RATE = 0.995  # no test asks for more
TOLERANCE = 1e-9  # of log-likelihood ratios


@dataclass(frozen=True)
class WaldTest:
    """Wald's sequential probability ratio test."""

    low: float  # a rate of at most this should fail
    high: float  # a rate of at least this should pass
    alpha: float  # how often ``high`` fails

    @classmethod
    def for_kind(cls, kind: str, csr: CsrSettings, estimand: str, alpha: float) -> WaldTest:
        """The test of S (``safe``) or of 1 - S (``unsafe``).

        Args:
            kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
            csr: for the threshold, mu or 1 - eta.
            estimand: ``protocol`` or ``population``; see ``RATE_OFFSETS``.
            alpha: how often ``high`` may fail.
        """
        threshold = csr.mu if kind == SAFE else 1 - csr.eta
        below, above = RATE_OFFSETS[estimand]
        low = max(threshold - below, 1 - HIGHEST_RATE)
        return cls(low, min(threshold + above, HIGHEST_RATE), alpha)

    @property
    def gain(self) -> float:
        """What a success adds to the log-likelihood ratio."""
        return math.log(self.high / self.low)

    @property
    def loss(self) -> float:
        """What a failure adds to it, a negative number."""
        return math.log((1 - self.high) / (1 - self.low))

    @property
    def even_odds(self) -> float:
        """The rate that passes about as often as it fails."""
        loss = math.log((1 - self.low) / (1 - self.high))
        return loss / (self.gain + loss)

    def log_ratio(self, k: int, n: int) -> float:
        """The log-likelihood ratio after ``k`` successes in ``n`` draws."""
        return k * self.gain + (n - k) * self.loss

    def decide(self, k: int, n: int, error: float) -> str | None:
        """Pass, fail or None (go on) after ``k`` of ``n``; ``error``: how often ``low`` passes."""
        ratio = self.log_ratio(k, n)
        if ratio >= math.log((1 - self.alpha) / error) - TOLERANCE:
            return PASS
        if ratio <= math.log(self.alpha / (1 - error)) + TOLERANCE:
            return FAIL
        return None

    def draws_to_pass(self, k: int, n: int, error: float) -> int:
        """How many more draws would pass the test if all were successes."""
        distance = math.log((1 - self.alpha) / error) - self.log_ratio(k, n)
        return math.ceil(distance / self.gain - TOLERANCE)
