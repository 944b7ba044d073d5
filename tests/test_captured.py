"""The decoder for GPUs draws what the decoder for CPUs draws, refills, grows and halves.

On a CPU its steps are called with the same buffers, without a graph; on a GPU the same tests run
with graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from sampling_kit import answers
from test_decoding import PREFIXES, collector, greedy
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.engines import captured, graphs, memory
from ipo_lib.engines.captured import CapturedDecoder, bucket
from ipo_lib.engines.decoding import ARCHITECTURES, Decoder
from ipo_lib.engines.graphs import GraphedFunction
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request, Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = [20, 3, 17, 1, 20, 9, 12, 5]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, spread=0.3)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def drawn(decoder: Decoder, limits: Sequence[int] = LIMITS, choose: Any = greedy) -> Any:
    rows, take = collector(limits)
    decoder.decode(PREFIXES, choose, take)
    return rows


@pytest.mark.parametrize("smallest", [4, 256])  # 4: every row outgrows several buckets
@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_greedy_tokens_are_those_of_the_other_decoder(
    folder: Path, size: int, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    expected = drawn(Decoder(model, size))
    monkeypatch.setattr(captured, "SMALLEST", smallest)
    decoder = CapturedDecoder(model, size)
    for _ in range(2):  # places, columns and graphs are kept for the second call
        assert drawn(decoder) == expected
    assert decoder.size == min(size, len(PREFIXES))
    if smallest == 4:
        longest = max(len(prefix) + limit for prefix, limit in zip(PREFIXES, LIMITS, strict=True))
        assert decoder.capacity == bucket(longest) > 8


def test_logits_are_those_of_the_other_decoder(folder: Path) -> None:
    model = load(folder)
    seen: list[dict[tuple[int, int], torch.Tensor]] = []
    for decoder in (Decoder(model, 3), CapturedDecoder(model, 3)):
        steps: dict[tuple[int, int], torch.Tensor] = {}
        rows, take = collector(LIMITS)

        def choose(
            live: Sequence[int], logits: torch.Tensor, steps: Any = steps, rows: Any = rows
        ) -> torch.Tensor:
            for index, row in zip(live, logits, strict=True):
                steps[index, len(rows[index])] = row.clone()
            return logits.argmax(-1)

        decoder.decode(PREFIXES, choose, take)
        seen.append(steps)
    assert len(seen[0]) == sum(LIMITS)
    for step, logits in seen[0].items():
        torch.testing.assert_close(seen[1][step], logits, rtol=1e-4, atol=1e-4)


def test_sampled_tokens_are_those_of_the_other_decoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    for place, prefix in enumerate(PREFIXES):
        for draw in range(3):
            requests.append(Request(f"{place}/{draw}", prefix, (), 100 * place + draw))
    sampling = Sampling(temperature=0.3, top_p=0.9, max_tokens=20)
    expected = answers(TransformersSampler(folder, Chat(folder), device="cpu"), requests, sampling)
    sampler = TransformersSampler(folder, Chat(folder), device=DEVICE, batch_size=5)
    if DEVICE == "cpu":
        monkeypatch.setattr("ipo_lib.engines.decoding.Decoder", CapturedDecoder)
    assert answers(sampler, requests, sampling) == expected


def test_a_step_writes_one_column_and_moves_none(folder: Path) -> None:
    decoder = CapturedDecoder(load(folder), 3)
    addresses, widths = set(), set()
    update = captured.PlacedLayer.update

    def watched(layer: Any, *arguments: Any, **options: Any) -> Any:
        addresses.add(layer.keys.data_ptr())
        widths.add(layer.width)
        return update(layer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured.PlacedLayer, "update", watched)
        drawn(decoder)
    assert widths == {256}
    assert len(addresses) == decoder.model.config.num_hidden_layers


def test_buckets_are_few() -> None:
    assert [bucket(n) for n in (1, 256, 257, 385, 513, 4000, 9000)] == [
        256, 256, 384, 512, 768, 4096, 12288
    ]  # fmt: skip


@pytest.mark.parametrize(("failure", "call"), [("step", 4), ("choice", 4), ("prefill", 1)])
def test_short_memory_halves_the_places_and_loses_nothing(
    folder: Path,
    failure: str,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load(folder)
    expected = drawn(Decoder(model, 8))
    decoder, calls = CapturedDecoder(model, 8), {"step": 0, "prefill": 0, "choice": 0}

    def fails(name: str) -> None:
        calls[name] += 1
        if (name, calls[name]) == (failure, call):
            raise torch.OutOfMemoryError("CUDA out of memory")

    forward = model.forward

    def watched(**inputs: Any) -> Any:
        fails("step" if inputs["input_ids"].shape[1] == 1 else "prefill")
        return forward(**inputs)

    def choose(live: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        fails("choice")
        return greedy(live, logits)

    monkeypatch.setattr(model, "forward", watched)
    assert drawn(decoder, choose=choose) == expected
    assert decoder.size == 4
    assert "4 texts at a time instead of 8" in caplog.text


def test_memory_that_does_not_suffice_for_one_row_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)

    def full(**_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(BadInput, match="does not suffice for one text of 40 tokens"):
        drawn(CapturedDecoder(model, 4))


def test_places_are_as_many_as_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CapturedDecoder(load(folder), 64)
    settings = decoder.model.config
    width = settings.hidden_size // settings.num_attention_heads
    column = 2 * settings.num_hidden_layers * settings.num_key_value_heads * width * 4
    assert decoder._bytes_of_a_column() == column
    free = 5.5 * column * bucket(40 + captured.AHEAD) / captured.SHARE
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    monkeypatch.setattr(memory, "empty_cache", lambda: None)
    monkeypatch.setattr(decoder, "device", torch.device("cuda"))
    decoder._find_places(PREFIXES)
    assert decoder.size == 5
    decoder.capacity, decoder.steps = 256, {256: None}  # type: ignore[dict-item]
    decoder._find_places(PREFIXES)  # no new graphs, though more rows are wanted than fit
    assert list(decoder.steps) == [256]


def test_a_function_gets_its_inputs_in_the_same_buffers() -> None:
    addresses = set()

    def double(numbers: torch.Tensor) -> torch.Tensor:
        addresses.add(numbers.data_ptr())
        return 2 * numbers

    function = GraphedFunction(double, [torch.ones(4, device=DEVICE)])
    assert function(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [2, 4, 6, 8]
    assert function(torch.tensor([5.0])).tolist() == [10, 4, 6, 8]  # fewer rows than places
    assert len(addresses) == 1


@on_gpu
def test_rows_that_outgrow_their_bucket_are_graphs_still(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "SMALLEST", 16)
    decoder, graphed = CapturedDecoder(load(folder), 8), []

    def choose(live: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        graphed.extend(step.graph is not None for step in decoder.steps.values())
        return greedy(live, logits)

    drawn(decoder, [30] * len(PREFIXES), choose)  # all places live, over several buckets
    assert decoder.capacity >= 64
    assert all(graphed)


@on_gpu
def test_a_capture_that_fails_is_logged_and_the_function_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = torch.cuda.current_stream()

    def waits(numbers: torch.Tensor) -> torch.Tensor:
        return numbers * float(numbers.sum().item())  # a graph cannot wait for the GPU

    function = GraphedFunction(waits, [torch.ones(2, device=DEVICE)])
    assert function.graph is None
    assert torch.cuda.current_stream() == stream
    assert function(torch.tensor([2.0, 3.0])).tolist() == [10, 15]
    assert "no CUDA graph" in caplog.text


@on_gpu
def test_steps_are_graphs_on_a_gpu(folder: Path) -> None:
    decoder = CapturedDecoder(load(folder), 8)
    drawn(decoder)
    assert [step.graph is not None for step in decoder.steps.values()] == [True]
    assert graphs.new_pool() is not None
