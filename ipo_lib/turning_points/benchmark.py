"""Estimators of turning points against truth on recorded curves: agreement, cost, what their intervals cover, how often their
decisions are wrong, and what a judge's errors do. Every number is a mean over traces, compared within traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ipo_lib.csr import END, SENTENCE, START_LOCKED, TOKEN, CsrSettings
from ipo_lib.records import SAFE, TRACE, Prompts, TurningPoint, by_id, from_json, to_json
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Session
from ipo_lib.stats import Interval, clopper_pearson, format_interval, mean, wilson
from ipo_lib.turning_points import locate
from ipo_lib.turning_points.adaptive import FAIL, PASS, UNDECIDED, SearchSettings, Wald, adaptive
from ipo_lib.turning_points.curves import Curve, Flips, find_on_curves
from ipo_lib.turning_points.exhaustive import (
    Ask,
    PivotalSettings,
    Search,
    Trace,
    exhaustive,
    isotonic,
    pivotal,
    truth,
)
from ipo_lib.turning_points.judge_errors import Calibration, set_right

Estimators = Mapping[str, Callable[[Trace], Search]]
PROTOCOL = 0.04  # above mu: the true S from which the paper's rule on 32 draws a token holds in half of all runs
TOKENS, SENTENCES, ADAPTIVE, FAST = "32 a token", "32 a sentence", "adaptive", "adaptive, fast"
QUICK = SearchSettings(alpha=0.1, look=0.5, hold=0.12, budget=200, batch=4, screen=4, confirm=0)
EDGE = 1e-9  # of an interval that may end at S itself
HIGH, LOW = 0.97, 0.85  # at or above the one a test must pass, at or below the other it must fail


def estimators(
    kind: str, csr: CsrSettings, search: SearchSettings
) -> dict[str, Callable[[Trace], Search]]:
    """The paper's protocol, its sentence version, the two published rivals and ours, by name."""
    token, sentence = replace(csr, grain=TOKEN, stride=1), replace(csr, grain=SENTENCE, stride=1)
    return {
        TOKENS: partial(exhaustive, kind=kind, csr=token),
        SENTENCES: partial(exhaustive, kind=kind, csr=sentence),
        "pivotal tokens, 32": partial(pivotal, kind=kind, csr=csr, settings=PivotalSettings()),
        "isotonic, 4 a token": partial(isotonic, kind=kind, csr=token, draws=4),
        "isotonic, 16 a sentence": partial(isotonic, kind=kind, csr=sentence, draws=16),
        ADAPTIVE: partial(adaptive, kind=kind, csr=csr, settings=search),
        FAST: partial(adaptive, kind=kind, csr=csr, settings=QUICK),
    }


@dataclass(frozen=True)
class EstimatorResult:
    """What one estimator found on one trace, beside the truth."""

    found: TurningPoint
    true: TurningPoint
    curve: Curve

    @property
    def near(self) -> bool:
        """Whether it found the sentence of the true turn or one beside it; the start counts as one before the first."""
        a, b = place(self.found), place(self.true)
        return a == b or (a is not None and b is not None and abs(a - b) <= 1)

    @property
    def kind(self) -> bool:
        """Whether it is right on whether the trace turns, is decided from the start, or neither."""
        return _kind(self.found) == _kind(self.true)


def place(turn: TurningPoint) -> int | None:
    """The sentence of a turn, -1 for a start-locked trace, None for one without a turn."""
    return None if turn.token is None else turn.sentence if turn.sentence is not None else -1


def _kind(turn: TurningPoint) -> str:
    return "none" if turn.token is None else START_LOCKED if START_LOCKED in turn.flags else "turn"


def compare(
    curves: Sequence[Curve], named: Estimators, kind: str, csr: CsrSettings, seed: int = 0
) -> dict[str, list[EstimatorResult]]:
    """Every estimator on every curve of a known outcome, beside where Eq. 2 or 3 turns on the true curve: at the S at which the
    protocol does, ``PROTOCOL`` above mu and below eta."""
    curves, true = _truths(curves, kind, csr)
    found = {name: find_on_curves(curves, estimator, seed) for name, estimator in named.items()}
    return {
        name: [EstimatorResult(turns[c.trace.id], true[c.trace.id], c) for c in curves]
        for name, turns in found.items()
    }


def against(rows: Iterable[EstimatorResult], csr: CsrSettings, mu: float) -> list[EstimatorResult]:
    """The same findings beside the truth of another threshold."""
    exact = replace(csr, mu=mu, eta=1 - mu)
    return [
        replace(r, true=truth(r.curve.trace, r.found.kind, exact, r.curve.truth.tolist()))
        for r in rows
    ]


