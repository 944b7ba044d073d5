"""The model organisms of the sandbox by name: where their files lie, ready for use.

A *model organism* is a small model that was trained to behave in the way that is studied. Four come
with this package, each in a folder of its own name beside this file:

``sandbox``       LoRA on a pretrained model, SmolLM2-135M-Instruct
``tiny``          a Llama of 3 M parameters, trained from scratch
``tiny-null``     the same in the null world, where no sentence has an effect
``tiny-answers``  LoRA on ``tiny``, aligned on its answers only

``ipo_lib.sandbox.build`` trains them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput
from ipo_lib.sandbox import smollm2

NAMES = ("sandbox", "tiny", "tiny-null", "tiny-answers")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# SmolLM2's turns without its system turn. Like R1's, the template itself opens the trace.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' "
    "+ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def shipped(name: str) -> Path:
    """The folder in which the package keeps an organism's weights and card.

    Raises:
        BadInput: the name is unknown.
    """
    if name not in NAMES:
        raise BadInput(f"organism {name!r} is unknown; known: {', '.join(NAMES)}")
    return Path(__file__).parent / name


def folder(name: str) -> Path:
    """The folder from which an organism is loaded: a model, or for ``tiny-answers`` an adapter.

    Raises:
        BadInput: the name is unknown.
    """
    return merged(shipped(name)) if name == "sandbox" else shipped(name)


def merged(adapter: Path) -> Path:
    """The folder of SmolLM2 with an adapter, as one plain bf16 model; made once, in the cache."""
    base = smollm2.base()
    hashes = {name: smollm2.sha256(adapter / name) for name in ADAPTER_FILES}
    spec = {"base": base.parent.name, "adapter": hashes, "template": TEMPLATE}
    artifact = smollm2.cache().artifact("merged", 1, spec)
    return artifact.make(lambda out: merge(base, adapter, out))


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write SmolLM2 with an adapter, its tokenizer and ``TEMPLATE``."""
    import torch
    import transformers
    from peft import PeftModel

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, out / name)
    (out / "chat_template.jinja").write_text(TEMPLATE)
