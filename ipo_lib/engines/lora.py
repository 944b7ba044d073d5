"""LoRA adapters and how they are trained: settings, batches, the frozen base in 16 bits or NF4, weights in and out."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import memory, processes
from ipo_lib.records import BadInput, Pair

Folder = Path | str
Rows = list[dict[str, float]]
Pairs = Sequence[Pair]
ADAPTER, METRICS, SUMMARY = "adapter_config.json", "metrics.jsonl", "training.json"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LOGGED = (
    "step",
    "loss",
    "grad_norm",
    "nll",
    "logps/chosen",
    "logps/rejected",
    "ref_logps/chosen",
    "ref_logps/rejected",
)
KEPT = "pairs-"
SAME = ("learning_rate", "weight_decay", "seed")


class Untrainable(BadInput):
    """No adapter comes of it: no pairs, none that fits, too few for one step, or a loss that is no number."""


class Diverged(ArithmeticError):
    """The loss of a step is not a number."""


def arguments(settings: DpoSettings, out: Folder) -> dict[str, Any]:
    """The arguments of transformers' trainer, stock TRL's too: every default that bites is explicit."""
    import torch

    batch_size, accumulation = processes.split(
        settings.batch_size, settings.accumulation, processes.count()
    )
    return {
        "output_dir": str(out),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing": settings.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,  # below 1: a share of the steps
        "bf16": settings.dtype == "bfloat16",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # no buffer changes
        "logging_nan_inf_filter": False,  # the default shows the last finite loss in place of a nan
        "use_cpu": settings.use_cpu or not torch.cuda.is_available(),
        **{name: getattr(settings, name) for name in SAME},
    }


def on_one_gpu(args: Any) -> Any:
    """The trainer's arguments for one GPU a process.

    Without a launcher the trainer would copy the model to every GPU it sees and cut each batch in rows,
    which neither a batch of trees nor 4-bit weights survive.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def quiet() -> None:
    """Silence what libraries say of each other: no user can mend it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # wants an optional kernel
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated"
    )  # PEFT asks transformers for it
    warnings.filterwarnings(
        "ignore", message="`broadcast_buffers` is deprecated"
    )  # accelerate asks torch for it


def base(folder: Folder, settings: DpoSettings, device: Any) -> Any:
    """The frozen model, in NF4 where the settings say so."""
    import transformers

    quiet()
    memory.release_all(str(device))  # training needs the memory of whoever has sampled
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": settings.dtype, "use_safetensors": True}
    if quantization(settings):
        options |= {
            "quantization_config": NF4 | {"bnb_4bit_compute_dtype": settings.dtype},
            "device_map": device,
        }
    # In eval mode bitsandbytes repacks NF4 weights at the first CPU forward (that of the reference), and from then on no
    # gradient passes them: train() is not a formality.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()


def config(folder: Folder, settings: DpoSettings, adapter: Folder | None) -> Any:
    """LoRA as the settings say, or as ``adapter`` was made; BadInput where that was for another model."""
    from peft import LoraConfig

    new = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        task_type="CAUSAL_LM",
    )
    lora = LoraConfig.from_pretrained(str(adapter)) if adapter else new
    if adapter and (own := Path(lora.base_model_name_or_path or "").name) not in (
        "",
        Path(folder).name,
    ):
        raise BadInput(
            f"dpo: adapter {adapter} was made for model {own!r}, not for {Path(folder).name!r}; train one for this model"
        )
    lora.lora_dropout, lora.inference_mode, lora.base_model_name_or_path = (
        settings.dropout,
        False,
        str(folder),
    )
    return lora


def fill(model: Any, adapter: Folder | None, folder: Folder) -> None:
    """Put the weights of ``adapter`` into the LoRA of ``model`` and hold it in float32, where small steps do not vanish."""
    from peft import load_peft_weights, set_peft_model_state_dict

    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()
    if adapter:
        try:
            loaded: Any = set_peft_model_state_dict(
                model, load_peft_weights(str(adapter), device="cpu")
            )
            unfit = bool(loaded.unexpected_keys)
        except RuntimeError:  # another width
            unfit = True
        if unfit:
            raise BadInput(
                f"dpo: adapter {adapter} was made for another model than {folder}; train one for this model"
            )


def save(lora: Any, target: Path, base: str) -> None:
    """Write the adapter: no checkpoint, optimizer, pickled arguments or generated model card."""
    config, modules = lora.peft_config["default"], lora.peft_config["default"].target_modules
    config.base_model_name_or_path = base  # the name: a path would tie the adapter to this machine
    config.target_modules = (
        modules if isinstance(modules, str) else sorted(modules)
    )  # a set's order varies
    lora.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)


def quantization(settings: DpoSettings) -> str | None:
    """ "nf4" or None. "auto" means the model's own setting, which a profile has put in its place."""
    return None if settings.quantize == "auto" else settings.quantize


def bucketed(pairs: Pairs, seed: int) -> list[Pair]:
    """The pairs by length, equals in random order, those of one trace side by side: neighbours make a batch, for the reference
    as in every epoch. In 16 bits a log-probability depends on the batch, so a reference from others would not start at a margin
    of 0."""
    trees: dict[Any, list[Pair]] = {}
    for pair in random.Random(seed).sample(list(pairs), len(pairs)):
        trees.setdefault((pair.prompt_ids, pair.rejected_ids), []).append(pair)
    longest = {
        key: len(key[0]) + max(len(key[1]), *(len(one.chosen_ids) for one in own))
        for key, own in trees.items()
    }
    return [pair for key in sorted(trees, key=longest.__getitem__) for pair in trees[key]]


class Batches:
    """A sampler that keeps neighbours in one batch: whole batches in random order, another each epoch, a short one last."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        draw, size = random.Random(f"{self.seed}/{self.epoch}"), self.batch_size
        self.epoch += 1
        starts = draw.sample(whole := range(0, self.count - size + 1, size), len(whole))
        return iter(
            [at + step for at in starts for step in range(size)]
            + [*range(len(whole) * size, self.count)]
        )
