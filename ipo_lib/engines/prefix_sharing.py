"""A DPO trainer that reads a shared prefix once (Eq. 4 on the trees of ``ipo_lib.engines.trees``).

The policy is the model with its LoRA adapter, the reference is the model without it. The reference
is read at a pair's first step and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipo_lib.chat import read_json
from ipo_lib.dpo import SFT, WHOLE, DpoSettings, losses
from ipo_lib.engines import processes
from ipo_lib.engines.decoding import ARCHITECTURES
from ipo_lib.engines.lora import (
    SIDES,
    BucketSampler,
    Diverged,
    Folder,
    Pairs,
    limit_to_one_gpu,
    load_base,
    load_weights,
    make_config,
    trainer_arguments,
)
from ipo_lib.engines.trees import Batch, Scorer, collate, has_block_kernels, sum_logps
from ipo_lib.records import BadInput, Pair

REFERENCE = (
    "reference.safetensors"  # in a checkpoint: the reference's sums of the pairs read so far
)


class IndexRows:
    """A data set whose rows are their own keys: the collator knows the pairs."""

    def __getitem__(self, key: Any) -> Any:
        """The key."""
        return key


class ShareSampler:
    """The batches of one of several processes, with their weights; another order each epoch."""

    def __init__(self, pairs: Pairs, settings: DpoSettings) -> None:
        self.settings = settings
        self.tokens = [_sft_tokens(pair, settings) for pair in pairs]
        self.order = BucketSampler(len(pairs), settings.batch_size, settings.seed)
        self.forwards = len(list(self._shares(range(len(pairs)))))

    def __len__(self) -> int:
        return self.forwards

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch whose batches come next, from 0."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[tuple[int, float, float]]]:
        for share in self._shares(list(self.order)):
            yield [(index, share.pair_weight, share.token_weight) for index in share.indices]

    def _shares(self, order: Sequence[int]) -> Iterator[processes.Share]:
        size = self.settings.batch_size
        return processes.shares(
            [order[start : start + size] for start in range(0, len(order), size)],
            self.tokens,
            size,
            self.settings.accumulation,
            processes.count(),
            processes.rank(),
        )


class ShareLoader(torch.utils.data.DataLoader[Any]):
    """A loader of shares, which the trainer tells the number of the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch whose batches come next, from 0."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def _sft_tokens(pair: Pair, settings: DpoSettings) -> int:
    """How many tokens of a pair the SFT loss reads."""
    left_out = 0 if settings.score_trigger else min(pair.given, len(pair.chosen_ids))
    prefix = pair.h if settings.sft_scope == WHOLE else 0
    return len(pair.chosen_ids) - left_out + prefix


