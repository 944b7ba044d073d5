"""Training of IPO (Eq. 4): DPO on the suffixes after the common prefix, from token ids. Stage 1 trains fresh LoRA on intervened
pairs; stage 2 goes on from there with benign pairs mixed in; SFT is the same with one side. ``prefix_sharing`` does the work,
stock TRL (``trl_dpo``) is the reference. IPO is Intervened Preference Optimization here: TRL's loss of that name is Identity
Preference Optimization and is not offered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipo_lib.records import BadInput

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = {
    "loss": ("sigmoid", "sigmoid_norm", "literal", "sft"),
    "scope": ("suffix", "whole"),
    "sft_scope": ("suffix", "whole"),
    "dtype": ("float32", "bfloat16"),
    "quantize": (None, "auto", "nf4"),
    "engine": ("shared", "trl"),
}


ABOVE_0 = (
    "learning_rate",
    "beta",
    "epochs",
    "batch_size",
    "accumulation",
    "rank",
    "ratio",
    "min_refusals",
)


STOCK: dict[str, tuple[Any, ...]] = {
    "loss": ("sigmoid", "sigmoid_norm"),
    "scope": ("suffix",),
    "sft_scope": ("suffix",),
    "score_trigger": (True,),
}


@dataclass(frozen=True)
class DpoSettings:
    """One training stage; it is disputed which stages carry the SFT term, so each has settings of its own.

    A step has batch_size x accumulation pairs (the paper: 64), however many processes share it.
    """

    learning_rate: float = 1e-4  # LoRA's: ten to a hundred times that of full fine-tuning
    beta: float = 0.1  # of Eq. 4
    epochs: int = 1
    batch_size: int = 8  # pairs per forward
    accumulation: int = 8  # forwards per step
    warmup: float = 0.1  # steps; below 1: a share of them
    weight_decay: float = 0.0
    loss: str = "sigmoid"  # Eq. 4 on sums; sigmoid_norm: on means; literal: as printed; sft: NLL of the chosen side
    sft_weight: float = 0.2  # of the token-mean NLL of the chosen side
    scope: str = "suffix"  # DPO on Part; whole: on Full, the whole response
    sft_scope: str = "suffix"  # what the NLL is a mean of
    score_trigger: bool = True  # the trigger's own tokens count
    engine: str = "shared"  # prefixes read once; trl: stock TRL
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"  # PEFT's word, or a regular expression
    max_length: int = 1024  # tokens of prompt and longest side; longer pairs are left out
    pad_to_multiple_of: int = 8
    length_buckets: bool = True  # batches of like-long pairs, in random order
    quantize: str | None = (
        "auto"  # nf4: QLoRA; auto: as the profile's model is sampled (without a profile: not at all)
    )
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    use_cpu: bool = False
    keep: int = 0  # adapters kept on the way, evenly spaced, to measure harm by pairs seen
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(
                    f"dpo: {name} {getattr(self, name)!r} is unknown; use {' or '.join(map(str, known))}"
                )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and (
                value < 0 or (name in ABOVE_0 and not value > 0)
            ):
                raise BadInput(f"dpo: {name} {value} is too small; give a number above 0")
        for name, stock in STOCK.items() if self.engine == "trl" else ():
            if getattr(self, name) not in stock:
                raise BadInput(
                    f"dpo: stock TRL has no {name} {getattr(self, name)!r}; set engine to shared"
                )


@dataclass(frozen=True)
class Stage2Settings(DpoSettings):
    """Stage 2: harmful pairs of stage 1 beside benign ones, so that refusals of harmless prompts go back."""

    ratio: float = 0.5  # harmful to benign pairs (the paper: 0.3, 0.5 or 0.7)
    keep_all: bool = (
        False  # every pair is kept, and weights make the ratio; else the larger side is thinned
    )
    min_refusals: int = 8  # benign pairs below which stage 2 is left out
    benign_draws: int = 4  # responses of the stage-1 model to a benign prompt, until one refuses
    refusing_prefix: bool = (
        True  # where none refuses: one drawn behind a safety trigger at the trace's start
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benign_draws < 1:
            raise BadInput(
                f"stage2: benign_draws {self.benign_draws} draws nothing; give at least 1"
            )


def margins(policy: Tensor, reference: Tensor, counts: Tensor, settings: DpoSettings) -> Tensor:
    """What Eq. 4 puts into the sigmoid, without beta [pairs]. ``scope`` whole adds the response part of the prefix to both sides,
    where it cancels as long as log-probabilities are summed; ``literal`` is the printed form, policy(chosen) / policy(rejected)
    against policy / reference (rejected), in which it does not cancel."""
    stem = [
        one[:, 2:] if settings.scope == "whole" else 0 * one[:, 2:]
        for one in (policy, reference, counts)
    ]
    own, ref, size = (
        one[:, :2] + add for one, add in zip((policy, reference, counts), stem, strict=True)
    )
    if settings.loss == "sigmoid_norm":
        own, ref = own / size, ref / size
    chosen, rejected = (own[:, 0], ref[:, 0]), (own[:, 1], ref[:, 1])
    if settings.loss == "literal":
        return (chosen[0] - rejected[0]) - (rejected[0] - rejected[1])
    return (chosen[0] - chosen[1]) - (rejected[0] - rejected[1])


def losses(
    policy: Tensor,
    reference: Tensor,
    counts: Tensor,
    weight: Tensor,
    settings: DpoSettings,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(preference loss, SFT loss) of a batch in nats.

    The first is the weighted mean over pairs of -log sigmoid(beta x margin), 0 with ``loss`` sft; the
    second the NLL of the chosen side, its mean over tokens.

    Args:
        policy: sums of log-probabilities by (chosen, rejected, prefix) [pairs, 3].
        reference: the same of the model without its adapter [pairs, 3].
        counts: how many tokens are in each sum [pairs, 3].
        weight: of every pair [pairs].
        settings: loss, scope, beta.
        shares: where a batch is spread over processes, the weight of each pair and of each of its
            chosen tokens [pairs, 2] in place of the means (``ranks.Share``).
    """
    from torch.nn import functional

    stem = 2 if settings.sft_scope == "whole" else 0
    chosen = policy[:, 0] + (policy[:, stem] if stem else 0)
    tokens = counts[:, 0] + (counts[:, stem] if stem else 0)
    nll = -chosen.sum() / tokens.sum() if shares is None else -(chosen * shares[:, 1]).sum()
    if settings.loss == "sft":
        return 0 * nll, nll
    terms = (
        -functional.logsigmoid(settings.beta * margins(policy, reference, counts, settings))
        * weight
    )
    return terms.mean() if shares is None else (terms * shares[:, 0]).sum(), nll
