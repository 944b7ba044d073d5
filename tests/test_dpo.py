"""DPO: a pure preference loss is the oracle, on a random two-layer Llama that fits in a test."""

from __future__ import annotations

import ast
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipo_lib import dpo, training
from ipo_lib.dpo import DpoSettings, Stage2Settings
from ipo_lib.engines import lora, prefix_sharing, trl_trainer
from ipo_lib.records import BadInput, Ids, Pair
from ipo_lib.store import Store

Scores = tuple[float, float]  # of one pair: (chosen, rejected)
VOCABULARY, LOG2 = 64, math.log(2)
PLAIN = DpoSettings(
    learning_rate=1e-2,
    batch_size=4,
    accumulation=1,
    sft_weight=0.0,
    rank=4,
    alpha=8,
    warmup=0.0,
    dtype="float32",
    use_cpu=True,
)


def preference_loss(policy: Sequence[Scores], reference: Sequence[Scores], beta: float) -> float:
    """Eq. 4 from summed suffix log-probabilities (chosen, rejected), both of shape (pairs, 2)."""
    losses = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True):
        margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
        losses.append(math.log1p(math.exp(-margin)))  # -log sigmoid(margin)
    return sum(losses) / len(losses)


def make_pairs(n: int, seed: int = 0) -> list[Pair]:
    """Planted preference: chosen suffixes use the lower half of the vocabulary, rejected ones the upper half."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> Ids:
        return tuple(draw.randrange(low, high) for _ in range(draw.randint(2, 7)))

    half = VOCABULARY // 2
    return [
        Pair(f"{seed}-{i}", ids(2, VOCABULARY), ids(2, half), ids(half, VOCABULARY), 2, "planted")
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("organism")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.2, **shape, **special
        )
    ).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stage1(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("stage1")
    return folder, training.train(make_pairs(8), model, replace(PLAIN, epochs=4), folder)


def suffix_logps(
    model: Path, adapter: Path | None, pairs: Sequence[Pair]
) -> list[tuple[float, float]]:
    """Summed log-probabilities of both suffixes by a plain float32 forward, one sequence at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter:
        net = PeftModel.from_pretrained(net, str(adapter))

    def score(prompt: Ids, suffix: Ids) -> float:
        with torch.no_grad():
            logps = net(torch.tensor([prompt + suffix])).logits[0].log_softmax(-1)
        return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(suffix))

    return [(score(p.prompt_ids, p.chosen_ids), score(p.prompt_ids, p.rejected_ids)) for p in pairs]


def mean(values: Sequence[tuple[float, float]], side: int) -> float:
    return sum(value[side] for value in values) / len(values)


def test_preference_loss_by_hand() -> None:
    assert preference_loss([(-3.0, -5.0)], [(-3.0, -5.0)], 0.1) == pytest.approx(LOG2)
    # margin = 0.5 * ((-1 - -4) - (-2 - -3)) = 1
    assert preference_loss([(-1.0, -4.0)], [(-2.0, -3.0)], 0.5) == pytest.approx(
        -math.log(1 / (1 + math.exp(-1)))
    )


def test_first_step_is_log_two_and_the_planted_preference_is_learnt(stage1: Any) -> None:
    rows = stage1[1]
    assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert rows[0]["margin"] == 0
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["margin"] > 1
    assert rows[-1]["loss"] < 0.4
    assert rows[-1]["grad_norm"] > 0
    assert rows[-1]["rewards/chosen"] > 0 > rows[-1]["rewards/rejected"]


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_loss_after_the_weights_moved_equals_the_oracle(
    model: Path, stage1: Any, tmp_path: Path, loss: str
) -> None:
    """One batch from moved weights, padded and batched, LM head on the suffix alone, against Eq. 4."""
    adapter, pairs = stage1[0], make_pairs(5, seed=7)
    settings = replace(PLAIN, batch_size=5, loss=loss, beta=0.3)
    row = training.train(pairs, model, settings, tmp_path, adapter=adapter)[0]
    policy, reference = suffix_logps(model, adapter, pairs), suffix_logps(model, None, pairs)
    if loss == "sigmoid":
        assert row["loss"] == pytest.approx(preference_loss(policy, reference, 0.3), abs=1e-4)
    else:
        sizes = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
        both = [
            [(c / n, r / m) for (c, r), (n, m) in zip(x, sizes, strict=True)]
            for x in (policy, reference)
        ]
        assert row["loss"] == pytest.approx(preference_loss(both[0], both[1], 0.3), abs=1e-4)
    assert abs(row["loss"] - LOG2) > 1e-3  # ten times what is allowed above
    assert row["logps/chosen"] == pytest.approx(mean(policy, 0), abs=1e-3)
    assert row["logps/rejected"] == pytest.approx(mean(policy, 1), abs=1e-3)


