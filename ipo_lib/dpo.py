"""Training of IPO (Eq. 4): DPO on the suffixes after the common prefix, through TRL, fed with token ids. Stage 1 trains
fresh LoRA on intervened pairs; stage 2 goes on from there with benign pairs mixed in. IPO is Intervened Preference
Optimization here: TRL's loss of that name is Identity Preference Optimization and is not offered."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ipo_lib import progress
from ipo_lib.records import BadInput, Pair, canonical

Folder = Path | str
Rows = list[dict[str, float]]
Pairs = Sequence[Pair]
CHOICES = {"loss": ("sigmoid", "sigmoid_norm"), "dtype": ("float32", "bfloat16"), "quantize": (None, "auto", "nf4")}
ABOVE_0 = ("learning_rate", "beta", "epochs", "batch_size", "accumulation", "rank", "ratio", "min_refusals")
LARGE = 2_000_000_000  # bytes of weights: a billion parameters in 16 bits
ADAPTER, METRICS, SUMMARY = "adapter_config.json", "metrics.jsonl", "training.json"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LOGGED = ("step", "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
KEPT = "pairs-"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SAME = ("learning_rate", "beta", "weight_decay", "pad_to_multiple_of", "precompute_ref_log_probs", "seed")


@dataclass(frozen=True)
class DpoSettings:
    """One training stage (paper.md 2.2); one object per stage, as it is disputed which stages carry the SFT term.
    ``loss`` ``sigmoid`` is Eq. 4 on summed suffix log-probabilities, ``sigmoid_norm`` on their means; ``sft_weight``
    scales the token-mean NLL of the chosen suffix. ``batch_size``: pairs per forward and device; the paper's 64 is
    batch_size x accumulation x devices. ``length_buckets``: batches of like-long pairs, in random order. ``warmup``
    below 1: a share of the steps. ``targets``: PEFT's word or regex. ``quantize`` nf4: QLoRA, auto: above 1B. ``keep``: adapters
    kept on the way, evenly spaced, to measure what training did by how many pairs were seen."""

    learning_rate: float = 5e-6
    beta: float = 0.1
    epochs: int = 1
    batch_size: int = 8
    accumulation: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    loss: str = "sigmoid"
    sft_weight: float = 0.2
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"
    max_length: int = 1024
    pad_to_multiple_of: int = 8
    length_buckets: bool = True
    quantize: str | None = "auto"
    dtype: str = "bfloat16"
    precompute_ref_log_probs: bool = True
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


@dataclass(frozen=True)
class Stage2Settings(DpoSettings):
    """Stage 2: ``ratio`` harmful pairs for each benign one (paper.md 2.2: 0.3, 0.5 or 0.7), drawn by ``seed``."""

    ratio: float = 0.5
    min_refusals: int = 8


def train(pairs: Pairs, model: Folder, settings: DpoSettings, out: Folder, *, adapter: Folder | None = None) -> Rows:
    """Train LoRA by Eq. 4 (+ ``sft_weight`` x NLL of the chosen suffix) and return one metrics row per step.
    ``out`` receives the adapter, the rows (log-probabilities are suffix sums in nats, averaged over the step's pairs)
    and ``training.json``, which also counts the pairs left out for ``max_length``. With ``adapter`` training goes on
    from its weights, rank and targets. BadInput: no pair left, no model or adapter there, a loss that is not finite."""
    fitting = [p for p in pairs if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= settings.max_length]
    if not fitting:
        raise BadInput(f"dpo: none of {len(pairs)} pairs fits max_length {settings.max_length}; raise it or add pairs")
    for folder, file in ((model, "config.json"), (adapter, ADAPTER)):
        if folder is not None and not (Path(folder) / file).is_file():
            raise BadInput(f"dpo: {folder} holds no {file}; give the folder of a saved model or adapter")
    from peft.helpers import disable_input_dtype_casting

    # TRL's LM head skips the prompt only where Triton runs; the same code serves the CPU (4 x faster at 49k words).
    suffix_only = mock.patch("trl.trainer.utils._use_triton", lambda device: device.type in ("cpu", "cuda"))
    with (
        suffix_only,
        mock.patch("trl.trainer.dpo_trainer.add_fused_lm_head", _lean_head),
        mock.patch.dict(os.environ, TQDM_DISABLE="1"),
    ):  # the one switch that TRL's precomputation reads
        trainer = ids_trainer(fitting, model, settings, out, adapter)
        trainer.add_callback(_on_the_way(Path(out), Path(model).name, settings.keep))
        # PEFT turns every input to LoRA's float32, and autocast turns it back: the same numbers, twice the memory traffic.
        with disable_input_dtype_casting(trainer.model, active=settings.dtype == "bfloat16"):
            trainer.train()
    if trainer.state.max_steps == 1 and trainer.args.get_warmup_steps(1):
        raise BadInput("dpo: the only step is warm-up, at a learning rate of 0; lower batch_size, or set warmup to 0")
    rows = _rows(trainer.state.log_history, settings.beta)
    if trainer.accelerator.is_main_process:
        batch = settings.batch_size * settings.accumulation * trainer.accelerator.num_processes
        summary: dict[str, Any] = {"base": Path(model).name, "continued": bool(adapter), "effective_batch": batch}
        summary |= {"pairs": len(fitting), "too_long": len(pairs) - len(fitting), "quantized": quantization(model, settings)}
        summary |= {"settings": asdict(settings)}
        _save(trainer.accelerator.unwrap_model(trainer.model), target := Path(out), summary["base"])
        (target / METRICS).write_text("".join(canonical(row) + "\n" for row in rows))
        (target / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return rows


def _lean_head(model: Any, **_: Any) -> None:
    """TRL's LM head without the entropies, mean logits and hits that only metrics outside LOGGED read: passes over the whole
    vocabulary for every token, forwards and backwards."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    full = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        out = full(*args, **options)
        if options.get("fused_lm_head"):
            out.entropy = out.mean_logits = torch.zeros_like(out.log_probs)
            out.is_top1 = torch.zeros_like(out.log_probs, dtype=torch.bool)
        return out

    model.forward = forward


def _save(lora: Any, target: Path, base: str) -> None:
    """Write the adapter: no checkpoint, optimizer, pickled arguments or generated model card."""
    config, modules = lora.peft_config["default"], lora.peft_config["default"].target_modules
    config.base_model_name_or_path = base  # the name: a path would tie the adapter to this machine
    config.target_modules = modules if isinstance(modules, str) else sorted(modules)  # a set's order varies
    lora.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)


