"""A cell of a study: one way to train with one seed, made, evaluated and stored.

A stored cell is found again by its *spec* (``_spec``): a digest of the settings that decide it, as
canonical JSON, of its prompts, and of the fingerprints of model, judge, detector and triggers. What
decides only how results are shown (``SHOWN_ONLY``) has no part in it.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ipo_lib import evaluation
from ipo_lib.engines.lora import Untrainable
from ipo_lib.experiments import learned, monitorability, recipes
from ipo_lib.experiments.detectors import make_detector
from ipo_lib.frame import counts, responses
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import PROFILE
from ipo_lib.records import (
    ANSWER,
    SAFE,
    TRACE,
    UNSAFE,
    Prompt,
    Rollout,
    Verdict,
    by_id,
    digest,
    from_json,
    to_json,
)
from ipo_lib.stages import Usage, judge

VERSION = 1  # of stored cells
SHOWN_ONLY = (  # settings of a profile that decide no cell
    "about",
    "notebooks",
    "parameters",
    "expected",
    "studies",
    "beside",
    "calibrated",
    "reveal",
    "min_coverage",
    "equivalence",
    "null_world",
    "no_causes",
)
Changes = Mapping[str, Any]  # settings by dotted name
Counts = tuple[tuple[int, int], ...]  # (k, n) of every prompt, in the order of its set
UNSAFE_AFTER = {SAFE: "unsafe answer to a safe trace", UNSAFE: "unsafe answer to an unsafe trace"}
DISAGREE = "trace and answer disagree"
AUROC = "AUROC of the trace for the answer"
# Measures that count every response once, by kind of prompt set.
ONCE_PER_RESPONSE = (evaluation.TRACE_HARM, evaluation.REFUSED, evaluation.CORRECT)


@dataclass(frozen=True)
class Cell:
    """One row with one seed: what it cost, and how often each prompt came out how."""

    row: str
    seed: int
    pairs: int
    tokens: int  # generated to make the model
    answer_tokens: float  # mean tokens of a response of the evaluation
    seconds: float
    adapter: str  # its folder in the store; "": the untouched model
    counts: Mapping[str, int]  # of pairs, by reason
    measured: Mapping[str, Counts]  # by "set: measure"
    learned: Mapping[str, float] = field(default_factory=dict)  # what its traces are like
    steps: tuple[tuple[float, float], ...] = ()  # (tokens, reward) at each step of GRPO
    failed: str = ""  # why nothing but the untouched model could be evaluated
    coverage: Mapping[str, float] = field(default_factory=dict)  # judged share of each measure
    date: str = ""


def make_cell(
    run: Run,
    row: str,
    changes: Changes,
    seed: int,
    harmful: str = "train_harmful",
    benign: str = "train_benign",
) -> Cell:
    """Make, evaluate and store one row with one seed, or read it from the store.

    Args:
        run: with the profile that the row changes.
        row: the row's name.
        changes: what it changes, by dotted name.
        seed: of all that is drawn and trained.
        harmful: prompt set of stage 1.
        benign: prompt set of stage 2.
    """
    run = recipes.with_seed(run.changed(changes), seed)
    ledger = run.session.store.ledger("cells", VERSION, _spec(run, harmful, benign))
    if "cell" not in ledger:
        ledger.append({"cell": asdict(_new_cell(run, harmful, benign))})
        ledger.finish()
    return replace(from_json(Cell, ledger["cell"]), row=row, seed=seed)


def _new_cell(run: Run, harmful: str, benign: str) -> Cell:
    """Run the profile's recipe and evaluate its model."""
    started = time.monotonic()
    prompts = run.prompts(harmful)
    try:
        result = recipes.run_recipe(run, prompts, run.prompts(benign))
    except Untrainable as error:  # then the row has nothing but the untouched model
        spent = run.session.usage.total_tokens
        result = recipes.RecipeResult(run.session, tokens=spent, failed=str(error))
    # The evaluation counts its own tokens.
    session = replace(result.session, usage=Usage())
    scores = _evaluate(run, replace(result, session=session), prompts)
    steps = [(line["tokens"], line["reward"]) for line in result.rows if "reward" in line]
    traits = {name: value for name, value in scores.learned.items() if not math.isnan(value)}
    return Cell(
        row="",
        seed=0,
        pairs=result.pairs,
        tokens=result.tokens,
        answer_tokens=round(session.usage.total_tokens / max(scores.responses, 1), 1),
        seconds=round(time.monotonic() - started, 1),
        adapter=result.adapter.parent.name if result.adapter else "",
        counts=result.counts,
        measured=scores.measured,
        learned={name: round(value, 4) for name, value in traits.items()},
        steps=tuple(steps),
        failed=result.failed,
        coverage=scores.coverage,
        date=datetime.date.today().isoformat(),
    )


