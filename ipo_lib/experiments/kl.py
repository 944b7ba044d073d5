"""How far a trained model diverges from its base model, and where (Fig 7).

1. Traces of the base model are read by both models. At every token there is a KL divergence of the
   two next-token distributions, in nats: KL(trained || base), or the other way round.
2. It is averaged over traces by the token's index, and by its offset from the compliance cue.
3. It is set against the sentence over which S changes most: is KL larger there than elsewhere?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ipo_lib.csr import SENTENCE
from ipo_lib.engines.lora import load_base, load_weights, make_config
from ipo_lib.profiles.run import Run
from ipo_lib.records import UNSAFE, Prompt, Prompts, Rollout, Rollouts, by_id
from ipo_lib.stages import (
    JudgedRollouts,
    Prefix,
    find_cues,
    measure_csr,
    random_subset,
    sample,
    sample_and_judge,
    trace_end,
    trace_sentences,
)
from ipo_lib.stats import mean
from ipo_lib.turning_points.curves import Curve, recorded_prompts, recorded_rollouts

DIRECTIONS = ("trained-base", "base-trained")
VERSION = 1
CHUNK = 256  # positions whose logits are held at once
KL_BOUND = 1000.0  # nats: no mean over tokens is larger
INDEX = range(60)  # tokens from the start of a trace
AROUND = range(-20, 31)  # tokens from its cue
Points = tuple[tuple[int, float, float, float], ...]  # (offset, mean, low, high) in nats
NatsByRollout = Mapping[str, Sequence[float]]  # KL at each token, by rollout id


def divergence(
    run: Run, adapter: Path, prompts: Prompts, rollouts: Rollouts, direction: str = DIRECTIONS[0]
) -> NatsByRollout:
    """KL at every token of each rollout's trace, over the full vocabulary.

    Args:
        run: an open run; its model is the base model.
        adapter: folder of the trained adapter.
        prompts: of the rollouts, by id.
        rollouts: whose traces are read.
        direction: of DIRECTIONS; the paper does not say which it takes.
    """
    session = run.session
    spec = {
        "sampler": run.adapted(adapter).sampler.fingerprint(),
        "chat": session.chat.fingerprint(),
        "direction": direction,
    }
    ledger = session.store.ledger("divergence", VERSION, spec)
    rollouts_by_id = by_id(rollouts)
    missing = ledger.missing(rollouts_by_id)
    if missing:
        import torch

        model = _load_adapted(run, adapter)
        in_bf16 = run.profile.stage1.dtype == "bfloat16"
        autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16)
        for key in missing:
            rollout = rollouts_by_id[key]
            prompt_ids = session.chat.prompt_ids(prompts[rollout.prompt_id])
            trace_ids = rollout.token_ids[: trace_end(session, rollout)]
            ids = torch.tensor([prompt_ids + trace_ids], device=model.device)
            with torch.no_grad(), autocast:
                nats = token_divergences(model, ids, len(prompt_ids), direction)
            ledger.append({key: {"kl": [round(value, 6) for value in nats]}})
        ledger.finish()
    return {key: ledger[key]["kl"] for key in rollouts_by_id}


def _load_adapted(run: Run, adapter: Path) -> Any:
    """The model as it is trained: the base with the adapter beside it, which can be taken off."""
    import torch
    from peft import get_peft_model

    settings = run.profile.stage1
    device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
    base = load_base(run.folder, settings, device)
    model = get_peft_model(base, make_config(run.folder, settings, adapter)).to(device)
    load_weights(model, adapter, run.folder)
    return model


def token_divergences(model: Any, ids: Any, prompt_length: int, direction: str) -> list[float]:
    """KL of the next-token distributions at every token after the prompt.

    Args:
        model: PEFT model whose adapter can be taken off.
        ids: prompt and trace [1, tokens].
        prompt_length: tokens of the prompt.
        direction: of DIRECTIONS.
    """
    base = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()

    def states() -> Any:
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[0, prompt_length - 1 : -1].split(CHUNK)

    trained = states()
    with model.disable_adapter():
        plain = states()
    nats: list[float] = []
    for chunks in zip(trained, plain, strict=True):
        p, q = (head(chunk).float().log_softmax(-1) for chunk in chunks)
        if direction != DIRECTIONS[0]:
            p, q = q, p
        nats += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()
    return nats


def mean_by_offset(nats: NatsByRollout, origins: Mapping[str, int], window: range) -> Points:
    """Mean KL over traces at each offset from an origin, with its interval.

    Args:
        nats: KL at each token, by rollout id.
        origins: the token that has offset 0, by rollout id.
        window: offsets; one is left out where less than half of the traces have it.
    """
    points = []
    for offset in window:
        values = []
        for key, origin in origins.items():
            if 0 <= origin + offset < len(nats[key]):
                values.append(nats[key][origin + offset])
        if len(values) >= max(2, len(origins) / 2):
            average = mean(values, (0.0, KL_BOUND))
            points.append((offset, average.value, average.low, average.high))
    return tuple(points)


@dataclass(frozen=True)
class SafetyChanges:
    """How S changes along a trace, sentence by sentence."""

    rollout_id: str
    ends: tuple[int, ...]  # the ends of sentences in tokens, after a first one of 0
    s: tuple[float, ...]  # S at each of them

    @property
    def largest(self) -> int | None:
        """Index of the sentence over which S changes most; None with one sentence or unknown S."""
        steps = np.abs(np.diff(self.s))
        return None if len(steps) < 2 or np.isnan(steps).any() else int(steps.argmax())


def recorded_changes(recorded: Sequence[tuple[Rollout, Curve]]) -> list[SafetyChanges]:
    """The exact changes of S in traces with recorded curves."""
    changes = []
    for rollout, curve in recorded:
        ends = (0, *curve.trace.ends)
        s = tuple(float(curve.truth[end]) for end in ends)
        changes.append(SafetyChanges(rollout.id, ends, s))
    return changes


def measured_changes(run: Run, judged: JudgedRollouts, rollouts: Rollouts) -> list[SafetyChanges]:
    """Changes of S from ``csr.draws`` continuations at every sentence end."""
    settings = replace(run.profile.csr, grain=SENTENCE, stride=1)
    curves = measure_csr(run.session, judged.prompts, rollouts, settings, run.thinking)
    changes = []
    for key, points in curves.items():
        ends = tuple(point.cut for point in points)
        changes.append(SafetyChanges(key, ends, tuple(point.s for point in points)))
    return changes


def concentration(
    nats: NatsByRollout,
    changes: Sequence[SafetyChanges],
    prompts: Mapping[str, str],
    matched: bool = False,
) -> tuple[tuple[str, float], ...]:
    """How much more KL there is in the sentence over which S changes most.

    Args:
        nats: KL at each token, by rollout id.
        changes: of S in each trace; a trace of one sentence is left out.
        prompts: the prompt id of each trace, by rollout id.
        matched: what that sentence is compared with. False: the other tokens of its trace. True:
            the sentences with its index in other traces whose largest change is elsewhere.

    Returns:
        By prompt, the mean over its traces of the difference in nats per token.
    """
    sentences = {}
    for trace in changes:
        values = nats[trace.rollout_id]
        sentences[trace.rollout_id] = [[*values[a:b]] for a, b in pairwise(trace.ends)]

    differences: dict[str, list[float]] = {}
    for trace in changes:
        key, index = trace.rollout_id, trace.largest
        if index is None or not sentences[key][index]:
            continue
        inside = sentences[key][index]
        outside: list[float] = []
        if matched:
            for other in changes:
                if other.largest not in (None, index) and index < len(sentences[other.rollout_id]):
                    outside += sentences[other.rollout_id][index]
        else:
            start = trace.ends[index]
            outside += [*nats[key][:start], *nats[key][start + len(inside) :]]
        if outside:
            difference = float(np.mean(inside) - np.mean(outside))
            differences.setdefault(prompts[key], []).append(difference)
    rows = []
    for prompt, values in sorted(differences.items()):
        rows.append((prompt, round(sum(values) / len(values), 6)))
    return tuple(rows)


@dataclass(frozen=True)
class Divergence:
    """How far one adapter diverges from the base model: mean KL in nats, with intervals."""

    row: str  # of a table of results
    seed: int  # of the training
    index: Points  # by token from the start of unsafe base traces
    cue: Points  # by token from the cue of unsafe base traces
    benign: Points  # by token from the start of traces of benign prompts
    # By prompt, how much more there is where S changes most than elsewhere in the trace ...
    where: tuple[tuple[str, float], ...] = ()
    # ... and than in the sentences with the same index of other traces.
    matched: tuple[tuple[str, float], ...] = ()


def measure_divergence(
    run: Run,
    row: str,
    seed: int,
    adapter: Path,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    count: int,
    curves: int = 0,
) -> Divergence:
    """Measure how far an adapter diverges from the base model.

    Args:
        run: an open run; its model is the base model.
        row: of a table of results.
        seed: of the training.
        adapter: folder of the trained adapter.
        harmful: prompts of the base traces.
        benign: harmless prompts.
        count: how many unsafe base traces, and how many traces of benign prompts, are read.
        curves: how many base traces are read for the change of S. With recorded curves 0 means
            all; without, S is measured, and 0 means none.
    """
    session, profile = run.session, run.profile
    judged = sample_and_judge(session, harmful, run.thinking, profile.plan.draws)

    # 1. Unsafe traces, from their start and from their cue.
    unsafe = random_subset(judged.labelled(UNSAFE), count, profile.seed)
    nats = divergence(run, adapter, judged.prompts, unsafe)
    cue_starts = _cue_starts(run, judged, unsafe)

    # 2. Traces of benign prompts.
    prefixes = [Prefix(prompt) for prompt in benign[:count]]
    harmless = sample(session, prefixes, run.thinking, 1)
    benign_nats = divergence(run, adapter, by_id(benign), harmless)

    # 3. Traces whose curve of S is recorded, or else is measured.
    recorded_curves = run.recorded_curves()
    recorded = recorded_rollouts(session, judged, recorded_curves)
    if recorded:
        chosen = random_subset(recorded, curves or len(recorded), profile.seed)
        rollouts = [rollout for rollout, _ in chosen]
        changes = recorded_changes(chosen)
    else:
        rollouts = random_subset(judged.rollouts, curves, profile.seed)
        changes = measured_changes(run, judged, rollouts) if rollouts else []
    prompt_ids = {rollout.id: rollout.prompt_id for rollout in rollouts}
    prompts = recorded_prompts(judged, recorded_curves)
    curve_nats = divergence(run, adapter, prompts, rollouts)

    return Divergence(
        row,
        seed,
        mean_by_offset(nats, dict.fromkeys(nats, 0), INDEX),
        mean_by_offset(nats, cue_starts, AROUND),
        mean_by_offset(benign_nats, dict.fromkeys(benign_nats, 0), INDEX),
        concentration(curve_nats, changes, prompt_ids),
        concentration(curve_nats, changes, prompt_ids, matched=True),
    )


def _cue_starts(run: Run, judged: JudgedRollouts, rollouts: Rollouts) -> dict[str, int]:
    """The first token of each trace's cue, by rollout id; traces without a cue are left out."""
    detector = run.truth() or run.detector(judged.rollouts, judged.verdicts)
    cues = find_cues(run.session, judged.prompts, rollouts, detector)
    starts = {}
    for rollout in rollouts:
        sentence = cues[rollout.id]
        if sentence is not None:
            starts[rollout.id] = trace_sentences(run.session, rollout)[sentence].token_start
    return starts
