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
    monkeypatch.setattr(benchmark, "PAIRS", 32)
    monkeypatch.setattr(benchmark, "LEAN", replace(benchmark.LEAN, dtype="float32", learning_rate=3e-3))


def test_every_engine_draws_the_same_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(benchmark, "TOKENS", 3)
    model: Any = AutoModelForCausalLM.from_pretrained(shipped("tiny"))
    model.generation_config = type(model.generation_config)()
    plain, asked = model.config._attn_implementation, benchmark.requests(Chat(shipped("tiny")))
    assert {name: (len(one), len(set(one))) for name, one in asked.items()} == {
        "32 x one prefix": (32, 1), "12 cuts x 8": (96, 12), "64 unrelated": (64, 64),
    }  # fmt: skip
    assert {len(ids) for ids in asked["32 x one prefix"]} == {benchmark.PREFIX}
    for prefixes in asked.values():
        assert benchmark.ours(model, prefixes) == 3 * len(prefixes)
        model.set_attn_implementation(plain)
        assert benchmark.theirs(model, prefixes) == benchmark.theirs(model, prefixes, together=False) == 3 * len(prefixes)


def test_pairs_are_as_long_as_they_say() -> None:
    made = benchmark.pairs(Chat(shipped("tiny")))
    spans = [len(pair.prompt_ids) + len(pair.chosen_ids) for pair in made]
    assert len(made) == 32
    assert all(benchmark.LENGTHS[0] - 1 <= span <= benchmark.LENGTHS[1] for span in spans)
    assert all(len(pair.prompt_ids) == len(pair.chosen_ids) == len(pair.rejected_ids) for pair in made)
    assert len(set(spans)) > 5


def test_trl_and_ours_have_the_same_losses() -> None:
    found = {engine: benchmark.trained(engine, None)["losses"] for engine in benchmark.TRAINERS}
    stock, same_batches, padded, lean = found.values()
    assert list(found) == ["TRL", "TRL, our batches", "TRL, padded", "ipo_lib"]
    assert len(stock) == 4
    assert abs(lean[-1] - lean[0]) > 0.02
    assert lean == pytest.approx(same_batches, abs=1e-3)
    assert padded == pytest.approx(same_batches, abs=1e-3)
    assert lean[0] == pytest.approx(stock[0], abs=1e-3)  # before the first step every pair's loss is log 2
    assert lean != pytest.approx(stock, abs=1e-3)  # other pairs share a batch
