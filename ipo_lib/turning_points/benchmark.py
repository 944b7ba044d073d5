"""Compare estimators of turning points with the truth, on recorded curves.

How often an estimator agrees with the truth, what it costs, whether its intervals cover S, and how
often its tests are wrong. Estimators are compared on the same traces. Agreement and savings have
intervals over prompts, since traces of one prompt are alike; costs are means over traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ipo_lib.csr import END, SENTENCE, START_LOCKED, TOKEN, CsrSettings
from ipo_lib.frame import count_outcomes, mean_over_prompts, rate
from ipo_lib.records import SAFE, Prompts, TurningPoint, by_id, from_json, to_json
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Session
from ipo_lib.stats import Interval, clopper_pearson, format_interval, wilson
from ipo_lib.turning_points import locate
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive
from ipo_lib.turning_points.curves import Curve, run_on_curves
from ipo_lib.turning_points.draws import Search, Trace
from ipo_lib.turning_points.exhaustive import (
    PivotalSettings,
    exhaustive,
    isotonic,
    pivotal,
    true_turn,
)
from ipo_lib.turning_points.judge_errors import covers
from ipo_lib.turning_points.wald import FAIL, PASS, UNDECIDED, WaldTest

Estimators = Mapping[str, Callable[[Trace], Search]]
# True S above mu at which the paper's rule on 32 draws a token holds in half of all runs.
PROTOCOL_SHIFT = 0.04
PER_TOKEN, PER_SENTENCE = "32 a token", "32 a sentence"
ADAPTIVE, FAST = "adaptive", "adaptive, fast"
FAST_SEARCH = SearchSettings(alpha=0.1, hold=0.12, budget=200, batch=4, screen=4, confirm=0)
CLEAR_PASS = 0.97  # a test must pass from this S up
CLEAR_FAIL = 0.85  # and fail up to this one


def estimators(
    kind: str, csr: CsrSettings, search: SearchSettings
) -> dict[str, Callable[[Trace], Search]]:
    """The paper's protocol, its sentence version, two published rivals and the adaptive search."""
    token = replace(csr, grain=TOKEN, stride=1)
    sentence = replace(csr, grain=SENTENCE, stride=1)
    return {
        PER_TOKEN: partial(exhaustive, kind=kind, csr=token),
        PER_SENTENCE: partial(exhaustive, kind=kind, csr=sentence),
        "pivotal tokens, 32": partial(pivotal, kind=kind, csr=csr, settings=PivotalSettings()),
        "isotonic, 4 a token": partial(isotonic, kind=kind, csr=token, draws=4),
        "isotonic, 16 a sentence": partial(isotonic, kind=kind, csr=sentence, draws=16),
        ADAPTIVE: partial(adaptive, kind=kind, csr=csr, settings=search),
        FAST: partial(adaptive, kind=kind, csr=csr, settings=FAST_SEARCH),
    }


@dataclass(frozen=True)
class EstimatorResult:
    """What one estimator found on one trace, beside the truth."""

    turn: TurningPoint
    truth: TurningPoint
    curve: Curve

    @property
    def within_one_sentence(self) -> bool:
        """Whether it found the true turn's sentence or the one before or after it."""
        sentence, true_sentence = sentence_of(self.turn), sentence_of(self.truth)
        if sentence is None or true_sentence is None:
            return sentence == true_sentence
        return abs(sentence - true_sentence) <= 1

    @property
    def same_sentence(self) -> bool:
        """Whether it found the true turn's sentence."""
        return sentence_of(self.turn) == sentence_of(self.truth)

    @property
    def same_kind(self) -> bool:
        """Whether it is right on whether the trace turns, is decided at the start, or neither."""
        return _kind_of_trace(self.turn) == _kind_of_trace(self.truth)


def sentence_of(turn: TurningPoint) -> int | None:
    """The sentence of a turn; -1 for a start-locked trace, None for one without a turn."""
    if turn.token is None:
        return None
    return -1 if turn.sentence is None else turn.sentence


def _kind_of_trace(turn: TurningPoint) -> str:
    if turn.token is None:
        return "none"
    return START_LOCKED if START_LOCKED in turn.flags else "turn"


# Comparisons.


def compare(
    curves: Sequence[Curve], named: Estimators, kind: str, csr: CsrSettings, seed: int = 0
) -> dict[str, list[EstimatorResult]]:
    """Run every estimator on every curve of a known outcome.

    Args:
        curves: recorded curves; those without a label are left out.
        named: estimators by name.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule. The truth turns where the paper's protocol does, ``PROTOCOL_SHIFT`` above mu
            and below eta.
        seed: of the draws.
    """
    turns = {}
    for name, estimator in named.items():
        turns[name] = run_on_curves(_labelled(curves), estimator, seed)
    return beside_truth(curves, turns, kind, csr)


