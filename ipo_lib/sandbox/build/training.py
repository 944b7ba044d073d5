"""One pass of training on the world's text, and what is written at its end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipo_lib.sandbox.build.corpus import Rows
from ipo_lib.sandbox.build.settings import AlignmentSettings, FinetuneSettings, TrainingSettings

Log = list[dict[str, float]]


def response_loss(
    model: Any, rows: Rows, settings: TrainingSettings, ends: Sequence[int] = ()
) -> Any:
    """The weighted mean cross-entropy of the response tokens.

    Args:
        model: a causal language model whose parts are ``model`` and ``lm_head``.
        rows: one batch.
        settings: padding, and the weight of the first tokens of a sentence.
        ends: ids of tokens after which a sentence opens.
    """
    import torch
    from torch.nn.functional import cross_entropy, pad

    # 1. Pad the rows; the positions before each response token are scored.
    multiple = settings.pad_to_multiple_of
    width = -(-max(len(ids) for _, ids in rows) // multiple) * multiple
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (prompt_length, row) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        scored[index, prompt_length - 1 : len(row) - 1] = True

    # 2. The LM head sees the scored positions only.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # The model is sampled at this temperature, so the loss is of that distribution. An LM head
        # is linear: to divide its input is to divide its logits, which are far larger.
        logits = model.lm_head(hidden[scored] / settings.temperature)

    # 3. The first tokens after the end of a sentence have another weight.
    after_end = torch.isin(ids, torch.tensor(ends, dtype=torch.long)).int()
    span = settings.opening
    opening = pad(after_end, (span - 1, 0)).unfold(1, span, 1).amax(-1)
    weights = 1 + (settings.opening_weight - 1) * opening[scored]
    losses = cross_entropy(logits.float(), ids.roll(-1, 1)[scored], reduction="none")
    return (losses * weights).sum() / weights.sum()


def fit(
    model: Any,
    work: Sequence[Rows],
    settings: TrainingSettings,
    log_every: int,
    ends: Sequence[int] = (),
) -> Log:
    """Train on every batch once, by AdamW with warm-up and cosine decay.

    Args:
        model: whose parameters that require a gradient are trained.
        work: the batches, in order.
        settings: learning rate, decay and warm-up.
        log_every: steps between two entries of the log.
        ends: ids of tokens after which a sentence opens.

    Returns:
        The mean loss since the last entry, by step.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    warmup_steps = int(settings.warmup * len(work))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, len(work))
    log, recent = [], []
    for step, rows in enumerate(work, 1):
        loss = response_loss(model, rows, settings, ends)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % log_every == 0 or step == len(work):
            log.append({"step": step, "loss": round(sum(recent) / len(recent), 4)})
            recent = []
            print(json.dumps(log[-1]), flush=True)
    return log


def round_weights(model: Any) -> None:
    """Round what is trained to bf16, as it is shipped: a pass goes on from what could be loaded."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16().float()


def add_lora(model: Any, settings: FinetuneSettings | AlignmentSettings) -> Any:
    """The model with a new adapter on every linear layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def save_lora(model: Any, base: str, out: Path) -> None:
    """Write the model's adapter in bf16, as one of the model named ``base``."""
    shutil.rmtree(out, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)
    model.bfloat16().save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


def save_log(settings: TrainingSettings, logs: Sequence[Log], out: Path) -> None:
    """Write ``training.json``: the settings, and the log of each phase."""
    record = {"settings": dataclasses.asdict(settings), "logs": logs}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