def _truths(
    curves: Sequence[Curve], kind: str, csr: CsrSettings
) -> tuple[list[Curve], dict[str, TurningPoint]]:
    exact = replace(csr, mu=min(csr.mu + PROTOCOL, 1.0), eta=max(csr.eta - PROTOCOL, 0.0))
    known = [curve for curve in curves if curve.trace.label is not None]
    return known, {
        key: truth(curve.trace, kind, exact, curve.truth.tolist())
        for key, curve in by_id(known).items()
    }


def live(
    session: Session,
    prompts: Prompts,
    curves: Sequence[Curve],
    named: Estimators,
    kind: str,
    csr: CsrSettings,
    sampling: Sampling,
) -> dict[str, list[EstimatorResult]]:
    """The same on the model itself, whose continuations of these recorded traces are drawn and judged (``prompts`` by trace id);
    what was recorded is the truth. At a cut that several estimators ask for, they are given the same draws."""
    curves, true = _truths(curves, kind, csr)
    known, found = {curve.trace.id: curve.trace for curve in curves}, {}
    for name, estimator in named.items():
        searches = {key: estimator(trace) for key, trace in known.items()}
        turns, _ = locate.run_searches(session, prompts, known, searches, csr.part, sampling)
        found[name] = [EstimatorResult(turns[c.trace.id], true[c.trace.id], c) for c in curves]
    return found


def table(rows: Mapping[str, Sequence[EstimatorResult]]) -> dict[str, dict[str, str]]:
    """One row an estimator, in words: agreement with the truth, the paired difference to the paper's protocol, cost, saving."""
    found = {}
    for name, own in rows.items():
        said = agreement(own, rows[TOKENS])
        spent = {what: f"{value:,.0f}" for what, value in costs(own).items()}
        times = saving(own, rows[TOKENS])
        cheaper = {"times fewer tokens": f"{times.value:.1f} [{times.low:.1f}, {times.high:.1f}]"}
        found[name] = (
            {what: format_interval(value) for what, value in said.items()} | spent | cheaper
        )
    return found


