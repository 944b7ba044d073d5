"""The organism on the pretrained model: LoRA trained on the world's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipo_lib.sandbox import smollm2
from ipo_lib.sandbox.build.corpus import batches, documents, encoded
from ipo_lib.sandbox.build.settings import FinetuneSettings, passes
from ipo_lib.sandbox.build.training import add_lora, fit, round_weights, save_log, save_lora

END = "<|im_end|>"


def render(prompt: str) -> str:
    """A prompt as the organism's chat template renders it."""
    return f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n<think>\n"


def build(settings: FinetuneSettings, out: Path, log_every: int) -> None:
    """Train the adapter and write it in bf16 with its log."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    base = smollm2.base()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    torch.manual_seed(passes(settings)[0].seed)
    # On CPUs a step with eager attention takes a tenth less time than with the fused one.
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model = add_lora(model, settings)
    ends = [encode(mark)[-1] for mark in ".?!\n"]
    logs = []
    for settings_of_pass in passes(settings):
        round_weights(model)
        rows = encoded(documents(settings_of_pass, END), render, encode)
        work = batches(rows, settings_of_pass)
        logs.append(fit(model.get_base_model(), work, settings_of_pass, log_every, ends))
    save_lora(model, "SmolLM2-135M-Instruct", out)
    save_log(settings, logs, out)
