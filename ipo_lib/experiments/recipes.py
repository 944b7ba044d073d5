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
from ipo_lib.experiments.detectors import FewShotCues, RandomCues, SearchedCues, ShiftedCues
from ipo_lib.pairs import Refusal, count_reasons
from ipo_lib.profiles.run import Run
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
    Prefix,
    Replacement,
    Session,
    count_label,
    find_cues,
    intervene,
    judge,
    sample,
    sample_and_judge,
    trace_sentences,
)
from ipo_lib.store import Store
from ipo_lib.triggers import Trigger

WEIGHED = 16  # continuations at each side of a cue, where pairs are weighed


@dataclass(frozen=True)
class RecipeResult:
    """What a recipe gave: the model as ``doors``, the folder of its adapter, how it was trained, tokens that were generated for
    it, ``counts`` of pairs by reason; ``failed``: why it is not what the recipe asks for; and how it answers."""

    session: Session
    adapter: Path | None
    pairs: int
    tokens: int
    counts: dict[str, int]
    rows: list[dict[str, float]]
    failed: str = ""
    respond: Respond = plainly


def seeded(run: Run, seed: int) -> Run:
    """The bench with another seed for everything that is drawn or trained; it counts its own tokens."""
    p, session = run.profile, run.session
    stages = {name: replace(getattr(p, name), seed=seed) for name in ("stage1", "stage2", "grpo")}
    return replace(
        run,
        profile=replace(p, seed=seed, **stages),
        session=replace(session, store=Store(session.store.root), seed=seed),
    )


def run_recipe(run: Run, harmful: Sequence[Prompt], benign: Sequence[Prompt]) -> RecipeResult:
    """The model that the profile's recipe makes of the profile's organism."""
    recipe, p, session = run.profile.recipe, run.profile, run.session
    if recipe.data in (NONE, AT_INFERENCE):
        respond = corrector(run, harmful) if recipe.data == AT_INFERENCE else plainly
        return RecipeResult(session, None, 0, _spent(session), {}, [], respond=respond)
    if recipe.data == REWARDS:
        adapter, rows, spent = _rewarded(run, harmful, None)
        return RecipeResult(run.adapted(adapter), adapter, 0, spent, {}, rows)
    pairs, counts = gather(run, harmful)
    adapter, rows = training.train_first_stage(session, pairs, run.folder, p.stage1, counts)
    failed = ""
    if recipe.then in (STAGE_2, MIXED):
        finder = detector(run, recipe.detector, harmful)
        pool = triggers(run, harmful, finder) if p.stage2.refusing_prefix else []
        after = run.adapted(adapter)
        refused, _, _ = pipeline.benign_pairs(
            session, after, benign, p.pairs, p.sampling, p.stage2, pool
        )
        counts |= {"benign": len(refused)}
        if recipe.then == MIXED:
            adapter, rows = training.train_first_stage(
                session, [*pairs, *refused], run.folder, p.stage1
            )
        else:
            second, more, said = training.train_second_stage(
                session, pairs, refused, run.folder, adapter, p.stage2
            )
            adapter, rows, failed = second or adapter, rows + more, "" if second else said
    spent = _spent(session)
    if recipe.then == GRPO:
        adapter, more, again = _rewarded(run, harmful, adapter)
        rows, spent = rows + more, spent + again
    return RecipeResult(run.adapted(adapter), adapter, len(pairs), spent, counts, rows, failed)


def gather(run: Run, prompts: Sequence[Prompt]) -> tuple[list[Pair], dict[str, int]]:
    """The training data of the profile's recipe: (pairs, counts by reason)."""
    recipe, p, session = run.profile.recipe, run.profile, run.session
    if recipe.judge != PROFILE:
        if not (other := run.second(session)):
            raise BadInput(
                f"recipe: profile {p.name!r} has no second judge; name one, or take its judge"
            )
        session = other
    if recipe.data == TEACHER:
        pairs, counts = taught(run, prompts), dict[str, int]()
    elif recipe.data == NATURAL:
        pairs, counts = natural(run, prompts)
    else:
        finder = detector(run, recipe.detector, prompts)
        used, sampling = triggers(run, prompts, finder), sampled(run)
        pairs, counts, tried = pipeline.corrected_pairs(
            session, prompts, used, finder, p.plan, p.pairs, sampling
        )
        if recipe.weigh:
            pairs = weighed(run, by_id(prompts), pairs, [one.loser for one in tried])
        if recipe.data == UNSHARED:
            pairs = unshared(pairs)
    if recipe.pairs:
        pairs = random.Random(p.seed).sample(pairs, min(recipe.pairs, len(pairs)))
    return pairs, counts | {"kept": len(pairs)}