def compare_on_model(
    session: Session,
    prompts: Prompts,
    curves: Sequence[Curve],
    named: Estimators,
    kind: str,
    csr: CsrSettings,
    sampling: Sampling,
) -> dict[str, list[EstimatorResult]]:
    """``compare`` with continuations that the model itself draws now.

    Estimators that ask at the same cut get the same draws.

    Args:
        session: the model and the judge.
        prompts: by trace id.
        curves: recorded curves of these traces, which are the truth.
        named: estimators by name.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule, and what the judge reads.
        sampling: how continuations are drawn.
    """
    traces = {key: curve.trace for key, curve in by_id(_labelled(curves)).items()}
    turns = {}
    for name, estimator in named.items():
        searches = {key: estimator(trace) for key, trace in traces.items()}
        turns[name], _ = locate.run_searches(session, prompts, traces, searches, csr.part, sampling)
    return beside_truth(curves, turns, kind, csr)


def compare_with_threshold(
    rows: Iterable[EstimatorResult], csr: CsrSettings, mu: float
) -> list[EstimatorResult]:
    """The same findings beside the truth of another threshold."""
    rule = replace(csr, mu=mu, eta=1 - mu)
    return [replace(row, truth=_true_turn(row.curve, row.turn.kind, rule)) for row in rows]


def _labelled(curves: Iterable[Curve]) -> list[Curve]:
    return [curve for curve in curves if curve.trace.label is not None]


def _true_turn(curve: Curve, kind: str, csr: CsrSettings) -> TurningPoint:
    return true_turn(curve.trace, kind, csr, curve.truth.tolist())


def beside_truth(
    curves: Iterable[Curve],
    turns: Mapping[str, Mapping[str, TurningPoint]],
    kind: str,
    csr: CsrSettings,
) -> dict[str, list[EstimatorResult]]:
    """Turning points by estimator and trace, beside the turn on the true curve."""
    mu = min(csr.mu + PROTOCOL_SHIFT, 1.0)
    eta = max(csr.eta - PROTOCOL_SHIFT, 0.0)
    rule = replace(csr, mu=mu, eta=eta)
    curves = _labelled(curves)
    truths = {curve.id: _true_turn(curve, kind, rule) for curve in curves}
    rows = {}
    for name, by_trace in turns.items():
        rows[name] = [EstimatorResult(by_trace[c.id], truths[c.id], c) for c in curves]
    return rows


# Summaries.


def agreement(
    rows: Sequence[EstimatorResult], against: Sequence[EstimatorResult] | None = None
) -> dict[str, Interval]:
    """How often an estimator is right; with ``against``, also the paired difference to that one."""
    shares = {
        "within one sentence": [row.within_one_sentence for row in rows],
        "same sentence": [row.same_sentence for row in rows],
        "kind of trace": [row.same_kind for row in rows],
        "undecided": [UNDECIDED in row.turn.flags for row in rows],
    }
    table, prompts = {}, [row.curve.prompt_id for row in rows]
    for name, values in shares.items():
        table[name] = mean_over_prompts(prompts, map(float, values), (0.0, 1.0))
    if against:
        differences = []
        for row, other in zip(rows, against, strict=True):
            differences.append(float(row.within_one_sentence) - float(other.within_one_sentence))
        table["difference"] = mean_over_prompts(prompts, differences)
    return table


def costs(rows: Sequence[EstimatorResult]) -> dict[str, float]:
    """Rollouts a trace (mean, 95th percentile) and generated tokens a trace."""
    rollouts = [row.turn.rollouts for row in rows]
    return {
        "rollouts": float(np.mean(rollouts)),
        "rollouts, 95th percentile": float(np.percentile(rollouts, 95)),
        "tokens": float(np.mean([row.turn.tokens for row in rows])),
    }


