"""Tiny model folders for tests.

A byte-level BPE, three chat-template styles, random or planted weights. No network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = (
    "The lighthouse keeper counts the ships and writes their names in a book.",
    "Wait, I should check whether the ships carry lamps. Then I answer the question.",
    "Bread needs flour, water, salt and time; the oven needs to be hot.",
    "How tall is a lighthouse? A tall one has sixty metres, a small one ten.",
)
TURN = (
    "{{ bos_token }}{% for m in messages %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
)
TEMPLATES = {
    "r1": TURN
    + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",  # opens <think> itself
    "qwen3": TURN
    + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",  # the model writes <think>
}
SPECIAL = ("<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


def tiny_tokenizer(
    folder: Path, *, template: str | None = "qwen3", tags: str = "single", vocabulary: int = 380
) -> Path:
    """Writes tokenizer.json and its settings.

    ``tags`` "single": <think>, </think> are tokens, "text": they are not.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if tags == "single":
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<|end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATES.get(template, template))
    return folder


def tiny_model(
    folder: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    context: int = 512,
    spread: float = 0.5,
    dtype: str = "float32",
    **tokenizer: Any,
) -> Path:
    """A random model with a tokenizer.

    ``spread`` is the standard deviation of its weights (larger: more peaked).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_tokenizer(folder, **tokenizer)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    heads = max(2, hidden // 32)
    config = AutoConfig.for_model(
        family,
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=context,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def planted_model(
    folder: Path, next_token: Mapping[int, Mapping[int, float]], **tokenizer: Any
) -> Path:
    """A Markov chain as a Llama.

    After token a comes token b with probability ``next_token[a][b]``; others: EOS.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(folder, **tokenizer)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    width = -(-size // 16) * 16
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    table = torch.full((size, size), -40.0)
    table[:, 1] = 0.0
    for token, row in next_token.items():
        table[token, 1] = -40.0
        for following, probability in row.items():
            table[token, following] = float(torch.tensor(probability).log())
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:  # nothing but the embedding reaches the head
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = (
            table.T / width**0.5
        )  # RMSNorm turns a one-hot of `width` into sqrt(width)
    model.save_pretrained(folder)
    return folder
