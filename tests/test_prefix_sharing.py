"""Trees: log-probabilities, losses and gradients are those of plain forwards, one sequence at a time."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor

from ipo_lib import dpo, training
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import lora
from ipo_lib.engines import prefix_sharing as shared
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


def trees(families: int = 3, leaves: int = 6, seed: int = 0) -> list[Pair]:
    """Pairs of which up to ``leaves`` share prefix and rejected side; prefixes of 5 to 20 tokens, of which h are a response's."""
    draw, found = random.Random(seed), []

    def ids(low: int, high: int) -> Ids:
        return tuple(draw.randrange(5, 300) for _ in range(draw.randint(low, high)))

    for family in range(families):
        prefix, rejected = ids(5, 20), ids(1, 12)
        h = draw.randint(0, 4)
        for leaf in range(leaves if family else 1):
            found.append(
                Pair(
                    f"{family}-{leaf}",
                    prefix,
                    ids(1, 12),
                    rejected,
                    h,
                    "made up",
                    given=1,
                    weight=1 + leaf / 4,
                )
            )
    return found


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama nf4", "qwen2 nf4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with random LoRA, float32 or NF4, as training makes it."""
    family, _, quantize = request.param.partition(" ")
    folder = tiny_model(tmp_path_factory.mktemp("tree"), family=family, hidden=64, spread=0.2)
    torch.manual_seed(0)
    plain = lora.base(folder, replace(SETTINGS, quantize=quantize or None), "cpu")
    made = get_peft_model(
        plain, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, value in made.named_parameters():
        if "lora_" in name:
            value.data.normal_(0, 0.1)
    return made


def alone(model: Any, before: Ids, after: Ids) -> Tensor:
    """The log-probability of every token of ``after``, by a forward of its own."""
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(after)[:, None])[:, 0]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def run(
    model: Any, pairs: list[Pair], settings: DpoSettings, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(policy sums, counts, loss) of one batch of trees; the reference is 0 unless given."""
    batch = shared.collate(pairs, settings)
    policy, counts = shared.sums(shared.Scorer(model)(**batch), batch)
    zero = torch.zeros_like(policy) if reference is None else reference
    preference, nll = dpo.losses(policy, zero, counts, batch["weight"], settings)
    return policy, counts, preference + settings.sft_weight * nll


@pytest.mark.parametrize("head", [4096, 7])
def test_sums_and_gradients_are_those_of_separate_forwards(
    model: Any, monkeypatch: pytest.MonkeyPatch, head: int
) -> None:
    monkeypatch.setattr(shared, "HEAD", head)  # 7: the logits of seven positions at a time
    pairs, settings = trees(), replace(SETTINGS, scope="whole", sft_weight=0.2)
    policy, counts, loss = run(model, pairs, settings)
    own, nlls, sizes, total = [], [], [], torch.tensor(0.0)
    for pair in pairs:
        prompt, stem = (
            pair.prompt_ids[: len(pair.prompt_ids) - pair.h],
            pair.prompt_ids[len(pair.prompt_ids) - pair.h :],
        )
        sides = [
            alone(model, pair.prompt_ids, side) for side in (pair.chosen_ids, pair.rejected_ids)
        ]
        own.append(
            torch.stack(
                [
                    *(side.sum() for side in sides),
                    alone(model, prompt, stem).sum() if stem else torch.tensor(0.0),
                ]
            )
        )
        sizes.append([len(pair.chosen_ids), len(pair.rejected_ids), len(stem)])
        nlls.append(-sides[0])
        total = total - pair.weight * torch.nn.functional.logsigmoid(
            settings.beta * (sides[0].sum() - sides[1].sum())
        )
    expected = total / len(pairs) + 0.2 * torch.cat(nlls).mean()
    torch.testing.assert_close(policy, torch.stack(own), **CLOSE)
    assert counts.tolist() == sizes
    torch.testing.assert_close(loss, expected, **CLOSE)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert ours.keys() == theirs.keys() != set()
    assert max(float(value.abs().max()) for value in theirs.values()) > 1e-3
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **CLOSE)