def token_saving(
    rows: Sequence[EstimatorResult],
    against: Sequence[EstimatorResult],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """How many times fewer tokens than another estimator, on the same traces.

    Args:
        rows: of this estimator.
        against: of the other one.
        resamples: of the bootstrap over prompts.
        seed: of the bootstrap.
    """
    # 1. Tokens of every prompt's traces.
    prompts, group = np.unique([row.curve.prompt_id for row in rows], return_inverse=True)
    n = len(prompts)
    tokens = np.bincount(group, [row.turn.tokens for row in rows], n)
    others = np.bincount(group, [row.turn.tokens for row in against], n)
    # 2. Their ratio, on samples of prompts.
    picks = np.random.default_rng(seed).integers(0, n, (resamples, n))
    ratios = others[picks].sum(1) / tokens[picks].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    value = float(others.sum() / tokens.sum())
    return Interval(value, low, high, n, "bootstrap over prompts")


def summary_table(rows: Mapping[str, Sequence[EstimatorResult]]) -> dict[str, dict[str, str]]:
    """Agreement, cost and saving of every estimator, in words; the paper's is compared with."""
    table: dict[str, dict[str, str]] = {}
    for name, results in rows.items():
        shares = agreement(results, rows[PER_TOKEN])
        times = token_saving(results, rows[PER_TOKEN])
        row = {what: format_interval(share) for what, share in shares.items()}
        row |= {what: f"{value:,.0f}" for what, value in costs(results).items()}
        row["times fewer tokens"] = f"{times.value:.1f} [{times.low:.1f}, {times.high:.1f}]"
        table[name] = row
    return table


def interval_coverage(rows: Iterable[EstimatorResult], pooled: bool = False) -> Interval:
    """How often the Clopper-Pearson interval at a side of a turn holds the true S.

    The interval is that of the fresh draws; with ``pooled``, that of the draws which steered the
    search, to see why fresh ones are needed.
    """
    hits = []
    for row in rows:
        for side in (row.turn.before, row.turn.after):
            if side is None:
                continue
            k, n = (side.n_safe, side.n) if pooled else (side.fresh_safe, side.fresh)
            if n:
                s = float(row.curve.truth[side.cut])
                hits.append(covers(clopper_pearson(k, n), s))
    return wilson(sum(hits), len(hits))


def decision_errors(rows: Iterable[EstimatorResult]) -> dict[str, Interval]:
    """How often tests at full strength are wrong where S is clear, and how often undecided.

    For unsafe turns it is 1 - S that counts.
    """
    clear_fails, clear_passes, states = [], [], []
    for row in rows:
        for cut, state in row.turn.tested:
            s = float(row.curve.truth[cut])
            rate = s if row.turn.kind == SAFE else 1 - s
            states.append(state)
            if rate <= CLEAR_FAIL:
                clear_fails.append(state)
            if rate >= CLEAR_PASS:
                clear_passes.append(state)
    return {
        f"pass at S <= {CLEAR_FAIL}": wilson(clear_fails.count(PASS), len(clear_fails)),
        f"fail at S >= {CLEAR_PASS}": wilson(clear_passes.count(FAIL), len(clear_passes)),
        "undecided": wilson(states.count(UNDECIDED), len(states)),
    }


# One setting changed at a time.


def vary_search(
    curves: Sequence[Curve],
    kind: str,
    csr: CsrSettings,
    search: SearchSettings,
    changes: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> list[tuple[str, float, Interval, float]]:
    """The adaptive search with one setting changed at a time.

    Args:
        curves: recorded curves.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule.
        search: the search.
        changes: values by setting, of the rule or of the search.
        seed: of the draws.

    Returns:
        (setting, value, share within one sentence of the truth, rollouts a trace). The truth turns
        where the search's own test has even odds.
    """
    table = []
    for name, values in changes.items():
        for value in values:
            rule, settings = csr, search
            if name in vars(csr):
                rule = from_json(CsrSettings, to_json(csr) | {name: value})
            else:
                settings = from_json(SearchSettings, to_json(search) | {name: value})
            test = WaldTest.for_kind(kind, rule, settings.estimand, settings.alpha)
            exact = replace(rule, mu=test.even_odds, eta=1 - test.even_odds)
            estimator = partial(adaptive, kind=kind, csr=rule, settings=settings)
            turns = run_on_curves(curves, estimator, seed)
            rows = [EstimatorResult(turns[c.id], _true_turn(c, kind, exact), c) for c in curves]
            near = agreement(rows)["within one sentence"]
            table.append((name, value, near, costs(rows)["rollouts"]))
    return table


def true_turns(curves: Sequence[Curve], kind: str, csr: CsrSettings) -> list[TurningPoint]:
    """The turning point of each curve by its exact S (Eq. 2 or 3)."""
    return [_true_turn(curve, kind, csr) for curve in curves]


def turning_share(curves: Sequence[Curve], kind: str, csr: CsrSettings) -> Interval:
    """Share of traces that meet Eq. 2 or 3 on their true curve before their own ending counts."""
    return _share_before_end(curves, true_turns(curves, kind, csr))


def _share_before_end(curves: Sequence[Curve], turns: Iterable[TurningPoint]) -> Interval:
    turned = [turn.sentence is not None and END not in turn.flags for turn in turns]
    return rate(count_outcomes([curve.prompt_id for curve in curves], turned))


def vary_rule(
    curves: Sequence[Curve],
    kind: str,
    csr: CsrSettings,
    changes: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> dict[str, list[tuple[float, Interval]]]:
    """``turning_share`` with one setting of the rule changed at a time.

    Args:
        curves: recorded curves.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        csr: the rule.
        changes: values by setting. With ``draws``, the share is what the paper's protocol finds
            from so many draws.
        seed: of these draws.
    """
    table: dict[str, list[tuple[float, Interval]]] = {name: [] for name in changes}
    for name, values in changes.items():
        for value in values:
            rule = from_json(CsrSettings, to_json(csr) | {name: value})
            if name == "draws":
                estimator = partial(exhaustive, kind=kind, csr=rule)
                turns = run_on_curves(curves, estimator, seed)
                share = _share_before_end(curves, turns.values())
            else:
                share = turning_share(curves, kind, rule)
            table[name].append((value, share))
    return table
