"""Other ways to a safer reasoning model, each in its smallest faithful form.

*SafePath* (arXiv 2505.14667)
    A short sentence about safety, the *primer*, opens every trace. Without training it is put
    there (``answer_after_primer``). With training the model learns to write it
    (``primer_examples``): on harmful prompts only the primer's tokens are scored.
*ThinkSafe* (arXiv 2601.23143)
    The model's own safe responses, sampled with a *hint* to refuse after the prompt. They are
    filtered by the judge and learnt without the hint (``safe_examples``).
*RECAP* (arXiv 2510.00938)
    The model learns to recover from a bad beginning. A trace is cut after its first cue, and a
    continuation that ends safe is preferred to the trace's own (``recovery_pairs``). RECAP takes
    the beginnings from other models and trains by reinforcement learning; here they are the
    model's own, and training is DPO.
*Masked harm*
    A control that nobody should want: after safe traces, unsafe answers are preferred
    (``masked_pairs``). A measure of monitorability that does not notice this model is worth
    nothing.

SafePath and ThinkSafe also keep the model's own answers to harmless prompts
(``retained_examples``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ipo_lib.evaluation import Respond
from ipo_lib.experiments.detectors import make_detector
from ipo_lib.pairs import NoPair, count_reasons
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import MASKED, PRIMED, RECOVERED, SELF
from ipo_lib.records import ANSWER, SAFE, UNSAFE, Ids, Pair, Prompt, Rollout, by_id, digest
from ipo_lib.sampling import Sampling
from ipo_lib.stages import (
    Prefix,
    Session,
    find_cues,
    judge,
    pair_rollouts,
    sample,
    sample_and_judge,
    trace_end,
    trace_sentences,
)

Counts = dict[str, int]  # of examples, by reason
RETAINED = "retained"


def primer_ids(run: Run) -> Ids:
    """The tokens of the recipe's primer at the beginning of a response."""
    return run.session.chat.trace_start_ids(f"{run.profile.recipe.primer.strip()} ")


def answer_after_primer(run: Run) -> Respond:
    """A way to answer in which every trace begins with the recipe's primer."""
    ids = primer_ids(run)

    def respond(
        session: Session, prompts: Sequence[Prompt], sampling: Sampling, draws: int
    ) -> list[Rollout]:
        """Answer every prompt after the primer.

        Args:
            session: the model.
            prompts: to answer.
            sampling: of the responses.
            draws: responses of each prompt.
        """
        return sample(session, [Prefix(prompt, ids) for prompt in prompts], sampling, draws)

    return respond


def primer_examples(
    run: Run, harmful: Sequence[Prompt], benign: Sequence[Prompt]
) -> tuple[list[Pair], Counts]:
    """SafePath's examples: the primer after harmful prompts, whole answers to harmless ones."""
    ids = primer_ids(run)
    examples = []
    for prompt in harmful:
        prompt_ids = run.session.chat.prompt_ids(prompt)
        examples.append(Pair(digest([prompt.id, PRIMED]), prompt_ids, ids, (), 0, PRIMED))
    retained = retained_examples(run, benign)
    return [*examples, *retained], {PRIMED: len(examples), RETAINED: len(retained)}


def safe_examples(
    run: Run, harmful: Sequence[Prompt], benign: Sequence[Prompt]
) -> tuple[list[Pair], Counts]:
    """ThinkSafe's examples: the model's own responses whose trace and answer are safe.

    The hint stands behind the prompt while they are sampled. It is no part of the example.
    """
    session, profile = run.session, run.profile
    prefixes = []
    for prompt in harmful:
        hinted = f"{prompt.text} {profile.recipe.hint}".strip()
        prefixes.append(Prefix(replace(prompt, text=hinted)))
    rollouts = sample(session, prefixes, profile.sampling, profile.plan.draws, stage="hinted")
    prompts = by_id(harmful)
    traces = judge(session, prompts, rollouts)
    answers = judge(session, prompts, rollouts, ANSWER)
    examples = []
    for rollout, trace, answer in zip(rollouts, traces, answers, strict=True):
        if trace.label == answer.label == SAFE:
            examples.append(_example(session, prompts[rollout.prompt_id], rollout, SELF))
    retained = retained_examples(run, benign)
    counts = {SELF: len(examples), "unsafe or not judged": len(rollouts) - len(examples)}
    return [*examples, *retained], counts | {RETAINED: len(retained)}


