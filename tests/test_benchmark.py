"""The benchmarks compare like with like: the same requests, as many tokens, the same loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ipo_lib.chat import Chat
from ipo_lib.sandbox.build import benchmark
from ipo_lib.sandbox.organism import shipped


@pytest.fixture(autouse=True)
def on_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(benchmark.SETTINGS, dtype="float32", learning_rate=3e-3)
    monkeypatch.setattr(benchmark, "folder", lambda _: shipped("tiny"))
    monkeypatch.setattr(benchmark, "STEPS", 4)
    monkeypatch.setattr(benchmark, "SETTINGS", settings)


def test_every_engine_draws_the_same_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(benchmark, "TOKENS", 3)
    model: Any = AutoModelForCausalLM.from_pretrained(shipped("tiny"))
    model.generation_config = type(model.generation_config)()
    attention = model.config._attn_implementation
    requests = benchmark.requests(Chat(shipped("tiny")))
    sizes = {name: (len(prefixes), len(set(prefixes))) for name, prefixes in requests.items()}
    assert sizes == {"32 x one prefix": (32, 1), "12 cuts x 8": (96, 12), "64 unrelated": (64, 64)}
    assert {len(ids) for ids in requests["32 x one prefix"]} == {benchmark.PREFIX}
    for prefixes in requests.values():
        for decode in benchmark.DECODERS.values():
            model.set_attn_implementation(attention)
            assert decode(model, prefixes) == 3 * len(prefixes)


@pytest.mark.parametrize("shape", benchmark.SHAPES)
def test_pairs_are_as_long_as_they_say(shape: str) -> None:
    leaves, batch = benchmark.SHAPES[shape]
    pairs = benchmark.pairs(Chat(shipped("tiny")), leaves, 4 * batch)
    assert len(pairs) == 4 * batch
    losers = {(pair.prompt_ids, pair.rejected_ids) for pair in pairs}
    assert len(losers) == 4 * batch // leaves
    low, high = benchmark.LENGTHS
    lengths = [len(pair.prompt_ids) for pair in pairs]
    assert all(low - 1 <= 2 * length <= high for length in lengths)
    assert [len(pair.chosen_ids) for pair in pairs] == lengths
    assert [len(pair.rejected_ids) for pair in pairs] == lengths
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("shape", benchmark.SHAPES)
def test_trl_and_ours_have_the_same_losses(shape: str) -> None:
    stock, ours = (benchmark.trained(engine, shape, "") for engine in benchmark.ENGINES)
    assert len(stock["losses"]) == len(stock["seconds"]) == len(ours["seconds"]) == 4
    assert stock["losses"] == pytest.approx(ours["losses"], abs=1e-3)
    assert max(stock["losses"]) - min(stock["losses"]) > 5e-3  # five times what is allowed above
