"""Organisms trained from scratch: a small Llama with its own byte-level BPE and chat template."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipo_lib.sandbox.corpus import CLOSE, Scratch, batches, documents, encoded, fit

END, USER, ASSISTANT, OPEN = "<|end|>", "<|user|>", "<|assistant|>", "<think>"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def tokenizer(texts: Sequence[str], body: Scratch, out: Path) -> Any:
    """A byte-level BPE learnt on the texts, saved with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = [END, USER, ASSISTANT, OPEN, CLOSE], pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {
        "special_tokens": special,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=body.vocabulary, **options))
    bpe.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": body.context,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return bpe


def build(body: Scratch, out: Path, log_every: int) -> None:
    """Train the organism and write model, tokenizer and log."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    texts = list(documents(body))
    bpe = tokenizer([f"{prompt} {response}{END}" for prompt, response in texts[:6000]], body, out)
    rows = encoded(
        texts, f"{USER}{{}}{ASSISTANT}{OPEN}\n".format, END, lambda text: list(bpe.encode(text).ids)
    )
    torch.manual_seed(body.seed)
    end = bpe.token_to_id(END)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=body.hidden,
        num_hidden_layers=body.layers,
        num_attention_heads=body.heads,
        num_key_value_heads=body.key_value_heads,
        intermediate_size=body.intermediate,
        max_position_embeddings=body.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    log = fit(model, batches(rows, body), body, log_every)
    model.bfloat16().save_pretrained(out)
    (out / "training.json").write_text(
        json.dumps({"body": dataclasses.asdict(body), "logs": [log]}, indent=1) + "\n"
    )