def _on_the_way(out: Path, base: str, keep: int) -> Any:
    """A callback that says how far training is and keeps ``keep`` adapters in ``out`` / KEPT + pairs seen."""
    import transformers

    class OnTheWay(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            progress.say(state.global_step, state.max_steps, "training")
            at = [round(place * state.max_steps / (keep + 1)) for place in range(1, keep + 1)]
            if state.global_step in at and state.is_world_process_zero:
                seen = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                _save(model, out / f"{KEPT}{seen:06d}", base)

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
    """The pairs by length, equals in random order: neighbours make a batch, for the reference as in every epoch. In 16 bits a
    log-probability depends on the padding, so a reference from other batches would not start at a margin of 0."""
    drawn = random.Random(seed).sample(list(pairs), len(pairs))
    return sorted(drawn, key=lambda pair: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)))


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


def ids_trainer(pairs: Pairs, folder: Folder, settings: DpoSettings, out: Folder, adapter: Folder | None = None) -> Any:
    """TRL's DPO trainer on ids; its LoRA is fresh or at the weights of ``adapter``, and in float32."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # wants an optional kernel
    import datasets
    import torch
    import transformers
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class IdsTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # law 1: the rows are ids already; TRL would tokenize text again

        def _get_train_sampler(self, *given: Any) -> Any:
            batches = Batches(len(pairs), settings.batch_size, settings.seed)
            return batches if settings.length_buckets else super()._get_train_sampler(*given)

        def _send_telemetry(self) -> None:
            """TRL reports every run to the hub; this package works offline."""

    pairs = bucketed(pairs, settings.seed) if settings.length_buckets else pairs
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = DPOConfig(  # every default of TRL 1.16 that bites (checkpointing, bf16, logging, reports) is explicit
        output_dir=str(out), report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        # CHOICES leaves TRL's "ipo" out: that is Identity Preference Optimization, a squared loss, not this method.
        loss_type=[settings.loss, "sft"], loss_weights=[1.0, settings.sft_weight],
        num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation, activation_checkpointing=settings.activation_checkpointing,
        lr_scheduler_type="cosine", warmup_steps=settings.warmup,  # below 1: a share of the steps
        max_length=None,  # train() has counted the long ones out; TRL would cut them silently
        disable_dropout=settings.dropout == 0,  # TRL's default silences LoRA's dropout with the rest
        bf16=settings.dtype == "bfloat16", dataloader_pin_memory=False,
        logging_nan_inf_filter=False,  # the default shows the last finite loss in place of a nan
        use_cpu=settings.use_cpu or not torch.cuda.is_available(), **{name: getattr(settings, name) for name in SAME},
    )  # fmt: skip
    options: dict[str, Any] = {"dtype": settings.dtype, "use_safetensors": True}
    if quantization(folder, settings):
        options |= {"quantization_config": NF4 | {"bnb_4bit_compute_dtype": settings.dtype}, "device_map": config.device}
    # In eval mode bitsandbytes repacks NF4 weights at the first CPU forward (the precomputed reference), and from then
    # on no gradient passes them: train() is not a formality.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()
    new = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets, task_type="CAUSAL_LM")
    lora = LoraConfig.from_pretrained(str(adapter)) if adapter else new
    lora.lora_dropout, lora.inference_mode, lora.base_model_name_or_path = settings.dropout, False, str(folder)
    rows = datasets.Dataset.from_list([{key: list(getattr(pair, key)) for key in IDS} for pair in pairs])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer: Any = IdsTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in filter(lambda one: one.requires_grad, trainer.model.parameters()):
        parameter.data = parameter.data.float()  # TRL rounds a QLoRA adapter to bf16, where small steps vanish
    # Handed a PeftModel, TRL freezes a copy of it as the reference. So LoRA starts fresh (the reference is LoRA off:
    # the organism, in stage 2 too), and stage 1's weights are put in afterwards.
    if adapter:
        loaded: Any = set_peft_model_state_dict(trainer.model, load_peft_weights(str(adapter), device="cpu"))
        if loaded.unexpected_keys:
            raise BadInput(f"dpo: adapter {adapter} was made for another model than {folder}")
    return trainer


def _rows(history: Rows, beta: float) -> Rows:
    """TRL's log as metrics rows, with the reference's log-probabilities (logp - reward / beta) beside the policy's."""
    rows, sides = [], ("chosen", "rejected")
    for entry in (entry for entry in history if "loss" in entry):
        if not math.isfinite(entry["loss"]):
            raise BadInput(f"dpo: the loss is {entry['loss']} at step {entry['step']}; lower learning_rate")
        reference = {f"ref_logps/{side}": entry[f"logps/{side}"] - entry[f"rewards/{side}"] / beta for side in sides}
        rows.append({name: entry[name] for name in LOGGED} | {"margin": entry["rewards/margins"]} | reference)
    return rows
