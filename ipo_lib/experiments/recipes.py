"""Ways to a safer model, one settings record each: the paper's method, what it compares, and what its reviewers asked for. A
recipe says what is gathered, with which detector and triggers, and what comes after; LoRA, prompts and evaluation are the
profile's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib import pipeline, training
from ipo_lib.cues import CueDetector
from ipo_lib.evaluation import Respond, plainly
from ipo_lib.experiments import grpo
from ipo_lib.experiments.detectors import Anywhere, FewShot, Searched, Shifted
from ipo_lib.pairs import Refusal, collect
from ipo_lib.profiles.run import Bench
from ipo_lib.profiles.settings import (
    ANYWHERE,
    AT_INFERENCE,
    CSR,
    GRPO,
    MIXED,
    MODEL,
    NATURAL,
    NEUTRAL,
    NONE,
    PARAPHRASES,
    PROFILE,
    RANDOM,
    REWARDS,
    STAGE_2,
    TEACHER,
    TRUTH,
    UNSHARED,
    Recipe,
)
from ipo_lib.records import (
    SAFE,
    TRACE,
    UNSAFE,
    BadInput,
    Pair,
    Prompt,
    Rollout,
    by_id,
    digest,
    to_json,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    FRESH,
    Case,
    Doors,
    Start,
    cues,
    intervene,
    judge,
    sample,
    tally,
    trace_sentences,
    traces,
)
from ipo_lib.store import Store
from ipo_lib.triggers import Trigger

WEIGHED = 16  # continuations at each side of a cue, where pairs are weighed


@dataclass(frozen=True)
class Made:
    """What a recipe gave: the model as ``doors``, the folder of its adapter, how it was trained, tokens that were generated for
    it, ``counts`` of pairs by reason; ``failed``: why it is not what the recipe asks for; and how it answers."""

    doors: Doors
    adapter: Path | None
    pairs: int
    tokens: int
    counts: dict[str, int]
    rows: list[dict[str, float]]
    failed: str = ""
    respond: Respond = plainly


def seeded(bench: Bench, seed: int) -> Bench:
    """The bench with another seed for everything that is drawn or trained; it counts its own tokens."""
    p, doors = bench.profile, bench.doors
    stages = {name: replace(getattr(p, name), seed=seed) for name in ("stage1", "stage2", "grpo")}
    return replace(
        bench,
        profile=replace(p, seed=seed, **stages),
        doors=replace(doors, store=Store(doors.store.root), seed=seed),
    )


def make(bench: Bench, harmful: Sequence[Prompt], benign: Sequence[Prompt]) -> Made:
    """The model that the profile's recipe makes of the profile's organism."""
    recipe, p, doors = bench.profile.recipe, bench.profile, bench.doors
    if recipe.data in (NONE, AT_INFERENCE):
        respond = corrector(bench, harmful) if recipe.data == AT_INFERENCE else plainly
        return Made(doors, None, 0, _spent(doors), {}, [], respond=respond)
    if recipe.data == REWARDS:
        adapter, rows, spent = _rewarded(bench, harmful, None)
        return Made(bench.adapted(adapter), adapter, 0, spent, {}, rows)
    pairs, counts = gather(bench, harmful)
    adapter, rows = training.adapter(doors, pairs, bench.folder, p.stage1, counts)
    failed = ""
    if recipe.then in (STAGE_2, MIXED):
        finder = detector(bench, recipe.detector, harmful)
        pool = triggers(bench, harmful, finder) if p.stage2.refusing_prefix else []
        after = bench.adapted(adapter)
        refused, _, _ = pipeline.benign_pairs(
            doors, after, benign, p.pairs, p.sampling, p.stage2, pool
        )
        counts |= {"benign": len(refused)}
        if recipe.then == MIXED:
            adapter, rows = training.adapter(doors, [*pairs, *refused], bench.folder, p.stage1)
        else:
            second, more, said = training.second_stage(
                doors, pairs, refused, bench.folder, adapter, p.stage2
            )
            adapter, rows, failed = second or adapter, rows + more, "" if second else said
    spent = _spent(doors)
    if recipe.then == GRPO:
        adapter, more, again = _rewarded(bench, harmful, adapter)
        rows, spent = rows + more, spent + again
    return Made(bench.adapted(adapter), adapter, len(pairs), spent, counts, rows, failed)


def gather(bench: Bench, prompts: Sequence[Prompt]) -> tuple[list[Pair], dict[str, int]]:
    """The training data of the profile's recipe: (pairs, counts by reason)."""
    recipe, p, doors = bench.profile.recipe, bench.profile, bench.doors
    if recipe.judge != PROFILE:
        if not (other := bench.second(doors)):
            raise BadInput(
                f"recipe: profile {p.name!r} has no second judge; name one, or take its judge"
            )
        doors = other
    if recipe.data == TEACHER:
        pairs, counts = taught(bench, prompts), dict[str, int]()
    elif recipe.data == NATURAL:
        pairs, counts = natural(bench, prompts)
    else:
        finder = detector(bench, recipe.detector, prompts)
        used, sampling = triggers(bench, prompts, finder), sampled(bench)
        pairs, counts, tried = pipeline.corrected_pairs(
            doors, prompts, used, finder, p.plan, p.pairs, sampling
        )
        if recipe.weigh:
            pairs = weighed(bench, by_id(prompts), pairs, [one.loser for one in tried])
        if recipe.data == UNSHARED:
            pairs = unshared(pairs)
    if recipe.pairs:
        pairs = random.Random(p.seed).sample(pairs, min(recipe.pairs, len(pairs)))
    return pairs, counts | {"kept": len(pairs)}


