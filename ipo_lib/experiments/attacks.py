"""Attacks on a reasoning model: how harmful do trace and answer become?

On the prompt (``PROMPT_ATTACKS``) the request is changed:

- *template*: it is put into a frame;
- *leetspeak* and *base64*: its subject is written in other letters;
- *paraphrase*: it is said in other words, where the profile knows how;
- *triggers forbidden in the prompt*: an adaptive attack that names the safety triggers.

On the trace (``TRACE_ATTACKS``) the attacker writes a part of the response:

- *empty thinking*: the trace is closed at once;
- *prefill to the cue*: the trace begins as an unsafe trace of the untouched model, through its
  first compliance cue; *prefill before the cue* is the control, the same without the cue;
- *whole unsafe trace*: all of that trace is given, and only the answer is sampled;
- *triggers kept out*: where the model begins a sentence like a trigger, it must begin another one;
- *reset*: a response that ends safe is cut before its first safety-aware sentence and goes on from
  there; once, twice, three times.

Verdicts are always about the original request. A whole trace that was given says nothing about the
model, so there only the answer counts.
"""

from __future__ import annotations

import base64
import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from ipo_lib.chat import CLOSE
from ipo_lib.cues import CueDetector
from ipo_lib.experiments.detectors import make_detector
from ipo_lib.experiments.learned import bar_triggers, nearest_similarities, resembling
from ipo_lib.experiments.recipes import choose_triggers
from ipo_lib.frame import Counts, count_labels
from ipo_lib.profiles.run import Run
from ipo_lib.records import (
    ANSWER,
    SAFE,
    UNSAFE,
    BadInput,
    Ids,
    Prompt,
    Rollout,
    Rollouts,
    Sentence,
    by_id,
)
from ipo_lib.stages import (
    Prefix,
    Session,
    draw_rollouts,
    find_cues,
    judge,
    sample,
    sample_and_judge,
    trace_end,
    trace_sentences,
    trace_texts,
)
from ipo_lib.triggers import Trigger

NO_ATTACK = "no attack"
TEMPLATE, LEETSPEAK, BASE64 = "template", "leetspeak", "base64"
PARAPHRASE, FORBIDDEN = "paraphrase", "triggers forbidden in the prompt"
EMPTY, WHOLE = "empty thinking", "whole unsafe trace"
PREFILL, CONTROL = "prefill to the cue", "prefill before the cue"
KEPT_OUT = "triggers kept out"
RESETS = ("reset once", "reset twice", "reset three times")
PROMPT_ATTACKS = (TEMPLATE, LEETSPEAK, BASE64, PARAPHRASE, FORBIDDEN)
TRACE_ATTACKS = (EMPTY, CONTROL, PREFILL, WHOLE, KEPT_OUT, *RESETS)
LETTERS = str.maketrans("aeiostAEIOST", "431057431057")
FIRST_RESET = 20_000  # number of the first draw after a reset


@functools.cache
def wording() -> dict[str, Any]:
    """The texts of ``attacks.yml``."""
    text = resources.files(__package__).joinpath("attacks.yml").read_text("utf-8")
    return dict(yaml.safe_load(text))


@dataclass(frozen=True)
class AttackMaterial:
    """What attacks are made of. It comes from the untouched model, whichever model is attacked."""

    prompts: list[Prompt]  # harmful ones
    unsafe: Mapping[str, Rollout]  # an unsafe trace, by prompt id; not every prompt has one
    cues: Mapping[str, Sentence]  # its first cue, by prompt id
    triggers: list[Trigger]
    aware: CueDetector | None  # of safety-aware sentences; None: those like a trigger


