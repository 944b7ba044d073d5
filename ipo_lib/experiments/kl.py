"""How far training moved a model along traces of the untouched one (Fig 7): KL(trained || base) of the next-token distributions,
in nats, at every token of a trace; averaged at the token's index or around the cue, and set against where S changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ipo_lib.csr import SENTENCE
from ipo_lib.engines.lora import base, config, fill
from ipo_lib.profiles.run import Run
from ipo_lib.records import UNSAFE, Prompt, Prompts, Rollout, Rollouts, by_id
from ipo_lib.stages import JudgedRollouts as JudgedRollouts
from ipo_lib.stages import (
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
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.curves import rollouts as recorded_rollouts

DIRECTIONS = ("trained-base", "base-trained")
VERSION = 1
CHUNK = 256  # positions whose logits are held at once
FAR = 1000.0  # nats: no mean of tokens is outside
INDEX, AROUND = range(60), range(-20, 31)  # tokens from a trace's start, and from its cue
Points = tuple[tuple[int, float, float, float], ...]
NatsByRollout = Mapping[str, Sequence[float]]  # nats a token, by rollout id


def divergence(
    run: Run, adapter: Path, prompts: Prompts, rollouts: Rollouts, direction: str = DIRECTIONS[0]
) -> NatsByRollout:
    """KL at every token of each rollout's trace, full vocabulary, float32 softmax; ``direction`` is open in the paper."""
    session = run.session
    spec = {
        "sampler": run.adapted(adapter).sampler.fingerprint(),
        "chat": session.chat.fingerprint(),
        "direction": direction,
    }
    ledger, named = session.store.ledger("divergence", VERSION, spec), by_id(rollouts)
    if missing := ledger.missing(named):
        import torch
        from peft import get_peft_model

        settings = run.profile.stage1
        device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
        model = get_peft_model(
            base(run.folder, settings, device), config(run.folder, settings, adapter)
        ).to(device)
        fill(model, adapter, run.folder)
        for key in missing:
            one = named[key]
            head = session.chat.prompt_ids(prompts[one.prompt_id])
            ids = one.token_ids[: trace_end(session, one) or len(one.token_ids)]
            given = torch.tensor([head + ids], device=device)
            with (
                torch.no_grad(),
                torch.autocast(device, enabled=settings.dtype == "bfloat16", dtype=torch.bfloat16),
            ):
                nats = _along(model, given, len(head), direction)
            ledger.append({key: {"kl": [round(value, 6) for value in nats]}})
        ledger.finish()
    return {key: ledger[key]["kl"] for key in named}


def _along(model: Any, ids: Any, head: int, direction: str) -> list[float]:
    """KL of the next-token distributions at every token from ``head`` on, the logits of CHUNK positions at a time.

    Args:
        model: with an adapter that can be taken off.
        ids: prompt and trace [1, tokens].
        head: tokens of the prompt.
        direction: of DIRECTIONS.
    """
    inner = model.get_base_model()
    states = [
        inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, head - 1 : -1]
    ]
    with model.disable_adapter():
        states.append(
            inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, head - 1 : -1]
        )
    to_logits, nats = inner.get_output_embeddings(), list[float]()
    for at in range(0, len(states[0]), CHUNK):
        trained, plain = (to_logits(one[at : at + CHUNK]).float().log_softmax(-1) for one in states)
        p, q = (trained, plain) if direction == DIRECTIONS[0] else (plain, trained)
        nats += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()
    return nats


def aligned(found: NatsByRollout, at: Mapping[str, int], window: range) -> Points:
    """(offset, mean over traces, low, high) for offsets in ``window`` from the token ``at`` of each trace, where half of the
    traces have one."""
    rows = []
    for offset in window:
        values = [
            found[key][at[key] + offset] for key in at if 0 <= at[key] + offset < len(found[key])
        ]
        if len(values) >= max(2, len(at) / 2):
            one = mean(values, (0.0, FAR))
            rows.append((offset, one.value, one.low, one.high))
    return tuple(rows)


@dataclass(frozen=True)
class Changes:
    """What each sentence of a trace does to S: ``ends`` are its cuts, the first one 0, ``s`` is S at each of them."""

    rollout_id: str
    ends: tuple[int, ...]
    s: tuple[float, ...]

    @property
    def largest(self) -> int | None:
        """The index of the sentence over which S changes most; None in a trace of one sentence, or where S is not known."""
        steps = np.abs(np.diff(self.s))
        return None if len(steps) < 2 or np.isnan(steps).any() else int(steps.argmax())


def known_changes(recorded: Sequence[tuple[Rollout, Curve]]) -> list[Changes]:
    """The exact changes of recorded traces."""
    found = []
    for rollout, curve in recorded:
        ends = (0, *curve.trace.ends)
        found.append(Changes(rollout.id, ends, tuple(float(curve.truth[cut]) for cut in ends)))
    return found


