"""Stock TRL as the reference of ``prefix_sharing``: its DPO trainer on the same ids, LoRA and arguments, prompts read twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import datasets
import transformers
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import processes
from ipo_lib.engines.lora import Batches, Folder, arguments, base, config, fill, on_one_gpu
from ipo_lib.records import BadInput, Pair

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def trainer(
    pairs: Sequence[Pair],
    folder: Folder,
    settings: DpoSettings,
    out: Folder,
    adapter: Folder | None,
) -> tuple[Any, Any]:
    """TRL's trainer and its LoRA model, fresh or at the weights of ``adapter``."""

    class IdsTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # law 1: the rows are ids already; TRL would tokenize text again

        def _get_train_sampler(self, *given: Any) -> Any:
            batches = Batches(len(pairs), settings.batch_size, settings.seed)
            return batches if settings.length_buckets else super()._get_train_sampler(*given)

        def _send_telemetry(self) -> None:
            """TRL reports every run to the hub; this package works offline."""

        def log(self, logs: dict[str, float], *given: Any, **options: Any) -> None:
            super().log(logs, *given, **options)
            for entry in filter(lambda one: "rewards/chosen" in one, self.state.log_history[-1:]):
                ratios = {
                    side: entry[f"rewards/{side}"] / settings.beta
                    for side in ("chosen", "rejected")
                }
                entry.update(
                    {
                        f"ref_logps/{side}": entry[f"logps/{side}"] - ratio
                        for side, ratio in ratios.items()
                    }
                )

    if processes.count() > 1:
        raise BadInput(
            "dpo: engine trl trains in one process; set engine to shared, or start without a launcher"
        )
    datasets.disable_progress_bars()
    args = on_one_gpu(
        DPOConfig(
            # CHOICES leaves one of TRL's losses out: that is Identity Preference Optimization, a squared loss, not this method.
            loss_type=[settings.loss, "sft"],
            loss_weights=[1.0, settings.sft_weight],
            beta=settings.beta,
            max_length=None,  # dpo.train has counted the long ones out; TRL would cut them silently
            disable_dropout=settings.dropout
            == 0,  # TRL's default silences LoRA's dropout with the rest
            pad_to_multiple_of=settings.pad_to_multiple_of,
            **arguments(settings, out),
        )
    )
    rows = datasets.Dataset.from_list(
        [{key: list(getattr(pair, key)) for key in IDS} for pair in pairs]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with mock.patch.dict(os.environ, TQDM_DISABLE="1"):
        made: Any = IdsTrainer(
            base(folder, settings, args.device),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config(folder, settings, adapter),
        )
    made.remove_callback(transformers.PrinterCallback)
    # Handed a PeftModel, TRL freezes a copy of it as the reference. So LoRA starts fresh (the reference is LoRA off, in stage 2
    # too), and the weights are put in afterwards. TRL also rounds a QLoRA adapter to bf16.
    fill(made.model, adapter, folder)
    return made, made.model
