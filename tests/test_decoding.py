"""The decoder draws what plain decoding, one prefix at a time, would draw."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from sampling_kit import answers
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.engines.decoding import (
    ARCHITECTURES,
    ColumnCache,
    Decoder,
    decode_by_generate,
    find_trunks,
)
from ipo_lib.engines.lanes import decode_in_lanes
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request, Sampling

STEPS = 20
TRACE = tuple(range(20, 60))
# Cuts of one trace, another trace that shares its beginning, an unrelated short one, one token, and
# a repetition.
PREFIXES = [
    TRACE[:9],
    TRACE,
    TRACE[:23],
    (*TRACE[:9], 100, 101),
    (200, 201, 202),
    (7,),
    TRACE[:23],
    tuple(range(300, 330)),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, spread=0.3)


def greedy(_: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def collector(limits: Sequence[int]) -> tuple[list[list[int]], Any]:
    """Rows to be filled, and a function that fills them up to their limits."""
    rows: list[list[int]] = [[] for _ in limits]

    def take(index: int, token: int) -> bool:
        rows[index].append(token)
        return len(rows[index]) == limits[index]

    return rows, take


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_greedy_tokens_are_those_of_plain_generate_one_by_one(folder: Path, size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = model.config._attn_implementation
    # Rows end at different steps, so that places are refilled.
    limits = [STEPS, 3, 17, 1, STEPS, 9, 12, 5]
    expected = []
    for prefix, limit in zip(PREFIXES, limits, strict=True):
        output = model.generate(
            torch.tensor([prefix]),
            do_sample=False,
            max_new_tokens=limit,
            min_new_tokens=limit,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(output[0, len(prefix) :].tolist())
    rows, take = collector(limits)
    Decoder(model, size).decode(PREFIXES, greedy, take)
    assert rows == expected
    model.set_attn_implementation(plain)
    rows, take = collector(limits)
    decode_by_generate(model, PREFIXES, 0, max(limits), greedy, take)
    assert rows == expected


def test_logits_are_those_of_a_forward_pass_over_the_whole_row(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    steps: list[tuple[int, int, torch.Tensor]] = []
    rows, take = collector([STEPS] * len(PREFIXES))

    def choose(live: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        for index, row_logits in zip(live, logits.clone(), strict=True):
            steps.append((index, len(rows[index]), row_logits))
        return logits.argmax(-1)

    Decoder(model, 5).decode(PREFIXES, choose, take)
    assert len(steps) == STEPS * len(PREFIXES)
    model.set_attn_implementation("eager")
    for index, step, logits in steps:
        ids = torch.tensor([[*PREFIXES[index], *rows[index][:step]]])
        with torch.no_grad():
            whole = model(ids).logits[0, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_a_shared_beginning_is_prefilled_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes: list[tuple[int, ...]] = []
    forward = model.forward

    def watched(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    _, take = collector([2] * 24)
    cuts = [TRACE[: 5 + 3 * cut] for cut in range(12)]
    prefixes = [prefix for prefix in cuts for _ in range(2)]
    Decoder(model, 64).decode(prefixes, greedy, take)
    assert shapes == [(1, 5 + 3 * 11), (24, 1), (24, 1)]


def test_keys_are_not_repeated_and_columns_grow_in_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    decoder = Decoder(model, 4)
    _, take = collector([150] * 4)
    buffers, heads = set(), set()
    update = ColumnCache.update

    def watched(self: ColumnCache, *arguments: Any, **options: Any) -> Any:
        output = update(self, *arguments, **options)
        buffers.add(self.keys.data_ptr())
        heads.add(self.keys.shape[1])
        return output

    monkeypatch.setattr(ColumnCache, "update", watched)
    decoder.decode([TRACE] * 4, greedy, take)
    assert heads == {model.config.num_key_value_heads}
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    # 150 columns in three allocations a layer.
    assert len(buffers) <= 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_lanes_draw_what_one_decoder_draws(folder: Path, cores: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    limits = [STEPS - index for index in range(len(PREFIXES))]
    (alone, take_alone), (shared, take_shared) = collector(limits), collector(limits)
    Decoder(model, 4).decode(PREFIXES, greedy, take_alone)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        decode_in_lanes(model, 4, 2, PREFIXES, greedy, take_shared)
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert shared == alone


def test_an_error_in_one_lane_stops_the_others(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    taken: Counter[int] = Counter()

    def take(index: int, _: int) -> bool:
        taken[index] += 1
        if index == 0 and taken[0] == 3:
            raise BadInput("a token that nobody can take")
        return taken[index] == 5000

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(BadInput, match="nobody can take"):
            decode_in_lanes(model, 4, 2, PREFIXES, greedy, take)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert max(taken.values()) < 1000


def test_trunks_are_the_longest_of_those_that_begin_alike() -> None:
    trunks, trunk_index = find_trunks(PREFIXES)
    expected = {TRACE, (*TRACE[:9], 100, 101), (200, 201, 202), (7,), tuple(range(300, 330))}
    assert sorted(trunks) == sorted(expected)
    for prefix, trunk in zip(PREFIXES, trunk_index, strict=True):
        assert trunks[trunk][: len(prefix)] == prefix
    for permutation in itertools.permutations(PREFIXES[:4]):
        assert len(find_trunks(permutation)[0]) == 2


def test_a_row_draws_by_its_own_seed_whatever_the_batch(folder: Path) -> None:
    chat, sampling = Chat(folder), Sampling(temperature=0.3, top_p=0.9, max_tokens=STEPS)
    requests = []
    for place, prefix in enumerate(PREFIXES):
        for draw in range(3):
            requests.append(Request(f"{place}/{draw}", prefix, (), 100 * place + draw))
    expected = answers(TransformersSampler(folder, chat, batch_size=64), requests, sampling)
    for size, order in ((5, requests[::-1]), (1, requests[7:] + requests[:7])):
        sampler = TransformersSampler(folder, chat, batch_size=size)
        assert answers(sampler, order, sampling) == expected
    assert expected["0/0"].token_ids != expected["0/1"].token_ids


def nucleus(model: Any, ids: Sequence[int], temperature: float, top_p: float) -> dict[int, float]:
    """The next token's probabilities, from a plain forward pass and a full sort."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    mass = (logits / temperature).softmax(-1)
    inside: dict[int, float] = {}
    total = 0.0
    for token in mass.argsort(descending=True).tolist():
        if total >= top_p:
            break
        inside[token] = mass[token].item()
        total += mass[token].item()
    return {token: probability / total for token, probability in inside.items()}


