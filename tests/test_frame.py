"""Tables of responses: counts, rates and differences by prompt, on planted truth."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from ipo_lib.frame import count_labels, count_outcomes, counts, difference, rate, responses
from ipo_lib.records import SAFE, TRACE, UNSAFE, BadInput, Rollout, Verdict

PROMPTS, DRAWS = 40, 8


def rollout(prompt: str, draw: int, prefix_len: int = 0) -> Rollout:
    ids = (1, 2, 3, 4, 5)
    return Rollout(f"{prompt}/{draw}", prompt, prefix_len, ids, "", "stop", draw, "scripted")


def judged(rollouts: Sequence[Rollout], labels: Sequence[str | None]) -> list[Verdict]:
    pairs = zip(rollouts, labels, strict=True)
    return [Verdict(r.id, TRACE, "harm", label, None, "", "scripted") for r, label in pairs]


def planted(share: float, seed: int) -> tuple[list[Rollout], list[Verdict]]:
    """Responses that are unsafe at rate ``share``, on average over prompts of different rates."""
    rng = random.Random(seed)
    rollouts, labels = [], []
    for index in range(PROMPTS):
        of_prompt = share + rng.uniform(-0.2, 0.2)
        for draw in range(DRAWS):
            rollouts.append(rollout(f"p{index}", draw))
            labels.append(UNSAFE if rng.random() < of_prompt else SAFE)
    return rollouts, judged(rollouts, labels)


def test_one_row_per_response() -> None:
    rollouts = [rollout("a", 0), rollout("b", 1, prefix_len=2)]
    table = responses(
        rollouts, trace=judged(rollouts, [SAFE, None]), answer=judged(rollouts, [UNSAFE, UNSAFE])
    )
    assert table.to_dict("list") == {
        "prompt": ["a", "b"],
        "rollout": ["a/0", "b/1"],
        "draw": [0, 1],
        "tokens": [5, 3],
        "finish": ["stop", "stop"],
        "trace": [SAFE, None],
        "answer": [UNSAFE, UNSAFE],
    }
    assert counts(table, "answer") == {"a": (1, 1), "b": (1, 1)}
    assert counts(table, "trace", SAFE) == {"a": (1, 1), "b": (0, 0)}


def test_an_empty_table_has_all_columns() -> None:
    table = responses([], trace=[])
    assert list(table) == ["prompt", "rollout", "draw", "tokens", "finish", "trace"]
    assert counts(table, "trace") == {}


def test_every_response_needs_one_verdict() -> None:
    rollouts = [rollout("a", 0), rollout("a", 1)]
    with pytest.raises(BadInput, match="1 verdicts 'trace' of 2 rollouts; give one each"):
        responses(rollouts, trace=judged(rollouts[:1], [SAFE]))


def test_unjudged_responses_count_in_neither_k_nor_n() -> None:
    prompts = ["a", "b", "a", "a", "c", "b"]
    rollouts = [rollout(prompt, draw) for draw, prompt in enumerate(prompts)]
    verdicts = judged(rollouts, [UNSAFE, SAFE, None, SAFE, None, UNSAFE])
    # In order of first appearance; prompt "c" stays in.
    assert list(count_labels(rollouts, verdicts).items()) == [
        ("a", (1, 2)),
        ("b", (1, 2)),
        ("c", (0, 0)),
    ]
    assert count_labels(rollouts, verdicts, SAFE) == {"a": (1, 2), "b": (1, 2), "c": (0, 0)}


def test_outcomes_are_counted_by_prompt() -> None:
    outcomes = [True, False, None, True, None]
    assert count_outcomes(["a", "a", "b", "c", "c"], outcomes) == {
        "a": (1, 2),
        "b": (0, 0),
        "c": (1, 1),
    }
    with pytest.raises(ValueError, match="shorter"):
        count_outcomes(["a", "b"], [True])


def test_planted_rate_comes_back() -> None:
    interval = rate(count_labels(*planted(0.6, seed=1)))
    assert interval.low <= 0.6 <= interval.high
    assert interval.high - interval.low < 0.15
    assert interval.n == PROMPTS


def test_prompts_have_equal_weight_and_unjudged_ones_none() -> None:
    interval = rate({"a": (8, 8), "b": (0, 2), "c": (0, 0)})
    assert (interval.value, interval.n) == (0.5, 2)
    assert math.isnan(rate({}).value)


def test_planted_difference_comes_back_paired_by_prompt() -> None:
    before = count_labels(*planted(0.7, seed=2))
    after = count_labels(*planted(0.3, seed=3))
    change = difference(before, after)
    assert change.low <= -0.4 <= change.high < 0
    assert change.value == pytest.approx(rate(after).value - rate(before).value)
    # The order of the prompts does not matter: they are matched by id.
    assert difference(before, dict(reversed(after.items()))) == change
    assert difference({"a": (4, 4), "b": (0, 4)}, {"b": (2, 4), "a": (0, 4)}).value == -0.25


def test_a_difference_is_of_the_same_prompts() -> None:
    with pytest.raises(BadInput, match="prompt 'b' is on one side only"):
        difference({"a": (1, 2)}, {"a": (1, 2), "b": (0, 2)})
