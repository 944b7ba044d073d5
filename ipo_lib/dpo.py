"""Training of IPO (Eq. 4): DPO on the suffixes after the common prefix, from token ids. Stage 1 trains fresh LoRA on intervened
pairs; stage 2 goes on from there with benign pairs mixed in; SFT is the same with one side. ``prefix_sharing`` does the work,
stock TRL (``trl_dpo``) is the reference. IPO is Intervened Preference Optimization here: TRL's loss of that name is Identity
Preference Optimization and is not offered."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipo_lib import progress
from ipo_lib.records import BadInput, Pair, canonical

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
LARGE = 2_000_000_000  # bytes of weights: a billion parameters in 16 bits
ADAPTER, METRICS, SUMMARY = "adapter_config.json", "metrics.jsonl", "training.json"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LOGGED = ("step", "loss", "grad_norm", "nll", "logps/chosen", "logps/rejected", "ref_logps/chosen", "ref_logps/rejected")
KEPT = "pairs-"
SAME = ("learning_rate", "weight_decay", "seed")


class Diverged(ArithmeticError):
    """The loss of a step is not a number."""


@dataclass(frozen=True)
class DpoSettings:
    """One training stage (paper.md 2.2); one object per stage, as it is disputed which stages carry the SFT term. ``loss``
    ``sigmoid`` is Eq. 4 on summed log-probabilities, ``sigmoid_norm`` on their means, ``literal`` as it is printed, ``sft`` the
    NLL of the chosen side alone. ``scope``: DPO on Part (suffix) or on Full (whole response); ``sft_weight`` scales the
    token-mean NLL of the chosen ``sft_scope``; ``score_trigger``: the trigger's own tokens count. ``engine``: prefixes read
    once, or stock TRL. ``batch_size``: pairs per forward and device; the paper's 64 is batch_size x accumulation x devices.
    ``length_buckets``: batches of like-long pairs, in random order. ``warmup`` below 1: a share of the steps. ``targets``:
    PEFT's word or regex. ``quantize`` nf4: QLoRA, auto: above 1B. ``keep``: adapters kept on the way, evenly spaced, to measure
    what training did by how many pairs were seen."""

    learning_rate: float = 5e-6
    beta: float = 0.1
    epochs: int = 1
    batch_size: int = 8
    accumulation: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    loss: str = "sigmoid"
    sft_weight: float = 0.2
    scope: str = "suffix"
    sft_scope: str = "suffix"
    score_trigger: bool = True
    engine: str = "shared"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"
    max_length: int = 1024
    pad_to_multiple_of: int = 8
    length_buckets: bool = True
    quantize: str | None = "auto"
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    use_cpu: bool = False
    keep: int = 0
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
    """Stage 2: ``ratio`` harmful pairs for each benign one (paper.md 2.2: 0.3, 0.5 or 0.7), drawn by ``seed``."""

    ratio: float = 0.5
    min_refusals: int = 8


def train(pairs: Pairs, model: Folder, settings: DpoSettings, out: Folder, *, adapter: Folder | None = None) -> Rows:
    """Train LoRA by Eq. 4 (+ ``sft_weight`` x NLL of the chosen side) and return one metrics row per step. ``out`` receives the
    adapter, the rows (log-probabilities are sums in nats from the suffix on, averaged over the step's pairs) and
    ``training.json``, which also counts the pairs left out for ``max_length``. With ``adapter`` training goes on from its
    weights, rank and targets. BadInput: no pair left, no model or adapter there, an adapter of another model, a loss that is not
    finite (``out`` then holds the adapter of the last finite one)."""
    fitting = [p for p in pairs if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= settings.max_length]
    if not fitting:
        raise BadInput(f"dpo: none of {len(pairs)} pairs fits max_length {settings.max_length}; raise it or add pairs")
    if settings.loss != "sft" and (lone := next((pair for pair in fitting if not pair.rejected_ids), None)):
        raise BadInput(f"dpo: pair {lone.id} has no rejected side; set loss to sft")
    if settings.engine == "trl" and any(pair.weight != 1 for pair in fitting):
        raise BadInput("dpo: stock TRL has no weights; set engine to shared")
    for folder, file in ((model, "config.json"), (adapter, ADAPTER)):
        if folder is not None and not (Path(folder) / file).is_file():
            raise BadInput(f"dpo: {folder} holds no {file}; give the folder of a saved model or adapter")
    from peft.helpers import disable_input_dtype_casting

    if settings.engine == "trl":
        from ipo_lib.trl_dpo import trainer as made
    else:
        from ipo_lib.prefix_sharing import trainer as made
    trainer, lora = made(bucketed(fitting, settings.seed) if settings.length_buckets else fitting, model, settings, out, adapter)
    trainer.add_callback(_on_the_way(lora, Path(out), Path(model).name, settings.keep))
    try:
        # PEFT turns every input to LoRA's float32, and autocast turns it back: the same numbers, twice the memory traffic.
        with disable_input_dtype_casting(lora, active=settings.dtype == "bfloat16"):
            trainer.train()
    except Diverged as error:
        trainer.restore()
        _save(lora, Path(out), Path(model).name)
        raise BadInput(f"dpo: the loss is {error}; lower learning_rate (the last good adapter is in {out})") from None
    if trainer.state.max_steps == 1 and trainer.args.get_warmup_steps(1):
        raise BadInput("dpo: the only step is warm-up, at a learning rate of 0; lower batch_size, or set warmup to 0")
    rows = _rows(trainer.state.log_history, settings.beta)
    if trainer.accelerator.is_main_process:
        batch = settings.batch_size * settings.accumulation * trainer.accelerator.num_processes
        summary: dict[str, Any] = {"base": Path(model).name, "continued": bool(adapter), "effective_batch": batch}
        summary |= {"pairs": len(fitting), "too_long": len(pairs) - len(fitting), "quantized": quantization(model, settings)}
        summary |= {"settings": asdict(settings)}
        _save(lora, target := Path(out), summary["base"])
        (target / METRICS).write_text("".join(canonical(row) + "\n" for row in rows))
        (target / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return rows


def arguments(settings: DpoSettings, out: Folder) -> dict[str, Any]:
    """The arguments of transformers' trainer, stock TRL's too: every default that bites is explicit."""
    import torch

    return {
        "output_dir": str(out), "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "num_train_epochs": settings.epochs, "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation, "activation_checkpointing": settings.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False}, "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,  # below 1: a share of the steps
        "bf16": settings.dtype == "bfloat16", "dataloader_pin_memory": False, "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # the default shows the last finite loss in place of a nan
        "use_cpu": settings.use_cpu or not torch.cuda.is_available(), **{name: getattr(settings, name) for name in SAME},
    }  # fmt: skip


def base(folder: Folder, settings: DpoSettings, device: Any) -> Any:
    """The frozen model, in NF4 where the settings say so."""
    import transformers

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # wants an optional kernel
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": settings.dtype, "use_safetensors": True}
    if quantization(folder, settings):
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


def _save(lora: Any, target: Path, base: str) -> None:
    """Write the adapter: no checkpoint, optimizer, pickled arguments or generated model card."""
    config, modules = lora.peft_config["default"], lora.peft_config["default"].target_modules
    config.base_model_name_or_path = base  # the name: a path would tie the adapter to this machine
    config.target_modules = modules if isinstance(modules, str) else sorted(modules)  # a set's order varies
    lora.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)


def _on_the_way(lora: Any, out: Path, base: str, keep: int) -> Any:
    """A callback that says how far training is and keeps ``keep`` adapters in ``out`` / KEPT + pairs seen."""
    import transformers

    class OnTheWay(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.say(state.global_step, state.max_steps, "training")
            at = [round(place * state.max_steps / (keep + 1)) for place in range(1, keep + 1)]
            if state.global_step in at and state.is_world_process_zero:
                seen = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                _save(lora, out / f"{KEPT}{seen:06d}", base)

    return OnTheWay()


def quantization(model: Folder, settings: DpoSettings) -> str | None:
    """What ``settings.quantize`` means for a model folder: "auto" is NF4 for more than LARGE bytes of weights."""
    size = sum(file.stat().st_size for file in Path(model).glob("model*.safetensors"))
    return settings.quantize if settings.quantize != "auto" else "nf4" if size > LARGE else None


def mix(harmful: Pairs, benign: Pairs, settings: Stage2Settings) -> list[list[Pair]]:
    """Stage 2's [harmful, benign] pairs, the larger side thinned at random until ``ratio`` holds; order is kept."""
    n = min(len(harmful), round(settings.ratio * len(benign)))
    sides = ((harmful, n), (benign, len(benign) if n < len(harmful) else min(len(benign), round(n / settings.ratio))))
    draw = random.Random(settings.seed)
    return [[side[i] for i in sorted(draw.sample(range(len(side)), size))] for side, size in sides]


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


def _rows(history: Rows, beta: float) -> Rows:
    """The trainer's log as metrics rows, with rewards (beta x the log-ratio to the reference) where there is a reference."""
    rows = []
    for entry in (entry for entry in history if "loss" in entry):
        if not math.isfinite(entry["loss"]):
            raise BadInput(f"dpo: the loss is {entry['loss']} at step {entry['step']}; lower learning_rate")
        row = {name: entry[name] for name in LOGGED if name in entry}
        if "ref_logps/chosen" in row:
            sides = ("chosen", "rejected")
            row |= {f"rewards/{side}": beta * (row[f"logps/{side}"] - row[f"ref_logps/{side}"]) for side in sides}
            row["margin"] = row["rewards/chosen"] - row["rewards/rejected"]
        rows.append(row)
    return rows
