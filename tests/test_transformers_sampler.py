"""A draw depends on model, prefix, settings and its seed, and on nothing else."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import planted_model, tiny_model, tiny_tokenizer
from sampling_kit import TEXTS, answers, by_key, make_requests, many_draws, prompt_ids
from scipy import stats
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import BadInput
from ipo_lib.sampling import Completion, Request, Sampling, draw_seed


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, spread=0.3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("one"), spread=0.3)


# What a draw does not depend on


def test_a_row_does_not_depend_on_its_batch(folder: Path) -> None:
    chat = Chat(folder)
    # Few tokens in the nucleus: rounding moves few bounds.
    sampling = Sampling(temperature=0.3, top_p=0.9, max_tokens=12)
    requests = make_requests(chat)
    expected = answers(TransformersSampler(folder, chat), requests, sampling)
    for size, order in ((1, requests), (3, requests[::-1]), (7, requests[3:] + requests[:3])):
        sampler = TransformersSampler(folder, chat, batch_size=size)
        assert answers(sampler, order, sampling) == expected
    assert len({completion.token_ids for completion in expected.values()}) == len(TEXTS)


def test_order_depends_on_the_requests_alone(llama: Path) -> None:
    chat, sampling = Chat(llama), Sampling(max_tokens=3)
    orders = []
    for size in (1, 2, 64):
        sampler = TransformersSampler(llama, chat, batch_size=size)
        orders.append([*answers(sampler, make_requests(chat), sampling)])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == [request.key for request in make_requests(chat)]


def test_settings_of_the_folder_do_not_leak(llama: Path, tmp_path: Path) -> None:
    leaky = shutil.copytree(llama, tmp_path / "leaky")
    settings = {
        "repetition_penalty": 5.0,
        "top_k": 1,
        "temperature": 0.01,
        "do_sample": True,
        "min_new_tokens": 9,
        "eos_token_id": 1,
        "suppress_tokens": [300],
    }
    (leaky / "generation_config.json").write_text(json.dumps(settings))
    for sampling in (Sampling(max_tokens=12), Sampling(temperature=0, max_tokens=12)):
        clean, leaked = (
            answers(TransformersSampler(path, Chat(path)), make_requests(Chat(path)), sampling)
            for path in (llama, leaky)
        )
        assert clean == leaked


def test_seeds_decide(llama: Path) -> None:
    chat = Chat(llama)
    requests = []
    for draw in range(32):
        seed = draw_seed(0, "p", draw)
        requests.append(Request(str(draw), prompt_ids(chat, "Wait"), (), seed))
    sampler = TransformersSampler(llama, chat)
    short, long = (Sampling(temperature=1.0, top_p=1.0, max_tokens=size) for size in (8, 16))
    draws = answers(sampler, requests, short)
    assert len({draw.token_ids for draw in draws.values()}) == 32
    for key, longer in answers(sampler, requests[:3], long).items():
        assert longer.token_ids[:8] == draws[key].token_ids


# What is drawn


def test_temperature_zero_is_plain_greedy_generate(folder: Path) -> None:
    chat = Chat(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    requests = make_requests(chat, "I")
    sampling = Sampling(temperature=0, max_tokens=12)
    completions = answers(TransformersSampler(folder, chat), requests, sampling)
    for request in requests:
        ids = torch.tensor([request.prompt_ids + request.prefix_ids])
        output = model.generate(
            ids, do_sample=False, max_new_tokens=12, pad_token_id=1, eos_token_id=1
        )
        expected = [token for token in output[0, ids.shape[1] :].tolist() if token != 1]
        completion = completions[request.key]
        assert list(completion.token_ids) == expected
        assert completion.finish == ("length" if len(expected) == 12 else "stop")


def test_a_prefix_continues_exactly(llama: Path) -> None:
    chat = Chat(llama)
    sampler = TransformersSampler(llama, chat)
    requests = make_requests(chat)
    whole = answers(sampler, requests, Sampling(temperature=0, max_tokens=12))
    cut = []
    for request in requests:
        prefix = whole[request.key].token_ids[:5]
        cut.append(Request(request.key, request.prompt_ids, prefix, 0))
    rest = answers(sampler, cut, Sampling(temperature=0, max_tokens=7))
    assert all(rest[key].token_ids == whole[key].token_ids[5:] for key in whole)


def test_first_tokens_over_many_seeds(tmp_path: Path) -> None:
    chat = Chat(tiny_tokenizer(tmp_path))
    a, b, c, d, start = (chat.encode(text)[0] for text in "abcdx")
    planted_model(tmp_path, {start: {a: 0.5, b: 0.3, c: 0.16, d: 0.04}})
    sampler = TransformersSampler(tmp_path, Chat(tmp_path), batch_size=500)
    draws = sampler.sample(many_draws((start,), 2000, base=1), Sampling(1.0, 0.95, 1))
    counts = Counter(draw.token_ids[0] for draw in draws)
    assert set(counts) == {a, b, c}
    expected = [2000 * p / 0.96 for p in (0.5, 0.3, 0.16)]
    assert stats.chisquare([counts[a], counts[b], counts[c]], expected).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_banned_token_is_left_out_of_its_nucleus(llama: Path, top_p: float) -> None:
    """Draws with ``ban`` are those that would not have begun with it.

    The others have the same shares among each other, and nothing new comes.
    """
    chat, sampling = Chat(llama), Sampling(temperature=0.7, top_p=top_p, max_tokens=2)
    sampler = TransformersSampler(llama, chat, dtype="float32")
    prompt = prompt_ids(chat, TEXTS[1])
    free = [draw.token_ids for draw in sampler.sample(many_draws(prompt, 2000, 2), sampling)]
    ban = Counter(ids[0] for ids in free if ids).most_common(1)[0][0]
    requests = many_draws(prompt, 2000, 3, ban)
    without = [draw.token_ids for draw in sampler.sample(requests, sampling)]
    assert all(ids[:1] != (ban,) for ids in without)
    # It is banned as the first token only.
    assert any(ids[1:] == (ban,) for ids in without) or top_p < 1
    free_counts = Counter(ids[:1] for ids in free if ids[:1] != (ban,))
    counts = Counter(ids[:1] for ids in without)
    common = [key for key, count in free_counts.items() if count >= 20]
    table = [[free_counts[key] for key in common], [counts[key] for key in common]]
    assert stats.chi2_contingency(table).pvalue > 1e-3


# Where a draw ends


@pytest.mark.parametrize("tags", ["single", "text"])
def test_stops_at_the_close_tag_at_eos_and_at_the_limit(tmp_path: Path, tags: str) -> None:
    chat = Chat(tiny_tokenizer(tmp_path, tags=tags, vocabulary=261))  # no merges: a token a byte
    tag = chat.encode("</think>")
    x, y, z = chat.encode("xyz")
    chain = {x: {tag[0]: 1.0}, tag[-1]: {y: 1.0}, y: {y: 1.0}, z: {1: 1.0}}
    chain |= {before: {after: 1.0} for before, after in itertools.pairwise(tag)}
    planted_model(tmp_path, chain, tags=tags, vocabulary=261)
    sampler = TransformersSampler(tmp_path, Chat(tmp_path))
    straddling = tag[:-1] if tags == "text" else (x,)
    requests = [
        Request("think", (x,), (), 1),
        Request("stop", (x,), (z,), 2),
        Request("length", (x, x), (y,), 3),
        Request("straddle", (x,), straddling, 4),
    ]
    completions = answers(sampler, requests, Sampling(max_tokens=20, until="think"))
    assert chat.decode(completions["think"].token_ids) == "</think>"
    assert completions["think"].finish == "think"
    assert completions["stop"] == Completion("stop", (), "stop")
    assert completions["length"] == Completion("length", (y,) * 20, "length")
    assert completions["straddle"] == Completion("straddle", tag[-1:], "think")
    (longer,) = sampler.sample(requests[:1], Sampling(max_tokens=20, until="eos"))
    assert chat.decode(longer.token_ids) == "</think>" + "y" * (20 - len(tag))
    assert longer.finish == "length"


def test_context_cuts_a_row_and_refuses_a_prompt(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, context=48, spread=0.01)
    sampler = TransformersSampler(folder, Chat(folder))
    requests = [Request("short", (5, 6, 7), (), 1), Request("long", tuple(range(5, 50)), (), 2)]
    completions = answers(sampler, requests, Sampling(temperature=0, max_tokens=10))
    for key, length in (("short", 10), ("long", 3)):
        assert len(completions[key].token_ids) == length
        assert completions[key].finish == "length"
    full = Request("full", tuple(range(5, 53)), (), 1)
    with pytest.raises(BadInput, match="request full: 48 prompt tokens"):
        next(sampler.sample([*requests, full], Sampling()))


def test_the_last_draws_wait_for_the_next_call_and_come_out_the_same(tmp_path: Path) -> None:
    """A token follows itself with 0.9, else the response ends: a few rows outlast the others."""
    folder = planted_model(tmp_path / "chain", {7: {7: 0.9, 1: 0.1}})
    chat, sampling = Chat(folder), Sampling(temperature=1.0, top_p=1.0, max_tokens=150)
    requests = many_draws((7,), 24, base=0)
    whole = answers(TransformersSampler(folder, chat, batch_size=24), requests, sampling)
    sampler = TransformersSampler(folder, chat, batch_size=24)
    first = by_key(sampler.sample_some(requests, sampling))
    assert 24 * 3 / 4 <= len(first) < 24
    waiting = [request for request in requests if request.key not in first]
    longest = max(len(completion.token_ids) for completion in first.values())
    assert longest < max(len(whole[request.key].token_ids) for request in waiting)
    more = [Request(f"new {n}", (7,), (), draw_seed(1, n)) for n in range(24)]
    second = by_key(sampler.sample_some([*waiting, *more], sampling))
    last = [request for request in (*waiting, *more) if request.key not in second]
    completions = first | second | answers(sampler, last, sampling)
    assert {key: completions[key] for key in whole} == whole
    new = {key: value for key, value in completions.items() if key.startswith("new")}
    assert new == answers(sampler, more, sampling)


def test_on_a_cpu_nobody_waits(llama: Path) -> None:
    assert not TransformersSampler(llama, Chat(llama), device="cpu").pauses
    assert TransformersSampler(llama, Chat(llama), device="cuda").pauses


# The model


def test_nf4_rounds_the_weights_and_nothing_else(llama: Path) -> None:
    chat = Chat(llama)
    plain = TransformersSampler(llama, chat, dtype="float32")
    rounded = TransformersSampler(llama, chat, dtype="float32", quantize="nf4")
    assert plain.fingerprint() != rounded.fingerprint()
    before, after = plain._model.state_dict(), rounded._model.state_dict()
    types_before = {name: weight.dtype for name, weight in before.items()}
    assert {name: weight.dtype for name, weight in after.items()} == types_before
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:
        assert len(after[name].unique()) < 0.5 * len(before[name].unique())
        similarity = torch.nn.functional.cosine_similarity(
            before[name].flatten(), after[name].flatten(), dim=0
        )
        assert similarity > 0.95
    assert len([*rounded.sample(make_requests(chat), Sampling(max_tokens=3))]) == len(TEXTS)
    with pytest.raises(BadInput, match="quantize 'int3' is unknown"):
        TransformersSampler(llama, chat, quantize="int3")


def saved_adapter(model_folder: Path, folder: Path) -> Any:
    """A LoRA adapter with random weights; returns the adapted model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


