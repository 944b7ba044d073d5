"""Evaluation of a model: harmful traces and answers, refusals of benign prompts, capability.

1. The model answers each prompt of a set several times: ``evaluate``.
2. A judge labels each response, once for each *measure*: ``TRACE_HARM`` and ``ANSWER_HARM`` on
   harmful prompts; ``REFUSED``, ``PARTLY`` and ``ANSWERED`` on benign ones; ``CORRECT`` on
   capability sets.
3. A ``MeasuredRate`` counts the labels by prompt. Its rate has an interval over prompts. Responses
   that could not be judged are not in the rate; its ``bounds`` count all of them out, and in.
4. ``side_by_side`` is a table of several models; ``difference`` pairs two of them by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipo_lib.chat import split_response
from ipo_lib.frame import count_labels
from ipo_lib.records import ANSWER, TRACE, UNSAFE, Prompt, Rollout, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Prefix, Session, judge, sample
from ipo_lib.stats import Interval, format_interval, paired_difference, pooled_rate

if TYPE_CHECKING:
    import pandas as pd

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
    def coverage(self) -> float:
        """The share of responses that were judged."""
        return 1 - self.unknown / max(self.total, 1)

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


def side_by_side(by_model: Mapping[str, Sequence[MeasuredRate]]) -> pd.DataFrame:
    """One row per set and measure, with a column of rates for each model.

    Args:
        by_model: what was measured of each model, the untouched one first, all in one order.

    Returns:
        Columns ``prompts`` (the set), ``n`` prompts and ``measure``; each model's rate in percent
        with its interval; if there are several models, ``change``: the last one minus the first in
        points, paired by prompt; ``not judged`` and ``cut off``: the highest share of such
        responses. Where some were not judged, a rate is followed by its ``bounds``.
    """
    import pandas as pd

    rows = []
    for entries in zip(*by_model.values(), strict=True):
        first, last = entries[0], entries[-1]
        row: dict[str, Any] = {"prompts": first.set, "n": first.rate.n, "measure": first.measure}
        for name, entry in zip(by_model, entries, strict=True):
            row[name] = _in_percent(entry.rate)
            if entry.unknown:
                low, high = entry.bounds
                row[name] += f" ({100 * low:.1f}-{100 * high:.1f})"
        if len(entries) > 1:
            row["change"] = _in_percent(difference([first], [last]))
        row["not judged"] = f"{max(1 - entry.coverage for entry in entries):.0%}"
        row["cut off"] = f"{max(entry.truncated / max(entry.total, 1) for entry in entries):.0%}"
        rows.append(row)
    return pd.DataFrame(rows)


def _in_percent(value: Interval) -> str:
    """A rate as "37.8 [26.1, 50.5]"; its n stands in a column of its own."""
    return format_interval(value).partition(", n=")[0].replace(" %", "")


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