def sampled(bench: Bench) -> Sampling:
    """How the sides of a pair are sampled: to the end of the trace, or of the response where it is part of the pair."""
    return bench.thinking if bench.profile.pairs.part == TRACE else bench.profile.sampling


def detector(bench: Bench, name: str, prompts: Sequence[Prompt]) -> CueDetector:
    """A cue detector by its name in a recipe; known errors are put on the truth, where the world has one."""
    p, doors = bench.profile, bench.doors
    if name == CSR:
        return Searched(doors, p.csr, p.search, bench.thinking)
    if name == MODEL:
        return FewShot(doors, tuple((one.sentences, one.answer) for one in p.examples))
    seen = None if p.detector else traces(doors, prompts, bench.thinking, p.plan.draws)
    own = bench.detector(seen.rollouts if seen else [], seen.verdicts if seen else [])
    if name == PROFILE:
        return own
    exact = bench.truth()
    if name == TRUTH:
        if not exact:
            raise BadInput(
                f"recipe: profile {p.name!r} knows no truth about cues; use another detector"
            )
        return exact
    if name == ANYWHERE:
        return Anywhere(exact or own, p.seed)
    if name.startswith("shift ") and name[6:].lstrip("+-").isdigit():
        return Shifted(exact or own, int(name[6:]))
    raise BadInput(
        f"recipe: detector {name!r} is unknown; use profile, truth, csr, model, random, or shift and a number"
    )


def triggers(bench: Bench, prompts: Sequence[Prompt], finder: CueDetector) -> list[Trigger]:
    """``plan.pool`` triggers: those in use and then the rest of the pool, any of the pool, paraphrases that nothing has seen, or
    neutral sentences in their place."""
    recipe, p = bench.profile.recipe, bench.profile
    if recipe.triggers in (PARAPHRASES, NEUTRAL):
        texts = bench.paraphrases() if recipe.triggers == PARAPHRASES else list(p.neutral)
        chosen = random.Random(p.seed).sample(texts, min(p.plan.pool, len(texts)))
        return [Trigger(digest(text), text, 0, 0, None) for text in chosen]
    seen = None if p.triggers else traces(bench.doors, prompts, bench.thinking, p.plan.draws)
    own = bench.triggers(
        seen.prompts if seen else {},
        seen.rollouts if seen else [],
        seen.verdicts if seen else [],
        finder,
    )
    every = own + [one for one in bench.pool() if one.text not in {known.text for known in own}]
    return (
        random.Random(p.seed).sample(every, len(every)) if recipe.triggers == RANDOM else every
    )[: p.plan.pool]