def test_full_and_part_are_the_same_loss_until_something_breaks_the_cancellation(
    model: Any,
) -> None:
    """paper.md's puzzle: with a shared prefix and summed log-probabilities the prefix terms of DPO cancel."""
    pairs = trees()
    with torch.no_grad(), model.disable_adapter():
        reference = run(model, pairs, replace(SETTINGS, scope="whole"))[0]

    def one(**changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = run(model, pairs, replace(SETTINGS, **changes), reference)[2]
        return loss.detach(), gradients(model, loss)

    for part, full, same in [
        ({}, {"scope": "whole"}, True),
        ({"loss": "sigmoid_norm"}, {"loss": "sigmoid_norm", "scope": "whole"}, False),
        ({"loss": "literal"}, {"loss": "literal", "scope": "whole"}, False),
        ({"sft_weight": 0.2}, {"sft_weight": 0.2, "sft_scope": "whole"}, False),
    ]:
        (loss, grad), (other, other_grad) = one(**part), one(**full)
        assert torch.allclose(loss, other, **CLOSE) is same
        assert all(torch.allclose(grad[name], other_grad[name], **CLOSE) for name in grad) is same


def test_what_each_setting_scores(model: Any) -> None:
    pairs = trees()
    policy, counts, _ = run(model, pairs, SETTINGS)
    masked, fewer, _ = run(model, pairs, replace(SETTINGS, score_trigger=False))
    assert (counts - fewer).tolist() == [[1, 0, 0]] * len(
        pairs
    )  # ``given`` tokens of the chosen side alone
    first = torch.stack([alone(model, pair.prompt_ids, pair.chosen_ids)[0] for pair in pairs])
    torch.testing.assert_close(policy[:, 0] - masked[:, 0], first, **CLOSE)
    torch.testing.assert_close(policy[:, 1:], masked[:, 1:], **CLOSE)
    _, only, loss = run(model, pairs, replace(SETTINGS, loss="sft"))
    assert only[:, 0].tolist() == counts[:, 0].tolist()
    batch = shared.collate(pairs, replace(SETTINGS, loss="sft"))
    assert len(batch["target"]) == sum(
        len(pair.chosen_ids) for pair in pairs
    )  # the rejected side is not even read
    sums, sizes = shared.sums(shared.Scorer(model)(**batch), batch)
    preference, nll = dpo.losses(sums, sums, sizes, batch["weight"], replace(SETTINGS, loss="sft"))
    assert float(preference) == float(loss) == 0
    assert float(nll) == pytest.approx(float(-policy[:, 0].sum() / counts[:, 0].sum()), abs=1e-5)


def test_literal_loss_by_hand() -> None:
    policy, reference, counts = (
        torch.tensor([[-4.0, -6.0, -1.0]]),
        torch.tensor([[-5.0, -5.5, -2.0]]),
        torch.tensor([[4.0, 3.0, 2.0]]),
    )
    for changes, margin in [
        ({}, (-4 + 5) - (-6 + 5.5)),
        ({"scope": "whole"}, (-4 + 5) - (-6 + 5.5)),
        ({"loss": "sigmoid_norm"}, 1 / 4 + 0.5 / 3),
        ({"loss": "sigmoid_norm", "scope": "whole"}, (-5 + 7) / 6 - (-7 + 7.5) / 5),
        ({"loss": "literal"}, -4 - 2 * -6 + -5.5),
        ({"loss": "literal", "scope": "whole"}, -5 - 2 * -7 + -7.5),
    ]:
        assert float(
            dpo.margins(policy, reference, counts, replace(SETTINGS, **changes))
        ) == pytest.approx(margin)


def test_a_tree_holds_its_prefix_once_and_logits_are_made_for_suffixes_alone() -> None:
    pairs = trees(families=2, leaves=6)
    batch = shared.collate(pairs, SETTINGS)
    assert len(batch["ids"]) == 2
    prefix, leaves = (
        len(pairs[1].prompt_ids),
        [pairs[1].rejected_ids, *(pair.chosen_ids for pair in pairs[1:])],
    )
    used = prefix + sum(len(leaf) - 1 for leaf in leaves)
    assert used < batch["ids"].shape[1] < used + 8
    assert not batch["mask"][1, 0, :used, used:].any()  # nobody sees padding
    assert len(batch["target"]) == sum(map(len, leaves)) + len(pairs[0].chosen_ids) + len(
        pairs[0].rejected_ids
    )
    assert batch["positions"][1, prefix : prefix + len(leaves[0]) - 1].tolist() == [
        *range(prefix, prefix + len(leaves[0]) - 1)
    ]
    assert (
        batch["positions"][1, :used] < prefix + 12
    ).all()  # every leaf goes on from the prefix's end


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_training_follows_stock_trl_step_by_step(tmp_path: Path, loss: str) -> None:
    folder = tiny_model(tmp_path / "model", family="llama", hidden=64, spread=0.2)
    pairs = [replace(pair, weight=1.0) for pair in trees(families=5, leaves=4)]
    same = replace(SETTINGS, loss=loss, epochs=2, batch_size=4, sft_weight=0.1, rank=4)
    ours, theirs = (
        training.train(pairs, folder, replace(same, engine=engine), tmp_path / engine)
        for engine in ("shared", "trl")
    )
    assert len(ours) == len(theirs) > 6
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
        for name in ("logps/chosen", "ref_logps/rejected", "margin"):
            assert one[name] == pytest.approx(other[name], abs=2e-2)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1


def test_a_loss_that_is_no_number_keeps_the_last_good_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    folder, pairs, plain = (
        tiny_model(tmp_path / "model", family="llama", hidden=64),
        trees(families=5, leaves=4),
        dpo.losses,
    )
    short = training.train(
        pairs, folder, replace(SETTINGS, batch_size=4, keep=3), tmp_path / "good"
    )
    steps = iter(range(100))

    def broken(*given: Any) -> Any:
        preference, nll = plain(*given)
        return (preference if next(steps) < 2 else preference * torch.nan), nll

    monkeypatch.setattr(shared, "losses", broken)
    with pytest.raises(
        BadInput, match=r"nan at step 3; lower learning_rate \(the last good adapter is in .*bad\)"
    ):
        training.train(pairs, folder, replace(SETTINGS, batch_size=4, keep=3), tmp_path / "bad")
    assert len(short) == 5
    kept = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    expected = load_file(
        tmp_path / "good" / "pairs-000004" / "adapter_model.safetensors"
    )  # that of the last finite loss: step 2's
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_what_cannot_be_trained_is_one_line(tmp_path: Path) -> None:
    folder, other = (
        tiny_model(tmp_path / name, family="llama", hidden=hidden)
        for name, hidden in (("one", 64), ("two", 96))
    )
    pairs = trees()
    training.train(pairs, folder, SETTINGS, tmp_path / "adapter")
    for changed, given, said in [
        ({"engine": "trl", "scope": "whole"}, {}, "stock TRL has no scope"),
        ({"beta": 0.0}, {}, "beta 0.0 is too small"),
        ({}, {"adapter": tmp_path / "adapter"}, "was made for model 'one', not for 'two'"),
    ]:
        with pytest.raises(BadInput, match=said) as caught:
            training.train(pairs, other, replace(SETTINGS, **changed), tmp_path / "out", **given)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="stock TRL has no weights"):
        training.train(pairs, folder, replace(SETTINGS, engine="trl"), tmp_path / "out")
    with pytest.raises(BadInput, match="no rejected side"):
        training.train([replace(pairs[0], rejected_ids=())], folder, SETTINGS, tmp_path / "out")
    (tmp_path / "moved").mkdir()
    other.rename(tmp_path / "moved" / "one")  # the same name, another width
    with pytest.raises(BadInput, match="was made for another model"):
        training.train(
            pairs,
            tmp_path / "moved" / "one",
            SETTINGS,
            tmp_path / "out",
            adapter=tmp_path / "adapter",
        )


def test_a_model_with_other_masks_is_one_line(tmp_path: Path) -> None:
    """Sliding windows would be trained with a mask that the model does not have."""
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}))
    with pytest.raises(
        BadInput,
        match="engine shared knows the masks of llama, qwen2, qwen3, not of 'gemma3_text'; set engine",
    ):
        shared.trainer(trees(), folder, SETTINGS, tmp_path / "out", None)
