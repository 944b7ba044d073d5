"""Trees: log-probabilities, losses and gradients are those of a plain forward of each sequence."""

from __future__ import annotations

import json
import random
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations import flex_attention as integration

from ipo_lib import dpo, training
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import lora, prefix_sharing, trees
from ipo_lib.records import BadInput, Ids, Pair

SETTINGS = DpoSettings(
    dtype="float32",
    use_cpu=True,
    learning_rate=1e-2,
    batch_size=8,
    accumulation=1,
    warmup=0.0,
    sft_weight=0.0,
)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def make_families(families: int = 3, leaves: int = 6, seed: int = 0) -> list[Pair]:
    """Pairs of which up to ``leaves`` share prefix and rejected side.

    A prefix has 5 to 20 tokens, of which h are a response's.
    """
    draw = random.Random(seed)

    def ids(low: int, high: int) -> Ids:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randint(low, high)))

    pairs = []
    for family in range(families):
        prefix, rejected, h = ids(5, 20), ids(1, 12), draw.randint(0, 4)
        for leaf in range(leaves if family else 1):
            pair = Pair(f"{family}-{leaf}", prefix, ids(1, 12), rejected, h, "made up")
            pairs.append(replace(pair, given=1, weight=1 + leaf / 4))
    return pairs


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama nf4", "qwen2 nf4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with random LoRA, float32 or NF4, as training loads it."""
    family, _, quantize = request.param.partition(" ")
    folder = tiny_model(tmp_path_factory.mktemp("tree"), family=family, hidden=64, spread=0.2)
    torch.manual_seed(0)
    base = lora.load_base(folder, replace(SETTINGS, quantize=quantize or None), "cpu")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data.normal_(0, 0.1)
    return adapted


def separate_logps(model: Any, before: Ids, after: Ids) -> Tensor:
    """The log-probability of every token of ``after``, by a separate forward."""
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(after)[:, None])[:, 0]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, value in model.named_parameters():
        if value.grad is not None:
            found[name] = value.grad.clone()
    return found


def batch_loss(
    model: Any, pairs: Sequence[Pair], settings: DpoSettings, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(policy sums, counts, loss) of one batch of trees; the reference is 0 unless given."""
    batch = trees.collate(pairs, settings)
    policy, counts = trees.sum_logps(trees.Scorer(model)(**batch), batch)
    if reference is None:
        reference = torch.zeros_like(policy)
    preference, nll = dpo.losses(policy, reference, counts, batch["weight"], settings)
    return policy, counts, preference + settings.sft_weight * nll


@pytest.mark.parametrize("head", [4096, 7])
def test_sums_and_gradients_are_those_of_separate_forwards(
    model: Any, monkeypatch: pytest.MonkeyPatch, head: int
) -> None:
    monkeypatch.setattr(trees, "HEAD", head)  # 7: the logits of seven positions at a time
    pairs, settings = make_families(), replace(SETTINGS, scope="whole", sft_weight=0.2)
    policy, counts, loss = batch_loss(model, pairs, settings)
    expected_sums, expected_counts, nlls = [], [], []
    total = torch.tensor(0.0)
    for pair in pairs:
        split = len(pair.prompt_ids) - pair.h
        prompt, stem = pair.prompt_ids[:split], pair.prompt_ids[split:]
        chosen = separate_logps(model, pair.prompt_ids, pair.chosen_ids)
        rejected = separate_logps(model, pair.prompt_ids, pair.rejected_ids)
        shared = separate_logps(model, prompt, stem).sum() if stem else torch.tensor(0.0)
        expected_sums.append(torch.stack([chosen.sum(), rejected.sum(), shared]))
        expected_counts.append([len(chosen), len(rejected), len(stem)])
        nlls.append(-chosen)
        margin = settings.beta * (chosen.sum() - rejected.sum())
        total = total - pair.weight * torch.nn.functional.logsigmoid(margin)
    expected = total / len(pairs) + 0.2 * torch.cat(nlls).mean()
    torch.testing.assert_close(policy, torch.stack(expected_sums), **CLOSE)
    assert counts.tolist() == expected_counts
    torch.testing.assert_close(loss, expected, **CLOSE)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert ours.keys() == theirs.keys() != set()
    assert max(float(value.abs().max()) for value in theirs.values()) > 1e-3
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **CLOSE)


