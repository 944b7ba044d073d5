"""Pairs from corrected traces, and adapters trained on them: both are stored, neither is made twice."""

from __future__ import annotations

import json
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipo_lib.dpo import DpoSettings, Stage2Settings
from ipo_lib.engines import processes, progress
from ipo_lib.engines.lora import (
    ADAPTER,
    KEPT,
    LOGGED,
    METRICS,
    SUMMARY,
    Diverged,
    Folder,
    Pairs,
    Rows,
    Untrainable,
    bucketed,
    quantization,
    save,
)
from ipo_lib.records import BadInput, Pair, canonical, digest, to_json
from ipo_lib.stages import Session

TRAIN_VERSION = 2


def train_first_stage(
    session: Session,
    pairs: Pairs,
    model: Path,
    settings: DpoSettings,
    counts: Mapping[str, int] | None = None,
) -> tuple[Path, Rows]:
    """Stage 1: the adapter folder trained on ``pairs`` and its metrics rows; trained once. BadInput without a pair names
    the reasons in ``counts``."""
    if not pairs:
        why = ", ".join(f"{n} {reason}" for reason, n in (counts or {}).items() if n)
        raise Untrainable(
            f"training: no pairs ({why or 'nothing was gathered'}); raise draws or prompts, or change what refuses them"
        )
    return _trained(session, pairs, pairs, model, settings)


def train_second_stage(
    session: Session,
    harmful: Pairs,
    benign: Pairs,
    model: Path,
    start: Path,
    settings: Stage2Settings,
) -> tuple[Path | None, Rows, str]:
    """Stage 2 from stage 1's adapter, reference the base model: (adapter or None, rows, what was done in one sentence).
    ``benign``: chosen = the base model's answer, rejected = the stage-1 model's refusal."""
    if len(benign) < settings.min_refusals:
        return (
            None,
            [],
            f"stage 2 skipped: {len(benign)} benign refusals, at least {settings.min_refusals} needed",
        )
    kept, mixed_in = mix(harmful, benign, settings)
    path, rows = _trained(
        session, [*harmful, *benign], [*kept, *mixed_in], model, settings, start, benign=len(benign)
    )
    return (
        path,
        rows,
        f"stage 2 trained {len(rows)} steps on {len(kept)} harmful and {len(mixed_in)} benign pairs",
    )


def _trained(
    session: Session,
    given: Pairs,
    taken: Pairs,
    model: Path,
    settings: DpoSettings,
    start: Path | None = None,
    **more: Any,
) -> tuple[Path, Rows]:
    """The adapter that ``given`` names and the pairs ``taken`` from them train, and its metrics rows; trained once."""
    spec = {
        "pairs": digest([to_json(one) for one in given], 64),
        "settings": to_json(settings),
        **more,
    }
    spec |= {"model": session.sampler.fingerprint()} | (
        {"start": start.parent.name} if start else {}
    )
    return train_once(
        session, spec, lambda folder: train(taken, model, settings, folder, adapter=start)
    )


def train_once(
    session: Session, spec: dict[str, Any], run: Callable[[Path], Any]
) -> tuple[Path, Rows]:
    """The adapter folder of ``spec``, which ``run`` fills if it is not there yet, and its metrics rows."""
    artifact = session.store.artifact("adapters", TRAIN_VERSION, spec)
    if not processes.agreed(artifact.done):
        if processes.is_first():
            with artifact.build() as folder:
                run(folder)
        else:  # it trains as well, and what it would write is the first process's
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder))
        processes.wait()
    return artifact.path, [
        json.loads(row) for row in (artifact.path / METRICS).read_text("utf-8").splitlines()
    ]


def kept_adapters(adapter: Path) -> dict[int, Path]:
    """The adapters kept on the way to ``adapter``, by pairs seen (``DpoSettings.keep``)."""
    return {int(path.name.removeprefix(KEPT)): path for path in sorted(adapter.glob(f"{KEPT}*"))}


def suffix_lengths(pairs: Pairs) -> Mapping[str, float]:
    """Mean suffix lengths in tokens: a short refusal against a long trace can win for its length alone."""
    sides = {
        "chosen": [one.chosen_ids for one in pairs],
        "rejected": [one.rejected_ids for one in pairs],
    }
    return {side: sum(map(len, ids)) / max(len(ids), 1) for side, ids in sides.items()}


