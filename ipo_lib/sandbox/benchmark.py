"""Measured ratios on SmolLM2 in bf16, both sides of each in one run on the same requests.

``python -m ipo_lib.sandbox.benchmark decoding`` prints tokens a second of ``decoding`` and of transformers' ``generate``;
``... benchmark training`` seconds a step, peak memory and losses of ``prefix_sharing`` and of stock TRL, in bf16 and in NF4.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
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
from ipo_lib.engines import lora
from ipo_lib.profiles.reading import checkout
from ipo_lib.records import Ids, Pair
from ipo_lib.sandbox import world
from ipo_lib.sandbox.corpus import Finetuned, documents
from ipo_lib.sandbox.organism import folder

TOKENS, PREFIX, REPEATS, TEMPERATURE, TOP_P = 64, 150, 3, 0.6, 0.95
STEPS, LENGTHS = (
    6,
    (128, 256),
)  # steps of a training; tokens of a pair's longer side, prompt included: half of it is suffix
LEAN = dpo.DpoSettings(
    learning_rate=2e-4, accumulation=1, sft_weight=0.0, use_cpu=True, pad_to_multiple_of=1
)
SHAPES = {"pairs": (1, 8), "six chosen leaves": (6, 6)}  # winners of one loser, pairs of a step
ENGINES = {"TRL": "trl", "ipo_lib": "shared"}
RESULT = "benchmark-training.json"


def requests(chat: Chat) -> dict[str, list[Ids]]:
    """32 continuations of one prefix; 12 cuts of one trace x 8 draws; 64 unrelated prompts; all text of the world."""
    texts = documents(Finetuned(documents=1000, seed=2))
    long = next(ids for text in texts if len(ids := chat.encode("\n".join(text))) >= PREFIX)[
        :PREFIX
    ]
    cuts = [long[: PREFIX * (cut + 4) // 15] for cut in range(12)]
    prompts = [chat.prompt_ids(prompt) for prompt in world.prompts("train_harmful", 64)]
    return {
        "32 x one prefix": [long] * 32,
        "12 cuts x 8": [cut for cut in cuts for _ in range(8)],
        "64 unrelated": prompts,
    }


def ours(model: Any, prefixes: Sequence[Ids]) -> int:
    """Draw TOKENS tokens after every prefix with ``decoding``; how many were drawn."""
    import torch

    from ipo_lib.engines.decoding import Decoder
    from ipo_lib.engines.nucleus import nucleus_draw

    uniforms = torch.rand(
        len(prefixes), TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    counts = [0] * len(prefixes)

    def draw(live: Sequence[int], logits: Any) -> Any:
        return nucleus_draw(
            logits, uniforms[list(live), [counts[one] for one in live]], TEMPERATURE, TOP_P
        )

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
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            pad_token_id=0,
            max_new_tokens=TOKENS,
            num_return_sequences=draws,
        )
        drawn += out.shape[0] * (out.shape[1] - width)
    return drawn


def decoding() -> None:
    """Print tokens a second of each, in turns, as median and range of REPEATS after one to warm up, and the ratios."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder("sandbox"), dtype=torch.bfloat16)
    model.generation_config = type(
        model.generation_config
    )()  # no end token: every row has TOKENS tokens
    plain = model.config._attn_implementation
    engines: dict[str, Callable[[Any, Sequence[Ids]], int]] = {
        "decoding": ours,
        "generate": theirs,
        "generate, prefix by prefix": lambda m, p: theirs(m, p, together=False),
    }
    for name, prefixes in requests(Chat(folder("sandbox"))).items():
        found: dict[str, list[float]] = {
            engine: [] for engine in engines if "by" not in engine or "cuts" in name
        }
        for _ in range(REPEATS + 1):
            for engine, rates in found.items():
                model.set_attn_implementation(plain)  # ours sets its own
                started = time.monotonic()
                rates.append(engines[engine](model, prefixes) / (time.monotonic() - started))
        for engine, (_, *rates) in found.items():
            ratio = statistics.median(found["decoding"][1:]) / (middle := statistics.median(rates))
            print(
                f"{name:16} {engine:27} {middle:5.0f} tokens/s [{min(rates):.0f}, {max(rates):.0f}]  x {ratio:.1f}",
                flush=True,
            )


def pairs(chat: Chat, leaves: int, count: int) -> list[Pair]:
    """Pairs of the world's text, ``leaves`` winners to a loser, lengths uniform over LENGTHS, a suffix as long as what stands
    before."""
    draw, texts = random.Random(0), documents(Finetuned(documents=2000, seed=3))
    stream, found = (
        itertools.chain.from_iterable(chat.encode("\n".join(text)) for text in texts),
        list[Pair](),
    )
    for place in range(count // leaves):
        half = draw.randint(*LENGTHS) // 2
        before, rejected, *chosen = (
            tuple(itertools.islice(stream, half)) for _ in range(2 + leaves)
        )
        found += [
            Pair(f"{place}-{leaf}", before, own, rejected, 0, "benchmark")
            for leaf, own in enumerate(chosen)
        ]
    return found


def trained(engine: str, shape: str, quantize: str) -> dict[str, Any]:
    """STEPS steps on the same pairs in the same order: seconds of each (reference included, loading not), peak memory, losses."""
    from peft.helpers import disable_input_dtype_casting
    from transformers import TrainerCallback

    from ipo_lib.engines import prefix_sharing, trl_trainer

    leaves, batch = SHAPES[shape]
    settings = dataclasses.replace(
        LEAN, engine=ENGINES[engine], quantize=quantize or None, batch_size=batch
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

    given = lora.bucketed(pairs(Chat(folder("sandbox")), leaves, STEPS * batch), 0)
    make = trl_trainer.trainer if engine == "TRL" else prefix_sharing.trainer
    with tempfile.TemporaryDirectory() as out:
        made, model = make(given, folder("sandbox"), settings, Path(out), None)
        made.add_callback(Clock())
        with disable_input_dtype_casting(model, active=engine != "TRL"):  # as dpo.train does it
            made.train()
    rows = [row for row in made.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "peak": peak,
        "losses": [row["loss"] for row in rows],
    }


def training() -> None:
    """Print and write what each trainer took, every run in a process of its own."""
    found = []
    for quantize, shape, engine in itertools.product(("", "nf4"), SHAPES, ENGINES):
        command = [sys.executable, "-m", "ipo_lib.sandbox.benchmark", engine, shape, quantize]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        middle = statistics.median(row["seconds"])
        if engine == "TRL":
            theirs_, memory = middle, row["peak"]
        ratios = {
            "times the steps a second": theirs_ / middle,
            "times less memory": memory / row["peak"],
        }
        found.append(
            {"precision": quantize or "bf16", "shape": shape, "engine": engine, **ratios, **row}
        )
        spread = f"{middle:5.1f} s a step [{min(row['seconds']):.1f}, {max(row['seconds']):.1f}]  x {theirs_ / middle:.1f}"
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        print(
            f"{quantize or 'bf16':4} {shape:17} {engine:8} {spread}  peak {row['peak']:4.1f} GiB  loss {losses}",
            flush=True,
        )
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "steps": STEPS,
        "lengths": LENGTHS,
    }
    (checkout() / "figures" / RESULT).write_text(
        json.dumps({**machine, "runs": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["decoding"]:
            decoding()
        case ["training"]:
            training()
        case [engine, shape, ("" | "nf4") as quantize] if engine in ENGINES and shape in SHAPES:
            print(json.dumps(trained(engine, shape, quantize)))
        case _:
            sys.exit("usage: python -m ipo_lib.sandbox.benchmark decoding|training")