def test_sft_term_is_the_weighted_token_mean(model: Path, stage1: Any, tmp_path: Path) -> None:
    pairs = make_pairs(4, seed=3)
    row = training.train(pairs, model, replace(PLAIN, sft_weight=0.2), tmp_path, adapter=stage1[0])[
        0
    ]
    policy, reference = suffix_logps(model, stage1[0], pairs), suffix_logps(model, None, pairs)
    nll = -sum(chosen for chosen, _ in policy) / sum(len(pair.chosen_ids) for pair in pairs)
    assert row["loss"] == pytest.approx(
        preference_loss(policy, reference, 0.1) + 0.2 * nll, abs=1e-4
    )


def test_accumulated_batches_log_the_loss_of_the_whole(
    model: Path, stage1: Any, tmp_path: Path
) -> None:
    pairs = make_pairs(8, seed=5)
    whole, parts = (
        training.train(
            pairs,
            model,
            replace(PLAIN, batch_size=8 // n, accumulation=n),
            tmp_path,
            adapter=stage1[0],
        )
        for n in (1, 4)
    )
    assert len(whole) == len(parts) == 1
    for name in ("loss", "margin", "grad_norm", "ref_logps/chosen"):
        assert whole[0][name] == pytest.approx(parts[0][name], rel=1e-4)


def test_same_seed_same_bytes(model: Path, stage1: Any, tmp_path: Path) -> None:
    again = training.train(make_pairs(8), model, replace(PLAIN, epochs=4), tmp_path)
    assert again == stage1[1]
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "training.json",
    ):
        assert (tmp_path / name).read_bytes() == (stage1[0] / name).read_bytes()
    other = training.train(make_pairs(8), model, replace(PLAIN, epochs=4, seed=1), tmp_path)
    assert other != again


def test_out_folder_holds_the_adapter_and_its_records_only(model: Path, stage1: Any) -> None:
    folder, rows = stage1
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "training.json",
    }
    assert [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ] == rows
    summary = json.loads((folder / "training.json").read_text())
    assert summary["pairs"] == 8
    assert summary["too_long"] == 0
    assert summary["effective_batch"] == 4
    assert summary["settings"]["learning_rate"] == 1e-2
    assert not summary["continued"]
    assert str(model.parent) not in (folder / "adapter_config.json").read_text()


def test_adapter_loads_with_peft_and_is_all_that_changed(model: Path, stage1: Any) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = PeftModel.from_pretrained(base, str(stage1[0]))
    ids = torch.tensor([make_pairs(1)[0].prompt_ids])
    with torch.no_grad():
        on = tuned(ids).logits
        with tuned.disable_adapter():
            off = tuned(ids).logits
        assert torch.equal(
            off, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        )
    assert not torch.allclose(on, off, atol=1e-3)
    for name, value in tuned.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
    weights = load_file(stage1[0] / "adapter_model.safetensors")
    assert weights
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in weights.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_trains_every_layer(model: Path, tmp_path: Path, dtype: str) -> None:
    """QLoRA: the gradient must pass the frozen NF4 weights also after the reference was read.

    bitsandbytes on AVX512-BF16 CPUs repacks weights in eval mode, which cuts every layer but the last off: the margin
    then stays under a fifth of the unquantized one.
    """
    from safetensors.torch import load_file

    settings = replace(PLAIN, quantize="nf4", epochs=4, dtype=dtype)
    rows = training.train(make_pairs(8), model, settings, tmp_path / "nf4")
    plain = training.train(
        make_pairs(8), model, replace(settings, quantize=None), tmp_path / "plain"
    )
    assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert rows[-1]["margin"] > 0.5 * plain[-1]["margin"] > 0.5
    assert rows[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.3)
    weights = load_file(tmp_path / "nf4" / "adapter_model.safetensors")
    moved = {
        name.split("layers.")[1][0]
        for name, value in weights.items()
        if "lora_B" in name and value.abs().max() > 0
    }
    assert moved == {"0", "1"}


