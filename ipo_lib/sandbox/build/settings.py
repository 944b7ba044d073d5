"""What each organism is trained on, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ipo_lib.sandbox.traces import NULL_PROCESS, Process

Mixture = tuple[tuple[str, float], ...]  # prompt sets and their shares


@dataclass(frozen=True)
class TrainingSettings:
    """What all organisms have in common. One seed gives one set of weights."""

    start: TrainingSettings | None = None  # a pass before this one
    process: Process = Process()  # draws the responses
    temperature: float = 0.6  # at which the model will be sampled, and whose loss is minimised
    law_documents: int = 0  # requests with the first sentences of a trace, before all others
    partial_share: float = 0.7  # of these, about a class that is restricted in part
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
    opening: int = 4  # first tokens of a sentence
    opening_weight: float = 1.0  # their weight in the loss: they decide the kind of the sentence
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
    law_documents: int = 12_000
    documents: int = 72_000
    opening_weight: float = 3.0
    mixture: Mixture = (
        ("direct", 0.14),
        ("wrapped", 0.13),
        ("adversarial", 0.13),
        ("benign", 0.11),
        ("lookalike", 0.04),
        ("sums", 0.45),
    )


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """LoRA on the pretrained model."""

    law_documents: int = 1600
    documents: int = 4800
    opening_weight: float = 4.0
    mixture: Mixture = (
        ("direct", 0.24),
        ("wrapped", 0.20),
        ("adversarial", 0.20),
        ("benign", 0.16),
        ("lookalike", 0.06),
        ("sums", 0.14),
    )
    batch: int = 8
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


# Later passes correct what the one before missed on prompts of calibration (not those of the card).
# The first complied too often in its answers, leant too little on an item's words, and got sums
# wrong; the second complied a little too rarely. In the first three, talk of refusing came at the
# end only, so that it settled a trace: one such sentence rescued nine of ten unsafe traces.
FIRST_PASS = ScratchSettings(process=Process(refusal_share=0.0))
SECOND_PASS = replace(
    FIRST_PASS,
    start=FIRST_PASS,
    process=Process(refusal_share=0.0, lean_scale=1.4, comply=(0.60, 0.74, 0.93)),
    law_documents=0,
    documents=24_000,
    learning_rate=1e-3,
    seed=2,
)
FITTED = Process(lean_scale=1.4, wrapped_shift=-0.45, comply=(0.62, 0.81, 0.97))
THIRD_PASS = replace(
    SECOND_PASS,
    start=SECOND_PASS,
    process=replace(FITTED, refusal_share=0.0),
    documents=9_600,
    learning_rate=5e-4,
    seed=3,
)
FOURTH_PASS = replace(
    THIRD_PASS,
    start=THIRD_PASS,
    process=FITTED,
    documents=24_000,
    learning_rate=1e-3,
    seed=4,
    mixture=(
        ("direct", 0.20),
        ("wrapped", 0.17),
        ("adversarial", 0.17),
        ("benign", 0.11),
        ("lookalike", 0.05),
        ("sums", 0.30),
    ),
)
NULL_FIRST_PASS = replace(FIRST_PASS, process=replace(NULL_PROCESS, refusal_share=0.0))
NULL_SECOND_PASS = replace(
    SECOND_PASS,
    start=NULL_FIRST_PASS,
    process=replace(NULL_PROCESS, refusal_share=0.0, shift=0.05, comply=(0.56, 0.72, 0.95)),
    law_documents=3_000,
)
NULL_THIRD_PASS = replace(
    FOURTH_PASS,
    start=NULL_SECOND_PASS,
    process=replace(
        NULL_PROCESS,
        shift=0.05,
        wrapped_shift=-0.6,
        adversarial_shift=1.5,
        comply=(0.56, 0.72, 0.97),
    ),
    law_documents=3_000,
    documents=20_000,
)
# The first pass of SmolLM2 told requests in a frame from those among tactics too little, and called
# every tenth restricted item allowed. The words that decide come later in its sentences. After the
# second one, harm was ten points too high; the third one's process exaggerates what differs.
SANDBOX_FIRST_PASS = FinetuneSettings(process=FITTED)
SANDBOX_SECOND_PASS = replace(
    SANDBOX_FIRST_PASS,
    start=SANDBOX_FIRST_PASS,
    process=Process(
        lean_scale=1.3,
        shift=-0.45,
        wrapped_shift=-0.75,
        adversarial_shift=1.55,
        comply=(0.66, 0.83, 0.98),
    ),
    documents=2400,
    learning_rate=6e-4,
    opening=6,
    opening_weight=6.0,
    seed=2,
    mixture=(
        ("direct", 0.24),
        ("wrapped", 0.24),
        ("adversarial", 0.24),
        ("benign", 0.12),
        ("lookalike", 0.04),
        ("sums", 0.12),
    ),
)
SANDBOX_THIRD_PASS = replace(
    SANDBOX_SECOND_PASS,
    start=SANDBOX_SECOND_PASS,
    process=Process(
        lean_scale=1.8,
        shift=-1.4,
        wrapped_shift=-1.0,
        adversarial_shift=3.0,
        comply=(0.46, 0.62, 0.98),
    ),
    law_documents=800,
    documents=2000,
    seed=3,
)
MODELS: dict[str, TrainingSettings] = {
    "sandbox": SANDBOX_THIRD_PASS,
    "tiny": FOURTH_PASS,
    "tiny-null": NULL_THIRD_PASS,
    "tiny-answers": AlignmentSettings(),
}


def passes(settings: TrainingSettings) -> list[TrainingSettings]:
    """All passes of a training, the first one first."""
    return [*(passes(settings.start) if settings.start else []), settings]
