"""Training of adapters on pairs, by Eq. 4; each adapter is trained once and stored.

1. Stage 1 trains fresh LoRA on intervened pairs.
2. Stage 2 goes on from stage 1's adapter, on a mix of its harmful pairs and of benign ones: on a
   harmless prompt, an answer over a refusal.
3. ``train`` does one training. The engine of its settings reads the pairs; ``ipo_lib.dpo`` has the
   losses.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipo_lib.dpo import SFT, DpoSettings, Stage2Settings
from ipo_lib.engines import checkpoints, processes, progress
from ipo_lib.engines.lora import (
    ADAPTER_CONFIG,
    METRICS,
    SIDES,
    Diverged,
    Folder,
    Pairs,
    Rows,
    Untrainable,
    pair_length,
    quantization,
    save_adapter,
    sort_by_length,
    write_results,
)
from ipo_lib.records import BadInput, Pair, digest, to_json
from ipo_lib.stages import Session

TRAIN_VERSION = 2
INTERMEDIATE = "pairs-"  # begin of the folder name of an intermediate adapter
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
LEARNT_MARGIN = 0.05  # reward margin below which a training has taught nothing
MARGIN_STEPS = 4  # the margin of the last quarter of the steps is looked at


def train_first_stage(
    session: Session,
    pairs: Pairs,
    model: Path,
    settings: DpoSettings,
    counts: Mapping[str, int] | None = None,
) -> tuple[Path, Rows]:
    """Stage 1: train fresh LoRA on ``pairs``, once.

    Args:
        session: for the store.
        pairs: training data.
        model: folder of the base model.
        settings: of the training.
        counts: why there are not more pairs, by reason, for the error message.

    Returns:
        (adapter folder, metrics rows).

    Raises:
        Untrainable: there is no pair.
    """
    if not pairs:
        reasons = ", ".join(f"{n} {reason}" for reason, n in (counts or {}).items() if n)
        raise Untrainable(
            f"training: no pairs ({reasons or 'nothing was gathered'}); "
            "raise draws or prompts, or change what refuses them"
        )
    spec = _spec(session, pairs, settings)
    return train_once(session, spec, lambda folder: train(pairs, model, settings, folder))


def train_second_stage(
    session: Session,
    harmful: Pairs,
    benign: Pairs,
    model: Path,
    start: Path,
    settings: Stage2Settings,
) -> tuple[Path | None, Rows, str]:
    """Stage 2: go on from stage 1's adapter, once. The reference is the base model.

    Args:
        session: for the store.
        harmful: pairs of stage 1.
        benign: chosen = the base model's answer, rejected = the stage-1 model's refusal.
        model: folder of the base model.
        start: folder of stage 1's adapter.
        settings: of the training and the mix.

    Returns:
        (adapter folder or None, metrics rows, what was done in one sentence).
    """
    if len(benign) < settings.min_refusals:
        message = (
            f"stage 2 skipped: {len(benign)} benign refusals, "
            f"at least {settings.min_refusals} needed"
        )
        return None, [], message
    harmful_part, benign_part = mix(harmful, benign, settings)
    mixed = [*harmful_part, *benign_part]
    spec = _spec(session, [*harmful, *benign], settings)
    spec |= {"benign": len(benign), "start": start.parent.name}
    path, rows = train_once(
        session, spec, lambda folder: train(mixed, model, settings, folder, adapter=start)
    )
    message = (
        f"stage 2 trained {len(rows)} steps on {len(harmful_part)} harmful "
        f"and {len(benign_part)} benign pairs"
    )
    return path, rows, message


def _spec(session: Session, pairs: Pairs, settings: DpoSettings) -> dict[str, Any]:
    """What decides an adapter, for its place in the store."""
    return {
        "pairs": digest([to_json(pair) for pair in pairs], 64),
        "settings": to_json(settings),
        "model": session.sampler.fingerprint(),
    }


def train_once(
    session: Session, spec: dict[str, Any], run: Callable[[Path], Any]
) -> tuple[Path, Rows]:
    """The adapter of ``spec`` from the store; if it is not there yet, ``run`` fills its folder.

    ``run`` finds in that folder what an attempt that was killed has left there.

    Returns:
        (adapter folder, metrics rows).
    """
    artifact = session.store.artifact("adapters", TRAIN_VERSION, spec)
    if not processes.broadcast(artifact.done):
        if processes.is_first():
            artifact.make(run, goes_on=True)
        else:  # it trains, too, and writes no more than its part of a checkpoint
            run(artifact.building)
        processes.wait()
    lines = (artifact.path / METRICS).read_text("utf-8").splitlines()
    return artifact.path, [json.loads(line) for line in lines]


def kept_adapters(adapter: Path) -> dict[int, Path]:
    """The intermediate adapters of a training, by pairs seen (``DpoSettings.keep``)."""
    folders = sorted(adapter.glob(f"{INTERMEDIATE}*"))
    return {int(folder.name.removeprefix(INTERMEDIATE)): folder for folder in folders}


def suffix_lengths(pairs: Pairs) -> Mapping[str, float]:
    """Mean tokens of each side: a short refusal can win over a long trace for its length alone."""
    count = max(len(pairs), 1)
    return {
        "chosen": sum(len(pair.chosen_ids) for pair in pairs) / count,
        "rejected": sum(len(pair.rejected_ids) for pair in pairs) / count,
    }


def train(
    pairs: Pairs,
    model: Folder,
    settings: DpoSettings,
    out: Folder,
    *,
    adapter: Folder | None = None,
) -> Rows:
    """Train LoRA on the preference loss of Eq. 4 plus ``sft_weight`` times the SFT loss.

    Under a launcher every process calls this with the same folder. A training whose margin stays at
    0 warns. One that was killed, called again alike, goes on (``ipo_lib.engines.checkpoints``).

    Args:
        pairs: training data; pairs longer than ``max_length`` are left out and counted.
        model: folder of the base model.
        settings: of the training.
        out: folder for the adapter, its metrics rows and ``training.json``.
        adapter: folder of an adapter to go on from, with its rank and targets; None: a fresh one.

    Returns:
        Metrics, one row per step; log-probabilities are sums over suffixes in nats, averaged over
        the step's pairs.

    Raises:
        BadInput: no pair is left, no model or adapter is there, the adapter is another model's, or
            a loss is not finite. In the last case ``out`` has the adapter of the last finite loss.
    """
    # 1. Leave out long pairs, and check what is given.
    fitting = _fitting(pairs, settings)
    _check_folder(model, "config.json")
    if adapter is not None:
        _check_folder(adapter, ADAPTER_CONFIG)

    # 2. Train.
    out, base = Path(out), Path(model).name
    ordered = sort_by_length(fitting, settings.seed) if settings.length_buckets else fitting
    trainer, lora = _make_trainer(ordered, model, settings, out, adapter)
    trainer.add_callback(_progress_callback(lora, out, base, settings.keep))
    name = digest([*map(to_json, (settings, *fitting)), str(model), str(adapter)])
    _run(trainer, lora, settings, out, base, name)

    # 3. Collect the metrics and write everything.
    rows = _metrics(trainer.state.log_history, settings.beta)
    warning = margin_warning(rows)
    if warning:
        warnings.warn(f"dpo: {warning}", stacklevel=2)
    summary = {
        "continued": bool(adapter),
        "effective_batch": settings.batch_size * settings.accumulation,
        "pairs": len(fitting),
        "too_long": len(pairs) - len(fitting),
        "quantized": quantization(settings),
        "settings": asdict(settings),
        "warning": warning,
    }
    if trainer.accelerator.is_main_process:
        write_results(lora, out, rows, base, summary)
        checkpoints.remove(out)
    return rows


def _fitting(pairs: Pairs, settings: DpoSettings) -> list[Pair]:
    """The pairs that are not too long; BadInput where none is left, or one cannot be trained on."""
    fitting = [pair for pair in pairs if pair_length(pair) <= settings.max_length]
    if not fitting:
        raise Untrainable(
            f"dpo: none of {len(pairs)} pairs fits max_length {settings.max_length}; "
            "raise it or add pairs"
        )
    for pair in fitting:
        if settings.loss != SFT and not pair.rejected_ids:
            raise BadInput(f"dpo: pair {pair.id} has no rejected side; set loss to sft")
        if settings.engine == "trl" and pair.weight != 1:
            raise BadInput("dpo: stock TRL has no weights; set engine to shared")
    return fitting


def _check_folder(folder: Folder, file: str) -> None:
    if not (Path(folder) / file).is_file():
        raise BadInput(
            f"dpo: {folder} holds no {file}; give the folder of a saved model or adapter"
        )


def _make_trainer(
    pairs: Pairs, model: Folder, settings: DpoSettings, out: Path, adapter: Folder | None
) -> tuple[Any, Any]:
    """The trainer of the settings' engine and its LoRA model."""
    if settings.engine == "trl":
        from ipo_lib.engines import trl_trainer

        return trl_trainer.make_trainer(pairs, model, settings, out, adapter)
    from ipo_lib.engines import prefix_sharing

    return prefix_sharing.make_trainer(pairs, model, settings, out, adapter)