def measured_changes(run: Run, seen: JudgedRollouts, rollouts: Rollouts) -> list[Changes]:
    """Changes of S from ``csr.draws`` continuations at every sentence end, where no exact ones are recorded."""
    session, settings = run.session, replace(run.profile.csr, grain=SENTENCE, stride=1)
    points = measure_csr(session, seen.prompts, rollouts, settings, run.thinking)
    return [
        Changes(key, tuple(p.cut for p in own), tuple(p.s for p in own))
        for key, own in points.items()
    ]


def concentration(
    found: NatsByRollout,
    changes: Sequence[Changes],
    prompts: Mapping[str, str],
    matched: bool = False,
) -> tuple[tuple[str, float], ...]:
    """Whether KL sits where S changes: by prompt, the mean over its traces of a difference in nats a token.

    Args:
        found: KL at every token, by rollout id.
        changes: of S in each trace; a trace of one sentence says nothing.
        prompts: the prompt of each trace, by rollout id.
        matched: what is taken off the mean KL in the sentence over which |change of S| is largest:
            False: that of the trace's other tokens; True: that of sentences at the same place in other
            traces, over which S changes less than elsewhere in them.
    """
    inside = {one.rollout_id: _by_sentence(found[one.rollout_id], one.ends) for one in changes}
    rows: dict[str, list[float]] = {}
    for one in changes:
        at, own = one.largest, inside[one.rollout_id]
        if at is None or at >= len(own) or not own[at]:
            continue
        if matched:
            beside = [
                value
                for other in changes
                if other.largest not in (None, at) and at < len(inside[other.rollout_id])
                for value in inside[other.rollout_id][at]
            ]
        else:
            start = len([value for sentence in own[:at] for value in sentence])
            every = [*found[one.rollout_id]]
            beside = every[:start] + every[start + len(own[at]) :]
        if beside:
            rows.setdefault(prompts[one.rollout_id], []).append(
                float(np.mean(own[at]) - np.mean(beside))
            )
    return tuple((prompt, round(sum(own) / len(own), 6)) for prompt, own in sorted(rows.items()))


def _by_sentence(nats: Sequence[float], ends: Sequence[int]) -> list[list[float]]:
    """KL by sentence."""
    return [list(nats[first:last]) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class Divergence:
    """How far one model moved: KL by token ``index`` and around the ``cue`` of unsafe base traces, by index on ``benign``
    prompts, and by prompt how much more there is ``where`` S changes most: than elsewhere in the trace, and (``matched``) than at
    the same place of other traces. (offset, mean, low, high) in nats."""

    row: str
    seed: int
    index: Points
    cue: Points
    benign: Points
    where: tuple[tuple[str, float], ...] = ()
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
    """How far an adapter moved the base model.

    Args:
        bench: the profile.
        row, seed: what the adapter is called.
        adapter: its folder.
        harmful: prompts of the base traces.
        benign: harmless prompts.
        count: unsafe base traces, and traces of benign prompts, that are measured.
        curves: base traces along which S is measured where the profile has no recorded curves.
    """
    session, plan = run.session, run.profile.plan
    seen = sample_and_judge(session, harmful, run.thinking, plan.draws)
    unsafe = random_subset(seen.labelled(UNSAFE), count, run.profile.seed)
    finder = run.truth() or run.detector(seen.rollouts, seen.verdicts)
    found, cue = (
        divergence(run, adapter, seen.prompts, unsafe),
        find_cues(session, seen.prompts, unsafe, finder),
    )
    starts = {
        one.id: trace_sentences(session, one)[at].token_start
        for one in unsafe
        if (at := cue[one.id]) is not None
    }
    named = by_id(benign)
    plain = sample(session, [Prefix(prompt) for prompt in benign][:count], run.thinking, 1)
    recorded = recorded_rollouts(session, seen, run.forks())
    if recorded:
        known = [rollout for rollout, _ in recorded]
        changes = known_changes(recorded)
    else:
        known = random_subset(seen.rollouts, curves, run.profile.seed) if curves else []
        changes = measured_changes(run, seen, known) if known else []
    owners = {one.id: one.prompt_id for one in known}
    along = divergence(run, adapter, seen.prompts, known) if known else {}
    where, matched = (concentration(along, changes, owners, beside) for beside in (False, True))
    other = divergence(run, adapter, named, plain)
    first, second = ({**dict.fromkeys(own, 0)} for own in (found, other))
    return Divergence(
        row,
        seed,
        aligned(found, first, INDEX),
        aligned(found, starts, AROUND),
        aligned(other, second, INDEX),
        where,
        matched,
    )