def train(
    pairs: Pairs,
    model: Folder,
    settings: DpoSettings,
    out: Folder,
    *,
    adapter: Folder | None = None,
) -> Rows:
    """Train LoRA by Eq. 4 (+ ``sft_weight`` x NLL of the chosen side) and return one metrics row per step. ``out`` receives the
    adapter, the rows (log-probabilities are sums in nats from the suffix on, averaged over the step's pairs) and
    ``training.json``, which also counts the pairs left out for ``max_length``. With ``adapter`` training goes on from its
    weights, rank and targets. BadInput: no pair left, no model or adapter there, an adapter of another model, a loss that is not
    finite (``out`` then holds the adapter of the last finite one). A training whose margin stays at 0 warns. Under a launcher
    every process calls this; the first one writes."""
    fitting = [
        p
        for p in pairs
        if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= settings.max_length
    ]
    if not fitting:
        raise Untrainable(
            f"dpo: none of {len(pairs)} pairs fits max_length {settings.max_length}; raise it or add pairs"
        )
    if settings.loss != "sft" and (
        lone := next((pair for pair in fitting if not pair.rejected_ids), None)
    ):
        raise BadInput(f"dpo: pair {lone.id} has no rejected side; set loss to sft")
    if settings.engine == "trl" and any(pair.weight != 1 for pair in fitting):
        raise BadInput("dpo: stock TRL has no weights; set engine to shared")
    for folder, file in ((model, "config.json"), (adapter, ADAPTER)):
        if folder is not None and not (Path(folder) / file).is_file():
            raise BadInput(
                f"dpo: {folder} holds no {file}; give the folder of a saved model or adapter"
            )
    from peft.helpers import disable_input_dtype_casting

    if settings.engine == "trl":
        from ipo_lib.engines.trl_trainer import trainer as made
    else:
        from ipo_lib.engines.prefix_sharing import trainer as made
    trainer, lora = made(
        bucketed(fitting, settings.seed) if settings.length_buckets else fitting,
        model,
        settings,
        out,
        adapter,
    )
    trainer.add_callback(_on_the_way(lora, Path(out), Path(model).name, settings.keep))
    try:
        # PEFT turns every input to LoRA's float32, and autocast turns it back: the same numbers, twice the memory traffic.
        with disable_input_dtype_casting(lora, active=settings.dtype == "bfloat16"):
            trainer.train()
    except Diverged as error:
        trainer.restore()
        if trainer.accelerator.is_main_process:
            save(lora, Path(out), Path(model).name)
        raise Untrainable(
            f"dpo: the loss is {error}; lower learning_rate (the last good adapter is in {out})"
        ) from None
    if trainer.state.max_steps == 1 and trainer.args.get_warmup_steps(1):
        raise Untrainable(
            "dpo: the only step is warm-up, at a learning rate of 0; lower batch_size, or set warmup to 0"
        )
    rows = _rows(trainer.state.log_history, settings.beta)
    if warning := untrained(rows):
        warnings.warn(f"dpo: {warning}", stacklevel=2)
    if trainer.accelerator.is_main_process:
        batch = settings.batch_size * settings.accumulation
        summary: dict[str, Any] = {
            "base": Path(model).name,
            "continued": bool(adapter),
            "effective_batch": batch,
        }
        summary |= {
            "pairs": len(fitting),
            "too_long": len(pairs) - len(fitting),
            "quantized": quantization(settings),
        }
        summary |= {"settings": asdict(settings), "warning": warning}
        save(lora, target := Path(out), summary["base"])
        (target / METRICS).write_text("".join(canonical(row) + "\n" for row in rows))
        (target / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return rows


def _on_the_way(lora: Any, out: Path, base: str, keep: int) -> Any:
    """A callback that says how far training is and keeps ``keep`` adapters in ``out`` / KEPT + pairs seen."""
    import transformers

    class OnTheWay(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.say(state.global_step, state.max_steps, "training")
            at = [round(place * state.max_steps / (keep + 1)) for place in range(1, keep + 1)]
            if state.global_step in at and state.is_world_process_zero:
                seen = (
                    state.global_step
                    * args.train_batch_size
                    * args.gradient_accumulation_steps
                    * args.world_size
                )
                save(lora, out / f"{KEPT}{seen:06d}", base)

    return OnTheWay()


def mix(harmful: Pairs, benign: Pairs, settings: Stage2Settings) -> list[list[Pair]]:
    """Stage 2's [harmful, benign] pairs at ``ratio`` harmful to benign, in their order.

    With ``keep_all`` every pair is kept, and weights of mean 1 make the ratio; else the larger side is
    thinned at random.
    """
    if settings.keep_all:
        weighed = (len(harmful) + len(benign)) / (1 + settings.ratio)
        weights = settings.ratio * weighed / max(len(harmful), 1), weighed / max(len(benign), 1)
        return [
            [replace(pair, weight=w) for pair in side]
            for side, w in zip((harmful, benign), weights, strict=True)
        ]
    n = min(len(harmful), round(settings.ratio * len(benign)))
    sides = (
        (harmful, n),
        (benign, len(benign) if n < len(harmful) else min(len(benign), round(n / settings.ratio))),
    )
    draw = random.Random(settings.seed)
    return [[side[i] for i in sorted(draw.sample(range(len(side)), size))] for side, size in sides]


def _rows(history: Rows, beta: float) -> Rows:
    """The trainer's log as metrics rows, with rewards (beta x the log-ratio to the reference) where there is a reference."""
    rows = []
    for entry in (entry for entry in history if "loss" in entry):
        if not math.isfinite(entry["loss"]):
            raise BadInput(
                f"dpo: the loss is {entry['loss']} at step {entry['step']}; lower learning_rate"
            )
        row = {name: entry[name] for name in LOGGED if name in entry}
        if "ref_logps/chosen" in row:
            sides = ("chosen", "rejected")
            row |= {
                f"rewards/{side}": beta * (row[f"logps/{side}"] - row[f"ref_logps/{side}"])
                for side in sides
            }
            row["margin"] = row["rewards/chosen"] - row["rewards/rejected"]
        rows.append(row)
    return rows


LEARNT = 0.05  # reward margin under which a training has taught nothing


LAST = 4  # the share of the steps whose margin is looked at: the last quarter


def untrained(rows: Rows) -> str:
    """A warning where preference training ended with the margin it began with, else an empty text.

    The margin is the mean reward of the chosen side minus that of the rejected one. It starts at 0, and a
    step's is measured before the step is taken, so fewer than LAST steps tell nothing.
    """
    margins = [row["margin"] for row in rows if "margin" in row]
    last = margins[-max(len(margins) // LAST, 1) :]
    if len(margins) < LAST or abs(sum(last) / len(last)) >= LEARNT:
        return ""
    said = (
        f"the margin of the last {len(last)} of {len(margins)} steps is {sum(last) / len(last):.3f}"
    )
    return f"TRAINING DID NOTHING: {said}; raise learning_rate or epochs, or give more pairs"