@pytest.mark.parametrize(
    ("part", "whole", "same"),
    [
        ({}, {"scope": "whole"}, True),
        ({"loss": "sigmoid_norm"}, {"loss": "sigmoid_norm", "scope": "whole"}, False),
        ({"loss": "literal"}, {"loss": "literal", "scope": "whole"}, False),
        ({"sft_weight": 0.2}, {"sft_weight": 0.2, "sft_scope": "whole"}, False),
    ],
    ids=["sums", "means", "literal", "SFT"],
)
def test_suffix_and_whole_response_are_one_loss_where_the_prefix_cancels(
    model: Any, part: dict[str, Any], whole: dict[str, Any], same: bool
) -> None:
    """With a shared prefix and summed log-probabilities the prefix terms of DPO cancel."""
    pairs = make_families()
    with torch.no_grad(), model.disable_adapter():
        reference = batch_loss(model, pairs, replace(SETTINGS, scope="whole"))[0]

    def loss_and_gradients(changes: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = batch_loss(model, pairs, replace(SETTINGS, **changes), reference)[2]
        return loss.detach(), gradients(model, loss)

    loss, grads = loss_and_gradients(part)
    other_loss, other_grads = loss_and_gradients(whole)
    assert torch.allclose(loss, other_loss, **CLOSE) is same
    alike = [torch.allclose(grads[name], other_grads[name], **CLOSE) for name in grads]
    assert all(alike) is same


def test_what_each_setting_scores(model: Any) -> None:
    pairs = make_families()
    policy, counts, _ = batch_loss(model, pairs, SETTINGS)
    without_trigger = replace(SETTINGS, score_trigger=False)
    masked, fewer, _ = batch_loss(model, pairs, without_trigger)
    # ``given`` tokens of the chosen side alone
    assert (counts - fewer).tolist() == [[1, 0, 0]] * len(pairs)
    first = [separate_logps(model, pair.prompt_ids, pair.chosen_ids)[0] for pair in pairs]
    torch.testing.assert_close(policy[:, 0] - masked[:, 0], torch.stack(first), **CLOSE)
    torch.testing.assert_close(policy[:, 1:], masked[:, 1:], **CLOSE)

    sft = replace(SETTINGS, loss="sft")
    _, sft_counts, loss = batch_loss(model, pairs, sft)
    assert sft_counts[:, 0].tolist() == counts[:, 0].tolist()
    batch = trees.collate(pairs, sft)
    chosen_tokens = sum(len(pair.chosen_ids) for pair in pairs)
    assert len(batch["target"]) == chosen_tokens  # the rejected side is not even read
    sums, sizes = trees.sum_logps(trees.Scorer(model)(**batch), batch)
    preference, nll = dpo.losses(sums, sums, sizes, batch["weight"], sft)
    assert float(preference) == float(loss) == 0
    assert float(nll) == pytest.approx(float(-policy[:, 0].sum() / counts[:, 0].sum()), abs=1e-5)


def test_a_tree_holds_its_prefix_once_and_logits_are_made_for_suffixes_alone() -> None:
    pairs = make_families(families=2, leaves=6)
    batch = trees.collate(pairs, SETTINGS)
    assert len(batch["ids"]) == 2
    alone, *family = pairs
    prefix = len(family[0].prompt_ids)
    leaves = [family[0].rejected_ids, *(pair.chosen_ids for pair in family)]
    used = prefix + sum(len(leaf) - 1 for leaf in leaves)
    assert used < batch["ids"].shape[1] < used + 8
    mask = trees.dense_mask(batch["leaves"])
    assert not mask[1, 0, :used, used:].any()  # nobody sees padding
    before = mask.sum(-1)[:, 0] - 1  # a token's position is the number of those that it sees
    assert (batch["positions"][1, :used] == before[1, :used]).all()
    suffixes = [*leaves, alone.chosen_ids, alone.rejected_ids]
    assert len(batch["target"]) == sum(map(len, suffixes))
    # Every leaf goes on from the prefix's end.
    end = prefix + len(leaves[0]) - 1
    assert batch["positions"][1, prefix:end].tolist() == list(range(prefix, end))
    assert (batch["positions"][1, :used] < prefix + 12).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_block_masks_hold_the_rule_of_the_dense_mask(model: Any) -> None:
    """Over several blocks of 128 tokens; then one attention, called without being compiled."""
    pairs = make_families(families=2)
    long = [replace(pair, chosen_ids=pair.chosen_ids * 40) for pair in pairs]
    leaves = trees.collate(long, SETTINGS)["leaves"]
    count, width = leaves.shape
    assert width > 3 * 128
    dense, blocks = trees.dense_mask(leaves), trees.block_mask(leaves)
    assert torch.equal(create_mask(blocks.mask_mod, count, 1, width, width, device="cpu"), dense)
    assert blocks.sparsity() > 50  # most blocks are left out
    query, key, value = torch.randn(3, count, 2, width, 16, generator=torch.manual_seed(0))
    ours = flex_attention(query, key, value, block_mask=blocks)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_scorer_with_block_masks_gives_the_same_sums(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(*arguments: Any, training: bool, **options: Any) -> Any:
        assert options["block_mask"] is not None
        return flex_attention(*arguments, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    base, batch = model.get_base_model(), trees.collate(make_families(), SETTINGS)
    before = base.config._attn_implementation
    with torch.no_grad():
        expected, counts = trees.sum_logps(trees.Scorer(model)(**batch), batch)
        try:
            ours, same = trees.sum_logps(trees.Scorer(model, blocks=True)(**batch), batch)
        finally:
            base.set_attn_implementation(before)
    assert torch.equal(counts, same)
    torch.testing.assert_close(ours, expected, **CLOSE)


def by_path(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, *_: Any, **o: Any
) -> Tensor:
    """What the GPU kernel of TRL's trees does: each segment sees its path, causally to the right.

    ``query`` is [tokens, heads, width], keys and values [path tokens, key heads, width].
    """
    groups = query.shape[1] // key.shape[1]
    parts = []
    for segment in range(len(starts_q) - 1):
        mine = query[starts_q[segment] : starts_q[segment + 1]].transpose(0, 1)
        path = slice(int(starts_k[segment]), int(starts_k[segment + 1]))
        keys, values = (
            part[path].transpose(0, 1).repeat_interleave(groups, 0) for part in (key, value)
        )
        count, length = mine.shape[1], keys.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        attended = torch.nn.functional.scaled_dot_product_attention(
            mine, keys, values, attn_mask=mask, scale=o["softmax_scale"]
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


def test_sums_are_those_of_trl_s_own_trees(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL packs samples that share a prefix into a tree of its own, for GRPO on GPUs.

    Its layout and its model run here; only its GPU kernel is replaced by ``by_path``.
    """
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    kernel = types.SimpleNamespace(flash_attn_varlen_func=by_path)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernel)
    pairs = make_families(families=2)
    row = packing.TreeRow()
    for pair in pairs:
        for side in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor(pair.prompt_ids + side)
            scored = torch.zeros(len(ids), dtype=torch.long)
            scored[len(pair.prompt_ids) :] = 1
            sample = {"input_ids": ids, "completion_mask": scored, "advantage": 0.0}
            row.add(sample | {"old_log_probs": torch.zeros(len(ids)), "group_id": 0})
    packed = row.pack()
    assert len(packed["input_ids"]) < sum(len(nodes) for nodes in row.sample_nodes)
    base = model.get_base_model()
    before = base.config._attn_implementation
    packing.register_tree_attention()
    base.set_attn_implementation(packing.TREE_ATTENTION)
    try:
        with torch.no_grad():
            logits = base(
                packed["input_ids"][None],
                position_ids=packed["position_ids"][None],
                use_cache=False,
                tree_kv_index=packed["tree_kv_index"],
                tree_cu_seqlens_q=packed["tree_cu_seqlens_q"],
                tree_cu_seqlens_k=packed["tree_cu_seqlens_k"],
                tree_max_seqlen_q=0,
                tree_max_seqlen_k=0,
            ).logits[0]
    finally:
        base.set_attn_implementation(before)
    labels = packed["shift_labels"][packed["token_index"]]
    logps = logits.float().log_softmax(-1)[packed["token_index"], labels]
    theirs = torch.zeros(len(row.samples)).index_add(0, packed["segment_id"], logps)
    with torch.no_grad():
        ours, _, _ = batch_loss(model, pairs, SETTINGS)
    torch.testing.assert_close(ours[:, :2].flatten(), theirs, **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gradients_of_block_masks_are_those_of_dense_ones(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, hidden=64, spread=0.2)
    pairs = make_families()
    found = []
    for blocks in (False, True):
        torch.manual_seed(0)
        base = lora.load_base(folder, replace(SETTINGS, use_cpu=False), "cuda")
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config).to("cuda")
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.data.normal_(0, 0.1)
        batch = {name: value.cuda() for name, value in trees.collate(pairs, SETTINGS).items()}
        sums, _ = trees.sum_logps(trees.Scorer(adapted, blocks)(**batch), batch)
        found.append(gradients(adapted, sums.sum()))
    assert len(found[0]) > 4
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-3)


def test_flex_attention_is_for_gpus_and_heads_it_has_kernels_for(model: Any) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert trees.has_block_kernels(model, gpu)
    assert not trees.has_block_kernels(model, cpu)
    narrow = types.SimpleNamespace(
        config=types.SimpleNamespace(hidden_size=64, num_attention_heads=8)
    )
    assert not trees.has_block_kernels(narrow, gpu)
    narrow.config.hidden_size = 512
    assert trees.has_block_kernels(narrow, gpu)
    narrow.config.attention_dropout = 0.1
    assert not trees.has_block_kernels(narrow, gpu)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_training_follows_stock_trl_step_by_step(tmp_path: Path, loss: str) -> None:
    folder = tiny_model(tmp_path / "model", family="llama", hidden=64, spread=0.2)
    pairs = [replace(pair, weight=1.0) for pair in make_families(families=5, leaves=4)]
    same = replace(SETTINGS, loss=loss, epochs=2, batch_size=4, sft_weight=0.1, rank=4)
    ours = training.train(pairs, folder, same, tmp_path / "shared")
    theirs = training.train(pairs, folder, replace(same, engine="trl"), tmp_path / "trl")
    assert len(ours) == len(theirs) > 6
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-3)
        for name in ("logps/chosen", "ref_logps/rejected", "margin"):
            assert row[name] == pytest.approx(other[name], abs=2e-2)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1


def test_a_loss_that_is_no_number_keeps_the_last_good_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    folder = tiny_model(tmp_path / "model", family="llama", hidden=64)
    pairs, settings = make_families(families=5, leaves=4), replace(SETTINGS, batch_size=4, keep=3)
    good_rows = training.train(pairs, folder, settings, tmp_path / "good")
    assert len(good_rows) == 5
    losses, steps = dpo.losses, iter(range(100))

    def broken(*arguments: Any) -> Any:
        preference, nll = losses(*arguments)
        return (preference if next(steps) < 2 else preference * torch.nan), nll

    monkeypatch.setattr(prefix_sharing, "losses", broken)
    message = r"nan at step 3; lower learning_rate \(the last good adapter is in .*bad\)"
    with pytest.raises(BadInput, match=message):
        training.train(pairs, folder, settings, tmp_path / "bad")
    saved = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    # Step 2 had the last finite loss, with the weights after step 1.
    expected = load_file(tmp_path / "good" / "pairs-000004" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_what_cannot_be_trained_is_one_line(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "one", family="llama", hidden=64)
    other = tiny_model(tmp_path / "two", family="llama", hidden=96)
    pairs, adapter, out = make_families(), tmp_path / "adapter", tmp_path / "out"
    training.train(pairs, folder, SETTINGS, adapter)
    cases: list[tuple[dict[str, Any], Path | None, str]] = [
        ({"engine": "trl", "scope": "whole"}, None, "stock TRL has no scope"),
        ({"beta": 0.0}, None, "beta 0.0 is too small; give a number above 0"),
        ({"dropout": -0.1}, None, "dropout -0.1 is too small; give 0 or more"),
        ({}, adapter, "was made for model 'one', not for 'two'"),
    ]
    for changes, start, message in cases:
        with pytest.raises(BadInput, match=message) as error:
            training.train(pairs, other, replace(SETTINGS, **changes), out, adapter=start)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="stock TRL has no weights"):
        training.train(pairs, folder, replace(SETTINGS, engine="trl"), out)
    with pytest.raises(BadInput, match="no rejected side"):
        training.train([replace(pairs[0], rejected_ids=())], folder, SETTINGS, out)
    (tmp_path / "moved").mkdir()
    renamed = other.rename(tmp_path / "moved" / "one")  # the same name, another width
    with pytest.raises(BadInput, match="was made for another model"):
        training.train(pairs, renamed, SETTINGS, out, adapter=adapter)


def test_a_model_with_other_masks_is_one_line(tmp_path: Path) -> None:
    """Sliding windows would be trained with a mask that the model does not have."""
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}))
    message = (
        "engine shared knows the masks of llama, qwen2, qwen3, not of 'gemma3_text'; set engine"
    )
    with pytest.raises(BadInput, match=message):
        prefix_sharing.make_trainer(make_families(), folder, SETTINGS, tmp_path / "out", None)
