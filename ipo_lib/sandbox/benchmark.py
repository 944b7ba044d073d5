"""Measured ratios on SmolLM2 in bf16, both sides of each in one run on the same requests.

``python -m ipo_lib.sandbox.benchmark decoding`` prints tokens a second of ``decoding`` and of transformers' ``generate``;
``... benchmark training`` seconds a step, peak memory and losses of ``dpo`` and of TRL as it comes, in bf16 and in NF4.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ipo_lib import dpo
from ipo_lib.chat import Chat
from ipo_lib.records import Ids, Pair
from ipo_lib.sandbox import world
from ipo_lib.sandbox.corpus import Finetuned, documents
from ipo_lib.sandbox.organism import folder

TOKENS, PREFIX, REPEATS, TEMPERATURE, TOP_P = 64, 150, 3, 0.6, 0.95
PAIRS, LENGTHS = 64, (128, 256)  # of a pair's longer side, prompt included; half of it is suffix
LEAN = dpo.DpoSettings(learning_rate=2e-4, batch_size=4, accumulation=2, sft_weight=0.0, use_cpu=True)
PLAIN: dict[str, Any] = {"pad_to_multiple_of": 1, "precompute_ref_log_probs": False}
STOCK: dict[str, Any] = {**PLAIN, "batch_size": 8, "accumulation": 1, "length_buckets": False}
TRAINERS: dict[str, dict[str, Any]] = {  # all but the first: the same steps. Padding changes bf16 losses: TRL beside itself
    "TRL": STOCK, "TRL, our batches": PLAIN, "TRL, padded": {**PLAIN, "pad_to_multiple_of": 32}, "ipo_lib": {},
}  # fmt: skip


def requests(chat: Chat) -> dict[str, list[Ids]]:
    """32 continuations of one prefix; 12 cuts of one trace x 8 draws; 64 unrelated prompts; all text of the world."""
    texts = documents(Finetuned(documents=1000, seed=2))
    long = next(ids for text in texts if len(ids := chat.encode("\n".join(text))) >= PREFIX)[:PREFIX]
    cuts = [long[: PREFIX * (cut + 4) // 15] for cut in range(12)]
    prompts = [chat.prompt_ids(prompt) for prompt in world.prompts("train_harmful", 64)]
    return {"32 x one prefix": [long] * 32, "12 cuts x 8": [cut for cut in cuts for _ in range(8)], "64 unrelated": prompts}


def ours(model: Any, prefixes: Sequence[Ids]) -> int:
    """Draw TOKENS tokens after every prefix with ``decoding``; how many were drawn."""
    import torch

    from ipo_lib.decoding import Decoder
    from ipo_lib.sampling import nucleus_draw

    uniforms = torch.rand(len(prefixes), TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = [0] * len(prefixes)

    def draw(live: Sequence[int], logits: Any) -> Any:
        return nucleus_draw(logits, uniforms[list(live), [counts[one] for one in live]], TEMPERATURE, TOP_P)

    def take(one: int, _: int) -> bool:
        counts[one] += 1
        return counts[one] == TOKENS

    Decoder(model, len(prefixes)).decode(prefixes, draw, take)
    return sum(counts)


def theirs(model: Any, prefixes: Sequence[Ids], together: bool = True) -> int:
    """The same by ``generate``: distinct prefixes as one left-padded batch, or one call each with all of its draws."""
    import torch

    distinct = [*dict.fromkeys(prefixes)]
    draws, drawn = len(prefixes) // len(distinct), 0
    for rows in [distinct] if together else [[one] for one in distinct]:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
                             pad_token_id=0, max_new_tokens=TOKENS, num_return_sequences=draws)  # fmt: skip
        drawn += out.shape[0] * (out.shape[1] - width)
    return drawn


def decoding() -> None:
    """Print tokens a second of each, in turns, as median and range of REPEATS after one to warm up, and the ratios."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder("sandbox"), dtype=torch.bfloat16)
    model.generation_config = type(model.generation_config)()  # no end token: every row has TOKENS tokens
    plain = model.config._attn_implementation
    engines: dict[str, Callable[[Any, Sequence[Ids]], int]] = {
        "decoding": ours, "generate": theirs, "generate, prefix by prefix": lambda m, p: theirs(m, p, together=False),
    }  # fmt: skip
    for name, prefixes in requests(Chat(folder("sandbox"))).items():
        found: dict[str, list[float]] = {engine: [] for engine in engines if "by" not in engine or "cuts" in name}
        for _ in range(REPEATS + 1):
            for engine, rates in found.items():
                model.set_attn_implementation(plain)  # ours sets its own
                started = time.monotonic()
                rates.append(engines[engine](model, prefixes) / (time.monotonic() - started))
        for engine, (_, *rates) in found.items():
            ratio = statistics.median(found["decoding"][1:]) / (middle := statistics.median(rates))
            print(f"{name:16} {engine:27} {middle:5.0f} tokens/s [{min(rates):.0f}, {max(rates):.0f}]  x {ratio:.1f}", flush=True)


def pairs(chat: Chat) -> list[Pair]:
    """Pairs of the world's text, lengths uniform over LENGTHS, a suffix as long as what stands before it."""
    draw, texts = random.Random(0), documents(Finetuned(documents=2000, seed=3))
    stream, found = itertools.chain.from_iterable(chat.encode("\n".join(text)) for text in texts), []
    for place in range(PAIRS):
        half = draw.randint(*LENGTHS) // 2
        before, chosen, rejected = (tuple(itertools.islice(stream, half)) for _ in range(3))
        found.append(Pair(str(place), before, chosen, rejected, 0, "benchmark"))
    return found


def trained(engine: str, quantize: str | None) -> dict[str, Any]:
    """Train once on ``pairs``, from loading the model to the last step; TRL's own trainer sees the same ids."""
    settings = dataclasses.replace(LEAN, quantize=quantize, **TRAINERS[engine])
    given, model, started = pairs(Chat(folder("sandbox"))), folder("sandbox"), time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        if engine.startswith("TRL"):
            trainer = dpo.ids_trainer(given, model, settings, Path(out))
            trainer.train()
            rows = [row for row in trainer.state.log_history if "loss" in row]
        else:
            rows = dpo.train(given, model, settings, Path(out))
    seconds = (time.monotonic() - started) / len(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak": peak, "losses": [row["loss"] for row in rows]}


def training() -> None:
    """Print what each trainer took, every run in a process of its own, loading and reference included."""
    for quantize in ("", "nf4"):
        found: dict[str, dict[str, Any]] = {}
        for engine in TRAINERS:
            command = [sys.executable, "-m", "ipo_lib.sandbox.benchmark", engine, quantize]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = found[engine] = json.loads(done.stdout.splitlines()[-1])
            ratio, losses = found["TRL"]["seconds"] / row["seconds"], " ".join(f"{loss:.4f}" for loss in row["losses"])
            time_, memory = f"{row['seconds']:5.1f} s a step  x {ratio:.1f}", f"peak {row['peak']:4.1f} GiB"
            print(f"{quantize or 'bf16':4} {engine:16} {time_}  {memory}  loss {losses}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["decoding"]:
            decoding()
        case ["training"]:
            training()
        case [engine, ("" | "nf4") as quantize] if engine in TRAINERS:
            print(json.dumps(trained(engine, quantize or None)))
        case _:
            sys.exit("usage: python -m ipo_lib.sandbox.benchmark decoding|training")
