"""Planted preferences for training tests: pairs, a small random Llama, and Eq. 4 by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipo_lib.dpo import DpoSettings
from ipo_lib.records import Ids, Pair

Scores = tuple[float, float]  # of one pair: (chosen, rejected)
VOCABULARY = 64
LOG2 = math.log(2)
PLAIN = DpoSettings(
    learning_rate=1e-2,
    batch_size=4,
    accumulation=1,
    sft_weight=0.0,
    rank=4,
    alpha=8,
    warmup=0.0,
    dtype="float32",
    use_cpu=True,
)


def make_pairs(n: int, seed: int = 0) -> list[Pair]:
    """Pairs whose chosen suffixes use the lower half of the vocabulary, rejected ones the upper."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> Ids:
        return tuple(draw.randrange(low, high) for _ in range(draw.randint(2, 7)))

    half = VOCABULARY // 2
    pairs = []
    for index in range(n):
        prefix, chosen, rejected = ids(2, VOCABULARY), ids(2, half), ids(half, VOCABULARY)
        pairs.append(Pair(f"{seed}-{index}", prefix, chosen, rejected, 2, "planted"))
    return pairs


def write_small_llama(folder: Path) -> Path:
    """Write a random two-layer Llama with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def preference_loss(policy: Sequence[Scores], reference: Sequence[Scores], beta: float) -> float:
    """Eq. 4 from summed suffix log-probabilities."""
    losses = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True):
        margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
        losses.append(math.log1p(math.exp(-margin)))  # -log sigmoid(margin)
    return sum(losses) / len(losses)


def suffix_logps(model: Path, adapter: Path | None, pairs: Sequence[Pair]) -> list[Scores]:
    """Summed log-probabilities of both suffixes, by a plain float32 forward of each sequence."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter:
        net = PeftModel.from_pretrained(net, str(adapter))

    def score(prompt: Ids, suffix: Ids) -> float:
        with torch.no_grad():
            logps = net(torch.tensor([prompt + suffix])).logits[0].log_softmax(-1)
        return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(suffix))

    scores = []
    for pair in pairs:
        chosen = score(pair.prompt_ids, pair.chosen_ids)
        scores.append((chosen, score(pair.prompt_ids, pair.rejected_ids)))
    return scores


def side_mean(scores: Sequence[Scores], side: int) -> float:
    """The mean over pairs of one side."""
    return sum(score[side] for score in scores) / len(scores)
