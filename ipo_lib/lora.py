"""LoRA adapters and how they are trained: settings, batches, the frozen base in 16 bits or NF4, weights in and out."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib import ranks, resident
from ipo_lib.records import BadInput, Pair

Folder = Path | str
Rows = list[dict[str, float]]
Pairs = Sequence[Pair]
CHOICES = {
    "loss": ("sigmoid", "sigmoid_norm", "literal", "sft"), "scope": ("suffix", "whole"), "sft_scope": ("suffix", "whole"),
    "dtype": ("float32", "bfloat16"), "quantize": (None, "auto", "nf4"), "engine": ("shared", "trl"),
}  # fmt: skip
ABOVE_0 = ("learning_rate", "beta", "epochs", "batch_size", "accumulation", "rank", "ratio", "min_refusals")
STOCK: dict[str, tuple[Any, ...]] = {
    "loss": ("sigmoid", "sigmoid_norm"),
    "scope": ("suffix",),
    "sft_scope": ("suffix",),
    "score_trigger": (True,),
}
LEARNT = 0.05  # reward margin under which a training has taught nothing
LAST = 4  # the share of the steps whose margin is looked at: the last quarter
ADAPTER, METRICS, SUMMARY = "adapter_config.json", "metrics.jsonl", "training.json"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LOGGED = ("step", "loss", "grad_norm", "nll", "logps/chosen", "logps/rejected", "ref_logps/chosen", "ref_logps/rejected")
KEPT = "pairs-"
SAME = ("learning_rate", "weight_decay", "seed")


class Untrainable(BadInput):
    """No adapter comes of it: no pairs, none that fits, too few for one step, or a loss that is no number."""


class Diverged(ArithmeticError):
    """The loss of a step is not a number."""


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
    quantize: str | None = "auto"  # nf4: QLoRA; auto: as the profile's model is sampled (without a profile: not at all)
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    use_cpu: bool = False
    keep: int = 0  # adapters kept on the way, evenly spaced, to measure harm by pairs seen
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(f"dpo: {name} {getattr(self, name)!r} is unknown; use {' or '.join(map(str, known))}")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and (value < 0 or (name in ABOVE_0 and not value > 0)):
                raise BadInput(f"dpo: {name} {value} is too small; give a number above 0")
        for name, stock in STOCK.items() if self.engine == "trl" else ():
            if getattr(self, name) not in stock:
                raise BadInput(f"dpo: stock TRL has no {name} {getattr(self, name)!r}; set engine to shared")


@dataclass(frozen=True)
class Stage2Settings(DpoSettings):
    """Stage 2: harmful pairs of stage 1 beside benign ones, so that refusals of harmless prompts go back."""

    ratio: float = 0.5  # harmful to benign pairs (the paper: 0.3, 0.5 or 0.7)
    keep_all: bool = False  # every pair is kept, and weights make the ratio; else the larger side is thinned
    min_refusals: int = 8  # benign pairs below which stage 2 is left out
    benign_draws: int = 4  # responses of the stage-1 model to a benign prompt, until one refuses
    refusing_prefix: bool = True  # where none refuses: one drawn behind a safety trigger at the trace's start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benign_draws < 1:
            raise BadInput(f"stage2: benign_draws {self.benign_draws} draws nothing; give at least 1")


def arguments(settings: DpoSettings, out: Folder) -> dict[str, Any]:
    """The arguments of transformers' trainer, stock TRL's too: every default that bites is explicit."""
    import torch

    batch_size, accumulation = ranks.split(settings.batch_size, settings.accumulation, ranks.count())
    return {
        "output_dir": str(out), "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "num_train_epochs": settings.epochs, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation, "activation_checkpointing": settings.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False}, "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,  # below 1: a share of the steps
        "bf16": settings.dtype == "bfloat16", "dataloader_pin_memory": False, "remove_unused_columns": False,
        "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False,  # no buffer changes
        "logging_nan_inf_filter": False,  # the default shows the last finite loss in place of a nan
        "use_cpu": settings.use_cpu or not torch.cuda.is_available(), **{name: getattr(settings, name) for name in SAME},
    }  # fmt: skip


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
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # wants an optional kernel
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers for it
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate asks torch for it


def base(folder: Folder, settings: DpoSettings, device: Any) -> Any:
    """The frozen model, in NF4 where the settings say so."""
    import transformers

    quiet()
    resident.release_all(str(device))  # training needs the memory of whoever has sampled
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": settings.dtype, "use_safetensors": True}
    if quantization(settings):
        options |= {"quantization_config": NF4 | {"bnb_4bit_compute_dtype": settings.dtype}, "device_map": device}
    # In eval mode bitsandbytes repacks NF4 weights at the first CPU forward (that of the reference), and from then on no
    # gradient passes them: train() is not a formality.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()


def config(folder: Folder, settings: DpoSettings, adapter: Folder | None) -> Any:
    """LoRA as the settings say, or as ``adapter`` was made; BadInput where that was for another model."""
    from peft import LoraConfig

    new = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets, task_type="CAUSAL_LM")
    lora = LoraConfig.from_pretrained(str(adapter)) if adapter else new
    if adapter and (own := Path(lora.base_model_name_or_path or "").name) not in ("", Path(folder).name):
        raise BadInput(
            f"dpo: adapter {adapter} was made for model {own!r}, not for {Path(folder).name!r}; train one for this model"
        )
    lora.lora_dropout, lora.inference_mode, lora.base_model_name_or_path = settings.dropout, False, str(folder)
    return lora


def fill(model: Any, adapter: Folder | None, folder: Folder) -> None:
    """Put the weights of ``adapter`` into the LoRA of ``model`` and hold it in float32, where small steps do not vanish."""
    from peft import load_peft_weights, set_peft_model_state_dict

    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()
    if adapter:
        try:
            loaded: Any = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
            unfit = bool(loaded.unexpected_keys)
        except RuntimeError:  # another width
            unfit = True
        if unfit:
            raise BadInput(f"dpo: adapter {adapter} was made for another model than {folder}; train one for this model")


def save(lora: Any, target: Path, base: str) -> None:
    """Write the adapter: no checkpoint, optimizer, pickled arguments or generated model card."""
    config, modules = lora.peft_config["default"], lora.peft_config["default"].target_modules
    config.base_model_name_or_path = base  # the name: a path would tie the adapter to this machine
    config.target_modules = modules if isinstance(modules, str) else sorted(modules)  # a set's order varies
    lora.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)


def quantization(settings: DpoSettings) -> str | None:
    """ "nf4" or None. "auto" means the model's own setting, which a profile has put in its place."""
    return None if settings.quantize == "auto" else settings.quantize


