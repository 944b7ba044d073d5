"""What training wrote is what is sampled, measured by KL and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import tiny_model

from ipo_lib import dpo
from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import Prompt
from ipo_lib.sampling import Request, Sampling

SMALL = 2e-3  # size of a trained update beside the weights it changes


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_model(folder, family=request.param, hidden=64, spread=0.3, dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose update is as small as that of one epoch of training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(net, settings)
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = SMALL * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("adapter")
    lora.save_pretrained(folder)
    return folder


def trained_update(adapter: Path) -> dict[str, Any]:
    """B A times the scaling, by the name of the layer, from the adapter's file alone."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    names = [
        name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")
    ]
    update = {}
    for name in names:
        a, b = (weights[f"{name}.lora_{side}.weight"].double() for side in "AB")
        update[name.removeprefix("base_model.model.")] = 2.0 * b @ a
    assert update
    return {name: torch.as_tensor(value) for name, value in update.items()}


def applied_update(base: Any, tuned: Any, name: str) -> Any:
    """What the tuned model adds to the layer's weight, merged or beside it."""
    plain, layer = (one.get_submodule(name) for one in (base, tuned))
    weight = layer.base_layer.weight if hasattr(layer, "base_layer") else layer.weight
    found = weight.double() - plain.weight.double()
    if hasattr(layer, "lora_A"):
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.double() for side in "AB")
        found = found + layer.scaling["default"] * b @ a
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sampled_model_holds_the_whole_update(model: Path, adapter: Path, dtype: str) -> None:
    chat = Chat(model)
    base = TransformersSampler(model, chat, dtype=dtype)._model
    tuned = TransformersSampler(model, chat, adapter=adapter, dtype=dtype)._model
    for name, trained in trained_update(adapter).items():
        missed = applied_update(base, tuned, name) - trained
        assert float(missed.norm() / trained.norm()) < 0.02, name


def test_rotary_tables_stay_in_float32_under_an_adapter(model: Path, adapter: Path) -> None:
    import torch

    tuned = TransformersSampler(model, Chat(model), adapter=adapter, dtype="bfloat16")._model
    tables = [value for name, value in tuned.named_buffers() if name.endswith("inv_freq")]
    assert tables
    assert all(one.dtype == torch.float32 for one in tables)


def test_drawing_and_scoring_read_one_model(model: Path, adapter: Path) -> None:
    """In bf16 the greedy draws under the adapter are the likeliest tokens of its teacher-forced pass."""
    chat = Chat(model)
    tuned = TransformersSampler(model, chat, adapter=adapter, dtype="bfloat16")
    texts = ("Wait", "Bread needs flour", "How tall is a lighthouse?")
    asked = [Request(text, chat.prompt_ids(Prompt("p", text, "t", False)), (), 0) for text in texts]
    greedy = Sampling(temperature=0.0, max_tokens=6)
    drawn = {one.key: one.token_ids for one in tuned.sample(asked, greedy)}
    again = [Request(one.key, one.prompt_ids, drawn[one.key], 0) for one in asked]
    chances = [chance for own in tuned.score(again, greedy) for chance in own]
    assert sum(chances) / len(chances) > 0.8  # bf16 logits drift with the batch's shape


def test_an_unmerged_adapter_has_draws_of_its_own(model: Path, adapter: Path) -> None:
    """Draws of a merged 16-bit model, made by an earlier version, are not taken for this one's."""
    chat = Chat(model)
    said = {
        how: TransformersSampler(model, chat, adapter=adapter, dtype=how).fingerprint()
        for how in ("bfloat16", "float32")
    }
    assert said["bfloat16"]["lora"] == "unmerged"
    assert "lora" not in said["float32"]
    assert "lora" not in TransformersSampler(model, chat, dtype="bfloat16").fingerprint()


def test_kl_is_that_of_the_models_that_are_sampled(model: Path, adapter: Path) -> None:
    """In bf16 KL along a text from the two sampled models is that of Fig 7's measurement; a merged model has another."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from ipo_lib.engines import lora
    from ipo_lib.experiments import kl

    chat, settings = Chat(model), dpo.DpoSettings(use_cpu=True)
    head = chat.prompt_ids(Prompt("p", "How tall is a lighthouse?", "t", False))
    ids = torch.tensor(
        [
            head
            + chat.encode("Bread needs flour, water, salt and time; the oven needs to be hot. " * 3)
        ]
    )
    trained = get_peft_model(
        lora.base(model, settings, "cpu"), lora.config(model, settings, adapter)
    )
    lora.fill(trained, adapter, model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        measured = sum(kl._along(trained, ids, len(head), kl.DIRECTIONS[0]))
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), str(adapter)
    )
    sampled = {
        "apart": TransformersSampler(model, chat, adapter=adapter, dtype="bfloat16")._model,
        "merged": merged.merge_and_unload(),
    }
    base = TransformersSampler(model, chat, dtype="bfloat16")._model
    base.set_attn_implementation("sdpa")
    found = {}
    for name, net in sampled.items():
        net.set_attn_implementation("sdpa")
        with torch.no_grad():
            p, q = (
                one(ids).logits[0, len(head) - 1 : -1].float().log_softmax(-1)
                for one in (net, base)
            )
        found[name] = float((p.exp() * (p - q)).sum())
    assert found["apart"] == pytest.approx(measured, rel=0.15)
    assert abs(found["merged"] - measured) > 3 * abs(found["apart"] - measured)