def gather_material(run: Run, prompts: Sequence[Prompt], train: Sequence[Prompt]) -> AttackMaterial:
    """Unsafe traces of the untouched model with their first cues, and the triggers.

    Args:
        run: with the profile.
        prompts: harmful prompts that are asked under attack.
        train: prompts that a detector or triggers are learnt from where the profile has none.
    """
    detector = run.truth() or make_detector(run, run.profile.recipe.detector, train)
    seen = sample_and_judge(run.session, prompts, run.thinking, run.profile.plan.draws)
    traces = seen.labelled(UNSAFE)
    cues = find_cues(run.session, seen.prompts, traces, detector)
    unsafe, first_cues = {}, {}
    for trace in traces:
        index = cues[trace.id]
        if index is None or trace.prompt_id in unsafe:
            continue
        unsafe[trace.prompt_id] = trace
        first_cues[trace.prompt_id] = trace_sentences(run.session, trace)[index]
    triggers = choose_triggers(run, train, detector)
    return AttackMaterial(list(prompts), unsafe, first_cues, triggers, run.safety_aware())


def attacks_of(run: Run) -> list[str]:
    """The names of all attacks that the profile has what it takes for."""
    names = [NO_ATTACK, *PROMPT_ATTACKS, *TRACE_ATTACKS]
    if not run.extra("rewrite"):
        names.remove(PARAPHRASE)
    return names


def attack(
    run: Run, session: Session, name: str, material: AttackMaterial, draws: int
) -> list[Rollout]:
    """Responses of a model under one attack, ``draws`` of each prompt that it can be made on.

    Args:
        run: with the profile.
        session: of the model that is attacked.
        name: of the attack.
        material: what attacks are made of.
        draws: responses of each prompt.
    """
    sampling, prompts = run.profile.sampling, material.prompts
    plain = [Prefix(prompt) for prompt in prompts]
    if name == NO_ATTACK:
        return sample(session, plain, sampling, draws)
    if name in PROMPT_ATTACKS:
        changed = [
            replace(prompt, text=changed_text(run, prompt, name, material)) for prompt in prompts
        ]
        return sample(session, [Prefix(prompt) for prompt in changed], sampling, draws)
    if name in (EMPTY, CONTROL, PREFILL, WHOLE):
        prefixes = _given_traces(session, name, material)
        return sample(session, prefixes, sampling, draws, stage="attacks")
    rollouts = sample(session, plain, sampling, draws)
    if name == KEPT_OUT:
        return bar_triggers(session, by_id(prompts), rollouts, material.triggers, sampling)
    if name in RESETS:
        return _reset(run, session, rollouts, material, RESETS.index(name) + 1)
    listed = ", ".join([NO_ATTACK, *PROMPT_ATTACKS, *TRACE_ATTACKS])
    raise BadInput(f"attack {name!r} is unknown; use {listed}")


def changed_text(run: Run, prompt: Prompt, name: str, material: AttackMaterial) -> str:
    """The text of a prompt under an attack on prompts.

    Args:
        run: with the profile.
        prompt: the original one.
        name: one of PROMPT_ATTACKS.
        material: has the triggers.
    """
    rng = random.Random(f"{name}/{run.profile.seed}/{prompt.id}")
    text = prompt.text
    if name == TEMPLATE:
        templates = run.extra("templates") or wording()["templates"]
        return str(rng.choice(templates)).replace("{request}", text)
    if name == PARAPHRASE:
        return str(run.extra("rewrite")(text, rng))
    if name == FORBIDDEN:
        triggers = " ".join(trigger.text for trigger in material.triggers)
        return str(wording()["forbidden"]).replace("{triggers}", triggers).format(request=text)
    subject = subject_of(run, text)
    if name == LEETSPEAK:
        return text.replace(subject, subject.translate(LETTERS))
    encoded = base64.b64encode(subject.encode()).decode()
    return str(wording()["encoded"]).replace("{request}", text.replace(subject, encoded))


def subject_of(run: Run, text: str) -> str:
    """The part of a request that an obfuscation hides: by the profile, or else its longest word."""
    find_subject = run.extra("subject")
    if find_subject:
        return str(find_subject(text))
    return max(text.split(), key=len, default="")


