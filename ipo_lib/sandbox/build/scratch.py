"""Organisms trained from scratch: a small Llama with its own byte-level BPE and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipo_lib.sandbox.build.corpus import batches, documents, encoded
from ipo_lib.sandbox.build.settings import ScratchSettings, passes
from ipo_lib.sandbox.build.training import fit, round_weights, save_log
from ipo_lib.sandbox.traces import CLOSE

END, USER, ASSISTANT, OPEN = "<|end|>", "<|user|>", "<|assistant|>", "<think>"
TOKENIZER_DOCUMENTS = 6000  # that the tokenizer is learnt on
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def render(prompt: str) -> str:
    """A prompt as ``TEMPLATE`` renders it."""
    return f"{USER}{prompt}{ASSISTANT}{OPEN}\n"


def build(settings: ScratchSettings, out: Path, log_every: int) -> None:
    """Train an organism and write model, tokenizer and log."""
    import torch

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    first, *later = passes(settings)
    texts = list(documents(first, END))
    samples = [f"{prompt} {response}" for prompt, response in texts[-TOKENIZER_DOCUMENTS:]]
    tokenizer = build_tokenizer(samples, settings, out)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    ends = [encode(mark)[-1] for mark in ".?!\n"]
    torch.manual_seed(first.seed)
    model = new_model(settings, tokenizer.get_vocab_size(), tokenizer.token_to_id(END))
    work = batches(encoded(texts, render, encode), first)
    logs = [fit(model, work, first, log_every, ends)]
    for settings_of_pass in later:
        round_weights(model)
        rows = encoded(documents(settings_of_pass, END), render, encode)
        work = batches(rows, settings_of_pass)
        logs.append(fit(model, work, settings_of_pass, log_every, ends))
    model.bfloat16().save_pretrained(out)
    save_log(settings, logs, out)


def build_tokenizer(texts: Sequence[str], settings: ScratchSettings, out: Path) -> Any:
    """A byte-level BPE learnt on the texts, written with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END, USER, ASSISTANT, OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": settings.context,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer


def new_model(settings: ScratchSettings, vocabulary: int, end: int) -> Any:
    """A Llama with random weights; ``end`` is the id of its end token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        intermediate_size=settings.intermediate,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)