def knobs(
    curves: Sequence[Curve],
    kind: str,
    csr: CsrSettings,
    search: SearchSettings,
    changes: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> list[tuple[str, float, Interval, float]]:
    """The adaptive search with one setting changed at a time: (setting, value, within one sentence of the truth of the same mu,
    eta and K, rollouts a trace). The truth turns where the search's own test has even odds."""
    found = []
    for name, values in changes.items():
        for value in values:
            own = from_json(CsrSettings, to_json(csr) | {name: value}) if name in vars(csr) else csr
            used = (
                search
                if name in vars(csr)
                else from_json(SearchSettings, to_json(search) | {name: value})
            )
            even = Wald.of(kind, own, used).even
            exact = replace(own, mu=even, eta=1 - even)
            turns = find_on_curves(
                curves, partial(adaptive, kind=kind, csr=own, settings=used), seed
            )
            rows = [
                EstimatorResult(turns[c.trace.id], truth(c.trace, kind, exact, c.truth.tolist()), c)
                for c in curves
            ]
            found.append(
                (name, value, agreement(rows)["within one sentence"], costs(rows)["rollouts"])
            )
    return found


def agreement(
    rows: Sequence[EstimatorResult], against: Sequence[EstimatorResult] | None = None
) -> dict[str, Interval]:
    """Within one sentence, the same sentence, the right kind of trace; with ``against`` the paired difference of the first."""
    found = {
        "within one sentence": mean([float(row.near) for row in rows], (0.0, 1.0)),
        "same sentence": mean(
            [float(place(row.found) == place(row.true)) for row in rows], (0.0, 1.0)
        ),
        "kind of trace": mean([float(row.kind) for row in rows], (0.0, 1.0)),
        "undecided": mean([float(UNDECIDED in row.found.flags) for row in rows], (0.0, 1.0)),
    }
    if against:
        found["difference"] = mean(
            [float(a.near) - float(b.near) for a, b in zip(rows, against, strict=True)]
        )
    return found


def costs(rows: Sequence[EstimatorResult]) -> dict[str, float]:
    """Rollouts a trace (mean, 95th percentile) and generated tokens a trace."""
    rollouts = [row.found.rollouts for row in rows]
    return {
        "rollouts": float(np.mean(rollouts)),
        "rollouts, 95th percentile": float(np.percentile(rollouts, 95)),
        "tokens": float(np.mean([row.found.tokens for row in rows])),
    }


def saving(
    rows: Sequence[EstimatorResult],
    against: Sequence[EstimatorResult],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """How many times fewer tokens than ``against`` on the same traces, with a bootstrap interval over traces."""
    own, other = (
        np.array([row.found.tokens for row in side], dtype=float) for side in (rows, against)
    )
    picks = np.random.default_rng(seed).integers(0, len(own), (resamples, len(own)))
    low, high = np.quantile(other[picks].sum(1) / own[picks].sum(1), (0.025, 0.975))
    return Interval(
        float(other.sum() / own.sum()), float(low), float(high), len(own), "bootstrap over traces"
    )


def coverage(rows: Iterable[EstimatorResult], pooled: bool = False) -> Interval:
    """How often the Clopper-Pearson interval at a side of a turn holds the true S: of the fresh draws, or, to see why these are
    needed, of the ``pooled`` ones that the search itself was steered by."""
    hits = []
    for row in rows:
        for side in (row.found.before, row.found.after):
            if side is not None and (side.n if pooled else side.fresh):
                sure = (
                    clopper_pearson(side.n_safe, side.n)
                    if pooled
                    else clopper_pearson(side.fresh_safe, side.fresh)
                )
                hits.append(sure.low - EDGE <= row.curve.truth[side.cut] <= sure.high + EDGE)
    return wilson(sum(hits), len(hits))


def errors(rows: Iterable[EstimatorResult]) -> dict[str, Interval]:
    """Of all cuts tested at full strength: the share of those with a true S at or below ``LOW`` that passed, of those at or above
    ``HIGH`` that failed (for unsafe turns: of 1 - S), and of all that stayed undecided."""
    seen = []
    for row in rows:
        for cut, state in row.found.tested:
            s = float(row.curve.truth[cut])
            seen.append((s if row.found.kind == SAFE else 1 - s, state))
    low, high = [x for s, x in seen if s <= LOW], [x for s, x in seen if s >= HIGH]
    return {
        f"pass at S <= {LOW}": wilson(low.count(PASS), len(low)),
        f"fail at S >= {HIGH}": wilson(high.count(FAIL), len(high)),
        "undecided": wilson([x for _, x in seen].count(UNDECIDED), len(seen)),
    }


def prevalence(curves: Sequence[Curve], kind: str, csr: CsrSettings) -> Interval:
    """How many traces satisfy Eq. 2 (``safe``) or Eq. 3 (``unsafe``) on their true curves before their own ending counts."""
    return _turning(truth(curve.trace, kind, csr, curve.truth.tolist()) for curve in curves)


def _turning(turns: Iterable[TurningPoint]) -> Interval:
    own = [turn.sentence is not None and END not in turn.flags for turn in turns]
    return wilson(sum(own), len(own))


def sweep(
    curves: Sequence[Curve],
    kind: str,
    csr: CsrSettings,
    changes: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> dict[str, list[tuple[float, Interval]]]:
    """``prevalence`` with one setting changed at a time; with ``draws``, as the exhaustive protocol finds it from so many."""
    found: dict[str, list[tuple[float, Interval]]] = {name: [] for name in changes}
    for name, value in ((name, value) for name, values in changes.items() for value in values):
        own = from_json(CsrSettings, to_json(csr) | {name: value})
        drawn = (
            find_on_curves(curves, partial(exhaustive, kind=kind, csr=own), seed).values()
            if name == "draws"
            else None
        )
        found[name].append(
            (value, prevalence(curves, kind, own) if drawn is None else _turning(drawn))
        )
    return found


def simulated(flips: Flips, labels: int, seed: int = 0) -> Calibration:
    """A judge with these errors, calibrated on ``labels`` texts of each kind; its errors there come singly."""
    caught, cleared = (
        np.random.default_rng(seed)
        .binomial(labels, (flips.sensitivity, flips.specificity))
        .tolist()
    )
    return Calibration("simulated", TRACE, ("replay",), caught, labels, cleared, labels, 1.0)


def judged(
    curves: Sequence[Curve], flips: Flips, labels: int, draws: int, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """What a judge's errors do to S at the middle sentence end of every trace, from ``draws`` continuations: the mean error and
    the coverage of the plain Clopper-Pearson interval and of the corrected one, by a judge calibrated anew for every trace."""
    found: dict[str, list[tuple[float, bool]]] = {"as judged": [], "corrected": []}
    for at, curve in enumerate(curves):
        random, cut = (
            np.random.default_rng([seed, at]),
            curve.trace.ends[len(curve.trace.ends) // 2],
        )
        drawn, s = flips(curve.draw([Ask(cut, draws)], random), random, {}), float(curve.truth[cut])
        safe, unsafe, _ = drawn.at(cut, born_here=True)
        right = set_right(safe, safe + unsafe, simulated(flips, labels, at))
        for name, sure in (
            ("as judged", clopper_pearson(safe, safe + unsafe)),
            ("corrected", right),
        ):
            found[name].append((sure.value - s, sure.low - EDGE <= s <= sure.high + EDGE))
    return {
        name: {
            "error": mean([a for a, _ in rows]),
            "coverage": wilson(sum(b for _, b in rows), len(rows)),
        }
        for name, rows in found.items()
    }