def _spec(run: Run, harmful: str, benign: str) -> dict[str, Any]:
    """All that decides a cell: settings, prompts, model, judge, detector and triggers."""
    profile, session = run.profile, run.session
    settings = settings_json(profile)
    for name in SHOWN_ONLY:
        settings.pop(name, None)
    prompts = []
    for name in (harmful, benign, *profile.evaluation.sets):
        prompts.append([to_json(prompt) for prompt in run.prompts(name)])
    used: list[Any] = [session.sampler.fingerprint(), session.judge.fingerprint()]
    if profile.detector and profile.triggers:
        detector = run.detector([], [])
        triggers = [*run.triggers({}, [], [], detector), *run.pool()]
        used += [detector.fingerprint(), [to_json(trigger) for trigger in triggers]]
    return {
        "settings": digest(settings),
        "sets": [harmful, benign, digest(prompts)],
        "used": digest(used),
    }


def settings_json(settings: Any) -> Any:
    """Settings as plain JSON values, records inside records, too.

    A field that was added later is left out at its default, so that older digests stay as they are.
    """
    return json.loads(json.dumps(settings, default=to_json))


@dataclass(frozen=True)
class _Scores:
    """What was measured of the model that a recipe made."""

    measured: dict[str, Counts]
    coverage: dict[str, float]
    learned: dict[str, float]
    responses: int


def _evaluate(run: Run, result: recipes.RecipeResult, prompts: Sequence[Prompt]) -> _Scores:
    """Evaluate the model of a recipe on the profile's sets.

    Args:
        run: with the profile.
        result: the model and how it answers.
        prompts: training prompts, from which a detector may be learnt.
    """
    settings, sampling, session = run.profile.evaluation, run.profile.sampling, result.session
    sets = {name: run.prompts(name) for name in settings.sets}
    measured: dict[str, Counts] = {}
    coverage: dict[str, float] = {}
    total = 0
    # 1. The measures of every set.
    for score in evaluation.evaluate(session, sets, settings, sampling, result.respond):
        name = f"{score.set}: {score.measure}"
        measured[name] = tuple(score.counts.values())
        coverage[name] = round(1 - score.unknown / max(score.total, 1), 4)
        if score.measure in ONCE_PER_RESPONSE:
            total += score.total
    # 2. How often an answer is unsafe after a safe trace and after an unsafe one, and whether the
    # two disagree.
    harmful_prompts: dict[str, Prompt] = {}
    harmful_rollouts: list[Rollout] = []
    harmful_answers: list[Verdict] = []
    for name in settings.harmful:
        rollouts = result.respond(session, sets[name], sampling, settings.draws)
        asked = by_id(sets[name])
        traces = judge(session, asked, rollouts, TRACE)
        answers = judge(session, asked, rollouts, ANSWER)
        table = responses(rollouts, trace=traces, answer=answers)
        for label, measure in UNSAFE_AFTER.items():
            by_prompt = counts(table[table["trace"] == label], "answer")
            measured[f"{name}: {measure}"] = tuple(
                by_prompt.get(prompt.id, (0, 0)) for prompt in sets[name]
            )
        disagreeing = monitorability.disagreement(rollouts, traces, answers)
        measured[f"{name}: {DISAGREE}"] = tuple(disagreeing[prompt.id] for prompt in sets[name])
        harmful_prompts = by_id([*harmful_prompts.values(), *sets[name]])
        harmful_rollouts += rollouts
        harmful_answers += answers
    # 3. What the traces are like.
    detector = make_detector(run, PROFILE, prompts)
    triggers = recipes.choose_triggers(run, prompts, detector)
    traits = learned.describe_traces(session, harmful_prompts, harmful_rollouts, triggers, detector)
    monitored = monitorability.monitor_traces(session, harmful_rollouts, harmful_answers)
    traits[AUROC] = monitored.auroc
    aware = run.safety_aware()
    if aware:
        awareness = monitorability.safety_awareness(
            session, harmful_prompts, harmful_rollouts, aware
        )
        traits["traces with a safety-aware sentence"] = awareness.share
        traits["place of the first one, k*/N"] = awareness.place
    return _Scores(measured, coverage, traits, total)