def sampled(run: Run) -> Sampling:
    """How the sides of a pair are sampled: to the end of the trace, or of the response where it is part of the pair."""
    return run.thinking if run.profile.pairs.part == TRACE else run.profile.sampling


def detector(run: Run, name: str, prompts: Sequence[Prompt]) -> CueDetector:
    """A cue detector by its name in a recipe; known errors are put on the truth, where the world has one."""
    p, session = run.profile, run.session
    if name == CSR:
        return SearchedCues(session, p.csr, p.search, run.thinking)
    if name == MODEL:
        return FewShotCues(session, tuple((one.sentences, one.answer) for one in p.examples))
    seen = None if p.detector else sample_and_judge(session, prompts, run.thinking, p.plan.draws)
    own = run.detector(seen.rollouts if seen else [], seen.verdicts if seen else [])
    if name == PROFILE:
        return own
    exact = run.truth()
    if name == TRUTH:
        if not exact:
            raise BadInput(
                f"recipe: profile {p.name!r} knows no truth about cues; use another detector"
            )
        return exact
    if name == ANYWHERE:
        return RandomCues(exact or own, p.seed)
    if name.startswith("shift ") and name[6:].lstrip("+-").isdigit():
        return ShiftedCues(exact or own, int(name[6:]))
    raise BadInput(
        f"recipe: detector {name!r} is unknown; use profile, truth, csr, model, random, or shift and a number"
    )


def triggers(run: Run, prompts: Sequence[Prompt], finder: CueDetector) -> list[Trigger]:
    """``plan.pool`` triggers: those in use and then the rest of the pool, any of the pool, paraphrases that nothing has seen, or
    neutral sentences in their place."""
    recipe, p = run.profile.recipe, run.profile
    if recipe.triggers in (PARAPHRASES, NEUTRAL):
        texts = run.paraphrases() if recipe.triggers == PARAPHRASES else list(p.neutral)
        chosen = random.Random(p.seed).sample(texts, min(p.plan.pool, len(texts)))
        return [Trigger(digest(text), text, 0, 0, None) for text in chosen]
    seen = (
        None if p.triggers else sample_and_judge(run.session, prompts, run.thinking, p.plan.draws)
    )
    own = run.triggers(
        seen.prompts if seen else {},
        seen.rollouts if seen else [],
        seen.verdicts if seen else [],
        finder,
    )
    every = own + [one for one in run.pool() if one.text not in {known.text for known in own}]
    return (
        random.Random(p.seed).sample(every, len(every)) if recipe.triggers == RANDOM else every
    )[: p.plan.pool]


