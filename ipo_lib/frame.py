"""Responses as a table, and two numbers from it: a rate and a difference of rates.

1. A table has one row per response: its prompt, its length and the labels that judges gave it.
2. ``counts`` groups a column by prompt: in how many of the judged responses it has a label.
3. ``rate`` and ``difference`` turn such counts into a number with an interval. The prompt is the
   unit of sampling, since responses to one prompt are alike.

A response that could not be judged has no label (None). It counts in neither k nor n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ipo_lib.records import UNSAFE, BadInput, Rollouts, Verdicts
from ipo_lib.stats import Interval, Limits, mean, paired_difference, pooled_rate

if TYPE_CHECKING:
    import pandas as pd

Counts = Mapping[str, tuple[int, int]]  # by prompt id: (k, n)


def responses(rollouts: Rollouts, **verdicts: Verdicts) -> pd.DataFrame:
    """One row per rollout, with a column of labels for each list of verdicts.

    Args:
        rollouts: the responses, in any order.
        verdicts: one list for each column, in the order of the rollouts, such as
            ``trace=verdicts_on_traces``.

    Returns:
        Columns ``prompt`` (id), ``rollout`` (id), ``draw``, ``tokens`` (generated ones),
        ``finish``, and one column of labels per argument.
    """
    import pandas as pd

    rows = []
    for rollout in rollouts:
        tokens = len(rollout.token_ids) - rollout.prefix_len
        rows.append((rollout.prompt_id, rollout.id, rollout.draw, tokens, rollout.finish))
    table = pd.DataFrame(rows, columns=["prompt", "rollout", "draw", "tokens", "finish"])
    for name, column in verdicts.items():
        if len(column) != len(rollouts):
            raise BadInput(
                f"table: {len(column)} verdicts {name!r} of {len(rollouts)} rollouts; give one each"
            )
        table[name] = pd.Series([verdict.label for verdict in column], dtype=object)
    return table


def counts(table: pd.DataFrame, column: str, label: str = UNSAFE) -> dict[str, tuple[int, int]]:
    """(k, n) of every prompt: ``column`` has ``label`` in k of n judged responses."""
    outcomes = [None if value is None else value == label for value in table[column]]
    return count_outcomes(table["prompt"], outcomes)


def count_labels(
    rollouts: Rollouts, verdicts: Verdicts, label: str = UNSAFE
) -> dict[str, tuple[int, int]]:
    """(k, n) of every prompt: ``label`` was given to k of its n judged rollouts."""
    return counts(responses(rollouts, label=verdicts), "label", label)


def count_outcomes(
    prompts: Iterable[str], outcomes: Iterable[bool | None]
) -> dict[str, tuple[int, int]]:
    """(k, n) of every prompt id: k of its n outcomes are true; None is not counted.

    A prompt without any known outcome stays in, with n = 0.
    """
    counted: dict[str, tuple[int, int]] = {}
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        k, n = counted.get(prompt, (0, 0))
        counted[prompt] = (k + bool(outcome), n + (outcome is not None))
    return counted


def rate(by_prompt: Counts) -> Interval:
    """The mean over prompts of k / n, with its interval over prompts."""
    return pooled_rate(list(by_prompt.values()))


def mean_over_prompts(
    prompts: Iterable[str], values: Iterable[float], limits: Limits = (-1.0, 1.0)
) -> Interval:
    """The mean over prompts of each prompt's mean value, with its interval over prompts.

    Args:
        prompts: id of the prompt of each value.
        values: numbers; nan is left out.
        limits: the numbers lie between these two.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        if not math.isnan(value):
            by_prompt.setdefault(prompt, []).append(value)
    return mean([sum(some) / len(some) for some in by_prompt.values()], limits)


def difference(before: Counts, after: Counts) -> Interval:
    """The mean over prompts of the rate in ``after`` minus the rate in ``before``.

    Raises:
        BadInput: the two do not count the same prompts.
    """
    if before.keys() != after.keys():
        only = sorted(before.keys() ^ after.keys())[0]
        raise BadInput(f"difference: prompt {only!r} is on one side only; count the same prompts")
    return paired_difference(list(before.values()), [after[prompt] for prompt in before])