def _run(trainer: Any, lora: Any, settings: DpoSettings, out: Path, base: str, name: str) -> None:
    """Run a trainer; where its loss becomes nan, save the last good adapter and raise.

    Args:
        trainer: of the settings' engine.
        lora: its model.
        settings: of the training.
        out: folder for checkpoints, and for the last good adapter.
        base: name of the base model.
        name: of the training, for its checkpoints.
    """
    from peft.helpers import disable_input_dtype_casting

    processes.wait()  # no process writes a checkpoint before all have looked for one
    checkpoint = checkpoints.latest(out, name)
    trainer.add_callback(checkpoints.callback(out, name))
    try:
        # PEFT turns every input to LoRA's float32, and autocast turns it back: the same numbers at
        # twice the memory traffic.
        with disable_input_dtype_casting(lora, active=settings.dtype == "bfloat16"):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Diverged as error:
        trainer.restore()
        if trainer.accelerator.is_main_process:
            save_adapter(lora, out, base)
        raise Untrainable(
            f"dpo: the loss is {error}; lower learning_rate (the last good adapter is in {out})"
        ) from None
    if trainer.state.max_steps == 1 and trainer.args.get_warmup_steps(1):
        raise Untrainable(
            "dpo: the only step is warm-up, at a learning rate of 0; "
            "lower batch_size, or set warmup to 0"
        )


