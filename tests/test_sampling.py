"""Settings, seeds and scripts of samplers."""

from __future__ import annotations

import pytest
from doubles import ScriptedSampler

from ipo_lib.records import BadInput, to_json
from ipo_lib.sampling import Completion, Request, Sampling, draw_seed


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"until": "</s>"},
    ],
)
def test_bad_sampling(wrong: dict) -> None:  # type: ignore[type-arg]
    (value,) = wrong.values()
    with pytest.raises(BadInput, match=str(value).replace("</s>", "until")):
        Sampling(**wrong)


def test_settings_without_a_budget_name_the_draws_they_always_named() -> None:
    assert "think_tokens" not in to_json(Sampling())
    assert to_json(Sampling(think_tokens=9))["think_tokens"] == 9
    with pytest.raises(BadInput, match="think_tokens must lie below max_tokens"):
        Sampling(max_tokens=10, think_tokens=10)


def test_seeds_differ_between_draws() -> None:
    seeds = set()
    for prompt in "abc":
        for cut in range(20):
            seeds.update(draw_seed(0, prompt, cut, draw) for draw in range(32))
    assert len(seeds) == 3 * 20 * 32
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(0, "a", 1) == draw_seed(0, "a", 1) != draw_seed(1, "a", 1)


def test_scripted_sampler_answers_in_order() -> None:
    def script(request: Request, _: Sampling) -> Completion:
        return Completion(request.key, (request.seed,), "stop")

    requests = [Request(str(number), (1,), (), number) for number in range(3)]
    completions = ScriptedSampler(script).sample(requests, Sampling())
    assert [completion.token_ids for completion in completions] == [(0,), (1,), (2,)]
