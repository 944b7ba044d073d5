"""Ways to a safer model: the paper's method, what it compares, and what its reviewers asked for.

A *recipe* (``profiles.settings.Recipe``) says in settings

1. what is gathered to train on (``data``), with which detector and triggers,
2. what follows the first stage of training (``then``).

LoRA, prompts and evaluation are the profile's. ``run_recipe`` returns the model with its costs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ipo_lib import pipeline, stages, training
from ipo_lib.cues import CueDetector
from ipo_lib.engines.lora import Rows
from ipo_lib.evaluation import Respond, sample_responses
from ipo_lib.experiments import grpo, rivals
from ipo_lib.experiments.detectors import make_detector
from ipo_lib.experiments.pair_sources import (
    natural_pairs,
    teacher_examples,
    unshared_pairs,
    weigh_pairs,
)
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import (
    AT_INFERENCE,
    GRPO,
    MASKED,
    MIXED,
    NATURAL,
    NEUTRAL,
    NONE,
    PARAPHRASES,
    PRIMED,
    PRIMER,
    PROFILE,
    RANDOM,
    RECOVERED,
    REWARDS,
    SELF,
    STAGE_2,
    TEACHER,
    UNSHARED,
    Recipe,
)
from ipo_lib.records import BadInput, Pair, Prompt, Rollout, by_id, digest, to_json
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    Prefix,
    Replacement,
    Session,
    Usage,
    find_cues,
    intervene,
    sample,
    sample_and_judge,
)
from ipo_lib.triggers import Trigger


@dataclass(frozen=True)
class RecipeResult:
    """The model that a recipe made, and what it cost."""

    session: Session  # with the model
    adapter: Path | None = None  # its folder; None: the untouched model
    pairs: int = 0  # trained on
    tokens: int = 0  # generated to make it
    counts: dict[str, int] = field(default_factory=dict)  # of pairs, by reason
    rows: Rows = field(default_factory=list)  # metrics, one row a step
    failed: str = ""  # why it is not what the recipe asks for
    respond: Respond = sample_responses  # how it answers


def with_seed(run: Run, seed: int) -> Run:
    """The run with another seed for all that is drawn or trained; it counts its own tokens."""
    profile = run.profile
    settings: dict[str, Any] = {"seed": seed}
    for name in ("stage1", "stage2", "grpo"):
        settings[name] = replace(getattr(profile, name), seed=seed)
    session = replace(run.session, usage=Usage(), seed=seed)
    return replace(run, profile=replace(profile, **settings), session=session)


def run_recipe(run: Run, harmful: Sequence[Prompt], benign: Sequence[Prompt]) -> RecipeResult:
    """The model that the profile's recipe makes of the base model.

    Args:
        run: with the profile.
        harmful: prompts of stage 1.
        benign: prompts of stage 2.
    """
    recipe, session = run.profile.recipe, run.session
    if recipe.data == NONE:
        return RecipeResult(session, tokens=session.usage.total_tokens)
    if recipe.data == AT_INFERENCE:
        respond = correct_at_inference(run, harmful)
        return RecipeResult(session, tokens=session.usage.total_tokens, respond=respond)
    if recipe.data == PRIMER:
        return RecipeResult(session, respond=rivals.answer_after_primer(run))
    if recipe.data == REWARDS:
        adapter, rows, spent = train_grpo(run, harmful, None)
        return RecipeResult(run.adapted(adapter), adapter, tokens=spent, rows=rows)

    # 1. Gather the data and train on it.
    pairs, counts = gather_pairs(run, harmful, benign)
    stage1 = run.profile.stage1
    adapter, rows = training.train_first_stage(session, pairs, run.folder, stage1, counts)
    failed = ""
    # 2. Go on as the recipe says.
    if recipe.then in (STAGE_2, MIXED):
        refused = _refused_pairs(run, harmful, benign, adapter)
        counts |= {"benign": len(refused)}
        adapter, rows, failed = _train_on_both(run, pairs, refused, adapter, rows)
    spent = session.usage.total_tokens
    if recipe.then == GRPO:
        adapter, more_rows, of_grpo = train_grpo(run, harmful, adapter)
        rows, spent = rows + more_rows, spent + of_grpo
    return RecipeResult(run.adapted(adapter), adapter, len(pairs), spent, counts, rows, failed)


def _refused_pairs(
    run: Run, harmful: Sequence[Prompt], benign: Sequence[Prompt], adapter: Path
) -> list[Pair]:
    """Stage 2's pairs: the base model's answer over a refusal of the model with this adapter."""
    profile = run.profile
    detector = make_detector(run, profile.recipe.detector, harmful)
    triggers: list[Trigger] = []
    if profile.stage2.refusing_prefix:
        triggers = choose_triggers(run, harmful, detector)
    pairs, _, _ = stages.benign_pairs(
        run.session,
        run.adapted(adapter),
        benign,
        profile.pairs,
        profile.sampling,
        profile.stage2,
        triggers,
    )
    return pairs


def _train_on_both(
    run: Run, pairs: Sequence[Pair], refused: Sequence[Pair], adapter: Path, rows: Rows
) -> tuple[Path, Rows, str]:
    """Train with the benign pairs too, in one stage or in a second one.

    Args:
        run: with the profile.
        pairs: of stage 1.
        refused: of stage 2.
        adapter: after stage 1.
        rows: of stage 1.

    Returns:
        Adapter, rows, and why there was no second stage.
    """
    session, profile = run.session, run.profile
    if profile.recipe.then == MIXED:
        both = [*pairs, *refused]
        adapter, rows = training.train_first_stage(session, both, run.folder, profile.stage1)
        return adapter, rows, ""
    second, more_rows, skipped = training.train_second_stage(
        session, pairs, refused, run.folder, adapter, profile.stage2
    )
    if second is None:
        return adapter, rows + more_rows, skipped
    return second, rows + more_rows, ""


def gather_pairs(
    run: Run, prompts: Sequence[Prompt], benign: Sequence[Prompt] = ()
) -> tuple[list[Pair], dict[str, int]]:
    """The training data of the profile's recipe: (pairs, counts by reason).

    Args:
        run: with the profile.
        prompts: harmful prompts.
        benign: harmless prompts, for methods that keep answers to them.
    """
    recipe, profile, session = run.profile.recipe, run.profile, run.session
    if recipe.judge != PROFILE:
        second = run.with_second_judge(session)
        if second is None:
            raise BadInput(
                f"recipe: profile {profile.name!r} has no second judge; name one, or take its judge"
            )
        session = second
    if recipe.data == TEACHER:
        pairs, counts = teacher_examples(run, prompts), dict[str, int]()
    elif recipe.data == NATURAL:
        pairs, counts = natural_pairs(run, prompts, pipeline.pair_sampling(run))
    elif recipe.data == PRIMED:
        pairs, counts = rivals.primer_examples(run, prompts, benign)
    elif recipe.data == SELF:
        pairs, counts = rivals.safe_examples(run, prompts, benign)
    elif recipe.data == RECOVERED:
        pairs, counts = rivals.recovery_pairs(run, prompts, pipeline.pair_sampling(run))
    elif recipe.data == MASKED:
        pairs, counts = rivals.masked_pairs(run, prompts)
    else:
        detector = make_detector(run, recipe.detector, prompts)
        triggers = choose_triggers(run, prompts, detector)
        pairs, counts, tried = pipeline.corrected_pairs(
            session,
            prompts,
            triggers,
            detector,
            profile.plan,
            profile.pairs,
            pipeline.pair_sampling(run),
        )
        if recipe.weigh:
            losers = [correction.loser for correction in tried]
            pairs = weigh_pairs(run, by_id(prompts), pairs, losers)
        if recipe.data == UNSHARED:
            pairs = unshared_pairs(pairs)
    if recipe.pairs:
        pairs = random.Random(profile.seed).sample(pairs, min(recipe.pairs, len(pairs)))
    return pairs, counts | {"kept": len(pairs)}


def choose_triggers(run: Run, prompts: Sequence[Prompt], detector: CueDetector) -> list[Trigger]:
    """The ``plan.pool`` triggers of the profile's recipe.

    Args:
        run: with the profile.
        prompts: training prompts, from whose traces triggers are mined if the profile has none.
        detector: of cues.

    Returns:
        ``pool``: the triggers in use, then the rest of the pool. ``random``: any of these.
        ``paraphrases``: sentences that no part of the pipeline has seen. ``neutral``: sentences
        that say nothing about safety.
    """
    kind, profile = run.profile.recipe.triggers, run.profile
    shuffle = random.Random(profile.seed)
    if kind in (PARAPHRASES, NEUTRAL):
        texts = run.paraphrases() if kind == PARAPHRASES else list(profile.neutral)
        chosen = shuffle.sample(texts, min(profile.plan.pool, len(texts)))
        return [Trigger(digest(text), text, 0, 0, None) for text in chosen]
    if profile.triggers:
        in_use = run.triggers({}, [], [], detector)
    else:
        seen = sample_and_judge(run.session, prompts, run.thinking, profile.plan.draws)
        in_use = run.triggers(seen.prompts, seen.rollouts, seen.verdicts, detector)
    texts_in_use = {trigger.text for trigger in in_use}
    triggers = in_use + [trigger for trigger in run.pool() if trigger.text not in texts_in_use]
    if kind == RANDOM:
        triggers = shuffle.sample(triggers, len(triggers))
    return triggers[: profile.plan.pool]


def correct_at_inference(run: Run, harmful: Sequence[Prompt]) -> Respond:
    """Intervention without training: a way to answer in which cues are replaced as they come.

    1. The model answers. 2. It is stopped at the first cue. 3. A trigger takes the cue's place, and
    the model goes on; up to ``plan.rounds`` times.
    """
    detector = make_detector(run, run.profile.recipe.detector, harmful)
    triggers = choose_triggers(run, harmful, detector)

    def respond(
        session: Session, prompts: Sequence[Prompt], sampling: Sampling, draws: int
    ) -> list[Rollout]:
        """Answer every prompt, with cues replaced.

        Args:
            session: the model.
            prompts: prompts with distinct ids.
            sampling: of the answers and their continuations.
            draws: answers to each prompt.
        """
        prompts_by_id = by_id(prompts)
        rollouts = sample(session, [Prefix(prompt) for prompt in prompts], sampling, draws)
        for round_ in range(1, run.profile.plan.rounds + 1):
            cues = find_cues(session, prompts_by_id, rollouts, detector)
            places, replacements = [], []
            for place, rollout in enumerate(rollouts):
                index = cues[rollout.id]
                if index is not None:
                    trigger = triggers[place % len(triggers)]
                    places.append(place)
                    replacements.append(
                        Replacement(rollout, index, trigger.id, trigger.text, round_)
                    )
            results = intervene(session, prompts_by_id, replacements, sampling)
            for place, (_, result) in zip(places, results, strict=True):
                rollouts[place] = result
        return rollouts

    return respond


def train_grpo(run: Run, prompts: Sequence[Prompt], start: Path | None) -> tuple[Path, Rows, int]:
    """GRPO's adapter, its rows, and the tokens that it generated.

    Without a budget of its own it may generate ``grpo.multiple`` times as many tokens as Algorithm
    1 does for the same prompts and seed.
    """
    profile, session, settings = run.profile, run.session, run.profile.grpo
    if not settings.budget:
        usage = Usage()
        algorithm_1 = replace(
            run, profile=replace(profile, recipe=Recipe()), session=replace(session, usage=usage)
        )
        gather_pairs(algorithm_1, prompts)
        budget = round(settings.multiple * usage.total_tokens)
        settings = replace(settings, budget=budget, multiple=1.0)
    spec: dict[str, Any] = {
        "model": session.sampler.fingerprint(),
        "judge": session.judge.fingerprint(),
        "prompts": digest([to_json(prompt) for prompt in prompts]),
        "settings": to_json(settings),
        "lora": to_json(replace(profile.stage1, seed=0)),
        "sampling": to_json(profile.sampling),
    }
    if start:
        spec["start"] = start.parent.name

    def fill(folder: Path) -> None:
        grpo.train(
            session,
            prompts,
            run.folder,
            profile.stage1,
            settings,
            profile.sampling,
            folder,
            adapter=start,
        )

    path, rows = training.train_once(session, spec, fill)
    return path, rows, int(rows[-1]["tokens"])