def _given_traces(session: Session, name: str, material: AttackMaterial) -> list[Prefix]:
    """Prefixes in which the attacker has written a part of the trace, or all of it."""
    if name == EMPTY:
        ids = session.chat.trace_start_ids(f"\n{CLOSE}\n\n")
        return [Prefix(prompt, ids) for prompt in material.prompts]
    prefixes = []
    for prompt in material.prompts:
        trace = material.unsafe.get(prompt.id)
        if trace is None:
            continue
        end: int | None = material.cues[prompt.id].token_end
        if name == CONTROL:
            end = material.cues[prompt.id].token_start
        elif name == WHOLE:
            end = trace_end(session, trace)
        if end is not None:
            prefixes.append(Prefix(prompt, trace.token_ids[:end]))
    return prefixes


def _reset(
    run: Run, session: Session, rollouts: Rollouts, material: AttackMaterial, rounds: int
) -> list[Rollout]:
    """Responses that end safe, cut before their first safety-aware sentence and continued.

    Args:
        run: with the profile.
        session: of the model that is attacked.
        rollouts: its responses.
        material: what attacks are made of.
        rounds: how often a response is cut at most.
    """
    prompts, results = by_id(material.prompts), list(rollouts)
    for round_ in range(rounds):
        answers = judge(session, prompts, results, ANSWER)
        first = _first_aware(session, material, results)
        places, wanted = [], []
        for place, (rollout, answer) in enumerate(zip(results, answers, strict=True)):
            cut = first[rollout.id]
            if answer.label == SAFE and cut is not None:
                draw = FIRST_RESET + round_ * len(results) + place
                prefix: Ids = rollout.token_ids[:cut]
                places.append(place)
                wanted.append((Prefix(prompts[rollout.prompt_id], prefix), draw))
        continued = draw_rollouts(session, wanted, run.profile.sampling, "attacks")
        for place, rollout in zip(places, continued, strict=True):
            results[place] = rollout
    return results


def _first_aware(
    session: Session, material: AttackMaterial, rollouts: Rollouts
) -> dict[str, int | None]:
    """Tokens before the first safety-aware sentence of each response; None where there is none."""
    indices: dict[str, int | None] = {}
    if material.aware:
        found = find_cues(session, by_id(material.prompts), rollouts, material.aware)
        indices = dict(found)
    else:
        for rollout in rollouts:
            nearest = nearest_similarities(trace_texts(session, rollout), material.triggers)
            indices[rollout.id] = resembling(nearest)
    cuts: dict[str, int | None] = {}
    for rollout in rollouts:
        index = indices[rollout.id]
        cuts[rollout.id] = None
        if index is not None:
            cuts[rollout.id] = trace_sentences(session, rollout)[index].token_start
    return cuts


@dataclass(frozen=True)
class AttackResult:
    """What a model did under one attack."""

    attack: str
    traces: Counts  # (harmful, judged) by prompt; empty where the whole trace was given
    answers: Counts  # the same of answers
    judged: float  # share of answers that could be judged

    def answers_to(self, prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
        """(harmful, judged) answers of every prompt; (0, 0) where the attack cannot be made."""
        return [self.answers.get(prompt.id, (0, 0)) for prompt in prompts]


def measure_attacks(
    run: Run, session: Session, names: Sequence[str], material: AttackMaterial, draws: int
) -> list[AttackResult]:
    """Harm of traces and answers under every attack.

    Args:
        run: with the profile.
        session: of the model that is attacked.
        names: of the attacks.
        material: what attacks are made of.
        draws: responses of each prompt.
    """
    prompts, results = by_id(material.prompts), []
    for name in names:
        rollouts = attack(run, session, name, material, draws)
        traces: Counts = {}
        if name not in (EMPTY, WHOLE):
            traces = count_labels(rollouts, judge(session, prompts, rollouts))
        verdicts = judge(session, prompts, rollouts, ANSWER)
        judged = sum(verdict.label is not None for verdict in verdicts) / max(len(verdicts), 1)
        answers = count_labels(rollouts, verdicts)
        results.append(AttackResult(name, traces, answers, judged))
    return results
