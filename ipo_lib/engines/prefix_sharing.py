"""DPO batches in which a prefix is read once: a row is a tree of one prefix, one rejected leaf and the chosen leaves of all pairs
that share both. Each leaf sees the prefix and itself, at positions that go on from the prefix's end, so that every
log-probability is what a forward of its own would give; the LM head reads scored positions only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ipo_lib.chat import parsed
from ipo_lib.dpo import DpoSettings, losses
from ipo_lib.engines import processes
from ipo_lib.engines.decoding import ARCHITECTURES
from ipo_lib.engines.lora import (
    Batches,
    Diverged,
    Folder,
    arguments,
    base,
    config,
    fill,
    on_one_gpu,
)
from ipo_lib.records import BadInput, Pair

HEAD = 2048  # scored positions whose logits are held at once
SIDES = ("chosen", "rejected")
Batch = dict[str, Tensor]


def collate(pairs: Sequence[Pair], settings: DpoSettings, at: Sequence[int] = ()) -> Batch:
    """The trees of ``pairs``: ``ids``, ``positions`` [trees, length], ``mask`` [trees, 1, length, length] (True: seen); of every
    scored token its ``row``, the ``place`` that predicts it, its ``target``, its ``segment`` (a leaf, or the response
    part of a prefix) and whether it is ``kept`` in the sums [scored]; of every pair the segments of (chosen,
    rejected, prefix) as ``sides`` [pairs, 3], its ``weight``, and the ``index`` given in ``at`` [pairs]."""
    members: dict[Any, list[int]] = {}
    for place, pair in enumerate(pairs):
        members.setdefault((pair.prompt_ids, pair.rejected_ids, pair.h), []).append(place)
    compared, whole, size = (
        settings.loss != "sft",
        "whole" in (settings.scope, settings.sft_scope),
        settings.pad_to_multiple_of,
    )
    rows, leaves_of, scored, segments = [], [], list[tuple[int, ...]](), 0
    sides = [[0, 0, 0] for _ in pairs]
    for row, ((prefix, rejected, h), own) in enumerate(members.items()):
        ids, leaf_of = [*prefix], [0] * len(prefix)
        stem, segments = segments, segments + 1
        if whole:
            scored += [
                (row, j - 1, prefix[j], stem, 1) for j in range(len(prefix) - h, len(prefix))
            ]
        leaves = [(rejected, 0, -1)] * compared + [
            (pairs[p].chosen_ids, 0 if settings.score_trigger else pairs[p].given, p) for p in own
        ]
        for number, (leaf, given, owner) in enumerate(leaves, 1):
            scored += [
                (row, len(ids) + k - 1 if k else len(prefix) - 1, token, segments, int(k >= given))
                for k, token in enumerate(leaf)
            ]
            ids += leaf[:-1]  # nothing reads the last token
            leaf_of += [number] * (len(leaf) - 1)
            for place in own if owner < 0 else [owner]:
                sides[place][1 if owner < 0 else 0], sides[place][2] = segments, stem
            segments += 1
        rows.append(ids)
        leaves_of.append((len(prefix), leaf_of))
    length = -(-max(map(len, rows)) // size) * size
    leaf = torch.full((len(rows), length), -1)
    for row, (_, numbers) in enumerate(leaves_of):
        leaf[row, : len(numbers)] = torch.tensor(numbers)
    before = torch.ones(length, length, dtype=torch.bool).tril()
    shared = (leaf[:, None, :] == 0) | (leaf[:, None, :] == leaf[:, :, None])
    mask = (before & shared) | torch.eye(length, dtype=torch.bool)  # padding sees itself
    starts = torch.stack(
        [_starts(own, prefix) for own, (prefix, _) in zip(leaf, leaves_of, strict=True)]
    )
    names = ("row", "place", "target", "segment", "kept")
    columns = torch.tensor(scored).T
    return {
        "ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "positions": torch.arange(length) - starts,
        "mask": mask[:, None],
        **dict(zip(names, columns, strict=True)),
        "sides": torch.tensor(sides),
        "segments": torch.tensor(segments),
        "weight": torch.tensor([pair.weight for pair in pairs]),
        "index": torch.tensor([*at] or [*range(len(pairs))]),
    }


def _starts(leaf: Tensor, prefix: int) -> Tensor:
    """What to take off every place of a row, so that each leaf's positions go on from the prefix's end."""
    first = torch.cat([torch.tensor([True]), leaf[1:] != leaf[:-1]])
    begun = torch.where(first, torch.arange(len(leaf)), 0).cummax(0).values
    return torch.where(leaf > 0, begun - prefix, torch.where(leaf < 0, begun, 0))


class Scorer(nn.Module):
    """A causal LM that answers a ``Batch`` with the log-probability of every scored token, in float32 [scored]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The trainer asks the model that it was given; the layers are those of the base model."""
        self.model.get_base_model().activation_checkpointing_enable(**options)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        row: Tensor,
        place: Tensor,
        target: Tensor,
        **_: Tensor,
    ) -> Tensor:
        """One pass over the trees; ``HEAD`` positions of logits at a time, made again in the backward pass where there are
        more."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = inner.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        head = inner.get_output_embeddings()

        def score(read: Tensor, tokens: Tensor) -> Tensor:
            return -functional.cross_entropy(head(read).float(), tokens, reduction="none")

        read = hidden[row, place]
        if len(read) <= HEAD:
            return score(read, target)
        parts = zip(torch.split(read, HEAD), torch.split(target, HEAD), strict=True)
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])