def test_token_frequencies_are_the_models_own_probabilities(folder: Path) -> None:
    """First and second tokens of many draws, from two cuts of one trace in the same batch.

    The seeds are fixed.
    """
    sampling, draws = Sampling(temperature=1.0, top_p=0.9, max_tokens=2), 3000
    cuts = [TRACE[:9], TRACE[:23]]
    requests = []
    for place, cut in enumerate(cuts):
        for draw in range(draws):
            requests.append(Request(str(place), cut, (), draws * place + draw))
    chat = Chat(folder)
    completions = [*TransformersSampler(folder, chat, batch_size=500).sample(requests, sampling)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    checked = 0
    for place, cut in enumerate(cuts):
        pairs = []
        for completion in completions:
            if completion.key == str(place):
                ends = chat.eos_ids if completion.finish == "stop" else ()
                pairs.append(completion.token_ids + ends)
        first = Counter(ids[0] for ids in pairs)
        common = first.most_common(1)[0][0]
        second = Counter(ids[1] for ids in pairs if ids[0] == common)
        for counts, prefix in ((first, cut), (second, (*cut, common))):
            expected = nucleus(model, prefix, sampling.temperature, sampling.top_p)
            assert set(counts) <= set(expected)
            cells = cells_of_five(counts, expected)
            assert chisquare(*cells).pvalue > 1e-3
            checked += len(cells[0]) > 1
    assert checked == 4


def cells_of_five(
    counts: Counter[int], probabilities: dict[int, float]
) -> tuple[list[int], list[float]]:
    """Observed and expected counts in cells where at least five draws are expected."""
    observed, expected = [0], [0.0]
    for token, probability in probabilities.items():
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += counts[token]
        expected[-1] += counts.total() * probability
    return observed, expected


def test_other_architectures_are_decoded_by_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path, spread=0.3)
    requests = [Request("a", PREFIXES[0], (), 1), Request("b", PREFIXES[4], (), 2)]
    sampling = Sampling(temperature=0.3, max_tokens=5)
    ours = answers(TransformersSampler(folder, Chat(folder)), requests, sampling)
    monkeypatch.setattr("ipo_lib.engines.decoding.ARCHITECTURES", ())
    assert answers(TransformersSampler(folder, Chat(folder)), requests, sampling) == ours
