"""Stock TRL's DPO trainer on the ids, LoRA and arguments of ``prefix_sharing``: its reference."""

from __future__ import annotations

from typing import Any

import datasets
import transformers
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ipo_lib.dpo import SFT, DpoSettings
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


class IdsTrainer(DPOTrainer):
    """TRL's trainer on token ids, with the batches and the log of ``prefix_sharing``."""

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

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # the rows are ids already; TRL would tokenize text again

    def _get_train_sampler(self, *arguments: Any) -> Any:
        if not self.settings.length_buckets:
            return super()._get_train_sampler(*arguments)
        return BucketSampler(self.pair_count, self.settings.batch_size, self.settings.seed)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report every run to the hub."""

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the reference's log-probabilities, which TRL logs as rewards only."""
        super().log(logs, *arguments, **options)
        row = self.state.log_history[-1]
        if "rewards/chosen" in row:
            for side in SIDES:
                logratio = row[f"rewards/{side}"] / self.settings.beta
                row[f"ref_logps/{side}"] = row[f"logps/{side}"] - logratio


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
    arguments = DPOConfig(
        # Never TRL's loss of this method's name: that is Identity Preference Optimization.
        loss_type=[settings.loss, SFT],
        loss_weights=[1.0, settings.sft_weight],
        beta=settings.beta,
        max_length=None,  # longer pairs are left out before; TRL would cut them silently
        disable_dropout=settings.dropout == 0,  # TRL's default also disables LoRA's dropout
        pad_to_multiple_of=settings.pad_to_multiple_of,
        **trainer_arguments(settings, out),
    )
    arguments = limit_to_one_gpu(arguments)
    datasets.disable_progress_bars()
    trainer = IdsTrainer(
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
