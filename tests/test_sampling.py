from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from doubles import ScriptedSampler
from models import planted_model, tiny_model, tiny_tokenizer
from scipy import stats

from ipo_lib.chat import Chat
from ipo_lib.engines import scoring
from ipo_lib.engines.nucleus import nucleus_draw
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import BadInput, Prompt, to_json
from ipo_lib.sampling import Completion, Request, Sampling, draw_seed

TEXTS = (
    "The",
    "How tall is a lighthouse?",
    "Bread needs flour",
    "Wait",
    "I answer the question. " * 3,
    "salt",
    "A book",
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, spread=0.3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("one"), spread=0.3)


def make_requests(chat: Chat, prefix: str = "") -> list[Request]:
    return [
        Request(
            f"r{n}",
            chat.prompt_ids(Prompt("p", text, "t", False)),
            chat.encode(prefix),
            draw_seed(0, n),
        )
        for n, text in enumerate(TEXTS)
    ]


def answers(
    sampler: TransformersSampler, requests: list[Request], sampling: Sampling
) -> dict[str, Completion]:
    return {one.key: one for one in sampler.sample(requests, sampling)}


def test_a_row_does_not_depend_on_its_batch(folder: Path) -> None:
    chat, sampling = (
        Chat(folder),
        Sampling(temperature=0.3, top_p=0.9, max_tokens=12),
    )  # few tokens in the nucleus: rounding moves few bounds
    requests = make_requests(chat)
    together = answers(TransformersSampler(folder, chat), requests, sampling)
    for size, order in ((1, requests), (3, requests[::-1]), (7, requests[3:] + requests[:3])):
        assert (
            answers(TransformersSampler(folder, chat, batch_size=size), order, sampling) == together
        )
    assert len({one.token_ids for one in together.values()}) == len(TEXTS)


def test_nf4_rounds_the_weights_and_nothing_else(llama: Path) -> None:
    import torch

    whole, rounded = (
        TransformersSampler(llama, Chat(llama), dtype="float32", quantize=how)
        for how in (None, "nf4")
    )
    assert whole.fingerprint() != rounded.fingerprint()
    before, after = (sampler._model.state_dict() for sampler in (whole, rounded))
    assert {name: value.dtype for name, value in after.items()} == {
        name: value.dtype for name, value in before.items()
    }
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    for name in moved:
        assert len(after[name].unique()) < 0.5 * len(before[name].unique())
        assert (
            torch.nn.functional.cosine_similarity(
                before[name].flatten(), after[name].flatten(), dim=0
            )
            > 0.95
        )
    assert len([*rounded.sample(make_requests(Chat(llama)), Sampling(max_tokens=3))]) == len(TEXTS)
    with pytest.raises(BadInput, match="quantize 'int3' is unknown"):
        TransformersSampler(llama, Chat(llama), quantize="int3")


