"""A rehearsal of a profile on a small random model of its architecture, before hours are spent.

1. A model of two narrow layers with a vocabulary of bytes is written to a temporary folder.
2. Stage 1's settings train it for two steps, stage 2's settings go on from there for two more.
3. The profile's sampler draws two tokens from the result.

Whatever crashes with these settings on this machine (precision, 4-bit weights, activation
checkpointing, attention, the device) crashes here, in seconds.
"""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipo_lib import training
from ipo_lib.chat import OPEN, Chat, read_json
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines.lora import silence_libraries
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import Pair, Prompt
from ipo_lib.sampling import Request, Sampling, draw_seed

STEPS = 2
TOKENS = 2
LENGTH = 12  # tokens of each part of a random pair
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ENDS = ("<|start|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n" + OPEN + "\n{% endif %}"
)


def architecture(settings: Profile, folder: Path | None) -> str:
    """The model's architecture: as its folder says where it is here, else as the profile says."""
    config = read_json(folder / "config.json") if folder else {}
    return str(config.get("model_type") or settings.model.architecture)


def write_small_model(folder: Path, family: str, dtype: str) -> Path:
    """Write a random model of an architecture, with a tokenizer of single bytes.

    Args:
        folder: where to; it is also returned.
        family: transformers' name of the architecture, such as ``llama`` or ``qwen2``.
        dtype: of the weights that are written.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    silence_libraries()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # 1. The tokenizer: one token for each byte, and two special ones.
    pieces = [*ENDS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*ENDS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": ENDS[1],
        "pad_token": ENDS[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    # 2. The weights.
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(pieces), eos_token_id=1, pad_token_id=1, **SIZE
    )
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def random_pairs(count: int, vocabulary: int) -> list[Pair]:
    """Pairs of random tokens: prefix, chosen and rejected side of LENGTH tokens each."""
    generator = random.Random(0)

    def ids() -> tuple[int, ...]:
        return tuple(generator.randrange(len(ENDS), vocabulary) for _ in range(LENGTH))

    return [
        Pair(f"rehearsal-{index}", ids(), ids(), ids(), 2, "rehearsal") for index in range(count)
    ]


def shortened(settings: DpoSettings) -> DpoSettings:
    """Training settings for one pass, with nothing kept on the way and no warm-up."""
    return replace(settings, epochs=1, keep=0, warmup=0.0)


def rehearse(settings: Profile, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (what was done, how it went) of each step; what fails raises, as it would in the run.

    Args:
        settings: the profile.
        folder: the model's folder, where it is on this machine.
    """
    family, model = architecture(settings, folder), settings.model
    dtype = settings.stage1.dtype if model.dtype == "auto" else model.dtype
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = write_small_model(root / "files", family, dtype)
        vocabulary = len(read_json(base / "tokenizer.json")["model"]["vocab"])
        adapter: Path | None = None
        for stage, wanted in (("stage 1", settings.stage1), ("stage 2", settings.stage2)):
            pairs = random_pairs(STEPS * wanted.batch_size * wanted.accumulation, vocabulary)
            output = root / stage.replace(" ", "")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # two steps teach nothing
                rows = training.train(pairs, base, shortened(wanted), output, adapter=adapter)
            losses = ", ".join(f"{row['loss']:.4f}" for row in rows)
            yield f"{family}, {stage}", f"{len(rows)} steps, loss {losses}"
            adapter = output
        prefill = "" if model.prefill.lstrip().startswith(OPEN) else model.prefill
        sampler = TransformersSampler(
            base,
            Chat(base, prefill=prefill),
            adapter=adapter,
            device=model.device,
            dtype=dtype,
            quantize=model.quantize,
            batch_size=model.batch_size,
        )
        yield f"{family}, sampling", f"{drawn_tokens(sampler, settings)} tokens in {sampler.dtype}"


def drawn_tokens(sampler: TransformersSampler, settings: Profile) -> int:
    """The tokens of two draws of TOKENS tokens each."""
    prompt = Prompt("rehearsal", "How tall is a lighthouse?", "rehearsal", harm=False)
    ids = sampler.chat.prompt_ids(prompt)
    requests = [Request(str(draw), ids, (), draw_seed(0, draw)) for draw in range(2)]
    sampling = Sampling(settings.sampling.temperature, settings.sampling.top_p, TOKENS)
    return sum(len(drawn.token_ids) for drawn in sampler.sample(requests, sampling))