def test_adapter_is_merged_and_in_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    model = saved_adapter(llama, adapter)
    chat, sampling = Chat(llama), Sampling(temperature=0, max_tokens=8)
    bare = TransformersSampler(llama, chat)
    adapted = TransformersSampler(llama, chat, adapter=adapter)
    assert bare.fingerprint() != adapted.fingerprint()
    request = make_requests(chat)[1]
    ids = torch.tensor([request.prompt_ids])
    output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, pad_token_id=1)
    expected = [token for token in output[0, ids.shape[1] :].tolist() if token != 1]
    completions = answers(adapted, [request], sampling)
    assert list(completions[request.key].token_ids) == expected
    assert completions != answers(bare, [request], sampling)
    (adapter / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(BadInput, match=r"adapter_config.json: corrupt"):
        TransformersSampler(llama, chat, adapter=adapter).fingerprint()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickled"):
        TransformersSampler(llama, chat, adapter=adapter)


def test_fingerprint_moves_with_weights_and_dtype_not_with_speed_or_place(
    llama: Path, tmp_path: Path
) -> None:
    chat = Chat(llama)
    base = TransformersSampler(llama, chat).fingerprint()
    assert base["dtype"] == "float32"
    assert json.dumps(base)
    assert TransformersSampler(llama, chat, batch_size=2, device="cpu").fingerprint() == base
    assert TransformersSampler(llama, chat, dtype="bfloat16").fingerprint() != base
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert TransformersSampler(copy, Chat(copy)).fingerprint() == base
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert TransformersSampler(copy, Chat(copy)).fingerprint() != base


def test_bad_sampler(llama: Path, tmp_path: Path) -> None:
    chat = Chat(llama)
    with pytest.raises(BadInput, match="safetensors"):
        TransformersSampler(tmp_path, chat)
    with pytest.raises(BadInput, match="int8"):
        TransformersSampler(llama, chat, dtype="int8")
    with pytest.raises(BadInput, match="batch_size 0"):
        TransformersSampler(llama, chat, batch_size=0)


def loads_torch(code: str) -> bool:
    check = f"{code}\nimport sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stderr == ""  # no bar while weights load
    return run.stdout.strip().endswith("True")


def test_import_construction_and_fingerprint_load_no_torch_and_the_check_can_fail(
    llama: Path,
) -> None:
    use = f"""
from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
sampler = TransformersSampler({str(llama)!r}, Chat({str(llama)!r}))
sampler.fingerprint()
"""
    assert not loads_torch(use)
    assert loads_torch(use + "sampler._model")
