"""How LoRA is trained: precision, 4-bit weights, activation checkpointing, order of batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from preferences import LOG2, PLAIN, make_pairs, write_small_llama

from ipo_lib import training
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import lora, prefix_sharing, trl_trainer

MAKERS = pytest.mark.parametrize(
    "make_trainer", [prefix_sharing.make_trainer, trl_trainer.make_trainer], ids=["shared", "trl"]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_trains_every_layer(model: Path, tmp_path: Path, dtype: str) -> None:
    """QLoRA: the gradient must pass the frozen NF4 weights also after the reference was read.

    bitsandbytes on AVX512-BF16 CPUs repacks weights in eval mode, which cuts every layer but the
    last off: the margin then stays under a fifth of the unquantized one.
    """
    from safetensors.torch import load_file

    settings = replace(PLAIN, quantize="nf4", epochs=4, dtype=dtype)
    rows = training.train(make_pairs(8), model, settings, tmp_path / "nf4")
    settings = replace(settings, quantize=None)
    plain = training.train(make_pairs(8), model, settings, tmp_path / "plain")
    assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert rows[-1]["margin"] > 0.5 * plain[-1]["margin"] > 0.5
    assert rows[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.3)
    moved = set()
    for name, value in load_file(tmp_path / "nf4" / "adapter_model.safetensors").items():
        if "lora_B" in name and value.abs().max() > 0:
            moved.add(name.split("layers.")[1][0])
    assert moved == {"0", "1"}


def test_four_bits_are_asked_for_by_name() -> None:
    """Whatever the size of the weights: a model sampled in 16 bits must not be trained in four."""
    assert lora.quantization(DpoSettings()) is None
    assert lora.quantization(DpoSettings(quantize="nf4")) == "nf4"


@pytest.mark.parametrize("engine", ["shared", "trl"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_activation_checkpointing_changes_no_number(
    model: Path, tmp_path: Path, engine: str, quantize: str | None
) -> None:
    settings = replace(PLAIN, engine=engine, quantize=quantize, sft_weight=0.2, batch_size=4)
    plain = training.train(make_pairs(8), model, settings, tmp_path / "plain")
    settings = replace(settings, activation_checkpointing=True)
    checkpointed = training.train(make_pairs(8), model, settings, tmp_path / "checkpointed")
    for name in ("loss", "grad_norm", "logps/chosen"):
        expected = [row[name] for row in plain]
        assert [row[name] for row in checkpointed] == pytest.approx(expected, rel=1e-4), name
    assert plain[0]["grad_norm"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpoints_are_made_in_the_layers_of_the_model(family: str, tmp_path: Path) -> None:
    """The wrapper that the trainer sees hands the request on to the model that has layers."""
    folder = tiny_model(tmp_path / family, family=family, hidden=64)
    settings = replace(PLAIN, activation_checkpointing=True)
    trainer, adapted = prefix_sharing.make_trainer(
        make_pairs(4), folder, settings, tmp_path / "out", None
    )
    trainer.train()
    flags = []
    for layer in adapted.get_base_model().get_decoder().layers:
        older_name = getattr(layer, "gradient_checkpointing", False)
        flags.append(getattr(layer, "activation_checkpointing", older_name))
    assert flags == [True, True]


@MAKERS
def test_nf4_adapter_stays_in_float32(model: Path, tmp_path: Path, make_trainer: Any) -> None:
    """TRL turns it to bf16, where a step of 5e-6 on a weight near 0.1 is rounded away."""
    import torch

    _, adapted = make_trainer(make_pairs(2), model, replace(PLAIN, quantize="nf4"), tmp_path, None)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained)


@MAKERS
def test_lora_dropout_is_on_when_asked(model: Path, tmp_path: Path, make_trainer: Any) -> None:
    import torch

    for dropout in (0.0, 0.25):
        settings = replace(PLAIN, dropout=dropout)
        _, adapted = make_trainer(make_pairs(2), model, settings, tmp_path, None)
        rates = set()
        for module in adapted.modules():
            if isinstance(module, torch.nn.Dropout):
                rates.add(module.p)
        assert rates == ({dropout} if dropout else set())


def test_batches_hold_every_pair_once_with_its_like() -> None:
    pairs = []
    for index, pair in enumerate(make_pairs(42)):
        pairs.append(replace(pair, chosen_ids=(5,) * (1 + index * 7 % 40)))
    arranged = lora.sort_by_length(pairs, 7)
    lengths = []
    for pair in arranged:
        lengths.append(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)))
    assert sorted(pair.id for pair in arranged) == sorted(pair.id for pair in pairs)
    assert lengths == sorted(lengths)
    assert lora.sort_by_length(pairs, 7) == arranged

    sampler = lora.BucketSampler(42, 4, 7)
    epochs = [list(sampler) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert list(lora.BucketSampler(42, 4, 7)) == epochs[0]
    for order in epochs:
        assert sorted(order) == list(range(len(sampler))) == list(range(42))
        for start in range(0, 40, 4):
            batch = order[start : start + 4]
            assert batch == list(range(batch[0], batch[0] + 4))
            assert batch[0] % 4 == 0
        assert order[40:] == [40, 41]
    assert list(lora.BucketSampler(3, 4, 0)) == [0, 1, 2]


def test_in_16_bits_the_reference_is_that_of_the_first_step(model: Path, tmp_path: Path) -> None:
    """Rounding depends on a batch's padding: a reference taken in other batches was off."""
    pairs = []
    for index, pair in enumerate(make_pairs(12)):
        pairs.append(replace(pair, chosen_ids=(5, 9, 7) * (1 + index * 7 % 11)))
    settings = replace(PLAIN, learning_rate=1e-12, dtype="bfloat16", pad_to_multiple_of=1)
    rows = training.train(pairs, model, settings, tmp_path)
    assert [row["margin"] for row in rows] == [0.0] * 3


def test_buckets_change_the_order_and_no_loss(model: Path, tmp_path: Path) -> None:
    """One batch an epoch: whatever the order inside, the first loss is that of all pairs."""
    settings = replace(PLAIN, batch_size=8, sft_weight=0.3, learning_rate=1e-9, epochs=2)
    losses = []
    for buckets in (True, False):
        changed = replace(settings, length_buckets=buckets)
        rows = training.train(make_pairs(8), model, changed, tmp_path / str(buckets))
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
