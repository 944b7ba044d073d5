"""Pairs from corrected traces, and adapters trained on them: both are stored, neither is made twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.dpo import METRICS, DpoSettings, Stage2Settings, stage2, train
from ipo_lib.intervention import CueDetector, Trigger
from ipo_lib.pairs import PairSettings, Refusal, build, collect
from ipo_lib.records import ANSWER, BOTH, Pair, Prompt, Rollout, Verdict, digest, to_json
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Corrected, Doors, Plan, Start, correct, judge, sample, trace_end
from ipo_lib.store import Artifact

TRAIN_VERSION = 1


def pair(
    doors: Doors, prompt: Prompt, loser: Rollout, winner: Rollout, cut: int, settings: PairSettings, why: str = ""
) -> Pair | Refusal:
    """The pair (x, winner > loser, h = ``cut``) of two rollouts of one prompt, or the reason there is none."""
    ids, eos, ends = doors.chat.prompt_ids(prompt), doors.chat.eos_ids[0], [trace_end(doors, one) for one in (loser, winner)]
    eos_id = eos if settings.eos else None
    return build(loser, winner, ids, cut, settings, why, loser_end=ends[0], winner_end=ends[1], eos_id=eos_id)


def corrected_pairs(
    doors: Doors, prompts: Sequence[Prompt], triggers: Sequence[Trigger], detector: CueDetector, plan: Plan, settings: PairSettings,
    sampling: Sampling,
) -> tuple[list[Pair], dict[str, int], list[Corrected]]:  # fmt: skip
    """Algorithm 1 once per trigger, each on a fresh trace of every prompt: (pairs, counts by reason, what was tried).

    The loser is any trace with a cue, as in the paper; the winner is what its first cue's replacement was accepted with.
    ``counts`` has ``no-cue`` and ``not-accepted`` beside the reasons of ``pairs``.
    """
    named = {prompt.id: prompt for prompt in prompts}
    results: list[Pair | Refusal] = []
    tried: list[Corrected] = []
    for place, trigger in enumerate(triggers):
        rollouts = sample(doors, [Start(prompt) for prompt in prompts], sampling, 1, first=place)
        done = correct(doors, named, rollouts, trigger, detector, plan, sampling)
        tried += done
        for one in done:
            if one.intervention.accepted:
                prompt, why = named[one.loser.prompt_id], f"trigger {trigger.id}"
                results.append(pair(doors, prompt, one.loser, one.result, one.cut, settings, why))
    kept, counts = collect(results)
    refused = sum(not one.intervention.accepted for one in tried)
    return kept, {**counts, "no-cue": len(triggers) * len(prompts) - len(tried), "not-accepted": refused}, tried


def benign_pairs(
    before: Doors, after: Doors, prompts: Sequence[Prompt], settings: PairSettings, sampling: Sampling
) -> tuple[list[Pair], dict[str, int], list[Verdict]]:
    """Stage 2's pairs: the organism's whole response over the refusal of the model after stage 1, on benign prompts.

    Returns (pairs, counts by reason, the refusal verdicts after stage 1). Prompts that are not refused give no pair.
    """
    named = {prompt.id: prompt for prompt in prompts}
    starts = [Start(prompt) for prompt in prompts]
    good, bad = (sample(doors, starts, sampling, 1) for doors in (before, after))
    verdicts = [judge(doors, named, rollouts, ANSWER, "refusal") for doors, rollouts in ((before, good), (after, bad))]
    whole = dataclasses.replace(settings, part=BOTH, eos=True)
    results = [
        pair(before, named[loser.prompt_id], loser, winner, 0, whole, "benign refusal")
        for winner, loser, answered, refused in zip(good, bad, *verdicts, strict=True)
        if answered.label == "answered" and refused.label == "refused"
    ]
    return *collect(results), verdicts[1]


def adapter(doors: Doors, pairs: Sequence[Pair], model: Path, settings: DpoSettings) -> tuple[Path, list[dict[str, Any]]]:
    """Stage 1: the adapter folder trained on ``pairs`` and its metrics rows; trained once."""
    artifact = trained(doors, pairs, settings, {})
    if not artifact.done:
        with artifact.build() as folder:
            train(pairs, model, settings, folder)
    return artifact.path, metrics(artifact.path)


def second_stage(
    doors: Doors, harmful: Sequence[Pair], benign: Sequence[Pair], model: Path, start: Path, settings: Stage2Settings
) -> tuple[Path | None, list[dict[str, Any]], str]:
    """Stage 2 from stage 1's adapter, reference the organism: (adapter or None, rows, what was done in one sentence)."""
    artifact = trained(doors, [*harmful, *benign], settings, {"start": start.parent.name, "benign": len(benign)})
    if artifact.done:
        return artifact.path, metrics(artifact.path), "stage 2 trained"
    if len(benign) < settings.min_refusals:
        return None, *stage2(harmful, benign, model, settings, artifact.path, adapter=start)
    with artifact.build() as folder:
        rows, message = stage2(harmful, benign, model, settings, folder, adapter=start)
    return artifact.path, rows, message


def trained(doors: Doors, pairs: Sequence[Pair], settings: DpoSettings, more: Mapping[str, Any]) -> Artifact:
    """Where the adapter of these pairs and settings lies, or will lie."""
    spec = {"pairs": digest([to_json(one) for one in pairs], 64), "settings": to_json(settings), **more}
    return doors.store.artifact("adapters", TRAIN_VERSION, {**spec, "model": doors.sampler.fingerprint()})


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics rows beside a trained adapter."""
    return [json.loads(row) for row in (folder / METRICS).read_text("utf-8").splitlines()]


def lengths(pairs: Sequence[Pair]) -> Mapping[str, float]:
    """Mean suffix lengths in tokens: a short refusal against a long trace can win for its length alone."""
    sides = {"chosen": [one.chosen_ids for one in pairs], "rejected": [one.rejected_ids for one in pairs]}
    return {side: sum(map(len, ids)) / max(len(ids), 1) for side, ids in sides.items()}