def natural(bench: Bench, prompts: Sequence[Prompt]) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of ordinary sampling: every unsafe trace of a prompt against a safe one of the same, h = 0."""
    p, doors, results = bench.profile, bench.doors, list[Pair | Refusal]()
    seen = traces(doors, prompts, sampled(bench), p.plan.draws)
    lost, won = (seen.labelled(label) for label in (UNSAFE, SAFE))
    for prompt in prompts:
        winners = [one for one in won if one.prompt_id == prompt.id]
        losers = [one for one in lost if one.prompt_id == prompt.id]
        if winners:
            pairs = [(loser, winners[at % len(winners)]) for at, loser in enumerate(losers)]
            results += [
                pipeline.pair(doors, prompt, loser, winner, 0, p.pairs, NATURAL)
                for loser, winner in pairs
            ]
    return collect(results)


def taught(bench: Bench, prompts: Sequence[Prompt]) -> list[Pair]:
    """Safe responses of the profile's stronger source, without a rejected side: for SFT, STAR-1's way."""
    found, chat = [], bench.doors.chat
    for prompt, text in zip(prompts, bench.taught(prompts), strict=True):
        chosen = (*chat.encode(text), chat.eos_ids[0])
        found.append(
            Pair(digest([prompt.id, text]), chat.prompt_ids(prompt), chosen, (), 0, TEACHER)
        )
    return found


def unshared(pairs: Sequence[Pair]) -> list[Pair]:
    """The same losers and winners, but each loser beside the winner of the next trace of its prompt: nothing is shared (h = 0).
    Prompts with one trace give no pair."""
    whole = [
        (
            one,
            one.prompt_ids[: len(one.prompt_ids) - one.h],
            one.prompt_ids[len(one.prompt_ids) - one.h :],
        )
        for one in pairs
    ]
    found = []
    for head in dict.fromkeys(head for _, head, _ in whole):
        own = [(one, stem) for one, other, stem in whole if other == head]
        for (loser, stem), (winner, other) in zip(own, own[1:] + own[:1], strict=True):
            if stem != other:
                sides = other + winner.chosen_ids, stem + loser.rejected_ids
                found.append(Pair(digest([winner.id, loser.id]), head, *sides, 0, UNSHARED))
    return found


def weighed(
    bench: Bench, prompts: dict[str, Prompt], pairs: Sequence[Pair], losers: Sequence[Rollout]
) -> list[Pair]:
    """The pairs with weights of mean 1: |S after the loser's cue sentence - S before it|, from WEIGHED continuations each."""
    doors, places = bench.doors, list[Start]()
    for pair in pairs:
        stem = pair.prompt_ids[len(pair.prompt_ids) - pair.h :] + pair.rejected_ids
        head = pair.prompt_ids[: len(pair.prompt_ids) - pair.h]
        own = (one for one in losers if doors.chat.prompt_ids(prompts[one.prompt_id]) == head)
        loser = next(one for one in own if one.token_ids[: len(stem)] == stem)
        after = next(
            (span.token_end for span in trace_sentences(doors, loser) if span.token_end > pair.h),
            len(stem),
        )
        places += [
            Start(prompts[loser.prompt_id], loser.token_ids[:cut]) for cut in (pair.h, after)
        ]
    drawn = sample(doors, places, bench.thinking, WEIGHED, first=FRESH, stage="continuations")
    verdicts = judge(doors, prompts, drawn)
    rates = [
        k / max(n, 1)
        for k, n in (
            tally(verdicts[at : at + WEIGHED], SAFE) for at in range(0, len(verdicts), WEIGHED)
        )
    ]
    found = [abs(after - before) for before, after in zip(rates[::2], rates[1::2], strict=True)]
    mean = sum(found) / max(len(found), 1) or 1.0
    return [replace(pair, weight=one / mean) for pair, one in zip(pairs, found, strict=True)]


def corrector(bench: Bench, harmful: Sequence[Prompt]) -> Respond:
    """Intervention without training: whoever answers is stopped at a first cue, a trigger takes its place, and the answer goes
    on."""
    p, finder = bench.profile, detector(bench, bench.profile.recipe.detector, harmful)
    pool = triggers(bench, harmful, finder)

    def respond(
        doors: Doors, prompts: Sequence[Prompt], sampling: Sampling, draws: int
    ) -> list[Rollout]:
        named = by_id(prompts)
        found = sample(doors, [Start(prompt) for prompt in prompts], sampling, draws)
        for round_ in range(1, p.plan.rounds + 1):
            at = cues(doors, named, found, finder)
            cued = [place for place, one in enumerate(found) if at[one.id] is not None]
            cases = [
                Case(
                    found[place],
                    at[found[place].id] or 0,
                    (one := pool[place % len(pool)]).id,
                    one.text,
                    round_,
                )
                for place in cued
            ]
            for place, (_, result) in zip(
                cued, intervene(doors, named, cases, sampling), strict=True
            ):
                found[place] = result
        return found

    return respond


def _rewarded(
    bench: Bench, prompts: Sequence[Prompt], start: Path | None
) -> tuple[Path, list[dict[str, float]], int]:
    """GRPO's adapter, its rows, and the tokens it generated: ``grpo.multiple`` times as many as Algorithm 1 generates for the
    same prompts and seed."""
    p, doors = bench.profile, bench.doors
    settings = p.grpo
    if not settings.budget:
        other = replace(
            bench,
            profile=replace(p, recipe=Recipe()),
            doors=replace(doors, store=Store(doors.store.root)),
        )
        gather(other, prompts)
        settings = replace(
            settings, budget=round(settings.multiple * _spent(other.doors)), multiple=1.0
        )
    asked = {
        "settings": to_json(settings),
        "lora": to_json(replace(p.stage1, seed=0)),
        "sampling": to_json(p.sampling),
    }
    spec: dict[str, Any] = {
        "model": doors.sampler.fingerprint(),
        "judge": doors.judge.fingerprint(),
    }
    spec |= {"prompts": digest([to_json(one) for one in prompts]), **asked}
    spec |= {"start": start.parent.name} if start else {}

    def run(folder: Path) -> None:
        grpo.train(
            doors, prompts, bench.folder, p.stage1, settings, p.sampling, folder, adapter=start
        )

    path, rows = training.once(doors, spec, run)
    return path, rows, int(rows[-1]["tokens"])


def _spent(doors: Doors) -> int:
    return sum(doors.store.drawn.values())
