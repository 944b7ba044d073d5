"""Check and time the engines on one GPU, beside TRL and transformers' ``generate``.

``python -m ipo_lib.sandbox.build.gpu_check FILE`` takes about six minutes on a GPU of 80 GB:

1. ``parity``, with the model ``tiny`` in float32: tokens and scores of the GPU against the CPU's.
2. ``losses``, with the same model: the losses of four steps of each engine, in float32, in NF4, and
   with activation checkpointing, against those of the CPU.
3. ``sampling`` and 4. ``training``: their speed, with random weights in the shape of Llama-3 8B.

Parts named after FILE are run alone. FILE gets the rows as JSON, after every row, so that a run
that is cut short leaves what it has. On a machine without a GPU all parts run with a small shape,
as a test does.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ipo_lib.chat import Chat
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines.captured import CapturedDecoder
from ipo_lib.engines.decoding import Decoder
from ipo_lib.engines.lora import sort_by_length
from ipo_lib.engines.nucleus import nucleus_draw
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import Ids, Pair
from ipo_lib.sampling import Request, Sampling
from ipo_lib.sandbox.build import benchmark
from ipo_lib.sandbox.organism import folder

Row = dict[str, Any]
MODULE = "ipo_lib.sandbox.build.gpu_check"
PARTS = ("parity", "losses", "sampling", "training")
ENGINES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
CAPTURED, PLAIN, GENERATE = "captured step", "plain step", "generate"


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the sizes of the work."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    prefix: int  # tokens of the one prefix, and of each part of a pair
    prompt: int  # tokens of an unrelated prompt
    tokens: int  # drawn by each row
    steps: int  # of a training


LARGE = Shape(32, 4096, 14336, 32, 8, 128_256, 1000, 300, 96, 4)
SMALL = Shape(2, 64, 128, 4, 2, 4096, 40, 12, 6, 2)


def on_gpu() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def device() -> str:
    """The device that is checked."""
    return "cuda" if on_gpu() else "cpu"


def wait() -> None:
    """Wait for the GPU, so that a clock tells what it took."""
    if on_gpu():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """The most memory of the GPU since the last call; 0 without a GPU."""
    if not on_gpu():
        return 0.0
    most = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


# 1. Parity


def draw(
    decoder: Decoder, prefixes: Sequence[Ids], tokens: int, temperature: float
) -> list[list[int]]:
    """Draw the same number of tokens after every prefix, each row by random numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(prefixes), tokens, dtype=torch.float64, generator=generator)
    rows: list[list[int]] = [[] for _ in prefixes]

    def choose(live: Sequence[int], logits: Any) -> Any:
        if not temperature:
            return logits.argmax(-1)
        numbers = uniforms[list(live), [len(rows[index]) for index in live]]
        return nucleus_draw(logits, numbers, temperature, benchmark.TOP_P)

    def take(index: int, token: int) -> bool:
        rows[index].append(token)
        return len(rows[index]) == tokens

    decoder.decode(prefixes, choose, take)
    return rows


def parity() -> Iterator[Row]:
    """Tokens and scores of the model ``tiny`` in float32, on the device and on the CPU."""
    from transformers import AutoModelForCausalLM

    base = folder("tiny")
    chat = Chat(base)
    prompts = benchmark.requests(chat)["64 unrelated"][:24]
    here: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    there: Any = copy.deepcopy(here).to(device())
    texts: list[list[int]] = []
    for name, temperature in (("greedy", 0.0), ("sampled", benchmark.TEMPERATURE)):
        expected = draw(Decoder(here, 8), prompts, 60, temperature)
        for kind in (CapturedDecoder, Decoder):
            rows = draw(kind(there, 8), prompts, 60, temperature)
            equal = sum(row == other for row, other in zip(rows, expected, strict=True))
            decoder = CAPTURED if kind is CapturedDecoder else PLAIN
            yield {"what": f"{name} rows, {decoder}", "equal": equal, "of": len(prompts)}
        texts = expected
    requests = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        requests.append(Request(str(number), prompt, tuple(text), number))
    scores = []
    for place in ("cpu", device()):
        sampler = TransformersSampler(base, chat, device=place, dtype="float32")
        scores.append([*itertools.chain(*sampler.score(requests, Sampling()))])
    apart = max(abs(one - other) for one, other in zip(*scores, strict=True))
    yield {"what": "scores", "largest difference": apart, "of": len(scores[0])}


