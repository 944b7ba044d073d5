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


def trained_updates(adapter: Path) -> dict[str, Any]:
    """B A times the scaling, by the name of the layer, from the adapter's file alone."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    updates = {}
    for name, a in weights.items():
        if name.endswith(".lora_A.weight"):
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            updates[layer] = torch.as_tensor(2.0 * b.double() @ a.double())
    assert updates
    return updates


def applied_update(base: Any, tuned: Any, name: str) -> Any:
    """What the tuned model adds to the layer's weight, merged or beside it."""
    plain, layer = base.get_submodule(name), tuned.get_submodule(name)
    weight = layer.base_layer.weight if hasattr(layer, "base_layer") else layer.weight
    update = weight.double() - plain.weight.double()
    if hasattr(layer, "lora_A"):
        a = layer.lora_A["default"].weight.double()
        b = layer.lora_B["default"].weight.double()
        update = update + layer.scaling["default"] * b @ a
    return update


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sampled_model_holds_the_whole_update(model: Path, adapter: Path, dtype: str) -> None:
    chat = Chat(model)
    base = TransformersSampler(model, chat, dtype=dtype)._model
    tuned = TransformersSampler(model, chat, adapter=adapter, dtype=dtype)._model
    for name, trained in trained_updates(adapter).items():
        missed = applied_update(base, tuned, name) - trained
        assert float(missed.norm() / trained.norm()) < 0.02, name


def test_rotary_tables_stay_in_float32_under_an_adapter(model: Path, adapter: Path) -> None:
    import torch

    tuned = TransformersSampler(model, Chat(model), adapter=adapter, dtype="bfloat16")._model
    tables = [value for name, value in tuned.named_buffers() if name.endswith("inv_freq")]
    assert tables
    assert all(table.dtype == torch.float32 for table in tables)


def test_drawing_and_scoring_read_one_model(model: Path, adapter: Path) -> None:
    """In bf16 greedy draws under the adapter are the likeliest tokens when they are scored."""
    chat = Chat(model)
    tuned = TransformersSampler(model, chat, adapter=adapter, dtype="bfloat16")
    requests = []
    for text in ("Wait", "Bread needs flour", "How tall is a lighthouse?"):
        requests.append(Request(text, chat.prompt_ids(Prompt("p", text, "t", False)), (), 0))
    greedy = Sampling(temperature=0.0, max_tokens=6)
    drawn = {completion.key: completion.token_ids for completion in tuned.sample(requests, greedy)}
    scored = [Request(ask.key, ask.prompt_ids, drawn[ask.key], 0) for ask in requests]
    chances = []
    for by_token in tuned.score(scored, greedy):
        chances += by_token
    assert sum(chances) / len(chances) > 0.8  # bf16 logits drift with the batch's shape


def test_an_unmerged_adapter_has_draws_of_its_own(model: Path, adapter: Path) -> None:
    """Draws of a merged 16-bit model, made by an earlier version, are not taken for this one's."""
    chat = Chat(model)
    fingerprints = {}
    for dtype in ("bfloat16", "float32"):
        sampler = TransformersSampler(model, chat, adapter=adapter, dtype=dtype)
        fingerprints[dtype] = sampler.fingerprint()
    assert fingerprints["bfloat16"]["lora"] == "unmerged"
    assert "lora" not in fingerprints["float32"]
    assert "lora" not in TransformersSampler(model, chat, dtype="bfloat16").fingerprint()


def test_kl_is_that_of_the_models_that_are_sampled(model: Path, adapter: Path) -> None:
    """In bf16 KL between the sampled models is that of Fig 7; a merged model has another."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from ipo_lib.engines import lora
    from ipo_lib.experiments import kl

    chat, settings = Chat(model), dpo.DpoSettings(use_cpu=True)
    prompt_ids = chat.prompt_ids(Prompt("p", "How tall is a lighthouse?", "t", False))
    text = "Bread needs flour, water, salt and time; the oven needs to be hot. " * 3
    ids = torch.tensor([prompt_ids + chat.encode(text)])

    # 1. As the figure measures it.
    base = lora.load_base(model, settings, "cpu")
    trained = get_peft_model(base, lora.make_config(model, settings, adapter))
    lora.load_weights(trained, adapter, model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        measured = sum(kl.token_divergences(trained, ids, len(prompt_ids), kl.DIRECTIONS[0]))

    # 2. From the models that are sampled, and from a merged one.
    def log_probabilities(net: Any) -> Any:
        net.set_attn_implementation("sdpa")
        with torch.no_grad():
            return net(ids).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    apart = TransformersSampler(model, chat, adapter=adapter, dtype="bfloat16")._model
    q = log_probabilities(TransformersSampler(model, chat, dtype="bfloat16")._model)
    sampled = {}
    for name, net in {"apart": apart, "merged": merged}.items():
        p = log_probabilities(net)
        sampled[name] = float((p.exp() * (p - q)).sum())
    assert sampled["apart"] == pytest.approx(measured, rel=0.15)
    assert abs(sampled["merged"] - measured) > 3 * abs(sampled["apart"] - measured)
