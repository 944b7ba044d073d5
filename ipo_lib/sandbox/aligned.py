"""An organism aligned on answers only, for Fig 2: LoRA trained to refuse restricted requests, after whatever trace the world's
process wrote; the loss sees the answer alone. Its answers were made safe by design; what its traces do is the measurement."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipo_lib.records import Prompt
from ipo_lib.sandbox.corpus import CLOSE, Aligned, batches, documents, encoded, fit
from ipo_lib.sandbox.scratch import ASSISTANT, END, OPEN, USER
from ipo_lib.sandbox.traces import Process, respond


def teacher(prompts: Sequence[Prompt], seed: int) -> list[str]:
    """A safe response to every prompt, as a stronger source would think it: drawn from the world's process until trace and
    answer are safe, so in its own words and not the organism's."""
    found = []
    for prompt in prompts:
        rng = random.Random(f"teacher/{seed}/{prompt.id}")
        one = respond(rng, prompt, Process())
        while one.trace_unsafe or one.answer_unsafe:
            one = respond(rng, prompt, Process())
        found.append(f"{one.reasoning}\n{CLOSE}\n\n{one.response}")
    return found


def build(body: Aligned, base: Path, out: Path, log_every: int) -> None:
    """Train the adapter on the organism in ``base`` and write it in bf16 with its log."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    bpe = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = encoded(
        list(documents(body)),
        f"{USER}{{}}{ASSISTANT}{OPEN}\n".format,
        END,
        lambda text: list(bpe.encode(text).ids),
    )
    (close,) = bpe.encode(CLOSE).ids
    answers = [(ids.index(close) + 1, ids) for _, ids in rows]
    torch.manual_seed(body.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        r=body.rank, lora_alpha=body.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    log = fit(model.get_base_model(), batches(answers, body), body, log_every)
    shutil.rmtree(out, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.target_modules = body.base, sorted(config.target_modules)
    model.bfloat16().save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    (out / "training.json").write_text(
        json.dumps({"body": dataclasses.asdict(body), "logs": [log]}, indent=1) + "\n"
    )
