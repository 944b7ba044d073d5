"""Stock TRL's trainers on the ids, LoRA and arguments of ``prefix_sharing``.

DPO is the reference that ``prefix_sharing`` is compared with. KTO (arXiv 2402.01306) reads the two
sides of a pair as two examples, a desirable and an undesirable one.
"""

from __future__ import annotations

import random
from typing import Any

import datasets
import transformers
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from ipo_lib.dpo import KTO, SFT, DpoSettings
from ipo_lib.engines import processes
from ipo_lib.engines.lora import (
    SIDES,
    BucketSampler,
    Folder,
    Pairs,
    limit_to_one_gpu,
    load_base,
    load_weights,
    make_config,
    trainer_arguments,
)
from ipo_lib.records import BadInput


class IdsMixin:
    """What our trainers share: rows are ids already, nothing is reported, references are logged."""

    beta: float  # of the settings

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # TRL would tokenize text again

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report every run to the hub."""

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the reference's log-probabilities, which TRL logs as rewards only."""
        super().log(logs, *arguments, **options)  # type: ignore[misc]
        row = self.state.log_history[-1]  # type: ignore[attr-defined]
        for side in SIDES:
            if f"rewards/{side}" in row:
                logratio = row[f"rewards/{side}"] / self.beta
                row[f"ref_logps/{side}"] = row[f"logps/{side}"] - logratio


class IdsTrainer(IdsMixin, DPOTrainer):
    """TRL's DPO trainer on token ids, with the batches of ``prefix_sharing``."""

    def __init__(self, pairs: Pairs, settings: DpoSettings, **options: Any) -> None:
        self.settings = settings
        self.pair_count = len(pairs)
        rows = []
        for pair in pairs:
            rows.append(
                {
                    "prompt_ids": list(pair.prompt_ids),
                    "chosen_ids": list(pair.chosen_ids),
                    "rejected_ids": list(pair.rejected_ids),
                }
            )
        super().__init__(train_dataset=datasets.Dataset.from_list(rows), **options)

    def _get_train_sampler(self, *arguments: Any) -> Any:
        if not self.settings.length_buckets:
            return super()._get_train_sampler(*arguments)
        return BucketSampler(self.pair_count, self.settings.batch_size, self.settings.seed)


class IdsKtoTrainer(IdsMixin, KTOTrainer):
    """TRL's KTO trainer on token ids; a batch holds both sides of its pairs."""

    def __init__(self, pairs: Pairs, settings: DpoSettings, **options: Any) -> None:
        rows = unpaired_rows(pairs, settings.batch_size, settings.seed)
        super().__init__(train_dataset=datasets.Dataset.from_list(rows), **options)


def unpaired_rows(pairs: Pairs, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """Two rows of every pair for KTO, in the order in which they are read.

    KTO measures how far the policy has moved by completions of other prompts. So a row also has the
    completion of the pair before it in its batch; the pairs are in random order.

    Args:
        pairs: training data.
        batch_size: pairs of a batch. Its chosen sides come first, then its rejected sides.
        seed: of the order.
    """
    ordered = random.Random(seed).sample(list(pairs), len(pairs))
    rows = []
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        for side in SIDES:
            completions = [list(getattr(pair, f"{side}_ids")) for pair in batch]
            for number, pair in enumerate(batch):
                rows.append(
                    {
                        "prompt_ids": list(pair.prompt_ids),
                        "completion_ids": completions[number],
                        "KL_completion_ids": completions[number - 1],
                        "label": side == "chosen",
                    }
                )
    return rows


def make_trainer(
    pairs: Pairs, folder: Folder, settings: DpoSettings, out: Folder, adapter: Folder | None
) -> tuple[Any, Any]:
    """Make TRL's trainer and its LoRA model.

    Args:
        pairs: in the order in which neighbours make a batch.
        folder: of the base model.
        settings: of the stage.
        out: the trainer's folder.
        adapter: folder of an adapter to go on from; None: a fresh one.

    Returns:
        (trainer, PEFT model).

    Raises:
        BadInput: a launcher started several processes.
    """
    if processes.count() > 1:
        raise BadInput(
            "dpo: engine trl trains in one process; set engine to shared, "
            "or start without a launcher"
        )
    shared = {
        "beta": settings.beta,
        "max_length": None,  # longer pairs are left out before; TRL would cut them silently
        "disable_dropout": settings.dropout == 0,  # TRL's default also disables LoRA's dropout
        "pad_to_multiple_of": settings.pad_to_multiple_of,
        **trainer_arguments(settings, out),
    }
    arguments: Any
    kind: type[IdsTrainer] | type[IdsKtoTrainer]
    if settings.loss == KTO:
        shared["per_device_train_batch_size"] *= 2  # both sides of a pair
        kind, arguments = IdsKtoTrainer, KTOConfig(loss_type=KTO, **shared)
    else:
        # Never TRL's loss of this method's name: that is Identity Preference Optimization.
        weights = [1.0, settings.sft_weight]
        kind = IdsTrainer
        arguments = DPOConfig(loss_type=[settings.loss, SFT], loss_weights=weights, **shared)
    arguments = limit_to_one_gpu(arguments)
    datasets.disable_progress_bars()
    trainer = kind(
        pairs,
        settings,
        model=load_base(folder, settings, arguments.device),
        args=arguments,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        peft_config=make_config(folder, settings, adapter),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    # Given a PeftModel, TRL takes a frozen copy of it as the reference. So LoRA starts fresh, the
    # reference is the model without LoRA, in stage 2 too, and weights are loaded afterwards. That
    # also undoes TRL's rounding of a QLoRA adapter to bf16.
    load_weights(trainer.model, adapter, folder)
    return trainer, trainer.model
