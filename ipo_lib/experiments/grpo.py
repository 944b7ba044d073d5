"""GRPO as the paper's strongest baseline (Table 1): TRL's trainer on our prompt ids, rewarded for the safety of the thinking
trace z and of the response y. Each reward is named by its formula; the paper's own is read as I[z] - I[y], whose sign is in
doubt."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from ipo_lib.chat import cut_off, part_text
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines.lora import (
    METRICS,
    SUMMARY,
    Folder,
    Rows,
    Untrainable,
    base,
    config,
    fill,
    on_one_gpu,
    quantization,
    quiet,
    save,
)
from ipo_lib.engines.progress import say
from ipo_lib.judging import Exchange
from ipo_lib.profiles.settings import REWARD_FORMULAS, GrpoSettings
from ipo_lib.records import (
    ANSWER,
    SAFE,
    TRACE,
    BadInput,
    Ids,
    Prompt,
    Rollout,
    by_id,
    canonical,
    digest,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Session

LOGGED = {
    "reward": "reward",
    "reward_std": "reward_std",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "length": "completions/mean_length",
    "flat groups": "frac_reward_zero_std",
    "clipped": "completions/clipped_ratio",
}
ENDLESS = 100_000  # steps; the budget ends a run


def rewards(
    session: Session,
    prompts: Sequence[Prompt],
    responses: Sequence[Ids],
    ended: Sequence[bool],
    settings: GrpoSettings,
) -> list[float]:
    """The reward of each response.

    Args:
        doors: for the judge and the chat.
        prompts: of each response.
        responses: ids without EOS.
        ended: whether the model ended the response; if not, it was cut off at the longest length.
        settings: which parts are rewarded.

    A part that is missing, cut off or cannot be judged earns nothing.
    """
    total = [0.0] * len(responses)
    for part, weight in zip((TRACE, ANSWER), REWARD_FORMULAS[settings.reward], strict=True):
        if weight:
            asked, whole = [], []
            for at, (prompt, ids) in enumerate(zip(prompts, responses, strict=True)):
                finish = "stop" if ended[at] else "length"
                rollout = Rollout(
                    digest([at, ids]),
                    prompt.id,
                    0,
                    ids,
                    session.chat.decode(ids),
                    finish,
                    at,
                    "grpo",
                )
                whole.append(not cut_off(rollout, part, session.chat.opened))
                asked.append(
                    Exchange(
                        rollout.id,
                        prompt.text,
                        part_text(rollout, part, session.chat.opened),
                        part,
                        "harm",
                    )
                )
            for at, verdict in enumerate(session.judge.judge(asked)):
                total[at] += weight * (verdict.label == SAFE and whole[at])
    return total


def train(
    session: Session,
    prompts: Sequence[Prompt],
    model: Folder,
    lora: DpoSettings,
    settings: GrpoSettings,
    sampling: Sampling,
    out: Folder,
    *,
    adapter: Folder | None = None,
) -> Rows:
    """Train LoRA by GRPO on whole responses until ``settings.budget`` tokens were generated; one row a step: reward, its spread,
    share of groups without one, length, generated ``tokens`` so far. ``out`` receives what ``dpo.train`` writes."""
    if not settings.budget:
        raise BadInput(
            "grpo: budget 0 generates nothing; give the tokens that the method it stands beside has generated"
        )
    made = trainer(session, prompts, model, lora, settings, sampling, out, adapter)
    made.train()
    rows = [
        {
            "step": row["step"],
            **{name: row[key] for name, key in LOGGED.items() if key in row},
            "tokens": row["tokens"],
        }
        for row in made.state.log_history
        if "reward" in row
    ]
    if made.accelerator.is_main_process:
        summary = {
            "base": Path(model).name,
            "continued": bool(adapter),
            "quantized": quantization(lora),
        }
        summary |= {"generated": made.generated, "settings": asdict(settings), "lora": asdict(lora)}
        save(made.accelerator.unwrap_model(made.model), target := Path(out), Path(model).name)
        (target / METRICS).write_text("".join(canonical(row) + "\n" for row in rows))
        (target / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return rows


def trainer(
    session: Session,
    prompts: Sequence[Prompt],
    model: Folder,
    lora: DpoSettings,
    settings: GrpoSettings,
    sampling: Sampling,
    out: Folder,
    adapter: Folder | None,
) -> Any:
    """TRL's GRPO trainer, asked by prompt id and given our rendering of each prompt."""
    quiet()
    import datasets
    import torch
    import transformers
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    named = by_id(prompts)

    class IdsTrainer(GRPOTrainer):
        generated = 0

        def _tokenize_prompts(self, keys: Any) -> Any:
            return (
                [[*session.chat.prompt_ids(named[key])] for key in keys],
                None,
                {},
            )  # law 1: ids, not text again

        def _send_telemetry(self) -> None:
            """TRL reports every run to the hub; this package works offline."""

        def log(self, logs: dict[str, float], *given: Any, **options: Any) -> None:
            if "loss" in logs and not (
                math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))
            ):
                raise Untrainable(
                    f"grpo: the loss is no number at step {self.state.global_step}; lower learning_rate"
                )
            super().log(logs | {"tokens": self.generated}, *given, **options)

    def reward(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> Any:
        ends = set(session.chat.eos_ids)
        made.generated += sum(map(len, completion_ids))
        ended = [ids[-1] in ends for ids in completion_ids]
        bare = [
            tuple(ids[:-1] if end else ids) for ids, end in zip(completion_ids, ended, strict=True)
        ]
        return rewards(session, [named[key] for key in prompts], bare, ended, settings)

    class Spent(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say(min(made.generated, settings.budget), settings.budget, "GRPO, tokens")
            another = (
                made.generated / state.global_step
            )  # a step more would miss the budget by more than it is missed now
            control.should_training_stop = made.generated + another / 2 >= settings.budget

    datasets.disable_progress_bars()
    args = on_one_gpu(
        GRPOConfig(  # every default of TRL 1.16 that bites is explicit
            output_dir=str(out),
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=ENDLESS,
            num_generations=settings.group,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            num_iterations=1,
            max_completion_length=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=lora.weight_decay,
            beta=settings.beta,
            loss_type=settings.loss,
            scale_rewards=settings.scale,
            bf16=lora.dtype == "bfloat16",
            dataloader_pin_memory=False,
            logging_nan_inf_filter=False,
            activation_checkpointing=lora.activation_checkpointing,
            disable_dropout=lora.dropout == 0,
            seed=settings.seed,
            use_cpu=lora.use_cpu or not torch.cuda.is_available(),
        )
    )
    with mock.patch.dict(os.environ, TQDM_DISABLE="1"):
        made: Any = IdsTrainer(
            base(model, lora, args.device),
            reward,
            args=args,
            peft_config=config(model, lora, adapter),
            train_dataset=datasets.Dataset.from_list([{"prompt": key} for key in named]),
            processing_class=transformers.AutoTokenizer.from_pretrained(model, padding_side="left"),
        )
    made.eos_token_ids = [*session.chat.eos_ids]
    made.generation_config.eos_token_id = made.generation_kwargs["eos_token_id"] = [
        *session.chat.eos_ids
    ]
    fill(made.model, adapter, model)
    made.remove_callback(transformers.PrinterCallback)
    made.add_callback(Spent())
    return made
