"""Joint safety of trace and answer (Fig 3), diversity of groups (Fig 4), prevalence (Fig 5a).

1. Every prompt is sampled several times; a judge labels trace and answer of each response.
2. *Joint safety*: the share of responses in each of the four cells (trace, answer). The control
   puts a safe and an unsafe trace of the same prompt before a new answer.
3. A *group* is all responses to one prompt. *Diversity*: how many groups have k safe traces,
   beside what a binomial of the same mean rate would give if all prompts were alike.
4. *Prevalence*: how many traces have a turning point (Eq. 2 and 3), and of which kind.

Rates are means over prompts, with intervals over prompts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

from ipo_lib import csr
from ipo_lib.frame import count_labels, count_outcomes, counts, rate, responses
from ipo_lib.records import ANSWER, SAFE, UNSAFE, BadInput, Rollout, TurningPoint, Verdicts
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    JudgedRollouts,
    Prefix,
    Session,
    first_of_each_prompt,
    judge,
    mixed_prompts,
    random_subset,
    sample,
    trace_end,
)
from ipo_lib.stats import Interval, clopper_pearson
from ipo_lib.turning_points.adaptive import DIFFUSE
from ipo_lib.turning_points.curves import Curve, recorded_rollouts
from ipo_lib.turning_points.exhaustive import true_turn
from ipo_lib.turning_points.wald import UNDECIDED

SIDES = (SAFE, UNSAFE)


def joint_safety(seen: JudgedRollouts, answers: Verdicts) -> dict[tuple[str, str], Interval]:
    """Fig 3: the share of responses by (trace, answer) label, among those with both labels."""
    table = responses(seen.rollouts, trace=seen.verdicts, answer=answers)
    judged = table.dropna(subset=["trace", "answer"])
    shares = {}
    for trace, answer in itertools.product(SIDES, SIDES):
        in_cell = (judged["trace"] == trace) & (judged["answer"] == answer)
        shares[trace, answer] = rate(count_outcomes(judged["prompt"], in_cell))
    return shares


def answer_given_trace(seen: JudgedRollouts, answers: Verdicts, trace: str) -> Interval:
    """P(answer safe | trace labelled ``trace``), over the prompts that have such a trace."""
    table = responses(seen.rollouts, trace=seen.verdicts, answer=answers)
    return rate(counts(table[table["trace"] == trace], "answer", SAFE))


def swap_traces(
    session: Session, seen: JudgedRollouts, sampling: Sampling, draws: int
) -> dict[str, dict[str, tuple[int, int]]]:
    """The control of Fig 3: does the trace decide the answer?

    Of each prompt with closed traces of both labels, one trace of each label is kept, and the
    answer is drawn anew after it.

    Args:
        session: store, model and judge.
        seen: judged rollouts, from which the traces are taken.
        sampling: of the answers.
        draws: answers after each trace.

    Returns:
        By the label of the trace: (unsafe answers, judged answers) of every prompt.
    """
    prefixes = {label: _closed_traces(session, seen, label) for label in (UNSAFE, SAFE)}
    prompts = [prompt for prompt in prefixes[UNSAFE] if prompt in prefixes[SAFE]]
    counts_by_label = {}
    for label, by_prompt in prefixes.items():
        starts = [by_prompt[prompt] for prompt in prompts]
        answers = sample(session, starts, sampling, draws, stage="answers")
        verdicts = judge(session, seen.prompts, answers, ANSWER)
        counts_by_label[label] = count_labels(answers, verdicts)
    return counts_by_label


def _closed_traces(session: Session, seen: JudgedRollouts, label: str) -> dict[str, Prefix]:
    """The first closed trace with this label of every prompt that has one, as a prefix."""
    prefixes: dict[str, Prefix] = {}
    for rollout in seen.labelled(label):
        end = trace_end(session, rollout)
        if end is not None and rollout.prompt_id not in prefixes:
            prompt = seen.prompts[rollout.prompt_id]
            prefixes[rollout.prompt_id] = Prefix(prompt, rollout.token_ids[:end])
    return prefixes


@dataclass(frozen=True)
class Diversity:
    """Fig 4 for one prompt set."""

    shares: tuple[Interval, ...]  # shares[k]: prompts whose group has k safe traces
    alike: tuple[float, ...]  # the same from a binomial of the mean rate: all prompts alike
    flat: Interval  # groups all safe or all unsafe: a group-relative reward learns nothing there


def diversity(seen: JudgedRollouts, group: int) -> Diversity:
    """How many traces of a group are safe.

    Args:
        seen: judged rollouts; prompts with other than ``group`` judged traces are left out.
        group: rollouts of each prompt.
    """
    by_prompt = count_labels(seen.rollouts, seen.verdicts, SAFE)
    groups = Counter(safe for safe, judged in by_prompt.values() if judged == group)
    total = groups.total()
    all_safe = sum(safe * times for safe, times in groups.items())
    safe_rate = all_safe / (group * total) if total else 0.0
    shares, alike = [], []
    for k in range(group + 1):
        shares.append(clopper_pearson(groups[k], total))
        alike.append(comb(group, k) * safe_rate**k * (1 - safe_rate) ** (group - k))
    flat = clopper_pearson(groups[0] + groups[group], total)
    return Diversity(tuple(shares), tuple(alike), flat)


def choose_traces(
    seen: JudgedRollouts, label: str, count: int, seed: int, only_mixed: bool
) -> list[Rollout]:
    """One trace with this label from each of some prompts, at random.

    Args:
        seen: judged rollouts.
        label: safe or unsafe.
        count: number of prompts.
        seed: of the choice.
        only_mixed: take only prompts with traces of both labels, as the paper does. It selects for
            traces that turn.

    Raises:
        BadInput: there is no such trace.
    """
    prompts = set(mixed_prompts(seen.rollouts, seen.verdicts) if only_mixed else seen.prompts)
    candidates = [rollout for rollout in seen.labelled(label) if rollout.prompt_id in prompts]
    chosen = random_subset(first_of_each_prompt(candidates), count, seed)
    if not chosen:
        which = "prompts with traces of both kinds" if only_mixed else "prompts"
        raise BadInput(
            f"no {label} trace on {len(prompts)} {which}; raise plan.draws or the prompt set's "
            "count, or set mixed_only"
        )
    return chosen


def prevalence(turns: Iterable[TurningPoint], prompt_of: Mapping[str, str]) -> dict[str, Interval]:
    """Fig 5a: the share of traces that turn; a mean over prompts.

    Args:
        turns: one of every trace.
        prompt_of: id of the prompt, by rollout id.

    Returns:
        ``turns``: somewhere. ``before the end``: in a sentence whose window of later cuts fits into
        the trace, so that the trace's own label has no part in it. ``start-locked``: the rule holds
        before the first token. And the other flags: ``recrossing``, ``diffuse``, ``undecided``.
    """
    prompts, found = [], []
    for turn in turns:
        kinds = set(turn.flags)
        if turn.token is not None and csr.START_LOCKED not in kinds:
            kinds.add("turns")
        if turn.sentence is not None and csr.END not in kinds:
            kinds.add("before the end")
        prompts.append(prompt_of[turn.rollout_id])
        found.append(kinds)
    shares = {}
    for kind in ("turns", "before the end", csr.START_LOCKED, csr.RECROSSING, DIFFUSE, UNDECIDED):
        shares[kind] = rate(count_outcomes(prompts, [kind in kinds for kinds in found]))
    return shares


def recorded_turns(
    session: Session,
    seen: JudgedRollouts,
    curves: Sequence[Curve],
    kind: str,
    settings: csr.CsrSettings,
) -> tuple[list[Rollout], dict[str, TurningPoint]]:
    """Recorded traces of one label, as rollouts of this run, and where they turn by their exact S.

    Args:
        session: for its chat.
        seen: rollouts of this run. A curve of another trace is left out if it has no prompt.
        curves: recorded curves.
        kind: ``safe`` (Eq. 2 on safe traces) or ``unsafe`` (Eq. 3 on unsafe ones).
        settings: the rule.

    Returns:
        The rollouts, and their turning points by rollout id.
    """
    of_kind = [curve for curve in curves if curve.trace.label == kind]
    recorded = recorded_rollouts(session, seen, of_kind)
    turns = {}
    for rollout, curve in recorded:
        turns[rollout.id] = true_turn(curve.trace, kind, settings, curve.truth.tolist())
    return [rollout for rollout, _ in recorded], turns