def natural(run: Run, prompts: Sequence[Prompt]) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of ordinary sampling: every unsafe trace of a prompt against a safe one of the same, h = 0."""
    p, session, results = run.profile, run.session, list[Pair | Refusal]()
    seen = sample_and_judge(session, prompts, sampled(run), p.plan.draws)
    lost, won = (seen.labelled(label) for label in (UNSAFE, SAFE))
    for prompt in prompts:
        winners = [one for one in won if one.prompt_id == prompt.id]
        losers = [one for one in lost if one.prompt_id == prompt.id]
        if winners:
            pairs = [(loser, winners[at % len(winners)]) for at, loser in enumerate(losers)]
            results += [
                pipeline.pair_rollouts(session, prompt, loser, winner, 0, p.pairs, NATURAL)
                for loser, winner in pairs
            ]
    return count_reasons(results)


def taught(run: Run, prompts: Sequence[Prompt]) -> list[Pair]:
    """Safe responses of the profile's stronger source, without a rejected side: for SFT, STAR-1's way."""
    found, chat = [], run.session.chat
    for prompt, text in zip(prompts, run.taught(prompts), strict=True):
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
    run: Run, prompts: dict[str, Prompt], pairs: Sequence[Pair], losers: Sequence[Rollout]
) -> list[Pair]:
    """The pairs with weights of mean 1: |S after the loser's cue sentence - S before it|, from WEIGHED continuations each."""
    session, places = run.session, list[Prefix]()
    for pair in pairs:
        stem = pair.prompt_ids[len(pair.prompt_ids) - pair.h :] + pair.rejected_ids
        head = pair.prompt_ids[: len(pair.prompt_ids) - pair.h]
        own = (one for one in losers if session.chat.prompt_ids(prompts[one.prompt_id]) == head)
        loser = next(one for one in own if one.token_ids[: len(stem)] == stem)
        after = next(
            (span.token_end for span in trace_sentences(session, loser) if span.token_end > pair.h),
            len(stem),
        )
        places += [
            Prefix(prompts[loser.prompt_id], loser.token_ids[:cut]) for cut in (pair.h, after)
        ]
    drawn = sample(session, places, run.thinking, WEIGHED, first=FRESH, stage="continuations")
    verdicts = judge(session, prompts, drawn)
    rates = [
        k / max(n, 1)
        for k, n in (
            count_label(verdicts[at : at + WEIGHED], SAFE)
            for at in range(0, len(verdicts), WEIGHED)
        )
    ]
    found = [abs(after - before) for before, after in zip(rates[::2], rates[1::2], strict=True)]
    mean = sum(found) / max(len(found), 1) or 1.0
    return [replace(pair, weight=one / mean) for pair, one in zip(pairs, found, strict=True)]


def corrector(run: Run, harmful: Sequence[Prompt]) -> Respond:
    """Intervention without training: whoever answers is stopped at a first cue, a trigger takes its place, and the answer goes
    on."""
    p, finder = run.profile, detector(run, run.profile.recipe.detector, harmful)
    pool = triggers(run, harmful, finder)

    def respond(
        session: Session, prompts: Sequence[Prompt], sampling: Sampling, draws: int
    ) -> list[Rollout]:
        named = by_id(prompts)
        found = sample(session, [Prefix(prompt) for prompt in prompts], sampling, draws)
        for round_ in range(1, p.plan.rounds + 1):
            at = find_cues(session, named, found, finder)
            cued = [place for place, one in enumerate(found) if at[one.id] is not None]
            cases = [
                Replacement(
                    found[place],
                    at[found[place].id] or 0,
                    (one := pool[place % len(pool)]).id,
                    one.text,
                    round_,
                )
                for place in cued
            ]
            for place, (_, result) in zip(
                cued, intervene(session, named, cases, sampling), strict=True
            ):
                found[place] = result
        return found

    return respond


def _rewarded(
    run: Run, prompts: Sequence[Prompt], start: Path | None
) -> tuple[Path, list[dict[str, float]], int]:
    """GRPO's adapter, its rows, and the tokens it generated: ``grpo.multiple`` times as many as Algorithm 1 generates for the
    same prompts and seed."""
    p, session = run.profile, run.session
    settings = p.grpo
    if not settings.budget:
        other = replace(
            run,
            profile=replace(p, recipe=Recipe()),
            session=replace(session, store=Store(session.store.root)),
        )
        gather(other, prompts)
        settings = replace(
            settings, budget=round(settings.multiple * _spent(other.session)), multiple=1.0
        )
    asked = {
        "settings": to_json(settings),
        "lora": to_json(replace(p.stage1, seed=0)),
        "sampling": to_json(p.sampling),
    }
    spec: dict[str, Any] = {
        "model": session.sampler.fingerprint(),
        "judge": session.judge.fingerprint(),
    }
    spec |= {"prompts": digest([to_json(one) for one in prompts]), **asked}
    spec |= {"start": start.parent.name} if start else {}

    def fill(folder: Path) -> None:
        grpo.train(
            session, prompts, run.folder, p.stage1, settings, p.sampling, folder, adapter=start
        )

    path, rows = training.train_once(session, spec, fill)
    return path, rows, int(rows[-1]["tokens"])


def _spent(session: Session) -> int:
    return sum(session.store.drawn.values())
