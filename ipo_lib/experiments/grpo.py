"""GRPO, the paper's strongest baseline (Table 1): TRL's trainer, rewarded for safety by our judge.

1. TRL samples groups of responses to our prompt ids.
2. The judge says of each response whether its trace z and its answer y are safe; I[z] and I[y] are
   1 where they are.
3. A reward is named by its formula. The paper's own is read as I[z] - I[y]; its sign is in doubt.
4. Training ends when a budget of generated tokens is spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipo_lib.chat import is_cut_off, part_text
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import checkpoints
from ipo_lib.engines.lora import (
    Folder,
    Rows,
    Untrainable,
    common_arguments,
    limit_to_one_gpu,
    load_base,
    load_weights,
    make_config,
    quantization,
    silence_libraries,
    write_results,
)
from ipo_lib.engines.progress import say
from ipo_lib.judging import Exchange
from ipo_lib.profiles.settings import REWARD_FORMULAS, GrpoSettings
from ipo_lib.records import (
    ANSWER,
    SAFE,
    TRACE,
    BadInput,
    Prompt,
    Prompts,
    Rollout,
    Rollouts,
    by_id,
    digest,
    to_json,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Session

LOGGED = {  # columns of the metrics, and TRL's names for them
    "reward": "reward",
    "reward_std": "reward_std",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "length": "completions/mean_length",
    "flat groups": "frac_reward_zero_std",
    "clipped": "completions/clipped_ratio",
}
MAX_STEPS = 100_000  # the budget ends a run long before


class Rewarder:
    """What TRL calls to reward responses; it counts their tokens."""

    def __init__(self, session: Session, prompts: Prompts, settings: GrpoSettings) -> None:
        self.session = session
        self.prompts = prompts
        self.formula = REWARD_FORMULAS[settings.reward]
        self.generated = 0  # tokens of all responses

    def __call__(
        self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """The reward of each response. A part that is missing, cut off or not judged earns nothing.

        Args:
            prompts: prompt id of each response.
            completion_ids: token ids of each response, with EOS where the model ended it.
        """
        rollouts = []
        for draw, (prompt_id, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
            self.generated += len(ids)
            rollouts.append(self._rollout(prompt_id, ids, draw))
        rewards = [0.0] * len(rollouts)
        for part, weight in zip((TRACE, ANSWER), self.formula, strict=True):
            if weight:
                for index, is_safe in enumerate(self._judge(rollouts, part)):
                    rewards[index] += weight * is_safe
        return rewards

    def _rollout(self, prompt_id: str, ids: Sequence[int], draw: int) -> Rollout:
        chat = self.session.chat
        finish = "stop" if ids[-1] in chat.eos_ids else "length"
        tokens = tuple(ids[:-1] if finish == "stop" else ids)
        key, text = digest([draw, tokens]), chat.decode(tokens)
        return Rollout(key, prompt_id, 0, tokens, text, finish, draw, "grpo")

    def _judge(self, rollouts: Rollouts, part: str) -> Iterator[bool]:
        """Whether a part of each response is whole and safe."""
        opened = self.session.chat.opened
        exchanges = []
        for rollout in rollouts:
            prompt, text = self.prompts[rollout.prompt_id], part_text(rollout, part, opened)
            exchanges.append(Exchange(rollout.id, prompt.text, text, part))
        verdicts = self.session.judge.judge(exchanges)
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            yield verdict.label == SAFE and not is_cut_off(rollout, part, opened)


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
    """Train LoRA by GRPO on whole responses until ``settings.budget`` tokens were generated.

    Args:
        session: for the judge and the chat.
        prompts: to sample responses to.
        model: folder of the base model.
        lora: rank, precision and the rest of the training.
        settings: reward, budget, batches.
        sampling: temperature and length of the responses.
        out: folder for the adapter, its metrics rows and ``training.json``. A training that was
            killed goes on from its last checkpoint there.
        adapter: folder of an adapter to go on from; None: a fresh one.

    Returns:
        Metrics, one row per step: the reward, its spread, the share of groups without one, the
        length, the ``tokens`` generated so far.

    Raises:
        BadInput: the budget is 0, or a loss is not finite.
    """
    if not settings.budget:
        raise BadInput(
            "grpo: budget 0 generates nothing; "
            "give the tokens that the method it stands beside has generated"
        )
    trainer = make_trainer(session, prompts, model, lora, settings, sampling, out, adapter)
    asked = [prompt.text for prompt in prompts]
    given = [to_json(one) for one in (lora, settings, sampling)]
    name = digest([given, asked, str(model), str(adapter)])
    checkpoint = checkpoints.latest(Path(out), name)
    trainer.add_callback(checkpoints.callback(Path(out), name))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    rows = []
    for entry in trainer.state.log_history:
        if "reward" in entry:
            logged = {name: entry[key] for name, key in LOGGED.items() if key in entry}
            rows.append({"step": entry["step"], **logged, "tokens": entry["tokens"]})
    summary = {
        "continued": bool(adapter),
        "quantized": quantization(lora),
        "generated": rows[-1]["tokens"],
        "settings": asdict(settings),
        "lora": asdict(lora),
    }
    if trainer.accelerator.is_main_process:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        write_results(adapted, Path(out), rows, Path(model).name, summary)
        checkpoints.remove(Path(out))
    return rows


def make_trainer(
    session: Session,
    prompts: Sequence[Prompt],
    model: Folder,
    lora: DpoSettings,
    settings: GrpoSettings,
    sampling: Sampling,
    out: Folder,
    adapter: Folder | None,
) -> Any:
    """Make TRL's GRPO trainer, which knows prompts by their ids and gets our rendering of each.

    Args:
        session: as for ``train``.
        prompts: as for ``train``.
        model: as for ``train``.
        lora: as for ``train``.
        settings: as for ``train``.
        sampling: as for ``train``.
        out: the trainer's folder.
        adapter: as for ``train``.
    """
    silence_libraries()
    import datasets
    import transformers

    datasets.disable_progress_bars()
    prompts_by_id = by_id(prompts)
    eos_ids = list(session.chat.eos_ids)
    rewarder = Rewarder(session, prompts_by_id, settings)
    arguments = limit_to_one_gpu(_arguments(lora, settings, sampling, out))
    trainer = _trainer_class(session, prompts_by_id, rewarder)(
        load_base(model, lora, arguments.device),
        rewarder,
        args=arguments,
        peft_config=make_config(model, lora, adapter),
        train_dataset=datasets.Dataset.from_list([{"prompt": key} for key in prompts_by_id]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    trainer.eos_token_ids = eos_ids
    trainer.generation_config.eos_token_id = eos_ids
    trainer.generation_kwargs["eos_token_id"] = eos_ids
    load_weights(trainer.model, adapter, model)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_budget_callback(rewarder, settings.budget))
    return trainer


def _arguments(lora: DpoSettings, settings: GrpoSettings, sampling: Sampling, out: Folder) -> Any:
    """The trainer's arguments: TRL 1.16's defaults that matter are set here."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(
        **common_arguments(lora, out),
        max_steps=MAX_STEPS,
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
        beta=settings.beta,
        loss_type=settings.loss,
        scale_rewards=settings.scale,
        disable_dropout=lora.dropout == 0,
        seed=settings.seed,
    )