# 2. The losses of each engine

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "NF4": {"quantize": "nf4"},
    "bf16, checkpointing": {"activation_checkpointing": True},
}


def engines() -> Iterator[Row]:
    """The losses of four steps of the model ``tiny``: each engine and variant, device and CPU."""
    base = folder("tiny")
    ordered = sort_by_length(benchmark.pairs(Chat(base), 2, 16), seed=0)
    for variant, changes in VARIANTS.items():
        for engine in ("shared", "trl"):
            losses: dict[str, list[float]] = {}
            guards: list[int] = []
            for place in dict.fromkeys((device(), "cpu")):
                settings = replace(
                    benchmark.SETTINGS,
                    engine=engine,
                    batch_size=4,
                    learning_rate=3e-3,
                    warmup=0.0,
                    use_cpu=place == "cpu",
                    **{"quantize": None, **changes},
                )
                losses[place] = _losses(ordered, base, settings, guards)
            yield {"variant": variant, "engine": engine, "losses": losses, "GPUs": max(guards)}


def _losses(
    ordered: Sequence[Pair], base: Path, settings: DpoSettings, guards: list[int]
) -> list[float]:
    def note(trainer: Any) -> None:
        guards.append(trainer.args.n_gpu)  # the guard of ``limit_to_one_gpu``

    with tempfile.TemporaryDirectory() as out:
        return benchmark.train_and_time(ordered, base, settings, Path(out), note)[1]


# 3. The speed of sampling


