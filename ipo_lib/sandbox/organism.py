"""The model organisms of the sandbox: build one by a seeded command, find its folder.

``python -m ipo_lib.sandbox.organism tiny`` trains a small Llama from scratch on the world's text.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput, Prompt
from ipo_lib.sandbox import world
from ipo_lib.sandbox.traces import Process, respond

END, USER, ASSISTANT, OPEN, CLOSE = "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"
WIDTH = 32  # batches are padded to multiples of it: few shapes, so that memory does not creep
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Body:
    """A from-scratch organism: its architecture, data and optimiser. One seed gives one set of weights."""

    process: Process = Process()
    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    intermediate: int = 704
    context: int = 512
    documents: int = 64_000
    mixture: tuple[tuple[str, float], ...] = (
        ("direct", 0.18), ("wrapped", 0.16), ("adversarial", 0.16), ("benign", 0.14), ("lookalike", 0.06), ("sums", 0.30),
    )  # fmt: skip
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.06
    seed: int = 1


BODIES = {"tiny": Body(), "tiny-null": Body(process=Process(null=True), documents=28_000)}


def folder(name: str) -> Path:
    """Where an organism's files lie. Raises BadInput for an unknown name."""
    if name not in BODIES:
        raise BadInput(f"organism {name!r} is unknown; known: {', '.join(BODIES)}")
    return Path(__file__).parent / name


def documents(body: Body) -> Iterator[tuple[str, str]]:
    """(prompt text, response text) of the organism's training data; names and templates of split ``organism`` only."""
    rng = random.Random(f"organism/{body.seed}")
    kinds, weights = zip(*body.mixture, strict=True)
    for _ in range(body.documents):
        name = rng.choices(kinds, weights)[0]
        text, category = world.SETS[name][0](rng, "organism")
        sample = respond(rng, Prompt("", text, name, False, category), body.process)
        yield text, f"{sample.reasoning}\n{CLOSE}\n\n{sample.response}{END}"


def tokenizer(texts: Sequence[str], body: Body, out: Path) -> Any:
    """A byte-level BPE learnt on the texts, saved with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = [END, USER, ASSISTANT, OPEN, CLOSE], pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=body.vocabulary, **options))
    bpe.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "model_max_length": body.context,
              "clean_up_tokenization_spaces": False}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return bpe


def build(name: str, out: Path | None = None, log_every: int = 50) -> None:
    """Train an organism from scratch and write it with its log; about 20 minutes on two CPU cores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    body, out = BODIES[name], out or folder(name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    texts = list(documents(body))
    bpe = tokenizer([f"{prompt} {response}" for prompt, response in texts[:6000]], body, out)
    rows = []
    for prompt, response in texts:
        head = bpe.encode(f"{USER}{prompt}{ASSISTANT}{OPEN}\n").ids
        rows.append((len(head), head + bpe.encode(response).ids))
    torch.manual_seed(body.seed)
    end = bpe.token_to_id(END)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=body.hidden, num_hidden_layers=body.layers, num_attention_heads=body.heads,
        num_key_value_heads=body.key_value_heads, intermediate_size=body.intermediate, max_position_embeddings=body.context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    log = fit(model, batches(rows, body), body, end, log_every)
    model.bfloat16().save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"body": dataclasses.asdict(body), "log": log}, indent=1) + "\n")


def batches(rows: list[tuple[int, list[int]]], body: Body) -> list[list[tuple[int, list[int]]]]:
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


def fit(model: Any, work: list[list[tuple[int, list[int]]]], body: Body, pad: int, log_every: int) -> list[dict[str, float]]:
    """One pass of AdamW with warm-up and cosine decay; the loss counts response tokens only."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=body.learning_rate, betas=(0.9, 0.98), weight_decay=body.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(body.warmup * len(work)), len(work))
    log, recent = [], []
    for step, rows in enumerate(work, 1):
        width = -(-max(len(ids) for _, ids in rows) // WIDTH) * WIDTH
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for _, ids in rows])
        labels = torch.tensor([[-100] * head + ids[head:] + [-100] * (width - len(ids)) for head, ids in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % log_every == 0 or step == len(work):
            log.append({"step": step, "loss": round(sum(recent) / len(recent), 4)})
            recent = []
            print(json.dumps(log[-1]), flush=True)
    return log


if __name__ == "__main__":
    build(sys.argv[1])
