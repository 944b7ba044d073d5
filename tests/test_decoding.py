from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.engines.decoding import ARCHITECTURES, Columns, Decoder, generate, trunks_of
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.sampling import Request, Sampling

STEPS = 20
TRACE = tuple(range(20, 60))
# Cuts of one trace, another trace that shares its beginning, an unrelated short one, one token, and a repetition.
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


def collected(limits: Sequence[int]) -> tuple[list[list[int]], Any]:
    rows: list[list[int]] = [[] for _ in limits]

    def take(one: int, token: int) -> bool:
        rows[one].append(token)
        return len(rows[one]) == limits[one]

    return rows, take


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_greedy_tokens_are_those_of_plain_generate_one_by_one(folder: Path, size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = model.config._attn_implementation
    limits = [
        STEPS,
        3,
        17,
        1,
        STEPS,
        9,
        12,
        5,
    ]  # rows end at different steps, so that places are refilled
    expected = []
    for prefix, limit in zip(PREFIXES, limits, strict=True):
        ids = torch.tensor([prefix])
        out = model.generate(
            ids,
            do_sample=False,
            max_new_tokens=limit,
            min_new_tokens=limit,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prefix) :].tolist())
    found, take = collected(limits)
    Decoder(model, size).decode(PREFIXES, greedy, take)
    assert found == expected
    model.set_attn_implementation(plain)
    again, take = collected(limits)
    generate(model, PREFIXES, 0, max(limits), greedy, take)
    assert again == expected


def test_logits_are_those_of_a_forward_pass_over_the_whole_row(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: list[tuple[int, int, torch.Tensor]] = []
    found, take = collected([STEPS] * len(PREFIXES))

    def draw(live: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        seen.extend(
            (one, len(found[one]), row) for one, row in zip(live, logits.clone(), strict=True)
        )
        return logits.argmax(-1)

    Decoder(model, 5).decode(PREFIXES, draw, take)
    assert len(seen) == STEPS * len(PREFIXES)
    model.set_attn_implementation("eager")
    for one, step, logits in seen:
        with torch.no_grad():
            whole = model(torch.tensor([[*PREFIXES[one], *found[one][:step]]])).logits[0, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_a_shared_beginning_is_prefilled_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes: list[tuple[int, ...]] = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda **given: shapes.append(tuple(given["input_ids"].shape)) or forward(**given),
    )
    _, take = collected([2] * 24)
    Decoder(model, 64).decode(
        [TRACE[: 5 + 3 * cut] for cut in range(12) for _ in range(2)], greedy, take
    )
    assert shapes == [(1, 5 + 3 * 11), (24, 1), (24, 1)]


def test_keys_are_not_repeated_and_columns_grow_in_place(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    decoder = Decoder(model, 4)
    _, take = collected([150] * 4)
    buffers = set()
    update = Columns.update

    def watched(self: Columns, *given: Any, **named: Any) -> Any:
        out = update(self, *given, **named)
        buffers.add(self.keys.data_ptr())
        assert (
            self.keys.shape[1]
            == model.config.num_key_value_heads
            < model.config.num_attention_heads
        )
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Columns, "update", watched)
        decoder.decode([TRACE] * 4, greedy, take)
    assert (
        len(buffers) <= 3 * model.config.num_hidden_layers
    )  # 150 columns in three allocations a layer


def test_trunks_are_the_longest_of_those_that_begin_alike() -> None:
    trunks, which = trunks_of(PREFIXES)
    assert sorted(trunks) == sorted(
        {TRACE, (*TRACE[:9], 100, 101), (200, 201, 202), (7,), tuple(range(300, 330))}
    )
    for prefix, trunk in zip(PREFIXES, which, strict=True):
        assert trunks[trunk][: len(prefix)] == prefix
    for some in itertools.permutations(PREFIXES[:4]):
        assert len(trunks_of(some)[0]) == 2


def test_a_row_draws_by_its_own_seed_whatever_the_batch(folder: Path) -> None:
    chat, sampling = Chat(folder), Sampling(temperature=0.3, top_p=0.9, max_tokens=STEPS)
    requests = [
        Request(f"{place}/{draw}", prefix, (), 100 * place + draw)
        for place, prefix in enumerate(PREFIXES)
        for draw in range(3)
    ]
    found = [
        {
            one.key: one.token_ids
            for one in TransformersSampler(folder, chat, batch_size=size).sample(given, sampling)
        }
        for size, given in ((64, requests), (5, requests[::-1]), (1, requests[7:] + requests[:7]))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["0/0"] != found[0]["0/1"]


def nucleus(model: Any, ids: Sequence[int], temperature: float, top_p: float) -> dict[int, float]:
    """The next token's probabilities, from a plain forward pass and a full sort."""
    with torch.no_grad():
        mass = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
    kept, total = {}, 0.0
    for token in mass.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[token], total = mass[token].item(), total + mass[token].item()
    return {token: one / total for token, one in kept.items()}


def test_token_frequencies_are_the_models_own_probabilities(folder: Path) -> None:
    """First and second tokens of many draws, from two cuts of one trace in the same batch; the seeds are fixed."""
    sampling, draws = Sampling(temperature=1.0, top_p=0.9, max_tokens=2), 3000
    cuts = [TRACE[:9], TRACE[:23]]
    asked = [
        Request(f"{place}", cut, (), draws * place + draw)
        for place, cut in enumerate(cuts)
        for draw in range(draws)
    ]
    chat = Chat(folder)
    drawn = [*TransformersSampler(folder, chat, batch_size=500).sample(asked, sampling)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    checked = 0
    for place, cut in enumerate(cuts):
        pairs = [
            one.token_ids + chat.eos_ids * (one.finish == "stop")
            for one in drawn
            if one.key == str(place)
        ]
        first = Counter(ids[0] for ids in pairs)
        common = first.most_common(1)[0][0]
        second = Counter(ids[1] for ids in pairs if ids[0] == common)
        for counts, prefix in ((first, cut), (second, (*cut, common))):
            expected = nucleus(model, prefix, sampling.temperature, sampling.top_p)
            assert set(counts) <= set(expected)
            n = counts.total()
            found, hoped = [0], [0.0]  # in cells of at least five draws
            for token, mass in expected.items():
                if hoped[-1] >= 5:
                    found, hoped = [*found, 0], [*hoped, 0.0]
                found[-1], hoped[-1] = found[-1] + counts[token], hoped[-1] + n * mass
            assert chisquare(found, hoped).pvalue > 1e-3
            checked += len(found) > 1
    assert checked == 4


def test_other_architectures_are_decoded_by_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path, spread=0.3)
    ask = [Request("a", PREFIXES[0], (), 1), Request("b", PREFIXES[4], (), 2)]
    ours = [
        *TransformersSampler(folder, Chat(folder)).sample(
            ask, Sampling(temperature=0.3, max_tokens=5)
        )
    ]
    monkeypatch.setattr("ipo_lib.engines.decoding.ARCHITECTURES", ())
    assert [
        *TransformersSampler(folder, Chat(folder)).sample(
            ask, Sampling(temperature=0.3, max_tokens=5)
        )
    ] == ours
