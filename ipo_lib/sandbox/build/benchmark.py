"""Measure our decoder and our trainer against the libraries', on SmolLM2 in bf16.

Both sides of each comparison run on the same requests, one after the other.

``python -m ipo_lib.sandbox.build.benchmark decoding`` prints the tokens per second of our decoder
and of ``generate`` in transformers. ``... benchmark training`` prints and writes the seconds per
step, the peak memory and the losses of our trainer with shared prefixes and of stock TRL, in bf16
and NF4.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ipo_lib import dpo
from ipo_lib.chat import Chat
from ipo_lib.engines import lora
from ipo_lib.profiles.reading import checkout
from ipo_lib.records import Ids, Pair
from ipo_lib.sandbox import world
from ipo_lib.sandbox.build.corpus import documents
from ipo_lib.sandbox.build.settings import FinetuneSettings
from ipo_lib.sandbox.organism import folder

# Decoding
TOKENS, PREFIX = 64, 150  # drawn after each prefix; of the long prefix
TEMPERATURE, TOP_P = 0.6, 0.95
REPEATS = 3  # after one to warm up

# Training
STEPS = 6
LENGTHS = (128, 256)  # tokens of a pair's longer side, prompt included: half of it is suffix
SETTINGS = dpo.DpoSettings(
    learning_rate=2e-4, accumulation=1, sft_weight=0.0, use_cpu=True, pad_to_multiple_of=1
)
SHAPES = {"pairs": (1, 8), "six chosen leaves": (6, 6)}  # winners per loser, pairs per step
ENGINES = {"TRL": "trl", "ipo_lib": "shared"}
RESULT = "benchmark-training.json"
MODULE = "ipo_lib.sandbox.build.benchmark"


def world_text(chat: Chat, count: int, seed: int) -> Iterator[Ids]:
    """Documents of the world's text as ids."""
    settings = FinetuneSettings(documents=count, law_documents=0, seed=seed)
    for text in documents(settings, ""):
        yield chat.encode("\n".join(text))


def requests(chat: Chat) -> dict[str, list[Ids]]:
    """32 draws after one prefix; 8 after each of 12 cuts of one trace; 64 unrelated prompts."""
    texts = world_text(chat, 1000, seed=2)
    prefix = next(ids for ids in texts if len(ids) >= PREFIX)[:PREFIX]
    cuts = [prefix[: PREFIX * (index + 4) // 15] for index in range(12)]
    prompts = world.prompts("train_harmful", 64)
    return {
        "32 x one prefix": [prefix] * 32,
        "12 cuts x 8": sorted(cuts * 8, key=len),
        "64 unrelated": [chat.prompt_ids(prompt) for prompt in prompts],
    }


def decode_with_ours(model: Any, prefixes: Sequence[Ids]) -> int:
    """Draw TOKENS tokens after every prefix with our decoder.

    Returns:
        How many were drawn.
    """
    import torch

    from ipo_lib.engines.decoding import Decoder
    from ipo_lib.engines.nucleus import nucleus_draw

    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(prefixes), TOKENS, dtype=torch.float64, generator=generator)
    counts = [0] * len(prefixes)

    def draw(live: Sequence[int], logits: Any) -> Any:
        steps = [counts[request] for request in live]
        return nucleus_draw(logits, uniforms[list(live), steps], TEMPERATURE, TOP_P)

    def take(request: int, _: int) -> bool:
        counts[request] += 1
        return counts[request] == TOKENS

    Decoder(model, len(prefixes)).decode(prefixes, draw, take)
    return sum(counts)


def decode_with_generate(model: Any, prefixes: Sequence[Ids], tokens: int = 0) -> int:
    """The same with ``generate``: all distinct prefixes as one left-padded batch.

    Draws ``tokens`` after each; 0: TOKENS.
    """
    import torch

    distinct = list(dict.fromkeys(prefixes))
    width = max(map(len, distinct))
    ids, mask = torch.zeros(2, len(distinct), width, dtype=torch.long)
    for index, row in enumerate(distinct):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        pad_token_id=0,
        max_new_tokens=tokens or TOKENS,
        num_return_sequences=len(prefixes) // len(distinct),
    )
    return int(out.shape[0] * (out.shape[1] - width))


def decode_prefix_by_prefix(model: Any, prefixes: Sequence[Ids]) -> int:
    """The same with one call of ``generate`` for each distinct prefix."""
    groups = (group for _, group in itertools.groupby(prefixes))
    return sum(decode_with_generate(model, list(group)) for group in groups)


DECODERS: dict[str, Callable[[Any, Sequence[Ids]], int]] = {
    "decoding": decode_with_ours,
    "generate": decode_with_generate,
    "generate, prefix by prefix": decode_prefix_by_prefix,
}