def sums(logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums and counts of the kept tokens' log-probabilities by (chosen, rejected, prefix) of every pair [pairs, 3]."""
    total, count = (torch.zeros(int(batch["segments"]), device=logps.device) for _ in range(2))
    kept = batch["kept"].to(logps.dtype)
    total = total.index_add(0, batch["segment"], logps * kept).float()
    return total[batch["sides"]], count.index_add(0, batch["segment"], kept)[batch["sides"]]


class Keys:
    """A data set whose rows are their own keys: ``collate`` knows the pairs."""

    def __getitem__(self, key: Any) -> Any:
        return key


class Spread:
    """The batches of one process of several, as a batch sampler; another order each epoch."""

    def __init__(self, pairs: Sequence[Pair], settings: DpoSettings) -> None:
        self.settings, self.tokens = settings, [_sft_tokens(pair, settings) for pair in pairs]
        self.order = Batches(len(pairs), settings.batch_size, settings.seed)
        self.forwards = len(list(self._shares(list(range(len(pairs))))))

    def __len__(self) -> int:
        return self.forwards

    def __iter__(self) -> Iterator[list[tuple[int, float, float]]]:
        for share in self._shares(list(self.order)):
            yield list(zip(share.pairs, share.of_pairs, share.of_tokens, strict=True))

    def _shares(self, order: list[int]) -> Iterator[processes.Share]:
        size = self.settings.batch_size
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        return processes.shares(
            batches,
            self.tokens,
            size,
            self.settings.accumulation,
            processes.count(),
            processes.rank(),
        )


def _sft_tokens(pair: Pair, settings: DpoSettings) -> int:
    """How many tokens of a pair's chosen side the SFT loss is a mean of."""
    unscored = 0 if settings.score_trigger else min(pair.given, len(pair.chosen_ids))
    stem = pair.h if settings.sft_scope == "whole" else 0
    return len(pair.chosen_ids) - unscored + stem


class PrefixTrainer(transformers.Trainer):
    """transformers' trainer on trees. The reference is the model without its adapter, read at a pair's first step and kept."""

    def __init__(
        self,
        model: Any,
        pairs: Sequence[Pair],
        settings: DpoSettings,
        args: transformers.TrainingArguments,
    ) -> None:
        self.pairs, self.settings = pairs, settings
        super().__init__(
            Scorer(model), args, train_dataset=range(len(pairs)), data_collator=self.batch
        )
        self.model_accepts_loss_kwargs = False  # else accumulated losses would be summed
        self.reference = torch.full((len(pairs), 3), torch.nan, device=args.device)
        self.seen: list[dict[str, float]] = []
        self.good: dict[str, Tensor] = {}

    def batch(self, at: Sequence[Any]) -> Batch:
        """The trees of some pairs, given by place, or by place and the two weights of their share."""
        if not isinstance(at[0], tuple):
            return collate([self.pairs[one] for one in at], self.settings, at)
        places = [place for place, _, _ in at]
        shares = torch.tensor([weights for _, *weights in at])
        return collate([self.pairs[one] for one in places], self.settings, places) | {
            "shares": shares
        }

    def get_train_dataloader(self) -> Any:
        """This process's share of every batch; accelerate's own sharding would make other batches."""
        if processes.count() == 1:
            return super().get_train_dataloader()
        rows: Any = Keys()
        spread: Any = Spread(self.pairs, self.settings)
        return torch.utils.data.DataLoader(rows, batch_sampler=spread, collate_fn=self.batch)

    def _get_train_sampler(self, *given: Any) -> Any:
        batches = Batches(len(self.pairs), self.settings.batch_size, self.settings.seed)
        return batches if self.settings.length_buckets else super()._get_train_sampler(*given)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch; what it was made of waits for ``log``."""
        compared, at = self.settings.loss != "sft", inputs["index"]
        if compared and bool(self.reference[at].isnan().any()):
            alone = self.accelerator.unwrap_model(model)  # the other processes do not read it now
            with torch.no_grad(), self._without_adapter():
                self.reference[at] = sums(alone(**inputs), inputs)[0]
        policy, counts = sums(model(**inputs), inputs)
        shares = inputs.get("shares")
        preference, nll = losses(
            policy, self.reference[at], counts, inputs["weight"], self.settings, shares
        )
        loss = preference + (self.settings.sft_weight if compared else 1.0) * nll
        if not bool(self.accelerator.gather(loss.detach().reshape(1)).isfinite().all()):
            raise Diverged(f"{float(loss)} at step {self.state.global_step + 1}")
        if not self.seen:  # the first batch of a step
            lora = {name: value for name, value in model.named_parameters() if value.requires_grad}
            self.good = {name: value.detach().to("cpu", copy=True) for name, value in lora.items()}
        own = (
            torch.full((len(at), 1), 1 / len(at), device=policy.device)
            if shares is None
            else shares[:, :1]
        )
        logps, reference = (
            (own * each[:, :2]).sum(0) for each in (policy.detach(), self.reference[at])
        )
        found = {f"logps/{side}": logps[place] for place, side in enumerate(SIDES)}
        if compared:
            found |= {f"ref_logps/{side}": reference[place] for place, side in enumerate(SIDES)}
        self.seen.append(
            {name: float(value) for name, value in found.items()} | {"nll": float(nll.detach())}
        )
        return loss

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """The model without its adapter."""
        with self.accelerator.unwrap_model(self.model).model.disable_adapter():
            yield

    def log(self, logs: dict[str, float], *given: Any, **options: Any) -> None:
        """Add the means of what the step's batches were made of."""
        if self.seen and "loss" in logs:
            means = {
                name: sum(one[name] for one in self.seen) / len(self.seen) for name in self.seen[0]
            }
            if processes.count() > 1:
                numbers = torch.tensor(
                    [*means.values()], device=self.args.device, dtype=torch.float64
                )
                together = self.accelerator.reduce(numbers, "mean").tolist()
                means = dict(zip(means, together, strict=True))
            logs |= means
            self.seen.clear()
        super().log(logs, *given, **options)

    def restore(self) -> None:
        """Put back the adapter that gave the last finite loss."""
        for name, value in self.accelerator.unwrap_model(self.model).named_parameters():
            if name in self.good:
                value.data.copy_(self.good[name])


def trainer(
    pairs: Sequence[Pair],
    folder: Folder,
    settings: DpoSettings,
    out: Folder,
    adapter: Folder | None,
) -> tuple[Any, Any]:
    """The trainer and its LoRA model, fresh or at the weights of ``adapter``."""
    from peft import get_peft_model

    if processes.count() > 1 and not settings.length_buckets:
        raise BadInput(
            "dpo: length_buckets false in several processes; set it to true, or train in one"
        )
    family = str(parsed(Path(folder) / "config.json").get("model_type"))
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(
            f"dpo: engine shared knows the masks of {known}, not of {family!r}; set engine to trl"
        )
    args = on_one_gpu(transformers.TrainingArguments(**arguments(settings, out)))
    transformers.set_seed(settings.seed)
    model = get_peft_model(base(folder, settings, args.device), config(folder, settings, adapter))
    fill(model, adapter, folder)
    if settings.activation_checkpointing:
        model.enable_input_require_grads()
    made = PrefixTrainer(model, pairs, settings, args)
    made.remove_callback(transformers.PrinterCallback)
    return made, model
