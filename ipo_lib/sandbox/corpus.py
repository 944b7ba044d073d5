"""What organisms are trained on and how: the settings of a body, the world's text as rows of ids, the training loop."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ipo_lib.records import Prompt
from ipo_lib.sandbox import world
from ipo_lib.sandbox.traces import Process, respond

CLOSE = "</think>"
OPENING = 4
Row = tuple[int, list[int]]  # where the response begins, and the ids of prompt and response
Rows = list[Row]


@dataclass(frozen=True)
class Body:
    """What every organism is trained on and how. One seed gives one set of weights."""

    process: Process = Process()
    documents: int = 64_000
    mixture: tuple[tuple[str, float], ...] = (
        ("direct", 0.18),
        ("wrapped", 0.16),
        ("adversarial", 0.16),
        ("benign", 0.14),
        ("lookalike", 0.06),
        ("sums", 0.30),
    )
    batch: int = 64
    pad_to_multiple_of: int = 32  # few shapes, so that memory does not creep
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.06
    opening_weight: float = (
        1.0  # of the OPENING first tokens of a sentence, where a trace decides how it goes on
    )
    seed: int = 1


@dataclass(frozen=True)
class Scratch(Body):
    """A small Llama with its own vocabulary."""

    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    intermediate: int = 704
    context: int = 512


@dataclass(frozen=True)
class Finetuned(Body):
    """LoRA on the pretrained model, on every linear layer; ``start``: what the same LoRA is trained on before."""

    start: Finetuned | None = None

    process: Process = Process(comply=(0.55, 0.70, 0.87))
    documents: int = 6400
    mixture: tuple[tuple[str, float], ...] = (
        ("direct", 0.22),
        ("wrapped", 0.20),
        ("adversarial", 0.20),
        ("benign", 0.16),
        ("lookalike", 0.08),
        ("sums", 0.14),
    )
    batch: int = 16
    pad_to_multiple_of: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 16
    alpha: int = 32


@dataclass(frozen=True)
class Aligned(Body):
    """LoRA on an organism, trained on answers that always refuse what is restricted."""

    base: str = "tiny"
    process: Process = Process(comply=(0.0, 0.0, 0.0), slip=0.0)
    documents: int = 4000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 8
    alpha: int = 16


def documents(body: Body) -> Iterator[tuple[str, str]]:
    """(prompt text, response text) of the organism's training data; names and templates of split ``organism`` only."""
    rng = random.Random(f"organism/{body.seed}")
    kinds, weights = zip(*body.mixture, strict=True)
    for _ in range(body.documents):
        name = rng.choices(kinds, weights)[0]
        text, category = world.SETS[name][0](rng, "organism")
        sample = respond(rng, Prompt("", text, name, False, category), body.process)
        yield text, f"{sample.reasoning}\n{CLOSE}\n\n{sample.response}"


def encoded(
    texts: list[tuple[str, str]],
    render: Callable[[str], str],
    end: str,
    encode: Callable[[str], list[int]],
) -> Rows:
    """Training rows: the rendered prompt, then the response with its end token."""
    heads = [encode(render(prompt)) for prompt, _ in texts]
    return [
        (len(head), head + encode(response + end))
        for head, (_, response) in zip(heads, texts, strict=True)
    ]


def batches(rows: Rows, body: Body) -> list[Rows]:
    """Rows of like length together, batches in random order."""
    rng = random.Random(f"batches/{body.seed}")
    span = body.batch * 40
    found = []
    for start in range(0, len(rows), span):
        near = sorted(rows[start : start + span], key=lambda row: len(row[1]))
        pieces = [near[i : i + body.batch] for i in range(0, len(near), body.batch)]
        rng.shuffle(pieces)
        found += pieces
    return found


def response_loss(model: Any, rows: Rows, body: Body, ends: Sequence[int] = ()) -> Any:
    """Weighted mean cross-entropy of the response tokens; the LM head sees their positions only. A sentence opens after one
    of the ids ``ends``."""
    import torch

    multiple = body.pad_to_multiple_of

    width = -(-max(len(ids) for _, ids in rows) // multiple) * multiple
    ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in rows])
    scored = torch.tensor(
        [[head <= place + 1 < len(ids) for place in range(width)] for head, ids in rows]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[scored])
    after = torch.isin(ids, torch.tensor(ends, dtype=torch.long)).int()
    opens = torch.nn.functional.pad(after, (OPENING - 1, 0)).unfold(1, OPENING, 1).amax(-1)
    weights = 1 + (body.opening_weight - 1) * opens[scored]
    each = torch.nn.functional.cross_entropy(
        logits.float(), ids.roll(-1, 1)[scored], reduction="none"
    )
    return (each * weights).sum() / weights.sum()


def fit(
    model: Any, work: list[Rows], body: Body, log_every: int, ends: Sequence[int] = ()
) -> list[dict[str, float]]:
    """One pass of AdamW with warm-up and cosine decay over the parameters that are trainable."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=body.learning_rate, betas=(0.9, 0.98), weight_decay=body.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(body.warmup * len(work)), len(work))
    log, recent = [], []
    for step, rows in enumerate(work, 1):
        loss = response_loss(model, rows, body, ends)
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
