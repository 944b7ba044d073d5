"""LoRA adapters: the frozen base model, the adapter's weights, batches, and what a training writes.

Both trainers of Eq. 4 (``prefix_sharing`` and ``trl_trainer``) and GRPO are built from these parts.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import memory, processes
from ipo_lib.engines.loading import load_causal_lm
from ipo_lib.records import BadInput, Ids, Pair, canonical

Folder = Path | str
Rows = list[dict[str, float]]  # metrics, one row per step
Pairs = Sequence[Pair]

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file
METRICS = "metrics.jsonl"  # one row per step
SUMMARY = "training.json"  # settings and counts
SIDES = ("chosen", "rejected")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


class Untrainable(BadInput):
    """A training gives no adapter: no pairs that fit, too few for a step, or a loss that is nan."""


class Diverged(ArithmeticError):
    """The loss of a step is not a number."""


def common_arguments(settings: DpoSettings, out: Folder) -> dict[str, Any]:
    """Arguments of every trainer: defaults of transformers that matter are set here."""
    import torch

    return {
        "output_dir": str(out),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # by default a nan is logged as the last finite loss
        "weight_decay": settings.weight_decay,
        "activation_checkpointing": settings.activation_checkpointing,
        "bf16": settings.dtype == "bfloat16",
        "dataloader_pin_memory": False,
        "use_cpu": settings.use_cpu or not torch.cuda.is_available(),
    }


def trainer_arguments(settings: DpoSettings, out: Folder) -> dict[str, Any]:
    """Arguments of both trainers of Eq. 4."""
    batch_size, accumulation = processes.split(
        settings.batch_size, settings.accumulation, processes.count()
    )
    return common_arguments(settings, out) | {
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,  # below 1: a share of the steps
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # no buffer changes
        "seed": settings.seed,
    }


def limit_to_one_gpu(arguments: Any) -> Any:
    """The trainer's arguments, for one GPU per process.

    Without a launcher the trainer would copy the model to every GPU it sees and cut each batch in
    rows, which neither a batch of trees nor 4-bit weights survive.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def silence_libraries() -> None:
    """Silence warnings of one library about another, about which a user can do nothing."""
    # bitsandbytes wants an optional kernel.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PEFT asks transformers for the first of these, accelerate asks torch for the second.
    for name in ("is_gradient_checkpointing", "broadcast_buffers"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated")
    # PEFT looks for the base model under its name, where a trainer writes a checkpoint.
    warnings.filterwarnings("ignore", message="Could not find a config file in")


def load_base(folder: Folder, settings: DpoSettings, device: Any) -> Any:
    """Load the model to be trained, in NF4 where the settings say so."""
    import transformers

    silence_libraries()
    memory.release_all(str(device))  # models that sampled give their GPU memory back
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": settings.dtype}
    if quantization(settings):
        options["quantization_config"] = NF4 | {"bnb_4bit_compute_dtype": settings.dtype}
        options["device_map"] = device
    model = load_causal_lm(folder, **options)
    # In eval mode bitsandbytes repacks NF4 weights at the first CPU forward, that of the reference.
    # After that no gradient passes them, so train() is needed here.
    return model.train()


def make_config(folder: Folder, settings: DpoSettings, adapter: Folder | None) -> Any:
    """The LoRA config by the settings; with ``adapter`` by its rank and targets.

    Raises:
        BadInput: the adapter was made for another model.
    """
    from peft import LoraConfig

    if adapter:
        config = LoraConfig.from_pretrained(str(adapter))
        adapter_base = Path(config.base_model_name_or_path or "").name
        base = Path(folder).name
        if adapter_base not in ("", base):
            raise BadInput(
                f"dpo: adapter {adapter} was made for model {adapter_base!r}, not for {base!r}; "
                "train one for this model"
            )
    else:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=settings.targets,
            task_type="CAUSAL_LM",
        )
    config.lora_dropout = settings.dropout
    config.inference_mode = False
    config.base_model_name_or_path = str(folder)
    return config


def load_weights(model: Any, adapter: Folder | None, folder: Folder) -> None:
    """Turn the model's LoRA to float32, and load the weights of ``adapter`` where there is one.

    In 16 bits small steps would be rounded away.

    Raises:
        BadInput: the adapter's weights do not fit the model in ``folder``.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not adapter:
        return
    try:
        weights = load_peft_weights(str(adapter), device="cpu")
        result: Any = set_peft_model_state_dict(model, weights)
        fits = not result.unexpected_keys
    except RuntimeError:  # the layers have another width
        fits = False
    if not fits:
        raise BadInput(
            f"dpo: adapter {adapter} was made for another model than {folder}; "
            "train one for this model"
        )


def save_adapter(lora: Any, target: Path, base: str) -> None:
    """Write an adapter and its config: no checkpoint, optimizer, pickle or generated model card.

    Args:
        lora: the PEFT model.
        target: folder to write to.
        base: name of the base model; a path would tie the adapter to this machine.
    """
    config = lora.peft_config["default"]
    config.base_model_name_or_path = base
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # the order of a set varies
    lora.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)


def write_results(lora: Any, out: Path, rows: Rows, base: str, summary: Mapping[str, Any]) -> None:
    """Write what a training leaves: the adapter, its metrics rows and its summary.

    Args:
        lora: the PEFT model.
        out: folder to write to.
        rows: metrics, one row per step.
        base: name of the base model.
        summary: settings and counts.
    """
    save_adapter(lora, out, base)
    (out / METRICS).write_text("".join(canonical(row) + "\n" for row in rows))
    (out / SUMMARY).write_text(json.dumps({"base": base, **summary}, indent=1) + "\n")


def quantization(settings: DpoSettings) -> str | None:
    """How the base is quantized: "nf4" or None. A profile replaces "auto" by its model's own."""
    return None if settings.quantize == "auto" else settings.quantize


def pair_length(pair: Pair) -> int:
    """Tokens of a pair: its prefix and its longer side."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def sort_by_length(pairs: Pairs, seed: int) -> list[Pair]:
    """The pairs by length, those of one trace side by side, equals in random order.

    Neighbours make a batch, for the reference as in every epoch. In 16 bits a log-probability
    depends on the batch, so a reference from other batches would not start at a margin of 0.
    """
    families: dict[tuple[Ids, Ids], list[Pair]] = {}
    for pair in random.Random(seed).sample(list(pairs), len(pairs)):
        families.setdefault((pair.prompt_ids, pair.rejected_ids), []).append(pair)
    by_length = sorted(families.values(), key=lambda family: max(map(pair_length, family)))
    return list(itertools.chain.from_iterable(by_length))


class BucketSampler:
    """A sampler that keeps neighbours in one batch: whole batches at random, a short one last.

    Every epoch has another order. The trainer sets the number of the epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch whose order comes next, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch}")
        self.epoch += 1
        starts = range(0, self.count - self.batch_size + 1, self.batch_size)
        order: list[int] = []
        for start in draw.sample(starts, len(starts)):
            order += range(start, start + self.batch_size)
        order += range(len(order), self.count)
        return iter(order)