def test_temperature_zero_is_plain_greedy_generate(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chat = Chat(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = answers(
        TransformersSampler(folder, chat),
        make_requests(chat, "I"),
        Sampling(temperature=0, max_tokens=12),
    )
    for one in make_requests(chat, "I"):
        ids = torch.tensor([one.prompt_ids + one.prefix_ids])
        plain = model.generate(
            ids, do_sample=False, max_new_tokens=12, pad_token_id=1, eos_token_id=1
        )[0, ids.shape[1] :]
        expected = [token for token in plain.tolist() if token != 1]
        assert list(found[one.key].token_ids) == expected
        assert found[one.key].finish == ("length" if len(expected) == 12 else "stop")


def test_a_prefix_continues_exactly(llama: Path) -> None:
    chat, sampler = Chat(llama), TransformersSampler(llama, Chat(llama))
    whole = answers(sampler, make_requests(chat), Sampling(temperature=0, max_tokens=12))
    again = [
        Request(one.key, one.prompt_ids, whole[one.key].token_ids[:5], 0)
        for one in make_requests(chat)
    ]
    rest = answers(sampler, again, Sampling(temperature=0, max_tokens=7))
    assert all(rest[key].token_ids == whole[key].token_ids[5:] for key in whole)


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("head", [4, 64])
def test_frequencies_are_the_models_own_nucleus(llama: Path, top_p: float, head: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chat = Chat(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    logits = model(torch.tensor([make_requests(chat)[1].prompt_ids])).logits[0, -1].detach()
    probabilities = (logits / 0.7).double().softmax(-1)
    values, ids = probabilities.sort(descending=True)
    kept = int((values.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(values)
    nucleus = dict(
        zip(ids[:kept].tolist(), (values[:kept] / values[:kept].sum()).tolist(), strict=True)
    )
    n = 20_000
    uniforms = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).random(n))
    drawn = Counter(nucleus_draw(logits.expand(n, -1).clone(), uniforms, 0.7, top_p, head).tolist())
    assert set(drawn) <= set(nucleus)
    common = [token for token, share in nucleus.items() if share * n >= 5]
    rest = 1 - sum(nucleus[token] for token in common)
    seen = [drawn[token] for token in common] + [n - sum(drawn[token] for token in common)]
    expected = [nucleus[token] * n for token in common] + [rest * n]
    seen, expected = (seen, expected) if rest * n >= 5 else (seen[:-1], expected[:-1])
    if len(seen) > 1:
        scale = sum(seen) / sum(expected)
        assert stats.chisquare(seen, [one * scale for one in expected]).pvalue > 1e-3


def test_first_tokens_over_many_seeds(tmp_path: Path) -> None:
    chat = Chat(tiny_tokenizer(tmp_path))
    a, b, c, d, start = (chat.encode(one)[0] for one in "abcdx")
    planted_model(tmp_path, {start: {a: 0.5, b: 0.3, c: 0.16, d: 0.04}})
    requests = [Request(str(n), (start,), (), draw_seed(1, n)) for n in range(2000)]
    sampler = TransformersSampler(tmp_path, Chat(tmp_path), batch_size=500)
    drawn = Counter(one.token_ids[0] for one in sampler.sample(requests, Sampling(1.0, 0.95, 1)))
    assert set(drawn) == {a, b, c}
    assert (
        stats.chisquare(
            [drawn[a], drawn[b], drawn[c]], [2000 * p / 0.96 for p in (0.5, 0.3, 0.16)]
        ).pvalue
        > 1e-3
    )


def test_seeds_differ_and_decide(llama: Path) -> None:
    seeds = {
        draw_seed(0, prompt, cut, draw)
        for prompt in "abc"
        for cut in range(20)
        for draw in range(32)
    }
    assert len(seeds) == 3 * 20 * 32
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(0, "a", 1) == draw_seed(0, "a", 1) != draw_seed(1, "a", 1)
    ids = Chat(llama).prompt_ids(Prompt("p", "Wait", "t", False))
    requests = [Request(str(draw), ids, (), draw_seed(0, "p", draw)) for draw in range(32)]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    sampler = TransformersSampler(llama, Chat(llama))
    found = answers(sampler, requests, sampling)
    assert len({one.token_ids for one in found.values()}) == 32
    longer = answers(sampler, requests[:3], Sampling(temperature=1.0, top_p=1.0, max_tokens=16))
    assert all(longer[str(draw)].token_ids[:8] == found[str(draw)].token_ids for draw in range(3))


@pytest.mark.parametrize("tags", ["single", "text"])
def test_stops_at_the_close_tag_at_eos_and_at_the_limit(tmp_path: Path, tags: str) -> None:
    chat = Chat(tiny_tokenizer(tmp_path, tags=tags, vocabulary=261))  # no merges: a token a byte
    tag, (x, y, z) = chat.encode("</think>"), chat.encode("xyz")
    chain = {x: {tag[0]: 1.0}, tag[-1]: {y: 1.0}, y: {y: 1.0}, z: {1: 1.0}}
    chain |= {before: {after: 1.0} for before, after in itertools.pairwise(tag)}
    planted_model(tmp_path, chain, tags=tags, vocabulary=261)
    sampler = TransformersSampler(tmp_path, Chat(tmp_path))
    requests = [
        Request("think", (x,), (), 1),
        Request("stop", (x,), (z,), 2),
        Request("length", (x, x), (y,), 3),
    ]
    requests.append(
        Request("straddle", (x,), tag[:-1], 4)
        if tags == "text"
        else Request("straddle", (x,), (x,), 4)
    )
    found = answers(sampler, requests, Sampling(max_tokens=20, until="think"))
    assert chat.decode(found["think"].token_ids) == "</think>"
    assert found["think"].finish == "think"
    assert found["stop"] == Completion("stop", (), "stop")
    assert found["length"] == Completion("length", (y,) * 20, "length")
    assert found["straddle"] == Completion("straddle", tag[-1:], "think")
    on = answers(sampler, requests[:1], Sampling(max_tokens=20, until="eos"))["think"]
    assert chat.decode(on.token_ids) == "</think>" + "y" * (20 - len(tag))
    assert on.finish == "length"


def test_context_cuts_a_row_and_refuses_a_prompt(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, context=48, spread=0.01)
    sampler = TransformersSampler(folder, Chat(folder))
    requests = [Request("short", (5, 6, 7), (), 1), Request("long", tuple(range(5, 50)), (), 2)]
    found = answers(sampler, requests, Sampling(temperature=0, max_tokens=10))
    assert [(len(found[key].token_ids), found[key].finish) for key in ("short", "long")] == [
        (10, "length"),
        (3, "length"),
    ]
    with pytest.raises(BadInput, match="request full: 48 prompt tokens"):
        next(sampler.sample([*requests, Request("full", tuple(range(5, 53)), (), 1)], Sampling()))


def test_order_depends_on_the_requests_alone(llama: Path) -> None:
    chat, sampling = Chat(llama), Sampling(max_tokens=3)
    orders = [
        [
            one.key
            for one in TransformersSampler(llama, chat, batch_size=size).sample(
                make_requests(chat), sampling
            )
        ]
        for size in (1, 2, 64)
    ]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(f"r{n}" for n in range(len(TEXTS)))


def test_settings_of_the_folder_do_not_leak(llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    leaky = {
        "repetition_penalty": 5.0,
        "top_k": 1,
        "temperature": 0.01,
        "do_sample": True,
        "min_new_tokens": 9,
    }
    (other / "generation_config.json").write_text(
        json.dumps({**leaky, "eos_token_id": 1, "suppress_tokens": [300]})
    )
    found = [
        answers(TransformersSampler(one, Chat(one)), make_requests(Chat(one)), sampling)
        for sampling in (Sampling(max_tokens=12), Sampling(temperature=0, max_tokens=12))
        for one in (llama, other)
    ]
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_adapter_is_merged_and_in_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    peft.save_pretrained(tmp_path / "adapter")
    chat, sampling = Chat(llama), Sampling(temperature=0, max_tokens=8)
    bare, adapted = (
        TransformersSampler(llama, chat, adapter=one) for one in (None, tmp_path / "adapter")
    )
    assert bare.fingerprint() != adapted.fingerprint()
    one = make_requests(chat)[1]
    ids = torch.tensor([one.prompt_ids])
    expected = peft.generate(input_ids=ids, do_sample=False, max_new_tokens=8, pad_token_id=1)[
        0, ids.shape[1] :
    ]
    found = answers(adapted, [one], sampling)
    assert list(found[one.key].token_ids) == [token for token in expected.tolist() if token != 1]
    assert found != answers(bare, [one], sampling)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(BadInput, match=r"adapter_config.json: corrupt"):
        TransformersSampler(llama, chat, adapter=tmp_path / "adapter").fingerprint()
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    with pytest.raises(BadInput, match="pickled"):
        TransformersSampler(llama, chat, adapter=tmp_path / "adapter")


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
    with pytest.raises(BadInput, match=str(next(iter(wrong.values()))).replace("</s>", "until")):
        Sampling(**wrong)


def test_bad_sampler(llama: Path, tmp_path: Path) -> None:
    chat = Chat(llama)
    with pytest.raises(BadInput, match="safetensors"):
        TransformersSampler(tmp_path, chat)
    for options in ({"dtype": "int8"}, {"batch_size": 0}):
        with pytest.raises(BadInput, match=str(next(iter(options.values())))):
            TransformersSampler(llama, chat, **options)  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_refused() -> None:
    import torch

    with pytest.raises(BadInput, match="not finite"):
        nucleus_draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]).double(), 1.0, 0.9)


def test_scripted_sampler_answers_in_order() -> None:
    sampler = ScriptedSampler(
        lambda request, sampling: Completion(request.key, (request.seed,), "stop")
    )
    requests = [Request(str(n), (1,), (), n) for n in range(3)]
    assert [one.token_ids for one in sampler.sample(requests, Sampling())] == [(0,), (1,), (2,)]


def loads_torch(code: str) -> bool:
    check = f"{code}\nimport sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stderr == ""  # no bar while weights load
    return run.stdout.strip().endswith("True")


def test_import_construction_and_fingerprint_load_no_torch_and_the_check_can_fail(
    llama: Path,
) -> None:
    use = f"from ipo_lib.chat import Chat; from ipo_lib.engines.transformers_sampler import TransformersSampler as T; f = {str(llama)!r}"
    use += "; s = T(f, Chat(f)); s.fingerprint()"
    assert not loads_torch(use)
    assert loads_torch(use + "; s._model")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_that_share_a_prompt_are_those_of_separate_passes(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_model(tmp_path, family=family)
    chat, sampling = Chat(folder), Sampling(temperature=0.8, top_p=1.0)
    sampler = TransformersSampler(folder, chat, dtype="float32")
    prompts = [chat.encode(text) for text in TEXTS[:3]]
    texts = ["a", "The ships", "", "Bread needs flour, water.", "b", "Wait. " * 40, "hot oven"]
    asked = [
        Request(f"{at}", prompt, chat.encode(text), 0)
        for prompt in prompts
        for at, text in enumerate(texts)
    ]
    assert max(len(one.prefix_ids) for one in asked) > scoring.SHARED
    alone = [next(sampler.score([one], sampling)) for one in asked]
    together = list(sampler.score(asked, sampling))
    assert [len(one) for one in together] == [len(one.prefix_ids) for one in asked]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-3)
    few = TransformersSampler(folder, chat, dtype="float32", batch_size=2)
    for one, other in zip(few.score(asked, sampling), alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-3)


def test_a_score_reads_each_prompt_once_unless_what_follows_is_long(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(llama)
    sampler, short, long = (
        TransformersSampler(llama, chat),
        chat.encode("ab"),
        chat.encode("lighthouse " * 80),
    )
    prompts = [chat.encode(text) for text in TEXTS[:2]]
    decoder, rows = sampler._model.get_decoder(), list[tuple[int, ...]]()
    forward = decoder.forward
    monkeypatch.setattr(
        decoder,
        "forward",
        lambda **given: rows.append(tuple(given["input_ids"].shape)) or forward(**given),
    )
    asked = [Request(str(at), prompt, short, 0) for prompt in prompts for at in range(5)]
    list(sampler.score(asked, Sampling()))
    assert rows == [
        (1, len(prompts[0])),
        (5, len(short) - 1),
        (1, len(prompts[1])),
        (5, len(short) - 1),
    ]
    rows.clear()
    list(sampler.score([Request(str(at), prompts[0], long, 0) for at in range(2)], Sampling()))
    assert rows == [(1, len(prompts[0]) + len(long))] * 2


def test_scores_are_the_frequencies_of_draws(llama: Path) -> None:
    """``score`` says how often ``sample`` goes on with a trace's own token, and 0 for a token outside the nucleus."""
    chat, sampling = Chat(llama), Sampling(temperature=0.8, top_p=0.9, max_tokens=1)
    sampler, prompt = (
        TransformersSampler(llama, chat, dtype="float32"),
        chat.prompt_ids(Prompt("p", TEXTS[1], "t", False)),
    )
    first = Counter(
        one.token_ids
        for one in sampler.sample(
            [Request(str(n), prompt, (), draw_seed(1, n)) for n in range(3000)], sampling
        )
    )
    (common, times), *_ = [item for item in first.most_common() if item[0]]
    trace = common + chat.encode("salt")
    found, again = sampler.score(
        [Request("a", prompt, trace, 0), Request("b", prompt, trace[:1], 0)], sampling
    )
    assert len(found) == len(trace)
    assert again == pytest.approx(found[:1], rel=1e-4)
    assert abs(found[0] - times / 3000) < 4 * (found[0] * (1 - found[0]) / 3000) ** 0.5
    unlikely = next(token for token in range(chat.eos_ids[0] + 1, 200) if (token,) not in first)
    assert next(sampler.score([Request("c", prompt, (unlikely,), 0)], sampling)) == [0.0]
    greedy = Sampling(temperature=0, max_tokens=6)
    (drawn,) = sampler.sample([Request("d", prompt, (), 0)], greedy)
    assert set(next(sampler.score([Request("e", prompt, drawn.token_ids, 0)], greedy))) <= {1.0}


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_banned_token_is_left_out_of_its_nucleus(llama: Path, top_p: float) -> None:
    """Draws with ``ban`` are the draws that would not have begun with it: same shares among the others, nothing new."""
    chat, sampling = Chat(llama), Sampling(temperature=0.7, top_p=top_p, max_tokens=2)
    sampler, prompt = (
        TransformersSampler(llama, chat, dtype="float32"),
        chat.prompt_ids(Prompt("p", TEXTS[1], "t", False)),
    )
    free = [
        one.token_ids
        for one in sampler.sample(
            [Request(str(n), prompt, (), draw_seed(2, n)) for n in range(4000)], sampling
        )
    ]
    ban = Counter(ids[0] for ids in free if ids).most_common(1)[0][0]
    barred = [Request(str(n), prompt, (), draw_seed(3, n), ban) for n in range(4000)]
    left = [one.token_ids for one in sampler.sample(barred, sampling)]
    assert all(ids[:1] != (ban,) for ids in left)
    assert (
        any(ids[1:] == (ban,) for ids in left) or top_p < 1
    )  # it is banned as the first token only
    others = Counter(ids[:1] for ids in free if ids[:1] != (ban,))
    common = [key for key, n in others.items() if n >= 20]
    table = [
        [others[key] for key in common],
        [Counter(ids[:1] for ids in left)[key] for key in common],
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_barred_token_that_is_the_whole_nucleus_gives_way_to_the_others_by_their_weight() -> None:
    import torch

    logits = torch.tensor([[12.0, 2.0, 1.0, 0.0]]).expand(
        4000, 4
    )  # at top-p 0.95 the nucleus is token 0 alone
    uniforms = torch.arange(4000, dtype=torch.float64) / 4000
    drawn = nucleus_draw(logits, uniforms, 1.0, 0.95, barred=torch.zeros(4000, dtype=torch.long))
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(-1)
    shares = torch.bincount(drawn, minlength=4)[1:] / 4000
    assert 0 not in drawn
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert set(
        nucleus_draw(logits, uniforms, 1.0, 0.95, barred=torch.full((4000,), -1)).tolist()
    ) == {0}


def test_a_few_tokens_that_16_bit_logits_put_outside_the_nucleus_do_not_make_a_trace_foreign(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that drew a token had other logits in the last bits; a trace of another model has many such tokens."""
    chat, sampling = Chat(llama), Sampling(temperature=0.8, top_p=0.9, max_tokens=24)
    prompt = chat.prompt_ids(Prompt("p", TEXTS[1], "t", False))
    for dtype, tolerant in (("float32", False), ("bfloat16", True)):
        sampler = TransformersSampler(llama, chat, dtype=dtype)
        drawn = next(
            one.token_ids
            for one in sampler.sample([Request(str(n), prompt, (), n) for n in range(20)], sampling)
            if len(one.token_ids) > 8
        )
        own, found = (
            next(sampler.score([Request("a", prompt, drawn, 0)], sampling)),
            list[list[float]](),
        )
        assert min(own) > 0
        for token in range(chat.eos_ids[0] + 1, 120):
            found.append(
                next(sampler.score([Request("b", prompt, (*drawn[:-1], token), 0)], sampling))
            )
        assert any(0 < one[-1] < 0.05 for one in found)
        assert any(one[-1] == 0 for one in found) is not tolerant
        foreign = tuple(range(chat.eos_ids[0] + 1, chat.eos_ids[0] + 20))
        whole = next(sampler.score([Request("c", prompt, foreign, 0)], sampling))
        monkeypatch.setattr(
            "ipo_lib.engines.transformers_sampler.SCORED", 1
        )  # a share of the response, not of what is held at once
        assert (
            next(sampler.score([Request("c", prompt, foreign, 0)], sampling)).count(0)
            == whole.count(0)
            > 2
        )
        monkeypatch.undo()


# budget forcing


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that opens its trace by template and hardly ever closes it."""
    return tiny_model(tmp_path_factory.mktemp("thinker"), spread=0.3, template="r1")


@pytest.mark.parametrize("until", ["think", "eos"])
def test_thinking_that_is_too_long_is_closed_and_recorded(thinker: Path, until: str) -> None:
    chat, sampling = (
        Chat(thinker),
        Sampling(temperature=1.0, top_p=1.0, max_tokens=20, until=until, think_tokens=9),
    )
    asked = make_requests(chat)
    found = answers(TransformersSampler(thinker, chat, batch_size=3), asked, sampling)
    forced = [one for one in found.values() if one.forced is not None]
    assert len(forced) > len(TEXTS) // 2
    for one in forced:
        assert one.forced == 9
        said = chat.decode(one.token_ids)
        assert said.count("</think>") >= 1
        assert chat.decode(one.token_ids[9:]).startswith("\n</think>")
        assert one.finish == "think" if until == "think" else len(one.token_ids) > 12


def test_forcing_changes_no_token_before_it_and_no_draw_of_others(thinker: Path) -> None:
    chat = Chat(thinker)
    free = Sampling(temperature=1.0, top_p=1.0, max_tokens=20)
    asked = make_requests(chat)
    sampler = TransformersSampler(thinker, chat, batch_size=4)
    plain, forced = (
        answers(sampler, asked, one)
        for one in (free, Sampling(**{**vars(free), "think_tokens": 9}))
    )
    for key, one in forced.items():
        kept = len(one.token_ids) if one.forced is None else one.forced
        assert plain[key].token_ids[:kept] == one.token_ids[:kept]
    alone = answers(
        TransformersSampler(thinker, chat, batch_size=1),
        asked,
        Sampling(**{**vars(free), "think_tokens": 9}),
    )
    assert alone == forced


def test_a_trace_that_was_given_closed_is_not_closed_again(thinker: Path) -> None:
    chat, sampling = (
        Chat(thinker),
        Sampling(temperature=1.0, top_p=1.0, max_tokens=12, think_tokens=5),
    )
    asked = make_requests(chat, "The salt.</think>")
    assert {
        one.forced for one in answers(TransformersSampler(thinker, chat), asked, sampling).values()
    } == {None}


def test_settings_without_a_budget_name_the_draws_they_always_named() -> None:
    assert "think_tokens" not in to_json(Sampling())
    assert to_json(Sampling(think_tokens=9))["think_tokens"] == 9
    with pytest.raises(BadInput, match="think_tokens must lie below max_tokens"):
        Sampling(max_tokens=10, think_tokens=10)


# stragglers


def test_the_last_draws_wait_for_the_next_call_and_come_out_the_same(tmp_path: Path) -> None:
    """A token follows itself with 0.9, else the response ends: a few rows go on long after the others."""
    folder = planted_model(tmp_path / "chain", {7: {7: 0.9, 1: 0.1}})
    chat, sampling = Chat(folder), Sampling(temperature=1.0, top_p=1.0, max_tokens=150)
    asked = [Request(str(at), (7,), (), draw_seed(0, at)) for at in range(24)]
    whole = answers(TransformersSampler(folder, chat, batch_size=24), asked, sampling)
    sampler = TransformersSampler(folder, chat, batch_size=24)
    first = {one.key: one for one in sampler.sample_some(asked, sampling)}
    assert 24 * 3 / 4 <= len(first) < 24
    left = [one for one in asked if one.key not in first]
    assert max(len(one.token_ids) for one in first.values()) < max(
        len(whole[one.key].token_ids) for one in left
    )
    more = [Request(f"new {at}", (7,), (), draw_seed(1, at)) for at in range(24)]
    second = {one.key: one for one in sampler.sample_some([*left, *more], sampling)}
    last = [one for one in (*left, *more) if one.key not in second]
    third = {one.key: one for one in sampler.sample(last, sampling)}
    found = first | second | third
    assert {key: found[key] for key in whole} == whole
    assert {key: one for key, one in found.items() if key.startswith("new")} == answers(
        sampler, more, sampling
    )


def test_on_a_cpu_nobody_waits(llama: Path) -> None:
    assert not TransformersSampler(llama, Chat(llama), device="cpu").pauses
    assert TransformersSampler(llama, Chat(llama), device="cuda").pauses
