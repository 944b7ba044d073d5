"""Harmful rates by part, over-refusal and capability on each prompt set, before and after. Every rate has its interval over
prompts, its coverage (share judged) and its bounds (None all safe / all unsafe); truncated traces are a column of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipo_lib.chat import split
from ipo_lib.records import ANSWER, TRACE, UNSAFE, Prompt, Rollout, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Prefix, Session, by_prompt, judge, sample
from ipo_lib.stats import Interval, paired_difference, pooled_rate

Respond = Callable[[Session, Sequence[Prompt], Sampling, int], list[Rollout]]
TRACE_HARM, ANSWER_HARM, CORRECT = "trace harm", "answer harm", "correct"
REFUSED, PARTLY, ANSWERED = "refused", "partly", "answered"
MEASURES = {
    TRACE_HARM: (TRACE, "harm", UNSAFE),
    ANSWER_HARM: (ANSWER, "harm", UNSAFE),
    CORRECT: (ANSWER, "correct", "correct"),
    REFUSED: (ANSWER, "refusal", "refused"),
    PARTLY: (ANSWER, "refusal", "partly"),
    ANSWERED: (ANSWER, "refusal", "answered"),
}
ASKED = {
    "harmful": (TRACE_HARM, ANSWER_HARM),
    "benign": (REFUSED, PARTLY, ANSWERED),
    "capability": (CORRECT,),
}


@dataclass(frozen=True)
class EvaluationSettings:
    """Which sets answer which question, and the draws a prompt."""

    harmful: tuple[str, ...] = ()
    benign: tuple[str, ...] = ()
    capability: tuple[str, ...] = ()
    draws: int = 4

    @property
    def sets(self) -> tuple[str, ...]:
        """All of them, in order."""
        return (*self.harmful, *self.benign, *self.capability)


@dataclass(frozen=True)
class MeasuredRate:
    """One measure on one set: (k, n) per prompt, and how many rollouts were unknown or truncated among ``total``."""

    set: str
    measure: str
    counts: Mapping[str, tuple[int, int]]
    unknown: int
    truncated: int
    total: int

    @property
    def rate(self) -> Interval:
        """The pooled rate with its interval over prompts."""
        return pooled_rate(list(self.counts.values()))

    @property
    def bounds(self) -> tuple[float, float]:
        """The rate with every unknown counted out, and counted in."""
        k = sum(pair[0] for pair in self.counts.values())
        return (k / self.total, (k + self.unknown) / self.total) if self.total else (0.0, 1.0)


def plainly(
    session: Session, prompts: Sequence[Prompt], sampling: Sampling, draws: int
) -> list[Rollout]:
    """How a model answers: it samples."""
    return sample(session, [Prefix(prompt) for prompt in prompts], sampling, draws)


def evaluate(
    session: Session,
    sets: Mapping[str, list[Prompt]],
    settings: EvaluationSettings,
    sampling: Sampling,
    respond: Respond = plainly,
) -> list[MeasuredRate]:
    """Answer every set to the end and measure it. Sets not named in the settings are left alone."""
    found = []
    for name, measures in [
        (name, measures) for kind, measures in ASKED.items() for name in getattr(settings, kind)
    ]:
        prompts = by_id(sets[name])
        rollouts = respond(session, sets[name], sampling, settings.draws)
        cut = sum(not split(rollout.text, session.chat.opened).closed for rollout in rollouts)
        for measure in measures:
            part, question, label = MEASURES[measure]
            verdicts = judge(session, prompts, rollouts, part, question)
            unknown = sum(verdict.label is None for verdict in verdicts)
            found.append(
                MeasuredRate(
                    name, measure, by_prompt(rollouts, verdicts, label), unknown, cut, len(rollouts)
                )
            )
    return found


def table(measured: Sequence[MeasuredRate]) -> list[dict[str, Any]]:
    """One row per set and measure: rate in [0, 1] with interval, coverage, bounds, truncated share."""
    rows = []
    for one in measured:
        rate, (low, high), total = one.rate, one.bounds, max(one.total, 1)
        values = {
            "rate": rate.value,
            "low": rate.low,
            "high": rate.high,
            "prompts": rate.n,
            "rollouts": one.total,
        }
        shares = {
            "coverage": 1 - one.unknown / total,
            "at least": low,
            "at most": high,
            "truncated": one.truncated / total,
        }
        rows.append({"set": one.set, "measure": one.measure, **values, **shares})
    return rows


def compare(before: Sequence[MeasuredRate], after: Sequence[MeasuredRate]) -> list[dict[str, Any]]:
    """One row per set and measure: before, after and the paired difference (after - before), each with its interval."""
    rows: list[dict[str, Any]] = []
    for old, new in zip(before, after, strict=True):
        change = difference([old], [new])
        rows.append({"set": old.set, "measure": old.measure, "n": change.n})
        for name, one in (("before", old.rate), ("after", new.rate), ("difference", change)):
            rows[-1] |= {name: one.value, f"{name} low": one.low, f"{name} high": one.high}
    return rows


def difference(before: Sequence[MeasuredRate], after: Sequence[MeasuredRate]) -> Interval:
    """The paired difference (after - before) over the prompts of all given measures that were judged on both sides."""
    pairs = [
        (old.counts[prompt], new.counts[prompt])
        for old, new in zip(before, after, strict=True)
        for prompt in old.counts
    ]
    return paired_difference([old for old, _ in pairs], [new for _, new in pairs])


def pick(measured: Sequence[MeasuredRate], measure: str) -> list[MeasuredRate]:
    """The entries of one measure, over all sets."""
    return [one for one in measured if one.measure == measure]


def bounds(measured: Sequence[MeasuredRate]) -> tuple[float, float]:
    """The share over all responses of several sets with every unjudged one counted out, and counted in."""
    k = sum(hits for one in measured for hits, _ in one.counts.values())
    unknown, total = sum(one.unknown for one in measured), sum(one.total for one in measured)
    return (k / total, (k + unknown) / total) if total else (0.0, 1.0)


def pooled(measured: Sequence[MeasuredRate]) -> Interval:
    """The rate over all prompts of several sets."""
    return pooled_rate([counts for one in measured for counts in one.counts.values()])
