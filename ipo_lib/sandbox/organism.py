"""The model organisms of the sandbox by name: where their files lie, and the command that builds one.

``python -m ipo_lib.sandbox.organism NAME`` builds one: ``sandbox`` (LoRA on SmolLM2-135M-Instruct), ``tiny`` and ``tiny-null``
(small Llamas from scratch), or ``tiny-answers`` (LoRA on ``tiny``, aligned on answers only).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ipo_lib.records import BadInput
from ipo_lib.sandbox import aligned, finetune, scratch
from ipo_lib.sandbox.corpus import Aligned, Body, Finetuned, Scratch
from ipo_lib.sandbox.traces import Process

# Stronger causes than the default process has: a pretrained model learns to write the world's text long before it learns what
# the outcome depends on. So later phases make that plain and weigh the words that decide; the third lowers the harm.
PLAIN = Process(
    cue_effect=2.5,
    trigger_effect=-5.0,
    turn_steepness=0.5,
    lean_scale=1.4,
    shift=0.3,
    adversarial_shift=1.4,
    comply=(0.60, 0.69, 0.80),
)
DECIDING = Finetuned(
    start=Finetuned(),
    process=PLAIN,
    documents=2720,
    opening_weight=6.0,
    seed=2,
    mixture=(
        ("direct", 0.24),
        ("wrapped", 0.20),
        ("adversarial", 0.20),
        ("benign", 0.22),
        ("lookalike", 0.04),
        ("sums", 0.10),
    ),
)
BODIES: dict[str, Body] = {
    "sandbox": replace(
        DECIDING,
        start=DECIDING,
        process=replace(PLAIN, shift=-0.5, comply=(0.50, 0.62, 0.82)),
        documents=1920,
        seed=3,
    ),
    "tiny": Scratch(),
    "tiny-null": Scratch(process=Process(null=True), documents=28_000),
    "tiny-answers": Aligned(base="tiny"),
}


def shipped(name: str) -> Path:
    """Where the package keeps an organism's weights and card. Raises BadInput for an unknown name."""
    if name not in BODIES:
        raise BadInput(f"organism {name!r} is unknown; known: {', '.join(BODIES)}")
    return Path(__file__).parent / name


def folder(name: str) -> Path:
    """The model folder of an organism, an adapter's if it is ``Aligned``; a fine-tuned one is merged once, in the cache."""
    if isinstance(BODIES.get(name), Finetuned):
        return finetune.merged(shipped(name))
    return shipped(name)


def build(name: str, out: Path | None = None, log_every: int = 50) -> None:
    """Train an organism and write it with its log: 1 (``tiny-answers``) to 80 minutes (``sandbox``) on two CPU cores."""
    body, out = BODIES[name], out or shipped(name)
    if isinstance(body, Finetuned):
        finetune.build(body, out, log_every)
    elif isinstance(body, Scratch):
        scratch.build(body, out, log_every)
    elif isinstance(body, Aligned):
        aligned.build(body, shipped(body.base), out, log_every)


if __name__ == "__main__":
    build(sys.argv[1])