def decoding() -> None:
    """Print the tokens per second of each decoder: median, range, times slower than ours."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder("sandbox"), dtype=torch.bfloat16)
    # Without an end token every row gets TOKENS tokens.
    model.generation_config = type(model.generation_config)()
    attention = model.config._attn_implementation
    for name, prefixes in requests(Chat(folder("sandbox"))).items():
        rates: dict[str, list[float]] = {"decoding": [], "generate": []}
        if "cuts" in name:
            rates["generate, prefix by prefix"] = []
        for _ in range(REPEATS + 1):  # in turns
            for decoder, speeds in rates.items():
                model.set_attn_implementation(attention)  # our decoder sets its own
                started = time.monotonic()
                tokens = DECODERS[decoder](model, prefixes)
                speeds.append(tokens / (time.monotonic() - started))
        ours = statistics.median(rates["decoding"][1:])
        for decoder, (_, *speeds) in rates.items():
            median = statistics.median(speeds)
            spread = f"[{min(speeds):.0f}, {max(speeds):.0f}]"
            line = f"{name:16} {decoder:27} {median:5.0f} tokens/s {spread}  x {ours / median:.1f}"
            print(line, flush=True)


def pairs(chat: Chat, leaves: int, count: int) -> list[Pair]:
    """Pairs of the world's text. Lengths are uniform over LENGTHS, and half of a side is suffix.

    Args:
        chat: encodes the text.
        leaves: winners of each loser.
        count: of pairs.
    """
    rng = random.Random(0)
    stream = itertools.chain.from_iterable(world_text(chat, 2000, seed=3))
    result = []
    for group in range(count // leaves):
        half = rng.randint(*LENGTHS) // 2
        prompt, rejected, *winners = (
            tuple(itertools.islice(stream, half)) for _ in range(2 + leaves)
        )
        for leaf, chosen in enumerate(winners):
            result.append(Pair(f"{group}-{leaf}", prompt, chosen, rejected, 0, "benchmark"))
    return result


def trained(engine: str, shape: str, quantize: str) -> dict[str, Any]:
    """Train STEPS steps, on the same pairs in the same order for every engine.

    Args:
        engine: of ``ENGINES``.
        shape: of ``SHAPES``.
        quantize: ``nf4``, or empty for bf16.

    Returns:
        The seconds of each step (reference included, loading not), the peak memory in GiB, and the
        losses.
    """
    leaves, batch = SHAPES[shape]
    settings = dataclasses.replace(
        SETTINGS, engine=ENGINES[engine], quantize=quantize or None, batch_size=batch
    )
    base = folder("sandbox")
    ordered = lora.sort_by_length(pairs(Chat(base), leaves, STEPS * batch), seed=0)
    with tempfile.TemporaryDirectory() as out:
        seconds, losses = train_and_time(ordered, base, settings, Path(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak": peak, "losses": losses}


def train_and_time(
    ordered: Sequence[Pair],
    base: Path,
    settings: dpo.DpoSettings,
    out: Path,
    change: Callable[[Any], None] = lambda trainer: None,
) -> tuple[list[float], list[float]]:
    """Train once over pairs.

    Args:
        ordered: the pairs in the order of ``sort_by_length``.
        base: folder of the model.
        settings: of the training; its engine decides the trainer.
        out: folder of the trainer.
        change: is given the trainer before it starts.

    Returns:
        The seconds and the losses of each step.
    """
    from peft.helpers import disable_input_dtype_casting
    from transformers import TrainerCallback

    from ipo_lib.engines import prefix_sharing, trl_trainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

    stock = settings.engine == "trl"
    module = trl_trainer if stock else prefix_sharing
    trainer, model = module.make_trainer(ordered, base, settings, out, None)
    change(trainer)
    trainer.add_callback(Clock())
    with disable_input_dtype_casting(model, active=not stock):  # as ipo_lib.training does
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [end - start for start, end in itertools.pairwise(times)], losses


def trained_alone(engine: str, shape: str, quantize: str) -> dict[str, Any]:
    """``trained`` in a process of its own, which alone gives a true peak of memory."""
    command = [sys.executable, "-m", MODULE, engine, shape, quantize]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def training() -> None:
    """Print and write what each trainer took."""
    runs = []
    for quantize, shape in itertools.product(("", "nf4"), SHAPES):
        stock = trained_alone("TRL", shape, quantize)
        ours = trained_alone("ipo_lib", shape, quantize)
        for engine, row in (("TRL", stock), ("ipo_lib", ours)):
            median = statistics.median(row["seconds"])
            faster = statistics.median(stock["seconds"]) / median
            ratios = {
                "times the steps a second": faster,
                "times less memory": stock["peak"] / row["peak"],
            }
            precision = quantize or "bf16"
            run = {"precision": precision, "shape": shape, "engine": engine, **ratios, **row}
            runs.append(run)
            spread = f"[{min(row['seconds']):.1f}, {max(row['seconds']):.1f}]"
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            print(
                f"{precision:4} {shape:17} {engine:8} {median:5.1f} s a step {spread}  "
                f"x {faster:.1f}  peak {row['peak']:4.1f} GiB  loss {losses}",
                flush=True,
            )
    record = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "steps": STEPS,
        "lengths": LENGTHS,
        "runs": runs,
    }
    path = checkout() / "figures" / RESULT
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["decoding"]:
            decoding()
        case ["training"]:
            training()
        case [engine, shape, ("" | "nf4") as quantize] if engine in ENGINES and shape in SHAPES:
            print(json.dumps(trained(engine, shape, quantize)))
        case _:
            sys.exit(f"usage: python -m {MODULE} decoding|training")
