"""A rehearsal of a profile on a small random model of its architecture, before hours are spent.

1. A model of two narrow layers, with a byte vocabulary of its own, is written to a temporary folder.
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
from ipo_lib.chat import OPEN, Chat, parsed
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines.lora import quiet
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import Pair, Prompt
from ipo_lib.sampling import Request, Sampling, draw_seed

STEPS = 2
TOKENS = 2
LENGTH = 12  # tokens of each part of a made-up pair
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
    found = parsed(folder / "config.json").get("model_type") if folder else None
    return str(found or settings.model.architecture)


def small_model(folder: Path, family: str, dtype: str) -> Path:
    """Write a random model of an architecture, with a tokenizer of single bytes and a chat template.

    Args:
        folder: where to.
        family: transformers' name of the architecture, such as ``llama`` or ``qwen2``.
        dtype: of the weights that are written.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    pieces = [*ENDS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*ENDS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": ENDS[1],
        "pad_token": ENDS[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = AutoConfig.for_model(
        family, vocab_size=len(pieces), eos_token_id=1, pad_token_id=1, **SIZE
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def made_up_pairs(count: int, vocabulary: int) -> list[Pair]:
    """Pairs of random tokens: prefix, chosen and rejected side of LENGTH tokens each."""
    draw = random.Random(0)

    def ids() -> tuple[int, ...]:
        return tuple(draw.randrange(len(ENDS), vocabulary) for _ in range(LENGTH))

    return [Pair(f"rehearsal-{at}", ids(), ids(), ids(), 2, "rehearsal") for at in range(count)]


def two_steps(settings: DpoSettings) -> DpoSettings:
    """The settings, but for what makes a training long: one pass, nothing kept on the way, no warm-up."""
    return replace(settings, epochs=1, keep=0, warmup=0.0)


def rehearse(settings: Profile, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (what was done, how it went) of each step; whatever fails raises, as it would in the run.

    Args:
        settings: the profile.
        folder: the model's folder, where it is on this machine.
    """
    family, model = architecture(settings, folder), settings.model
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        dtype = settings.stage1.dtype if model.dtype == "auto" else model.dtype
        base = small_model(root / "files", family, dtype)
        chat = Chat(
            base, prefill=model.prefill if not model.prefill.lstrip().startswith(OPEN) else ""
        )
        size = len(parsed(base / "tokenizer.json")["model"]["vocab"])
        adapter: Path | None = None
        for stage, wanted in (("stage 1", settings.stage1), ("stage 2", settings.stage2)):
            count = STEPS * wanted.batch_size * wanted.accumulation
            out = root / stage.replace(" ", "")
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # two steps teach nothing, as they should
                rows = training.train(
                    made_up_pairs(count, size), base, two_steps(wanted), out, adapter=adapter
                )
            losses = ", ".join(f"{row['loss']:.4f}" for row in rows)
            yield f"{family}, {stage}", f"{len(rows)} steps, loss {losses}"
            adapter = out
        sampler = TransformersSampler(
            base,
            chat,
            adapter=adapter,
            device=model.device,
            dtype=dtype,
            quantize=model.quantize,
            batch_size=model.batch_size,
        )
        prompt = Prompt("rehearsal", "How tall is a lighthouse?", "rehearsal", harm=False)
        asked = [Request(str(at), chat.prompt_ids(prompt), (), draw_seed(0, at)) for at in range(2)]
        sampling = Sampling(settings.sampling.temperature, settings.sampling.top_p, TOKENS)
        drawn = list(sampler.sample(asked, sampling))
        yield (
            f"{family}, sampling",
            f"{sum(len(one.token_ids) for one in drawn)} tokens in {sampler.dtype}",
        )
