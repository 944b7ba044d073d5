"""Reading safety from the model's own states: a probe for S, and a cue detector made of it.

1. One pass over prompt and response, without sampling, gives the last hidden state at the end of
   every sentence. It is what the next token is drawn from.
2. The *probe* is a logistic regression that reads from such a state whether the trace will end
   safe. It learns from judged rollouts of training prompts; it never sees a cue.
3. The *reader* calls the first sentence a cue over which the probe's log-odds of safety fall by at
   least a threshold. The threshold separates unsafe from safe training traces best.

Log-odds are used, not probabilities: on a prompt that is nearly always unsafe, S is near 0 all
along, and no sentence can lower it by much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ipo_lib.cues import Answers, Texts
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompts, Rollouts, digest, to_json
from ipo_lib.sampling import Request
from ipo_lib.stages import JudgedRollouts, Session, trace_sentences

Array = np.ndarray[Any, Any]
FOLDS = 5  # of the cross-validation over prompts
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of regularisation that are tried


class StateSampler(Protocol):
    """A sampler that shows the states its tokens are drawn from."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the states."""

    def states(self, requests: Sequence[Request]) -> Iterator[Array]:
        """For each request, the state that draws each of its ``prefix_ids``: [tokens, width]."""


@dataclass(frozen=True)
class Probe:
    """Log-odds that a trace ends safe: ``weights`` x state + ``bias``."""

    weights: tuple[float, ...]  # one for each entry of a state
    bias: float

    def log_odds(self, states: Array) -> Array:
        """[sentences] from states [sentences, width]."""
        return np.asarray(states @ np.array(self.weights) + self.bias)


def states_by_sentence(session: Session, prompts: Prompts, rollouts: Rollouts) -> dict[str, Array]:
    """The state before each sentence of a trace and after the last one: [sentences + 1, width].

    Args:
        session: whose sampler shows its states.
        prompts: the rollouts' prompts, by id.
        rollouts: responses. A trace without a sentence is left out.

    Raises:
        BadInput: the sampler cannot show its states, as one behind a server.
    """
    sampler: Any = session.sampler
    if not hasattr(sampler, "states"):
        raise BadInput(
            f"{type(sampler).__name__} shows no hidden states; load the model in this process"
        )
    requests, cuts = [], {}
    for rollout in rollouts:
        spans = trace_sentences(session, rollout)
        if not spans:
            continue
        # The state at a cut draws the token there, so the last cut needs a token after it.
        last = min(spans[-1].token_end, len(rollout.token_ids) - 1)
        cuts[rollout.id] = [*(span.token_start for span in spans), last]
        prompt_ids = session.chat.prompt_ids(prompts[rollout.prompt_id])
        requests.append(Request(rollout.id, prompt_ids, rollout.token_ids, 0))
    all_states = sampler.states(requests)
    return {
        request.key: states[cuts[request.key]]
        for request, states in zip(requests, all_states, strict=True)
    }


def learn_probe(states: Mapping[str, Array], seen: JudgedRollouts) -> Probe:
    """A probe from the states of judged rollouts, regularised by cross-validation over prompts.

    Args:
        states: by rollout id.
        seen: the rollouts with their verdicts; unjudged ones are left out.

    Raises:
        BadInput: the traces lack a label, or are of too few prompts.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler

    rows, labels, groups, weights = [], [], [], []
    for rollout, verdict in zip(seen.rollouts, seen.verdicts, strict=True):
        if verdict.label not in (SAFE, UNSAFE) or rollout.id not in states:
            continue
        of_trace = states[rollout.id]
        rows.append(of_trace)
        labels += [verdict.label == SAFE] * len(of_trace)
        groups += [rollout.prompt_id] * len(of_trace)
        weights += [1 / len(of_trace)] * len(of_trace)  # every trace counts once
    if len(set(labels)) < 2 or len(set(groups)) < FOLDS:
        raise BadInput(
            f"probe: {len(rows)} judged traces of {len(set(groups))} prompts; give traces of both "
            f"labels, of {FOLDS} prompts or more"
        )
    scaler = StandardScaler()
    scaled = scaler.fit_transform(np.concatenate(rows).astype(float))
    folds = list(GroupKFold(FOLDS).split(scaled, labels, groups))
    model = LogisticRegressionCV(
        Cs=STRENGTHS,
        cv=folds,
        scoring="neg_log_loss",
        max_iter=500,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )
    model.fit(scaled, labels, sample_weight=np.array(weights))
    slopes = model.coef_[0] / scaler.scale_
    bias = float(model.intercept_[0] - slopes @ scaler.mean_)
    return Probe(tuple(slopes.tolist()), bias)


def falls(probe: Probe, states: Array) -> Array:
    """By how much the log-odds of safety fall over each sentence: [sentences]."""
    return -np.diff(probe.log_odds(states))


def learn_threshold(probe: Probe, states: Mapping[str, Array], seen: JudgedRollouts) -> float:
    """The fall from which on a trace is best called unsafe (balanced accuracy).

    It lies in the middle between the best level and the next lower one that occurs.
    """
    largest: dict[str, list[float]] = {SAFE: [], UNSAFE: []}
    for rollout, verdict in zip(seen.rollouts, seen.verdicts, strict=True):
        if verdict.label in largest and rollout.id in states:
            of_trace = falls(probe, states[rollout.id])[1:]  # the first sentence is never a cue
            largest[verdict.label].append(float(of_trace.max(initial=-np.inf)))
    levels = np.unique([*largest[SAFE], *largest[UNSAFE]])
    hits = [np.mean(np.array(largest[UNSAFE]) >= level) for level in levels]
    false_alarms = [np.mean(np.array(largest[SAFE]) >= level) for level in levels]
    best = int(np.argmax(np.array(hits) - np.array(false_alarms)))  # the lowest of equals
    return float(levels[max(best - 1, 0)] + levels[best]) / 2


@dataclass(frozen=True)
class StateCues:
    """A cue detector: the first sentence over which the probe's log-odds of safety fall enough."""

    session: Session  # with the model that is read
    probe: Probe
    threshold: float  # a fall of this much is a cue; log-odds

    stored = False

    def fingerprint(self) -> dict[str, Any]:
        """Probe, threshold and model."""
        return {
            "detector": "states",
            "probe": digest(to_json(self.probe)),
            "threshold": self.threshold,
            "sampler": self.session.sampler.fingerprint(),
        }

    def first_cues(self, prompts: Prompts, rollouts: Rollouts, texts: Texts) -> Answers:
        """Rollout id and index of the first cue; None where there is none."""
        states = states_by_sentence(self.session, prompts, rollouts)
        for rollout in rollouts:
            index = None
            if rollout.id in states:
                large = falls(self.probe, states[rollout.id]) >= self.threshold
                large[0] = False  # the first sentence restates the request
                if large.any():
                    index = int(large.argmax())
            yield rollout.id, index


def learn_state_cues(session: Session, seen: JudgedRollouts) -> StateCues:
    """A detector that is learnt from judged rollouts of training prompts alone."""
    states = states_by_sentence(session, seen.prompts, seen.rollouts)
    probe = learn_probe(states, seen)
    return StateCues(session, probe, learn_threshold(probe, states, seen))
