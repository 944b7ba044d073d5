"""The benchmarks compare like with like: the same requests, the same tokens drawn, the same loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ipo_lib.chat import Chat
from ipo_lib.sandbox import benchmark
from ipo_lib.sandbox.organism import shipped


@pytest.fixture(autouse=True)
def on_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "folder", lambda _: shipped("tiny"))
    monkeypatch.setattr(benchmark, "STEPS", 4)
    monkeypatch.setattr(
        benchmark, "LEAN", replace(benchmark.LEAN, dtype="float32", learning_rate=3e-3)
    )


def test_every_engine_draws_the_same_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(benchmark, "TOKENS", 3)
    model: Any = AutoModelForCausalLM.from_pretrained(shipped("tiny"))
    model.generation_config = type(model.generation_config)()
    plain, asked = model.config._attn_implementation, benchmark.requests(Chat(shipped("tiny")))
    assert {name: (len(one), len(set(one))) for name, one in asked.items()} == {
        "32 x one prefix": (32, 1),
        "12 cuts x 8": (96, 12),
        "64 unrelated": (64, 64),
    }
    assert {len(ids) for ids in asked["32 x one prefix"]} == {benchmark.PREFIX}
    for prefixes in asked.values():
        assert benchmark.ours(model, prefixes) == 3 * len(prefixes)
        model.set_attn_implementation(plain)
        assert (
            benchmark.theirs(model, prefixes)
            == benchmark.theirs(model, prefixes, together=False)
            == 3 * len(prefixes)
        )


@pytest.mark.parametrize("shape", benchmark.SHAPES)
def test_pairs_are_as_long_as_they_say(shape: str) -> None:
    leaves, batch = benchmark.SHAPES[shape]
    made = benchmark.pairs(Chat(shipped("tiny")), leaves, 4 * batch)
    spans = [len(pair.prompt_ids) + len(pair.chosen_ids) for pair in made]
    assert len(made) == 4 * batch
    assert len({(pair.prompt_ids, pair.rejected_ids) for pair in made}) == 4 * batch // leaves
    assert all(benchmark.LENGTHS[0] - 1 <= span <= benchmark.LENGTHS[1] for span in spans)
    assert all(
        len(pair.prompt_ids) == len(pair.chosen_ids) == len(pair.rejected_ids) for pair in made
    )
    assert len(set(spans)) > 2


@pytest.mark.parametrize("shape", benchmark.SHAPES)
def test_trl_and_ours_have_the_same_losses(shape: str) -> None:
    stock, ours = (benchmark.trained(engine, shape, "") for engine in benchmark.ENGINES)
    assert len(stock["losses"]) == len(stock["seconds"]) == len(ours["seconds"]) == 4
    assert stock["losses"] == pytest.approx(ours["losses"], abs=1e-3)
    assert max(stock["losses"]) - min(stock["losses"]) > 5e-3  # five times what is allowed above
