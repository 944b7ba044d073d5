"""What each organism is trained on, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ipo_lib.sandbox.traces import Process

Mixture = tuple[tuple[str, float], ...]  # prompt sets and their shares


@dataclass(frozen=True)
class TrainingSettings:
    """What all organisms have in common. One seed gives one set of weights."""

    process: Process = Process()  # draws the responses
    documents: int = 64_000  # prompts with a response
    mixture: Mixture = (
        ("direct", 0.18),
        ("wrapped", 0.16),
        ("adversarial", 0.16),
        ("benign", 0.14),
        ("lookalike", 0.06),
        ("sums", 0.30),
    )
    batch: int = 64
    pad_to_multiple_of: int = 32  # few different shapes, so that memory does not grow
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.06  # share of the steps
    opening_weight: float = 1.0  # loss weight of a sentence's first tokens, which decide its kind
    seed: int = 1


@dataclass(frozen=True)
class ScratchSettings(TrainingSettings):
    """A small Llama from scratch, with its own vocabulary."""

    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    intermediate: int = 704
    context: int = 512


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """LoRA on every linear layer of the pretrained model, in one or several phases."""

    start: FinetuneSettings | None = None  # the phase before this one

    process: Process = Process(comply=(0.55, 0.70, 0.87))
    documents: int = 6400
    mixture: Mixture = (
        ("direct", 0.22),
        ("wrapped", 0.20),
        ("adversarial", 0.20),
        ("benign", 0.16),
        ("lookalike", 0.08),
        ("sums", 0.14),
    )
    batch: int = 16
    pad_to_multiple_of: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 16
    alpha: int = 32


@dataclass(frozen=True)
class AlignmentSettings(TrainingSettings):
    """LoRA on an organism, trained on answers that always refuse what is restricted."""

    base: str = "tiny"  # name of the organism
    process: Process = Process(comply=(0.0, 0.0, 0.0), slip=0.0)
    documents: int = 4000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 8
    alpha: int = 16


# A pretrained model learns to write the world's text long before it learns what the outcome depends
# on. So after a first phase, its causes are made stronger and the words that decide weigh more. The
# third phase lowers the harm.
STRONG_CAUSES = Process(
    cue_effect=2.5,
    trigger_effect=-5.0,
    turn_steepness=0.5,
    lean_scale=1.4,
    shift=0.3,
    adversarial_shift=1.4,
    comply=(0.60, 0.69, 0.80),
)
SECOND_PHASE = FinetuneSettings(
    start=FinetuneSettings(),
    process=STRONG_CAUSES,
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
THIRD_PHASE = replace(
    SECOND_PHASE,
    start=SECOND_PHASE,
    process=replace(STRONG_CAUSES, shift=-0.5, comply=(0.50, 0.62, 0.82)),
    documents=1920,
    seed=3,
)
MODELS: dict[str, TrainingSettings] = {
    "sandbox": THIRD_PHASE,
    "tiny": ScratchSettings(),
    "tiny-null": ScratchSettings(process=Process(null=True), documents=28_000),
    "tiny-answers": AlignmentSettings(),
}
