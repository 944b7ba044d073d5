"""How far training moved a model along traces of the untouched one (Fig 7): KL(trained || base) of the next-token distributions,
in nats, at every token of a trace; averaged at the token's index or around the cue, and set against where S changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipo_lib.lora import base, config, fill
from ipo_lib.profiles import Bench
from ipo_lib.records import UNSAFE, Prompt, Prompts, Rollouts
from ipo_lib.replay import Curve
from ipo_lib.stages import Start, cues, sample, some, trace_end, trace_sentences, traces
from ipo_lib.stats import mean

DIRECTIONS = ("trained-base", "base-trained")
VERSION = 1
FAR = 1000.0  # nats: no mean of tokens is outside
INDEX, AROUND = range(60), range(-20, 31)  # tokens from a trace's start, and from its cue
Points = tuple[tuple[int, float, float, float], ...]
Divergence = Mapping[str, Sequence[float]]  # nats a token, by rollout id


def divergence(bench: Bench, adapter: Path, prompts: Prompts, rollouts: Rollouts, direction: str = DIRECTIONS[0]) -> Divergence:
    """KL at every token of each rollout's trace, full vocabulary, float32 softmax; ``direction`` is open in the paper."""
    doors = bench.doors
    spec = {"sampler": bench.adapted(adapter).sampler.fingerprint(), "chat": doors.chat.fingerprint(), "direction": direction}
    ledger, named = doors.store.ledger("divergence", VERSION, spec), {one.id: one for one in rollouts}
    if missing := ledger.missing(named):
        import torch
        from peft import get_peft_model

        settings = bench.profile.stage1
        device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
        model = get_peft_model(base(bench.folder, settings, device), config(bench.folder, settings, adapter)).to(device)
        fill(model, adapter, bench.folder)
        for key in missing:
            one = named[key]
            head, ids = (
                doors.chat.prompt_ids(prompts[one.prompt_id]),
                one.token_ids[: trace_end(doors, one) or len(one.token_ids)],
            )
            given = torch.tensor([head + ids], device=device)
            with torch.no_grad(), torch.autocast(device, enabled=settings.dtype == "bfloat16", dtype=torch.bfloat16):
                trained = model(input_ids=given).logits[0, len(head) - 1 : -1].float().log_softmax(-1)
                with model.disable_adapter():
                    plain = model(input_ids=given).logits[0, len(head) - 1 : -1].float().log_softmax(-1)
            p, q = (trained, plain) if direction == DIRECTIONS[0] else (plain, trained)
            ledger.append({key: {"kl": [round(one, 6) for one in (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()]}})
        ledger.finish()
    return {key: ledger[key]["kl"] for key in named}


def aligned(found: Divergence, at: Mapping[str, int], window: range) -> Points:
    """(offset, mean over traces, low, high) for offsets in ``window`` from the token ``at`` of each trace, where half of the
    traces have one."""
    rows = []
    for offset in window:
        values = [found[key][at[key] + offset] for key in at if 0 <= at[key] + offset < len(found[key])]
        if len(values) >= max(2, len(at) / 2):
            one = mean(values, (0.0, FAR))
            rows.append((offset, one.value, one.low, one.high))
    return tuple(rows)


def concentration(found: Divergence, curves: Sequence[Curve], prompts: Mapping[str, str]) -> tuple[tuple[str, float], ...]:
    """Whether KL sits where S changes: by prompt (of each trace in ``prompts``), over its traces of a known curve, the mean KL a
    token in the sentence over which |change of S| is largest, minus that of the trace's other tokens, in nats; traces of one
    sentence say nothing."""
    rows: dict[str, list[float]] = {}
    for curve in curves:
        kl, ends = np.array(found[curve.trace.id]), (0, *curve.trace.ends)
        at = int(np.abs(np.diff([curve.truth[cut] for cut in ends])).argmax()) if len(ends) > 2 else -1
        inside = np.zeros(len(kl), dtype=bool)
        inside[ends[at] : ends[at + 1] if at >= 0 else 0] = True
        if inside.any() and not inside.all():
            rows.setdefault(prompts[curve.trace.id], []).append(float(kl[inside].mean() - kl[~inside].mean()))
    return tuple((prompt, round(sum(own) / len(own), 6)) for prompt, own in sorted(rows.items()))


@dataclass(frozen=True)
class Moved:
    """How far one model moved: KL by token ``index`` and around the ``cue`` of unsafe base traces, by index on ``benign``
    prompts, and by prompt how much more there is ``where`` S changes most. (offset, mean, low, high) in nats."""

    row: str
    seed: int
    index: Points
    cue: Points
    benign: Points
    where: tuple[tuple[str, float], ...] = ()


def moved(
    bench: Bench, row: str, seed: int, adapter: Path, harmful: Sequence[Prompt], benign: Sequence[Prompt], count: int
) -> Moved:
    """``Moved`` on ``count`` unsafe base traces, as many traces of benign prompts, and the recorded traces of the profile."""
    doors, plan = bench.doors, bench.profile.plan
    seen = traces(doors, harmful, bench.thinking, plan.draws)
    unsafe = some(seen.labelled(UNSAFE), count, bench.profile.seed)
    finder = bench.truth() or bench.detector(seen.rollouts, seen.verdicts)
    found, cue = divergence(bench, adapter, seen.prompts, unsafe), cues(doors, seen.prompts, unsafe, finder)
    starts = {one.id: trace_sentences(doors, one)[at].token_start for one in unsafe if (at := cue[one.id]) is not None}
    named = {prompt.id: prompt for prompt in benign}
    plain = sample(doors, [Start(prompt) for prompt in benign][:count], bench.thinking, 1)
    curves = [curve for curve in bench.forks() if curve.trace.id in seen.labels]
    known = [one for one in seen.rollouts if one.id in {curve.trace.id for curve in curves}]
    owners = {one.id: one.prompt_id for one in known}
    where = concentration(divergence(bench, adapter, seen.prompts, known), curves, owners) if known else ()
    other = divergence(bench, adapter, named, plain)
    first, second = ({**dict.fromkeys(own, 0)} for own in (found, other))
    return Moved(row, seed, aligned(found, first, INDEX), aligned(found, starts, AROUND), aligned(other, second, INDEX), where)