def _progress_callback(lora: Any, out: Path, base: str, keep: int) -> Any:
    """A callback that reports progress and saves ``keep`` intermediate adapters in ``out``."""
    import transformers

    class Progress(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, steps = state.global_step, state.max_steps
            progress.say(step, steps, "training")
            saved_steps = [round(part * steps / (keep + 1)) for part in range(1, keep + 1)]
            if step in saved_steps and state.is_world_process_zero:
                batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                save_adapter(lora, out / f"{INTERMEDIATE}{step * batch:06d}", base)

    return Progress()


def mix(harmful: Pairs, benign: Pairs, settings: Stage2Settings) -> list[list[Pair]]:
    """Stage 2's [harmful, benign] pairs at ``ratio`` harmful to benign, in their order.

    With ``keep_all`` every pair is kept, and weights of mean 1 make the ratio. Else the larger side
    is thinned at random.
    """
    if settings.keep_all:
        benign_share = (len(harmful) + len(benign)) / (1 + settings.ratio)
        harmful_weight = settings.ratio * benign_share / max(len(harmful), 1)
        benign_weight = benign_share / max(len(benign), 1)
        return [
            [replace(pair, weight=harmful_weight) for pair in harmful],
            [replace(pair, weight=benign_weight) for pair in benign],
        ]
    harmful_count = min(len(harmful), round(settings.ratio * len(benign)))
    benign_count = len(benign)
    if harmful_count == len(harmful):
        benign_count = min(len(benign), round(harmful_count / settings.ratio))
    draw = random.Random(settings.seed)
    return [_thin(harmful, harmful_count, draw), _thin(benign, benign_count, draw)]


def _thin(pairs: Pairs, count: int, draw: random.Random) -> list[Pair]:
    indices = draw.sample(range(len(pairs)), count)
    return [pairs[index] for index in sorted(indices)]


def _metrics(history: Rows, beta: float) -> Rows:
    """The trainer's log as metrics rows, with rewards where there is a reference.

    A reward is beta times the log-ratio of policy and reference.
    """
    rows = []
    for entry in history:
        if "loss" not in entry:
            continue
        if not math.isfinite(entry["loss"]):
            raise BadInput(
                f"dpo: the loss is {entry['loss']} at step {entry['step']}; lower learning_rate"
            )
        row = {name: entry[name] for name in LOGGED if name in entry}
        if "ref_logps/chosen" in row:
            for side in SIDES:
                logratio = row[f"logps/{side}"] - row[f"ref_logps/{side}"]
                row[f"rewards/{side}"] = beta * logratio
            row["margin"] = row["rewards/chosen"] - row["rewards/rejected"]
        rows.append(row)
    return rows


def margin_warning(rows: Rows) -> str:
    """A warning where preference training ended with the margin it began with, else an empty text.

    The margin is the mean reward of the chosen side minus that of the rejected one. It starts at 0,
    and a step's margin is measured before the step is taken, so fewer than MARGIN_STEPS steps tell
    nothing.
    """
    margins = [row["margin"] for row in rows if "margin" in row]
    if len(margins) < MARGIN_STEPS:
        return ""
    last = margins[-(len(margins) // MARGIN_STEPS) :]
    margin = sum(last) / len(last)
    if abs(margin) >= LEARNT_MARGIN:
        return ""
    return (
        f"TRAINING DID NOTHING: the margin of the last {len(last)} of {len(margins)} steps is "
        f"{margin:.3f}; raise learning_rate or epochs, or give more pairs"
    )
