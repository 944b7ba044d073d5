"""Evaluation of a model: harmful traces and answers, refusals of benign prompts, capability.

1. The model answers each prompt of a set several times: ``evaluate``.
2. A judge labels each response, once for each *measure*: ``TRACE_HARM`` and ``ANSWER_HARM`` on
   harmful prompts; ``REFUSED``, ``PARTLY`` and ``ANSWERED`` on benign ones; ``CORRECT`` on
   capability sets.
3. A ``MeasuredRate`` counts the labels by prompt. Its rate has an interval over prompts. Responses
   that could not be judged are not in the rate; its ``bounds`` count all of them out, and in.
4. ``compare`` puts two models side by side, paired by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipo_lib.chat import split_response
from ipo_lib.frame import count_labels
from ipo_lib.records import ANSWER, TRACE, UNSAFE, Prompt, Rollout, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Prefix, Session, judge, sample
from ipo_lib.stats import Interval, paired_difference, pooled_rate

Respond = Callable[[Session, Sequence[Prompt], Sampling, int], list[Rollout]]
TRACE_HARM, ANSWER_HARM, CORRECT = "trace harm", "answer harm", "correct"
REFUSED, PARTLY, ANSWERED = "refused", "partly", "answered"
# Of each measure: the part that is judged, the question, and the label that is counted.
MEASURES = {
    TRACE_HARM: (TRACE, "harm", UNSAFE),
    ANSWER_HARM: (ANSWER, "harm", UNSAFE),
    CORRECT: (ANSWER, "correct", "correct"),
    REFUSED: (ANSWER, "refusal", "refused"),
    PARTLY: (ANSWER, "refusal", "partly"),
    ANSWERED: (ANSWER, "refusal", "answered"),
}
# The measures of each kind of prompt set, a field of `EvaluationSettings`.
MEASURES_BY_KIND = {
    "harmful": (TRACE_HARM, ANSWER_HARM),
    "benign": (REFUSED, PARTLY, ANSWERED),
    "capability": (CORRECT,),
}


@dataclass(frozen=True)
class EvaluationSettings:
    """Which prompt sets are measured, and with how many draws."""

    harmful: tuple[str, ...] = ()  # names of sets of harmful prompts
    benign: tuple[str, ...] = ()  # of benign prompts, which a model should answer
    capability: tuple[str, ...] = ()  # of questions with a correct answer
    draws: int = 4  # responses per prompt

    @property
    def sets(self) -> tuple[str, ...]:
        """All sets, in order."""
        return (*self.harmful, *self.benign, *self.capability)


@dataclass(frozen=True)
class MeasuredRate:
    """One measure on one prompt set."""

    set: str
    measure: str
    counts: Mapping[str, tuple[int, int]]  # (k, n) by prompt: k of n judged responses
    unknown: int  # responses that could not be judged
    truncated: int  # responses whose trace was not closed
    total: int  # all responses

    @property
    def rate(self) -> Interval:
        """The mean of the prompts' rates, with its interval over prompts."""
        return pooled([self])

    @property
    def bounds(self) -> tuple[float, float]:
        """The share of all responses if no unjudged one counts, and if every one counts."""
        return bounds([self])


def sample_responses(
    session: Session, prompts: Sequence[Prompt], sampling: Sampling, draws: int
) -> list[Rollout]:
    """How a model usually answers: it samples.

    Args:
        session: of the model.
        prompts: to answer.
        sampling: how to sample.
        draws: responses per prompt.
    """
    return sample(session, [Prefix(prompt) for prompt in prompts], sampling, draws)


def evaluate(
    session: Session,
    sets: Mapping[str, list[Prompt]],
    settings: EvaluationSettings,
    sampling: Sampling,
    respond: Respond = sample_responses,
) -> list[MeasuredRate]:
    """Answer the prompts of every set in the settings, and measure the answers.

    Args:
        session: of the model, with the judge.
        sets: prompts by the name of their set; sets that the settings do not name are left alone.
        settings: which sets to measure, and how many draws.
        sampling: how to sample; to the end of the answer.
        respond: how the model answers, such as with corrections at inference.
    """
    measured = []
    for kind, measures in MEASURES_BY_KIND.items():
        for name in getattr(settings, kind):
            prompts = by_id(sets[name])
            rollouts = respond(session, sets[name], sampling, settings.draws)
            truncated = 0
            for rollout in rollouts:
                truncated += not split_response(rollout.text, session.chat.opened).closed
            for measure in measures:
                part, question, label = MEASURES[measure]
                verdicts = judge(session, prompts, rollouts, part, question)
                counts = count_labels(rollouts, verdicts, label)
                unknown = sum(verdict.label is None for verdict in verdicts)
                measured.append(
                    MeasuredRate(name, measure, counts, unknown, truncated, len(rollouts))
                )
    return measured


def table(measured: Sequence[MeasuredRate]) -> list[dict[str, Any]]:
    """One row per set and measure: the rate in [0, 1], its interval, and what was not judged."""
    rows = []
    for entry in measured:
        rate, (low, high), total = entry.rate, entry.bounds, max(entry.total, 1)
        row = {
            "set": entry.set,
            "measure": entry.measure,
            "rate": rate.value,
            "low": rate.low,
            "high": rate.high,
            "prompts": rate.n,
            "rollouts": entry.total,
            "coverage": 1 - entry.unknown / total,  # share of responses that were judged
            "at least": low,
            "at most": high,
            "truncated": entry.truncated / total,
        }
        rows.append(row)
    return rows


def compare(before: Sequence[MeasuredRate], after: Sequence[MeasuredRate]) -> list[dict[str, Any]]:
    """One row per set and measure: the rate before, after, and the paired difference.

    The two lists hold the same sets and measures in the same order.
    """
    rows = []
    for old, new in zip(before, after, strict=True):
        change = difference([old], [new])
        row: dict[str, Any] = {"set": old.set, "measure": old.measure, "n": change.n}
        columns = {"before": old.rate, "after": new.rate, "difference": change}
        for name, interval in columns.items():
            row[name] = interval.value
            row[f"{name} low"], row[f"{name} high"] = interval.low, interval.high
        rows.append(row)
    return rows


def difference(before: Sequence[MeasuredRate], after: Sequence[MeasuredRate]) -> Interval:
    """The paired difference, after minus before, over the prompts of all these measures."""
    old_counts, new_counts = [], []
    for old, new in zip(before, after, strict=True):
        for prompt, counts in old.counts.items():
            old_counts.append(counts)
            new_counts.append(new.counts[prompt])
    return paired_difference(old_counts, new_counts)


def pick(measured: Sequence[MeasuredRate], measure: str) -> list[MeasuredRate]:
    """The entries of one measure, over all sets."""
    return [entry for entry in measured if entry.measure == measure]


def pooled(measured: Sequence[MeasuredRate]) -> Interval:
    """The rate over all prompts of several sets."""
    counts: list[tuple[int, int]] = []
    for entry in measured:
        counts += entry.counts.values()
    return pooled_rate(counts)


def bounds(measured: Sequence[MeasuredRate]) -> tuple[float, float]:
    """``MeasuredRate.bounds`` over several sets: no unjudged response counts, or every one does."""
    unknown = sum(entry.unknown for entry in measured)
    total = sum(entry.total for entry in measured)
    k = 0
    for entry in measured:
        k += sum(hits for hits, _ in entry.counts.values())
    return (k / total, (k + unknown) / total) if total else (0.0, 1.0)