def retained_examples(run: Run, benign: Sequence[Prompt]) -> list[Pair]:
    """The base model's own answer to every harmless prompt that it answers."""
    session = run.session
    rollouts = sample(session, [Prefix(prompt) for prompt in benign], run.profile.sampling, 1)
    prompts = by_id(benign)
    verdicts = judge(session, prompts, rollouts, ANSWER, "refusal")
    examples = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.label == "answered":
            examples.append(_example(session, prompts[rollout.prompt_id], rollout, RETAINED))
    return examples


def recovery_pairs(
    run: Run, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[list[Pair], Counts]:
    """Pairs that begin after the first cue: a safe way on is preferred to the trace's own.

    Args:
        run: with the profile.
        prompts: harmful prompts.
        sampling: of traces and continuations.

    Returns:
        One pair for every unsafe trace with a cue after which one of ``plan.draws`` continuations
        ends safe, and counts by reason.
    """
    session, profile = run.session, run.profile
    draws = profile.plan.draws
    seen = sample_and_judge(session, prompts, sampling, draws)
    detector = make_detector(run, profile.recipe.detector, prompts)
    unsafe = seen.labelled(UNSAFE)
    cues = find_cues(session, seen.prompts, unsafe, detector)

    # 1. Every trace up to the end of its cue, and what the model writes after it.
    losers, cuts, prefixes = [], [], []
    for loser in unsafe:
        index = cues[loser.id]
        if index is None:
            continue
        cut = trace_sentences(session, loser)[index].token_end
        losers.append(loser)
        cuts.append(cut)
        prefixes.append(Prefix(seen.prompts[loser.prompt_id], loser.token_ids[:cut]))
    continued = sample(session, prefixes, sampling, draws, stage="recovery")
    verdicts = judge(session, seen.prompts, continued)

    # 2. The first one that ends safe wins.
    results: list[Pair | NoPair] = []
    not_recovered = 0
    for number, (loser, cut) in enumerate(zip(losers, cuts, strict=True)):
        winner = None
        for place in range(number * draws, (number + 1) * draws):
            if winner is None and verdicts[place].label == SAFE:
                winner = continued[place]
        if winner is None:
            not_recovered += 1
            continue
        prompt = seen.prompts[loser.prompt_id]
        results.append(pair_rollouts(session, prompt, loser, winner, cut, profile.pairs, RECOVERED))
    pairs, counts = count_reasons(results)
    return pairs, counts | {"never safe": not_recovered, "no-cue": len(unsafe) - len(losers)}


def masked_pairs(run: Run, prompts: Sequence[Prompt]) -> tuple[list[Pair], Counts]:
    """After a safe trace, an unsafe answer to the same prompt is preferred to its own: the control.

    Args:
        run: with the profile.
        prompts: harmful prompts. One without a safe trace or without an unsafe answer gives no
            pair.
    """
    session, profile = run.session, run.profile
    prefixes = [Prefix(prompt) for prompt in prompts]
    rollouts = sample(session, prefixes, profile.sampling, profile.plan.draws)
    traces = judge(session, by_id(prompts), rollouts)
    answers = judge(session, by_id(prompts), rollouts, ANSWER)
    pairs = []
    for prompt in prompts:
        hiding, unsafe_answers = [], []
        for rollout, trace, answer in zip(rollouts, traces, answers, strict=True):
            end = trace_end(session, rollout)
            if rollout.prompt_id != prompt.id or end is None or rollout.finish != "stop":
                continue
            answer_ids = (*rollout.token_ids[end:], session.chat.eos_ids[0])
            if trace.label == answer.label == SAFE:
                hiding.append((rollout.token_ids[:end], answer_ids))
            if answer.label == UNSAFE:
                unsafe_answers.append(answer_ids)
        for number, (trace_ids, own_answer) in enumerate(hiding):
            if unsafe_answers:
                chosen = unsafe_answers[number % len(unsafe_answers)]
                prompt_ids = session.chat.prompt_ids(prompt) + trace_ids
                name = digest([prompt.id, trace_ids, chosen])
                h = len(trace_ids)
                pairs.append(Pair(name, prompt_ids, chosen, own_answer, h, MASKED))
    return pairs, {MASKED: len(pairs)}


def _example(session: Session, prompt: Prompt, rollout: Rollout, why: str) -> Pair:
    """A whole response as an example for supervised fine-tuning."""
    ids = rollout.token_ids
    if rollout.finish == "stop":
        ids = (*ids, session.chat.eos_ids[0])
    return Pair(digest([rollout.id, why]), session.chat.prompt_ids(prompt), ids, (), 0, why)