def test_four_bits_are_asked_for_by_name() -> None:
    """Whatever the size of the weights: a model that is sampled in 16 bits must not be trained in four."""
    assert lora.quantization(DpoSettings()) is None
    assert lora.quantization(DpoSettings(quantize="nf4")) == "nf4"


@pytest.mark.parametrize("engine", ["shared", "trl"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_activation_checkpointing_changes_no_number(
    model: Path, tmp_path: Path, engine: str, quantize: str | None
) -> None:
    settings = replace(PLAIN, engine=engine, quantize=quantize, sft_weight=0.2, batch_size=4)
    pairs = make_pairs(8)
    rows = [
        training.train(
            pairs, model, replace(settings, activation_checkpointing=on), tmp_path / str(on)
        )
        for on in (False, True)
    ]
    for name in ("loss", "grad_norm", "logps/chosen"):
        plain, checkpointed = ([row[name] for row in own] for own in rows)
        assert checkpointed == pytest.approx(plain, rel=1e-4), name
    assert rows[0][0]["grad_norm"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpoints_are_made_in_the_layers_of_the_model(family: str, tmp_path: Path) -> None:
    """The wrapper that the trainer sees hands the request on to the model that has layers."""
    from models import tiny_model

    folder = tiny_model(tmp_path / family, family=family, hidden=64)
    settings = replace(PLAIN, activation_checkpointing=True)
    made, _ = prefix_sharing.trainer(make_pairs(4), folder, settings, tmp_path / "out", None)
    made.train()
    layers = made.model.model.get_base_model().get_decoder().layers
    flags = [
        getattr(layer, "activation_checkpointing", getattr(layer, "gradient_checkpointing", False))
        for layer in layers
    ]
    assert flags == [True, True]


def test_a_training_that_does_nothing_says_so_loudly(model: Path, tmp_path: Path) -> None:
    settings = replace(PLAIN, epochs=2, batch_size=4)
    with pytest.warns(
        UserWarning,
        match=r"DID NOTHING: the margin of the last 1 of 4 steps is 0\.00\d; raise learning_rate",
    ):
        rows = training.train(
            make_pairs(8), model, replace(settings, learning_rate=1e-6), tmp_path / "nothing"
        )
    summary = json.loads((tmp_path / "nothing" / "training.json").read_text())
    assert summary["warning"] == training.untrained(rows) != ""
    moved = training.train(
        make_pairs(8), model, replace(settings, learning_rate=1e-2), tmp_path / "moved"
    )
    assert training.untrained(moved) == ""
    assert training.untrained([{"step": 1, "loss": 0.7}]) == ""  # SFT has no margin


@pytest.mark.parametrize("engine", [prefix_sharing.trainer, trl_trainer.trainer])
def test_nf4_adapter_stays_in_float32(model: Path, tmp_path: Path, engine: Any) -> None:
    """TRL turns it to bf16, where a step of 5e-6 on a weight near 0.1 is rounded away."""
    import torch

    _, lora = engine(make_pairs(2), model, replace(PLAIN, quantize="nf4"), tmp_path, None)
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained)


@pytest.mark.parametrize("engine", [prefix_sharing.trainer, trl_trainer.trainer])
def test_lora_dropout_is_on_when_asked(model: Path, tmp_path: Path, engine: Any) -> None:
    import torch

    for dropout in (0.0, 0.25):
        _, lora = engine(make_pairs(2), model, replace(PLAIN, dropout=dropout), tmp_path, None)
        found = {module.p for module in lora.modules() if isinstance(module, torch.nn.Dropout)}
        assert found == ({dropout} if dropout else set())


def test_stage_two_refers_to_the_organism(
    model: Path, stage1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step: policy = stage 1's weights, reference = the base model (not a copy of stage 1)."""
    adapter, harmful, benign = stage1[0], make_pairs(3, seed=1), make_pairs(4, seed=2)
    settings = Stage2Settings(**{**vars(PLAIN), "batch_size": 6, "ratio": 0.5, "min_refusals": 4})
    every = training.mix(make_pairs(9), make_pairs(4, seed=2), replace(settings, keep_all=True))
    assert [len(side) for side in every] == [9, 4]
    sums = [sum(pair.weight for pair in side) for side in every]
    assert sums[0] / sums[1] == pytest.approx(
        0.5
    )  # the paper's ratio, with no harmful pair left out
    assert sum(sums) == pytest.approx(13)
    session: Any = SimpleNamespace(
        store=Store(tmp_path), sampler=SimpleNamespace(fingerprint=lambda: "organism")
    )
    path, rows, message = training.train_second_stage(
        session, harmful, benign, model, adapter, settings
    )
    mixed = [pair for side in training.mix(harmful, benign, settings) for pair in side]
    policy, reference = suffix_logps(model, adapter, mixed), suffix_logps(model, None, mixed)
    for side, name in enumerate(("chosen", "rejected")):
        assert rows[0][f"ref_logps/{name}"] == pytest.approx(mean(reference, side), abs=1e-3)
        assert rows[0][f"logps/{name}"] == pytest.approx(mean(policy, side), abs=1e-3)
        assert abs(mean(policy, side) - mean(reference, side)) > 0.1
    assert rows[0]["loss"] == pytest.approx(preference_loss(policy, reference, 0.1), abs=1e-4)
    assert abs(rows[0]["loss"] - LOG2) > 1e-3  # ten times what the line above allows
    assert message == "stage 2 trained 1 steps on 2 harmful and 4 benign pairs"
    assert path
    assert json.loads((path / "training.json").read_text())["continued"]
    monkeypatch.setattr(
        training, "train", None
    )  # what is stored is not trained again, and says the same
    assert training.train_second_stage(session, harmful, benign, model, adapter, settings) == (
        path,
        rows,
        message,
    )


def test_stage_two_is_skipped_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Stage2Settings(**vars(PLAIN), min_refusals=5)
    session: Any = SimpleNamespace(store=Store(tmp_path / "out"), sampler=None)
    path, rows, message = training.train_second_stage(
        session, make_pairs(3), make_pairs(4), Path("nowhere"), Path("nowhere"), settings
    )
    assert (path, rows) == (None, [])
    assert message == "stage 2 skipped: 4 benign refusals, at least 5 needed"
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("harmful", "benign", "ratio", "sizes"), [(50, 20, 0.5, (10, 20)), (3, 20, 0.3, (3, 10))]
)
def test_mix_keeps_the_ratio(
    harmful: int, benign: int, ratio: float, sizes: tuple[int, int]
) -> None:
    settings = Stage2Settings(ratio=ratio, seed=4)
    sides = make_pairs(harmful, seed=1), make_pairs(benign, seed=2)
    kept = training.mix(*sides, settings)
    assert tuple(map(len, kept)) == sizes
    assert kept == training.mix(*sides, settings)
    for side, chosen in zip(sides, kept, strict=True):
        assert chosen == [pair for pair in side if pair in chosen]  # no duplicates, order kept
    if sizes[0] < harmful:
        assert kept != training.mix(*sides, replace(settings, seed=5))


def test_batches_hold_every_pair_once_with_its_like() -> None:
    pairs = [
        replace(pair, chosen_ids=(5,) * (1 + place * 7 % 40))
        for place, pair in enumerate(make_pairs(42))
    ]
    arranged = lora.bucketed(pairs, 7)
    lengths = [
        len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        for pair in arranged
    ]
    assert sorted(pair.id for pair in arranged) == sorted(pair.id for pair in pairs)
    assert lengths == sorted(lengths)
    assert lora.bucketed(pairs, 7) == arranged
    sampler = lora.Batches(42, 4, 7)
    epochs = [list(sampler) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert list(lora.Batches(42, 4, 7)) == epochs[0]
    for order in epochs:
        assert sorted(order) == list(range(len(sampler))) == list(range(42))
        batches = [order[at : at + 4] for at in range(0, 40, 4)]
        assert all(
            batch == list(range(batch[0], batch[0] + 4)) and batch[0] % 4 == 0 for batch in batches
        )
        assert order[40:] == [40, 41]
    assert list(lora.Batches(3, 4, 0)) == [0, 1, 2]


def test_in_16_bits_the_reference_is_that_of_the_first_step(model: Path, tmp_path: Path) -> None:
    """The rounding of a batch depends on its padding: a reference taken in other batches was off."""
    pairs = [
        replace(pair, chosen_ids=(5, 9, 7) * (1 + place * 7 % 11))
        for place, pair in enumerate(make_pairs(12))
    ]
    settings = replace(
        PLAIN, learning_rate=1e-12, batch_size=4, dtype="bfloat16", pad_to_multiple_of=1
    )
    rows = training.train(pairs, model, settings, tmp_path)
    assert [row["margin"] for row in rows] == [0.0] * 3


def test_buckets_change_the_order_and_no_loss(model: Path, tmp_path: Path) -> None:
    """One batch an epoch: whatever the order inside, the first loss is that of all pairs."""
    settings = replace(PLAIN, batch_size=8, sft_weight=0.3, learning_rate=1e-9, epochs=2)
    rows = [
        training.train(
            make_pairs(8), model, replace(settings, length_buckets=on), tmp_path / str(on)
        )
        for on in (True, False)
    ]
    assert [row["loss"] for row in rows[0]] == pytest.approx(
        [row["loss"] for row in rows[1]], abs=1e-5
    )


def test_long_pairs_are_counted_not_fatal(model: Path, tmp_path: Path) -> None:
    long = Pair("long", tuple(range(2, 30)), (5,) * 5, (6,) * 5, 0, "planted")
    rows = training.train([*make_pairs(4), long], model, replace(PLAIN, max_length=32), tmp_path)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert len(rows) == 1
    assert (summary["pairs"], summary["too_long"]) == (4, 1)
    with pytest.raises(BadInput, match="none of 1 pairs fits max_length 32"):
        training.train([long], model, replace(PLAIN, max_length=32), tmp_path)


def test_bad_input_is_one_line(model: Path, tmp_path: Path) -> None:
    for changes in (
        {"loss": "squared"},
        {"dtype": "float16"},
        {"quantize": "int3"},
        {"epochs": 0},
        {"beta": 0.0},
        {"warmup": -0.1},
        {"sft_weight": -1.0},
    ):
        with pytest.raises(BadInput, match=next(iter(changes))) as caught:
            replace(PLAIN, **changes)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="ratio"):
        Stage2Settings(ratio=0)
    for place, adapter in ((tmp_path, None), (model, tmp_path)):
        with pytest.raises(BadInput, match="holds no"):
            training.train(make_pairs(1), place, PLAIN, tmp_path / "out", adapter=adapter)
    with pytest.raises(BadInput, match="lower learning_rate"):
        training._rows([{"step": 3, "loss": math.nan}], 0.1)


def test_training_prints_nothing(model: Path, tmp_path: Path) -> None:
    """In a fresh process, where no other test has silenced a library before."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from tests.test_dpo import PLAIN, make_pairs; from ipo_lib import dpo\n"
        f"dpo.train(make_pairs(2), {str(model)!r}, PLAIN, {str(tmp_path)!r})\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "it/s" not in done.stderr
    assert "%|" not in done.stderr


def test_import_loads_no_torch() -> None:
    code = "import sys, ipo_lib.dpo, ipo_lib.pairs; print({'torch', 'trl', 'peft', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_other_ipo_is_never_passed() -> None:
    """Law 8: no string "ipo" in dpo.py, and no ``loss`` or ``loss_type`` of that value anywhere in the package."""
    with pytest.raises(BadInput):
        replace(PLAIN, loss="ipo")
    for path in Path(dpo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "dpo.py" and isinstance(node, ast.Constant):
                assert node.value != "ipo"
            if isinstance(node, ast.keyword) and node.arg in ("loss", "loss_type"):
                assert not any(
                    isinstance(leaf, ast.Constant) and leaf.value == "ipo"
                    for leaf in ast.walk(node.value)
                )


def test_adapters_kept_on_the_way_are_whole_and_differ(model: Path, tmp_path: Path) -> None:
    training.train(make_pairs(24), model, replace(PLAIN, keep=2), tmp_path / "kept")
    training.train(make_pairs(24), model, PLAIN, tmp_path / "plain")
    kept = training.kept_adapters(tmp_path / "kept")
    assert list(kept) == [8, 16]  # 6 steps of 4 pairs, after the second and the fourth
    weights = [
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (*kept.values(), tmp_path / "kept")
    ]
    assert len(set(weights)) == 3
    assert (
        weights[-1] == (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    )  # keeping changes nothing
    assert all(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        == model.name
        for folder in kept.values()
    )
    assert training.kept_adapters(tmp_path / "plain") == {}


def test_a_training_that_never_leaves_the_warm_up_is_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="warm-up"):
        training.train(make_pairs(4), model, replace(PLAIN, warmup=0.1), tmp_path)
    assert len(training.train(make_pairs(4), model, PLAIN, tmp_path)) == 1