def works(shape: Shape, stream: Iterator[int]) -> dict[str, list[Ids]]:
    """32 rows after one prefix; 8 after each of 12 cuts of a trace; 64 unrelated prompts."""

    def text(length: int) -> Ids:
        return tuple(itertools.islice(stream, length))

    trace = text(2 * shape.prefix)
    cuts = [trace[: len(trace) * (index + 4) // 15] for index in range(12)]
    return {
        f"32 after one prefix of {shape.prefix} tokens": [text(shape.prefix)] * 32,
        f"12 cuts x 8 of a trace of {len(trace)}": [cut for cut in cuts for _ in range(8)],
        f"64 prompts of {shape.prompt}": [text(shape.prompt) for _ in range(64)],
    }


def sampling_speed(model: Any, shape: Shape, stream: Iterator[int]) -> Iterator[Row]:
    """Tokens a second of our decoders and of ``generate``, on the same work; the second of two."""
    attention = model.config._attn_implementation

    def with_ours(decoder: Decoder, prefixes: Sequence[Ids]) -> tuple[int, float]:
        prefill = _time_calls(decoder, "_admit")
        rows = draw(decoder, prefixes, shape.tokens, benchmark.TEMPERATURE)
        return sum(map(len, rows)), sum(prefill)

    def with_generate(_: None, prefixes: Sequence[Ids]) -> tuple[int, float]:
        model.set_attn_implementation(attention)
        return benchmark.decode_with_generate(model, prefixes, shape.tokens), 0.0

    makers: dict[str, tuple[Callable[[int], Any], Callable[..., tuple[int, float]]]] = {
        CAPTURED: (lambda size: CapturedDecoder(model, size), with_ours),
        PLAIN: (lambda size: Decoder(model, size), with_ours),
        GENERATE: (lambda size: None, with_generate),
    }
    for work, prefixes in works(shape, stream).items():
        for name, (make, run) in makers.items():
            peak_gib()
            row: Row = {"work": work, "decoder": name}
            try:
                decoder = make(len(prefixes))
                for _ in range(2):
                    wait()
                    started = time.monotonic()
                    tokens, prefill = run(decoder, prefixes)
                    wait()
                    seconds = time.monotonic() - started
            except torch.OutOfMemoryError:
                yield row | {"failed": "out of memory"}
                continue
            finally:
                decoder = None
            yield row | {
                "tokens a second": tokens / seconds,
                "ms a step": 1000 * (seconds - prefill) / shape.tokens,
                "seconds": seconds,
                "of which prefill": prefill,
                "GiB": peak_gib(),
            }


def _time_calls(decoder: Decoder, name: str) -> list[float]:
    """A list that gets the seconds of each call of a method, until it is asked for anew."""
    method, seconds = getattr(type(decoder), name), []

    def timed(*arguments: Any) -> Any:
        wait()
        started = time.monotonic()
        result = method(decoder, *arguments)
        wait()
        seconds.append(time.monotonic() - started)
        return result

    setattr(decoder, name, timed)
    return seconds


# 4. The speed of training

TRAININGS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("a pair, bf16, checkpointing", 1, {}),
    ("a pair, NF4, checkpointing", 1, {"quantize": "nf4"}),
    ("six chosen leaves, bf16, checkpointing", 6, {}),
)


def training_speed(base: Path, shape: Shape, stream: Iterator[int]) -> Iterator[Row]:
    """Seconds a step after the first, for our trainer with either mask and for TRL."""
    variants = {"shared, dense mask": "shared", "TRL": "trl"}
    if on_gpu():
        variants = {"shared, block mask": "shared", **variants}
    for work, leaves, changes in TRAININGS:
        pairs = []
        for group in range(shape.steps):
            prompt, rejected = (tuple(itertools.islice(stream, shape.prefix)) for _ in range(2))
            for leaf in range(leaves):
                chosen = tuple(itertools.islice(stream, shape.prefix))
                pairs.append(Pair(f"{group}-{leaf}", prompt, chosen, rejected, 0, "made up"))
        for name, engine in variants.items():
            settings = replace(
                benchmark.SETTINGS,
                engine=engine,
                batch_size=leaves,
                use_cpu=not on_gpu(),
                max_length=4 * shape.prefix,
                activation_checkpointing=True,
                **{"quantize": None, **changes},
            )
            dense = name == "shared, dense mask"
            row: Row = {"work": work, "trainer": name}
            peak_gib()
            try:
                with tempfile.TemporaryDirectory() as out:
                    seconds, losses = benchmark.train_and_time(
                        pairs, base, settings, Path(out), _use_dense_mask if dense else _leave
                    )
            except torch.OutOfMemoryError:
                yield row | {"failed": "out of memory"}
                continue
            yield row | {
                "seconds a step": statistics.median(seconds[1:]),
                "range": [min(seconds[1:]), max(seconds[1:])],
                "losses": losses,
                "GiB": peak_gib(),
            }


def _leave(_: Any) -> None:
    """Change nothing."""


def _use_dense_mask(trainer: Any) -> None:
    from ipo_lib.engines.trees import dense_mask

    scorer = trainer.accelerator.unwrap_model(trainer.model)
    scorer.make_mask = dense_mask
    scorer.model.get_base_model().set_attn_implementation("sdpa")


# All parts


def write_model(shape: Shape, target: Path) -> Any:
    """Write a model with random weights and the tokenizer of ``tiny``; return it in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    with torch.device(device()):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.generation_config = type(model.generation_config)()  # no token ends a row
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    for file in folder("tiny").glob("*token*"):
        shutil.copy(file, target)
    return model.eval()


def run(path: Path, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Run some of ``PARTS`` and write each row as soon as it is there. Returns what was written."""
    shape = LARGE if on_gpu() else SMALL
    name = torch.cuda.get_device_name() if on_gpu() else "CPU"
    record: dict[str, Any] = {"machine": name, **{engine: version(engine) for engine in ENGINES}}
    texts = benchmark.world_text(Chat(folder("tiny")), 5000, seed=4)
    stream = itertools.chain.from_iterable(texts)

    def add(part: str, rows: Iterator[Row]) -> None:
        if part not in parts:
            return
        record[part] = []
        for row in rows:
            record[part].append(row)
            print(part, *(f"{key}: {_short(value)};" for key, value in row.items()), flush=True)
            path.write_text(json.dumps(record, indent=1) + "\n")

    add("parity", parity())
    add("losses", engines())
    if {"sampling", "training"} & {*parts}:
        with tempfile.TemporaryDirectory() as space:
            base = Path(space) / "model"
            model: Any = write_model(shape, base)
            with torch.inference_mode():
                add("sampling", sampling_speed(model, shape, stream))
            del model
            add("training", training_speed(base, shape, stream))
    return record


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) < 2 or not {*sys.argv[2:]} <= {*PARTS}:
        sys.exit(f"usage: python -m {MODULE} FILE [{' | '.join(PARTS)} ...]")
    run(Path(sys.argv[1]), sys.argv[2:] or PARTS)