def _trainer_class(session: Session, prompts: Prompts, rewarder: Rewarder) -> Any:
    """TRL's trainer on our prompt ids."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    class IdsTrainer(GRPOTrainer):
        def _tokenize_prompts(
            self, keys: Sequence[str]
        ) -> tuple[list[list[int]], None, dict[str, Any]]:
            ids = [list(session.chat.prompt_ids(prompts[key])) for key in keys]
            return ids, None, {}

        def _send_telemetry(self) -> None:
            """Send nothing: TRL would report every run to the hub."""

        def log(self, logs: Mapping[str, float], *arguments: Any, **options: Any) -> None:
            losses = [logs[name] for name in ("loss", "grad_norm") if name in logs]
            if "loss" in logs and not all(map(math.isfinite, losses)):
                raise Untrainable(
                    f"grpo: the loss is no number at step {self.state.global_step}; "
                    "lower learning_rate"
                )
            super().log({**logs, "tokens": rewarder.generated}, *arguments, **options)

    return IdsTrainer


def _budget_callback(rewarder: Rewarder, budget: int) -> Any:
    """A callback that reports progress and ends the training at the step nearest to its budget."""
    import transformers

    class Budget(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.log_history:  # it goes on from a checkpoint
                rewarder.generated = state.log_history[-1]["tokens"]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say(min(rewarder.generated, budget), budget, "GRPO, tokens")
            tokens_per_step = rewarder.generated / state.global_step
            control.should_training_stop = rewarder.generated + tokens_per_step / 2 >= budget

    return Budget()
