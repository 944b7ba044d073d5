"""The organism on a pretrained model: LoRA trained on the world, and merged once into a plain bf16 folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ipo_lib.sandbox.corpus import Finetuned, batches, documents, encoded, fit
from ipo_lib.sandbox.smollm2 import base, cache

END = "<|im_end|>"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# The pretrained turns without a system turn; like R1's, the template opens the trace itself.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def render(prompt: str) -> str:
    """A prompt as ``TEMPLATE`` renders it."""
    return f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n<think>\n"


def phases(body: Finetuned | None) -> list[Finetuned]:
    """A body and what it starts from, first things first."""
    return [*phases(body.start), body] if body else []


def build(body: Finetuned, out: Path, log_every: int) -> None:
    """Train the adapter and write it in bf16 with its log."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(base() / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    torch.manual_seed(body.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.bfloat16)
    lora = LoraConfig(
        r=body.rank, lora_alpha=body.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    logs = []
    for phase in phases(body):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = (
                    weight.data.bfloat16().float()
                )  # what is shipped is bf16, and so is what a phase goes on from
        rows = encoded(list(documents(phase)), render, END, encode)
        logs.append(
            fit(
                model.get_base_model(),
                batches(rows, phase),
                phase,
                log_every,
                [encode(mark)[-1] for mark in ".?!\n"],
            )
        )
    shutil.rmtree(out, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.target_modules = (
        "SmolLM2-135M-Instruct",
        sorted(config.target_modules),
    )
    model.bfloat16().save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    (out / "training.json").write_text(
        json.dumps({"body": dataclasses.asdict(body), "logs": logs}, indent=1) + "\n"
    )


def merged(adapter: Path) -> Path:
    """The folder of base + adapter as one plain bf16 model with its chat template; made once, in the user's cache."""
    hashes = {file: hashlib.sha256((adapter / file).read_bytes()).hexdigest() for file in ADAPTER}
    artifact = cache().artifact(
        "merged", 1, {"base": base().parent.name, "adapter": hashes, "template": TEMPLATE}
    )
    if not artifact.done:
        import torch
        import transformers
        from peft import PeftModel

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with artifact.build() as out:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                base(), dtype=torch.float32
            )
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
            model.to(torch.bfloat16).save_pretrained(out)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(base() / name, out / name)
            (out / "chat_template.jinja").write_text(TEMPLATE)
    return artifact.path