def untrained(rows: Rows) -> str:
    """A warning where preference training ended with the margin it began with, else an empty text.

    The margin is the mean reward of the chosen side minus that of the rejected one. It starts at 0, and a
    step's is measured before the step is taken, so fewer than LAST steps tell nothing.
    """
    margins = [row["margin"] for row in rows if "margin" in row]
    last = margins[-max(len(margins) // LAST, 1) :]
    if len(margins) < LAST or abs(sum(last) / len(last)) >= LEARNT:
        return ""
    said = f"the margin of the last {len(last)} of {len(margins)} steps is {sum(last) / len(last):.3f}"
    return f"TRAINING DID NOTHING: {said}; raise learning_rate or epochs, or give more pairs"


def bucketed(pairs: Pairs, seed: int) -> list[Pair]:
    """The pairs by length, equals in random order, those of one trace side by side: neighbours make a batch, for the reference
    as in every epoch. In 16 bits a log-probability depends on the batch, so a reference from others would not start at a margin
    of 0."""
    trees: dict[Any, list[Pair]] = {}
    for pair in random.Random(seed).sample(list(pairs), len(pairs)):
        trees.setdefault((pair.prompt_ids, pair.rejected_ids), []).append(pair)
    longest = {key: len(key[0]) + max(len(key[1]), *(len(one.chosen_ids) for one in own)) for key, own in trees.items()}
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
        return iter([at + step for at in starts for step in range(size)] + [*range(len(whole) * size, self.count)])
