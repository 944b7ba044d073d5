"""What the model's state tells of S, and what that is worth.

A probe (``ipo_lib.experiments.states``) reads from the state at a sentence end how likely the trace
ends safe. Here its prediction is put beside the exact S of recorded curves.

1. Prompts are split into folds. A probe learns from the traces of all other folds and predicts S
   along the traces of its own. So it never reads a prompt that it has learnt from.
2. *Error*: the mean distance of prediction and S, and that of a constant. Of all constants, it has
   the smallest mean distance on the other folds.
3. *Calibration*: among cuts with nearly the same prediction, the mean S.
4. *Settled*: traces of which the prediction before the first sentence is nearly 0 or nearly 1. No
   draws need be spent on them, if the prediction is right.
5. *Guess*: the first sentence end at which the prediction crosses the threshold of Eq. 2 or 3. The
   adaptive search may begin there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ipo_lib.csr import CsrSettings
from ipo_lib.experiments.monitorability import Ranking
from ipo_lib.experiments.states import learn_probe, states_by_sentence
from ipo_lib.records import SAFE, TRACE, UNSAFE, BadInput, Prompt, Rollout, TurningPoint, Verdict
from ipo_lib.stages import JudgedRollouts, Session, trace_sentences
from ipo_lib.stats import Interval, mean
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.draws import Search, Trace
from ipo_lib.turning_points.exhaustive import true_turn

Array = np.ndarray[Any, Any]
FOLDS = 5
BINS = 10  # of predictions, for calibration
OPEN = (0.05, 0.95)  # where S is within these, the outcome of the trace is open


@dataclass(frozen=True)
class PredictedCurve:
    """S along one trace: as predicted from states, and exactly."""

    rollout: Rollout
    curve: Curve
    cuts: tuple[int, ...]  # tokens before each sentence, and at the end of the last one
    predicted: Array  # S at each cut
    constant: float  # nearest to S at the cuts of the traces that the probe has learnt from
    open_constant: float  # the same, where S is open

    @property
    def exact(self) -> Array:
        """S at each cut, from the recording."""
        return np.asarray(self.curve.truth[list(self.cuts)])


def predict_curves(
    session: Session,
    prompts: dict[str, Prompt],
    recorded: Sequence[tuple[Rollout, Curve]],
    seed: int = 0,
) -> list[PredictedCurve]:
    """Predict S along recorded traces, each by a probe that has learnt from other prompts.

    Args:
        session: whose sampler shows its states.
        prompts: the rollouts' prompts, by id.
        recorded: traces with their curves; those without a label are left out.
        seed: of the folds.

    Raises:
        BadInput: there are fewer prompts than folds.
    """
    labelled = [(rollout, curve) for rollout, curve in recorded if curve.trace.label]
    names = sorted({rollout.prompt_id for rollout, _ in labelled})
    if len(names) < FOLDS:
        raise BadInput(f"{len(names)} prompts with recorded curves; {FOLDS} are needed")
    shuffled = np.random.default_rng(seed).permutation(names)
    fold_of = {name: number % FOLDS for number, name in enumerate(shuffled.tolist())}
    states = states_by_sentence(session, prompts, [rollout for rollout, _ in labelled])

    cuts_of = {}
    for rollout, curve in labelled:
        if rollout.id in states:
            spans = trace_sentences(session, rollout)
            last = min(spans[-1].token_end, len(curve.truth) - 1)
            cuts_of[rollout.id] = (*(span.token_start for span in spans), last)

    predicted = []
    for fold in range(FOLDS):
        others = [pair for pair in labelled if fold_of[pair[0].prompt_id] != fold]
        probe = learn_probe(states, _as_judged(prompts, others))
        seen: dict[str, list[Array]] = defaultdict(list)
        for rollout, curve in others:
            if rollout.id in cuts_of:
                seen[rollout.prompt_id].append(curve.truth[list(cuts_of[rollout.id])])
        constants = nearest_constant(seen, (0.0, 1.0)), nearest_constant(seen, OPEN)
        for rollout, curve in labelled:
            if fold_of[rollout.prompt_id] != fold or rollout.id not in cuts_of:
                continue
            log_odds = probe.log_odds(states[rollout.id])
            values = 1 / (1 + np.exp(-log_odds))
            cuts = cuts_of[rollout.id]
            predicted.append(PredictedCurve(rollout, curve, cuts, values, *constants))
    return predicted


def nearest_constant(
    s_by_prompt: Mapping[str, Sequence[Array]], within: tuple[float, float]
) -> float:
    """The constant with the smallest mean distance from S, over cuts, traces and then prompts.

    Args:
        s_by_prompt: S at the cuts of each trace of a prompt.
        within: only cuts where S is within these bounds count.

    Returns:
        A median in which every prompt, and in it every trace, weighs the same; 0.5 without cuts.
    """
    values, weights = [], []
    for traces in s_by_prompt.values():
        kept = [s[(s >= within[0]) & (s <= within[1])] for s in traces]
        kept = [s for s in kept if len(s)]
        for s in kept:
            values += s.tolist()
            weights += [1 / (len(s) * len(kept))] * len(s)
    if not values:
        return 0.5
    order = np.argsort(values)
    rising = np.cumsum(np.array(weights)[order])
    return float(np.array(values)[order][np.searchsorted(rising, rising[-1] / 2)])


def _as_judged(
    prompts: dict[str, Prompt], recorded: Sequence[tuple[Rollout, Curve]]
) -> JudgedRollouts:
    """Recorded traces with their labels as verdicts."""
    verdicts = []
    for rollout, curve in recorded:
        label = curve.trace.label
        verdicts.append(Verdict(rollout.id, TRACE, "harm", label, None, "", "recording"))
    return JudgedRollouts(prompts, [rollout for rollout, _ in recorded], verdicts)


def errors(predicted: Sequence[PredictedCurve]) -> dict[str, Interval]:
    """Mean distance from S, of the probe and of a constant, over prompts.

    Returns:
        ``probe``, ``constant``, and ``probe minus constant``, paired by prompt. And the first two
        *where S is open*, within ``OPEN``: elsewhere the outcome is known, as after a harmful step.
    """
    everywhere = _mean_distances(predicted, (0.0, 1.0), [one.constant for one in predicted])
    where_open = _mean_distances(predicted, OPEN, [one.open_constant for one in predicted])
    return {
        "probe": mean(everywhere[:, 0].tolist(), (0.0, 1.0)),
        "constant": mean(everywhere[:, 1].tolist(), (0.0, 1.0)),
        "probe minus constant": mean((everywhere[:, 0] - everywhere[:, 1]).tolist(), (-1.0, 1.0)),
        "probe, where S is open": mean(where_open[:, 0].tolist(), (0.0, 1.0)),
        "constant, where S is open": mean(where_open[:, 1].tolist(), (0.0, 1.0)),
    }


def _mean_distances(
    predicted: Sequence[PredictedCurve], within: tuple[float, float], constants: Sequence[float]
) -> Array:
    """Mean distances of probe and constants, [prompts, 2], where S is within bounds."""
    by_prompt: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one, constant in zip(predicted, constants, strict=True):
        places = (one.exact >= within[0]) & (one.exact <= within[1])
        if places.any():
            of_probe = float(np.abs(one.predicted - one.exact)[places].mean())
            of_constant = float(np.abs(constant - one.exact)[places].mean())
            by_prompt[one.rollout.prompt_id].append((of_probe, of_constant))
    return np.array([np.mean(values, axis=0) for values in by_prompt.values()]).reshape(-1, 2)


def auroc(predicted: Sequence[PredictedCurve], share: float) -> Interval:
    """How well the prediction ranks traces by how they end, after this share of their sentences.

    The interval is over prompts.
    """
    scores = np.array([one.predicted[int(share * (len(one.cuts) - 1))] for one in predicted])
    is_safe = np.array([one.curve.trace.label == SAFE for one in predicted])
    prompts = np.array([one.rollout.prompt_id for one in predicted])
    return Ranking(scores, is_safe, prompts).interval()


def calibration(predicted: Sequence[PredictedCurve]) -> list[tuple[float, Interval]]:
    """For each bin of predictions: their mean, and the mean S with an interval over prompts."""
    bins: dict[int, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for one in predicted:
        for guess, exact in zip(one.predicted, one.exact, strict=True):
            number = min(int(guess * BINS), BINS - 1)
            bins[number][one.rollout.prompt_id].append((float(guess), float(exact)))
    rows = []
    for number in sorted(bins):
        pairs = np.array([np.mean(values, axis=0) for values in bins[number].values()])
        rows.append((float(pairs[:, 0].mean()), mean(pairs[:, 1].tolist(), (0.0, 1.0))))
    return rows


@dataclass(frozen=True)
class Settled:
    """Traces whose end is taken for settled before their first sentence."""

    share: Interval  # of all traces, over prompts
    wrong: Interval  # of the settled ones, those that ended the other way, over prompts


def settled(predicted: Sequence[PredictedCurve], threshold: float) -> Settled:
    """How many traces are settled at the start, and how often that is wrong.

    Args:
        predicted: of all traces.
        threshold: a prediction below it, or above 1 minus it, counts as settled.
    """
    all_of: dict[str, list[float]] = defaultdict(list)
    wrong_of: dict[str, list[float]] = defaultdict(list)
    for one in predicted:
        first, prompt = one.predicted[0], one.rollout.prompt_id
        is_settled = first < threshold or first > 1 - threshold
        all_of[prompt].append(float(is_settled))
        if is_settled:
            expected = SAFE if first > 0.5 else UNSAFE
            wrong_of[prompt].append(float(one.curve.trace.label != expected))
    shares = [float(np.mean(values)) for values in all_of.values()]
    wrong = [float(np.mean(values)) for values in wrong_of.values()]
    return Settled(mean(shares, (0.0, 1.0)), mean(wrong, (0.0, 1.0)))


def guesses(
    predicted: Sequence[PredictedCurve], kind: str, csr: CsrSettings
) -> dict[str, int | None]:
    """By trace id the cut at which the prediction first meets the threshold of Eq. 2 or 3.

    None: it never does, and the search has to begin without a guess.
    """
    found: dict[str, int | None] = {}
    for one in predicted:
        meets = [csr.meets(float(value), kind) for value in one.predicted]
        found[one.curve.id] = one.cuts[meets.index(True)] if any(meets) else None
    return found


def guessing_search(
    predicted: Sequence[PredictedCurve], kind: str, csr: CsrSettings, settings: SearchSettings
) -> Callable[[Trace], Search]:
    """The adaptive search that begins where the probe expects the turn."""
    return partial(_search_from_guess, guesses(predicted, kind, csr), kind, csr, settings)


def _search_from_guess(
    by_trace: dict[str, int | None],
    kind: str,
    csr: CsrSettings,
    settings: SearchSettings,
    trace: Trace,
) -> Search:
    return adaptive(trace, kind, csr, settings, guess=by_trace.get(trace.id))


def turns_by_probe(
    predicted: Sequence[PredictedCurve], kind: str, csr: CsrSettings
) -> dict[str, TurningPoint]:
    """By trace id the turning point of the predicted curve: no continuation is drawn."""
    turns = {}
    for one in predicted:
        length = len(one.curve.truth)
        # Between two sentence ends the prediction stays what it was at the first one.
        index = np.searchsorted(one.cuts, np.arange(length), side="right") - 1
        curve = one.predicted[np.maximum(index, 0)].astype(float)
        curve[-1] = 1.0 if one.curve.trace.label == SAFE else 0.0
        turns[one.curve.id] = true_turn(one.curve.trace, kind, csr, curve.tolist())
    return turns
