"""An organism aligned on its answers only (Fig. 2): LoRA trained to refuse restricted requests.

It refuses after whatever trace the world's process wrote, since the loss sees the answer alone. Its
answers are safe by design; what its traces do is the measurement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipo_lib.sandbox.build.corpus import batches, documents, encoded
from ipo_lib.sandbox.build.scratch import END, render
from ipo_lib.sandbox.build.settings import AlignmentSettings
from ipo_lib.sandbox.build.training import add_lora, fit, save_log, save_lora
from ipo_lib.sandbox.traces import CLOSE


def build(settings: AlignmentSettings, base: Path, out: Path, log_every: int) -> None:
    """Train the adapter and write it in bf16 with its log.

    Args:
        settings: what it is trained on, and how.
        base: the folder of the organism that is aligned.
        out: where to write.
        log_every: steps between two entries of the log.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = documents(settings, END)
    rows = encoded(texts, render, lambda text: list(tokenizer.encode(text).ids))
    (close,) = tokenizer.encode(CLOSE).ids
    answers = [(ids.index(close) + 1, ids) for _, ids in rows]
    torch.manual_seed(settings.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = add_lora(model, settings)
    log = fit(model.get_base_model(), batches(answers, settings), settings, log_every)
    save_lora(model, settings.base, out)
    save_log(settings, [log], out)