class PrefixTrainer(transformers.Trainer):
    """transformers' trainer on trees."""

    def __init__(self, model: Any, pairs: Pairs, settings: DpoSettings, arguments: Any) -> None:
        self.pairs = pairs
        self.settings = settings
        rows: Any = range(len(pairs))
        blocks = has_block_kernels(model, arguments.device)
        super().__init__(
            Scorer(model, blocks), arguments, train_dataset=rows, data_collator=self.make_batch
        )
        self.model_accepts_loss_kwargs = False  # else accumulated losses would be summed
        # The reference's sums by (chosen, rejected, prefix); nan: not read yet.
        self.reference = torch.full((len(pairs), 3), torch.nan, device=arguments.device)
        self.logged: list[dict[str, float]] = []  # by batch of the current step
        self.last_good: dict[str, Tensor] = {}  # LoRA weights before the current step

    def make_batch(self, rows: Sequence[Any]) -> Batch:
        """The trees of some pairs: of their indices, or of (index, weight, weight of a token)."""
        if not isinstance(rows[0], tuple):
            return collate([self.pairs[index] for index in rows], self.settings, rows)
        indices = [index for index, _, _ in rows]
        batch = collate([self.pairs[index] for index in indices], self.settings, indices)
        batch["shares"] = torch.tensor([weights for _, *weights in rows])
        return batch

    def get_train_dataloader(self) -> Any:
        """Batches of this process's shares; accelerate's own sharding would make other batches."""
        if processes.count() == 1:
            return super().get_train_dataloader()
        rows: Any = IndexRows()
        sampler: Any = ShareSampler(self.pairs, self.settings)
        return ShareLoader(rows, batch_sampler=sampler, collate_fn=self.make_batch)

    def _get_train_sampler(self, *arguments: Any) -> Any:
        if not self.settings.length_buckets:
            return super()._get_train_sampler(*arguments)
        return BucketSampler(len(self.pairs), self.settings.batch_size, self.settings.seed)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch, as the trainer asks for it; its parts are kept for ``log``.

        Args:
            model: the scorer, as wrapped by accelerate.
            inputs: the batch.
            return_outputs: not used.
            num_items_in_batch: not used.

        Raises:
            Diverged: the loss is not a number.
        """
        settings, indices, shares = self.settings, inputs["index"], inputs.get("shares")
        sft_weight = 1.0 if settings.loss == SFT else settings.sft_weight

        # 1. The reference of pairs that are read for the first time.
        if settings.loss != SFT and bool(self.reference[indices].isnan().any()):
            self.reference[indices] = self._read_reference(model, inputs)
        reference = self.reference[indices]

        # 2. The losses.
        policy, counts = sum_logps(model(**inputs), inputs)
        preference, nll = losses(policy, reference, counts, inputs["weight"], settings, shares)
        loss = preference + sft_weight * nll

        # 3. At the first batch of a step the weights are those of the last finite loss.
        if not bool(self.accelerator.gather(loss.detach().reshape(1)).isfinite().all()):
            raise Diverged(f"{float(loss)} at step {self.state.global_step + 1}")
        if not self.logged:
            for name, value in model.named_parameters():
                if value.requires_grad:
                    self.last_good[name] = value.detach().to("cpu", copy=True)

        # 4. Means over the batch, for the log.
        weights = torch.full((len(policy), 1), 1 / len(policy), device=policy.device)
        if shares is not None:
            weights = shares[:, :1]
        row = _means_by_side("logps", policy.detach(), weights)
        if settings.loss != SFT:
            row |= _means_by_side("ref_logps", reference, weights)
        self.logged.append(row | {"nll": float(nll.detach())})
        return loss

    def _read_reference(self, model: Any, inputs: Batch) -> Tensor:
        scorer = self.accelerator.unwrap_model(model)  # not every process reads it at this step
        with torch.no_grad(), scorer.model.disable_adapter():
            return sum_logps(scorer(**inputs), inputs)[0]

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the means over the step's batches."""
        if self.logged and "loss" in logs:
            means = {}
            for name in self.logged[0]:
                means[name] = sum(row[name] for row in self.logged) / len(self.logged)
            logs |= self._mean_over_processes(means)
            self.logged.clear()
        super().log(logs, *arguments, **options)

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        if processes.count() == 1:
            return values
        numbers = torch.tensor(list(values.values()), device=self.args.device, dtype=torch.float64)
        means = self.accelerator.reduce(numbers, "mean").tolist()
        return dict(zip(values, means, strict=True))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what a checkpoint holds of the model: LoRA, and the reference's sums so far."""
        if output_dir and self.args.should_save:
            self._lora().save_pretrained(output_dir, save_embedding_layers=False)
            save_file({"sums": self.reference}, Path(output_dir) / REFERENCE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self._lora(), resume_from_checkpoint, resume_from_checkpoint)
        sums = load_file(Path(resume_from_checkpoint) / REFERENCE)["sums"]
        self.reference = sums.to(self.args.device)

    def _lora(self) -> Any:
        return self.accelerator.unwrap_model(self.model).model

    def restore(self) -> None:
        """Put back the adapter that gave the last finite loss."""
        for name, value in self.accelerator.unwrap_model(self.model).named_parameters():
            if name in self.last_good:
                value.data.copy_(self.last_good[name])


def _means_by_side(name: str, sums: Tensor, weights: Tensor) -> dict[str, float]:
    """Weighted means over pairs of the chosen and of the rejected column of ``sums`` [pairs, 3]."""
    means = (weights * sums[:, : len(SIDES)]).sum(0).tolist()
    return {f"{name}/{side}": mean for side, mean in zip(SIDES, means, strict=True)}


def make_trainer(
    pairs: Pairs, folder: Folder, settings: DpoSettings, out: Folder, adapter: Folder | None
) -> tuple[Any, Any]:
    """Make the trainer and its LoRA model.

    Args:
        pairs: in the order in which neighbours make a batch.
        folder: of the base model.
        settings: of the stage.
        out: the trainer's folder.
        adapter: folder of an adapter to go on from; None: a fresh one.

    Returns:
        (trainer, PEFT model).

    Raises:
        BadInput: the model's attention is not known, or the pairs have no fixed batches to share.
    """
    if processes.count() > 1 and not settings.length_buckets:
        raise BadInput(
            "dpo: length_buckets false in several processes; set it to true, or train in one"
        )
    family = str(read_json(Path(folder) / "config.json").get("model_type"))
    if family not in ARCHITECTURES:
        raise BadInput(
            f"dpo: engine shared knows the masks of {', '.join(ARCHITECTURES)}, not of {family!r}; "
            "set engine to trl"
        )
    from peft import get_peft_model

    arguments = limit_to_one_gpu(transformers.TrainingArguments(**trainer_arguments(settings, out)))
    transformers.set_seed(settings.seed)
    base = load_base(folder, settings, arguments.device)
    model = get_peft_model(base, make_config(folder, settings, adapter))
    load_weights(model, adapter, folder)
    if settings.activation_checkpointing:
        model.enable_input_require_grads()
    trainer = PrefixTrainer(model, pairs, settings, arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, model
