"""The objective of IPO's training, DPO on suffixes (Eq. 4), and the settings of a training stage.

1. A pair has one *prefix* and two *suffixes* after it: the chosen one and the rejected one.
2. The *policy* is the model with its LoRA adapter, the *reference* the same model without it.
3. A part of a pair is scored by the sum of its tokens' log-probabilities, in nats.
4. The *preference loss* of a pair compares these sums: one function for each name of
   ``PREFERENCE_LOSSES``. To add a loss, write such a function and enter it there. A new number
   that it needs becomes a field of ``DpoSettings`` and an argument of ``losses``. The engine
   ``trl`` offers only what ``TRL_CHOICES`` lists.
5. The *SFT loss* is the negative log-likelihood (NLL) of the chosen side. A stage trains on the
   preference loss plus ``sft_weight`` times the SFT loss.

IPO is Intervened Preference Optimization here. TRL's loss of that name is Identity Preference
Optimization and is not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipo_lib.records import BadInput

if TYPE_CHECKING:
    from torch import Tensor

SIMPO_MARGIN = 0.5  # of SimPO, as a share of beta
KTO = "kto"  # by TRL's trainer alone
SFT = "sft"  # the loss without a preference: only the chosen side is read
# What a loss reads: the suffix alone, or the response part before it too.
SUFFIX, WHOLE = "suffix", "whole"


def sigmoid_loss(policy: Tensor, reference: Tensor, counts: Tensor, beta: float) -> Tensor:
    """DPO on sums of log-probabilities (Eq. 4).

    Args:
        policy: log-probability of the chosen and of the rejected side by the policy [pairs, 2].
        reference: the same by the reference [pairs, 2].
        counts: how many tokens each side has [pairs, 2]; not used here.
        beta: how strongly the log-ratios count.

    Returns:
        The loss of each pair in nats [pairs].
    """
    policy_chosen_logps, policy_rejected_logps = policy.unbind(1)
    reference_chosen_logps, reference_rejected_logps = reference.unbind(1)

    chosen_logratios = policy_chosen_logps - reference_chosen_logps  # [pairs]
    rejected_logratios = policy_rejected_logps - reference_rejected_logps  # [pairs]
    return _negative_log_sigmoid(beta * (chosen_logratios - rejected_logratios))


def sigmoid_norm_loss(policy: Tensor, reference: Tensor, counts: Tensor, beta: float) -> Tensor:
    """Eq. 4 on means per token in place of sums.

    Args:
        policy: as in ``sigmoid_loss`` [pairs, 2].
        reference: as there [pairs, 2].
        counts: how many tokens each side has [pairs, 2].
        beta: as there.
    """
    return sigmoid_loss(policy / counts, reference / counts, counts, beta)


def simpo_loss(policy: Tensor, reference: Tensor, counts: Tensor, beta: float) -> Tensor:
    """SimPO (arXiv 2405.14734): means per token, no reference, a margin of half of ``beta``.

    Its authors take a beta of 2 to 10, and margins of a fifth to one and a half of it.

    Args:
        policy: as in ``sigmoid_loss`` [pairs, 2].
        reference: not used.
        counts: how many tokens each side has [pairs, 2].
        beta: factor of the mean log-probabilities.
    """
    chosen_means, rejected_means = (policy / counts).unbind(1)  # [pairs]
    return _negative_log_sigmoid(beta * (chosen_means - rejected_means - SIMPO_MARGIN))


def literal_loss(policy: Tensor, reference: Tensor, counts: Tensor, beta: float) -> Tensor:
    """Eq. 4 as the paper prints it: its first ratio has the policy above and below.

    A prefix that both sides share does not cancel in this form.

    Args:
        policy: as in ``sigmoid_loss`` [pairs, 2].
        reference: as there [pairs, 2].
        counts: as there; not used.
        beta: as there.
    """
    policy_chosen_logps, policy_rejected_logps = policy.unbind(1)
    _, reference_rejected_logps = reference.unbind(1)

    policy_logratios = policy_chosen_logps - policy_rejected_logps  # [pairs]
    rejected_logratios = policy_rejected_logps - reference_rejected_logps  # [pairs]
    return _negative_log_sigmoid(beta * (policy_logratios - rejected_logratios))


def _negative_log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn import functional

    return -functional.logsigmoid(values)


PREFERENCE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "literal": literal_loss,
}

CHOICES: dict[str, tuple[Any, ...]] = {
    "loss": (*PREFERENCE_LOSSES, SFT, KTO),
    "scope": (SUFFIX, WHOLE),
    "sft_scope": (SUFFIX, WHOLE),
    "dtype": ("float32", "bfloat16"),
    "quantize": (None, "auto", "nf4"),
    "engine": ("shared", "trl"),
}
TRL_CHOICES: dict[str, tuple[Any, ...]] = {
    "loss": ("sigmoid", "sigmoid_norm", KTO),
    "scope": (SUFFIX,),
    "sft_scope": (SUFFIX,),
    "score_trigger": (True,),
}
POSITIVE = (
    "learning_rate",
    "beta",
    "epochs",
    "batch_size",
    "accumulation",
    "rank",
    "ratio",
    "min_refusals",
)


@dataclass(frozen=True)
class DpoSettings:
    """One training stage. Each stage has its own settings, also for the SFT term.

    A step reads batch_size x accumulation pairs (the paper: 64), however many processes share it.
    """

    learning_rate: float = 1e-4  # for LoRA: ten to a hundred times that of full fine-tuning
    beta: float = 0.1  # of Eq. 4
    epochs: int = 1
    batch_size: int = 8  # pairs per forward
    accumulation: int = 8  # forwards per step
    warmup: float = 0.1  # steps; below 1: a share of them
    weight_decay: float = 0.0
    # A name in PREFERENCE_LOSSES; "sft": the NLL of the chosen side alone; "kto": TRL's KTO.
    loss: str = "sigmoid"
    sft_weight: float = 0.2  # of the SFT loss, a mean over tokens
    scope: str = SUFFIX  # what the preference loss reads; "whole": the whole response
    sft_scope: str = SUFFIX  # what the SFT loss reads
    score_trigger: bool = True  # whether the trigger's own tokens count
    engine: str = "shared"  # "shared": a prefix is read once; "trl": stock TRL
    rank: int = 16  # of LoRA
    alpha: int = 32  # of LoRA
    dropout: float = 0.0  # of LoRA
    targets: str = "all-linear"  # PEFT's word, or a regular expression
    max_length: int = 1024  # tokens of prompt and longest side; longer pairs are left out
    pad_to_multiple_of: int = 8
    length_buckets: bool = True  # batches of pairs of similar length, in random order
    quantize: str | None = "auto"  # "nf4": QLoRA; "auto": as the profile's model
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    use_cpu: bool = False
    keep: int = 0  # intermediate adapters kept, evenly spaced, to measure harm by pairs seen
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = " or ".join(map(str, choices))
                raise BadInput(f"dpo: {name} {value!r} is unknown; use {hint}")
        for name, value in vars(self).items():
            if not isinstance(value, int | float):
                continue
            if value < 0 or (name in POSITIVE and not value > 0):
                least = "a number above 0" if name in POSITIVE else "0 or more"
                raise BadInput(f"dpo: {name} {value} is too small; give {least}")
        if self.engine == "trl":
            self._check_trl()
        elif self.loss == KTO:
            raise BadInput("dpo: loss 'kto' is TRL's; set engine to trl")

    def _check_trl(self) -> None:
        for name, choices in TRL_CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise BadInput(f"dpo: stock TRL has no {name} {value!r}; set engine to shared")


@dataclass(frozen=True)
class Stage2Settings(DpoSettings):
    """Stage 2: pairs of stage 1 beside benign ones, against refusals of harmless prompts."""

    ratio: float = 0.5  # harmful to benign pairs (the paper: 0.3, 0.5 or 0.7)
    keep_all: bool = (
        False  # keep every pair, weights make the ratio; else the larger side is thinned
    )
    min_refusals: int = 8  # benign pairs below which stage 2 is left out
    benign_draws: int = 4  # responses of the stage-1 model to a benign prompt, until one refuses
    # Where none refuses: sample one after a safety trigger at the start of the trace.
    refusing_prefix: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benign_draws < 1:
            raise BadInput(
                f"stage2: benign_draws {self.benign_draws} draws nothing; give at least 1"
            )


def losses(
    policy: Tensor,
    reference: Tensor,
    counts: Tensor,
    weight: Tensor,
    settings: DpoSettings,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The preference loss and the SFT loss of a batch, in nats.

    Args:
        policy: sums of log-probabilities by (chosen, rejected, prefix) [pairs, 3].
        reference: the same of the model without its adapter [pairs, 3].
        counts: how many tokens are in each sum [pairs, 3].
        weight: weight of each pair's preference loss [pairs].
        settings: loss, beta, and what each loss reads.
        shares: where several processes share a batch, the weights of each pair and of each of its
            chosen tokens [pairs, 2]; they replace the two means (``processes.Share``).

    Returns:
        (weighted mean over pairs, or 0 with loss "sft"; mean over the chosen sides' tokens).
    """
    # SFT: NLL of the chosen sides.
    chosen_logps = _by_side(policy, settings.sft_scope)[:, 0]  # [pairs]
    if shares is None:
        chosen_counts = _by_side(counts, settings.sft_scope)[:, 0]
        nll = -chosen_logps.sum() / chosen_counts.sum()
    else:
        nll = -(chosen_logps * shares[:, 1]).sum()
    if settings.loss == SFT:
        return 0 * nll, nll

    # Preference (Eq. 4).
    preference_loss = PREFERENCE_LOSSES[settings.loss]
    pair_losses = weight * preference_loss(
        _by_side(policy, settings.scope),
        _by_side(reference, settings.scope),
        _by_side(counts, settings.scope),
        settings.beta,
    )  # [pairs]
    if shares is None:
        return pair_losses.mean(), nll
    return (pair_losses * shares[:, 0]).sum(), nll


def _by_side(table: Tensor, scope: str) -> Tensor:
    """Both sides of a table [pairs, 2]; with scope "whole" the prefix is added to each."""
    sides, prefix = table[:, :2], table[:, 2:]
    return sides + prefix if scope == WHOLE else sides
