"""What a profile costs before it runs: rollouts and generated tokens by notebook, from its settings and expected lengths.

Counts are upper ends (every loser has a cue, no correction is accepted at once), but one text goes on in later rounds; lengths
are means, and the null world that 05 runs beside is left out. What a run did ask for stands in the sidecars of its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib.profiles import Profile
from ipo_lib.study import tables

BARRED = 3  # rounds in which barred sentences are drawn anew, at most
RUBRIC, VERDICT, FIND = 400.0, 100.0, 2.0  # tokens that a judge or detector reads beside the text, and that each writes
PARTS = 2  # of a rollout that may be judged
LONG = 180  # minutes from which hours are said
HALF = 0.5  # of a trace is still to come at a cut, on average
Drawn = Iterator[tuple[str, float, float, str]]  # what for, rollouts, tokens of each, the pool they come from


@dataclass(frozen=True)
class Cost:
    """One line of the bill: ``rollouts`` drawn, ``tokens`` generated, ``pairs`` trained on (an epoch each counts). Lines of one
    ``pool`` ask for the same draws, so that only the largest is paid for."""

    notebook: str
    what: str
    rollouts: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0
    pool: str = ""


def plan(settings: Profile, parameters: Mapping[str, Mapping[str, Any]]) -> list[Cost]:
    """The bill of a profile's notebooks, given each notebook's own parameters. A notebook unknown here costs nothing."""
    bill = []
    for name in settings.notebooks:
        if (lines := NOTEBOOKS.get(name)) is not None:
            drawn = lines(settings, parameters.get(name, {}))
            bill += [Cost(name, what, count, count * each, pool=pool or f"{name}/{what}") for what, count, each, pool in drawn]
    if settings.triggers is None:  # mined from the run's own traces: searches, then candidates tried on some prompts
        rollouts = settings.plan.traces * (settings.expected.search.get("safe", 0.0) + settings.plan.pool)
        bill.append(Cost(settings.notebooks[0], "mining triggers", rollouts, rollouts * HALF * settings.expected.trace))
    if "06_ipo_training" in settings.notebooks:
        count, plan_ = settings.prompts["train_harmful"].size, settings.plan
        pairs = 2 * count * plan_.pool * settings.stage1.epochs
        bill.append(Cost("06_ipo_training", "stage 1, stage 2", pairs=pairs, pool="06_ipo_training/stages"))
        full = {name: one for name, one in settings.studies.items() if parameters.get(STUDIED.get(name, ""), {}).get("full")}
        cells = sum(one.seeds * len(one.rows or tables()[name]) for name, one in full.items())
        bill.append(Cost("06_ipo_training", "full run", pairs=cells * pairs / 2, pool="06_ipo_training/full"))
    return bill


def paid(bill: Iterable[Cost]) -> float:
    """Generated tokens of a bill: draws that several lines ask for are made once."""
    largest: dict[str, float] = {}
    for one in bill:
        largest[one.pool] = max(largest.get(one.pool, 0.0), one.tokens)
    return sum(largest.values())


def response(settings: Profile, name: str) -> float:
    """Mean tokens of a whole response on a set."""
    return settings.expected.response.get(name, settings.expected.trace + settings.expected.answer)


def responses(settings: Profile, draws: float) -> Drawn:
    """Whole responses of the untouched model on the harmful sets."""
    for name in settings.evaluation.harmful:
        yield f"{name}, before", settings.prompts[name].size * draws, response(settings, name), f"before/{name}"


def training_traces(settings: Profile) -> tuple[str, float, float, str]:
    """The untouched model's traces of the training prompts."""
    return "traces", settings.prompts["train_harmful"].size * settings.plan.draws, settings.expected.trace, "traces"


def searches(settings: Profile, turn: str, label: str, count: float) -> tuple[str, float, float, str]:
    """Adaptive searches for a kind of turning point in ``count`` traces."""
    what, at = f"{turn} turns of {label} traces", settings.expected.search
    return what, count * at.get(turn if turn == label else "none", 0.0), HALF * settings.expected.trace, what


def quickstart(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Traces of some prompts, two CSR curves, every replacement of one cue."""
    trace = settings.expected.trace
    yield "traces", own["candidates"] * own["draws"], trace, ""
    yield "CSR of two traces", 2 * (1 + settings.expected.sentences) * settings.csr.draws, HALF * trace, ""
    yield "replacements", (2 + settings.plan.pool) * own["draws"], HALF * trace, ""


def safety(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Whole responses, the answers after swapped traces, and the aligned model's responses where there is one."""
    yield from responses(settings, own["draws"])
    prompts = sum(settings.prompts[name].size for name in settings.evaluation.harmful)
    yield "answers after a swap", 2 * prompts * own["swap_draws"], settings.expected.answer, ""
    if settings.aligned:
        yield "aligned model", prompts * own["draws"], settings.expected.trace + settings.expected.answer, ""


def diversity(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """A group of draws on every set."""
    yield from responses(settings, own["group"])
    yield training_traces(settings)
    yield from full_run(settings, own, "table1")


def triggers(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Safe turns of safe and of unsafe traces, some whole curves, one curve at every sentence end."""
    half, draws = HALF * settings.expected.trace, settings.csr.draws
    yield training_traces(settings)
    yield searches(settings, "safe", "safe", own["safe_traces"])
    yield searches(settings, "safe", "unsafe", own["unsafe_traces"])
    yield "whole curves", (2 * own["examples"] + 1) * (own["probes"] + 2) * draws, half, ""
    yield "every sentence end", (1 + settings.expected.sentences) * draws, half, ""


def cues(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Unsafe turns of unsafe traces, and S around cues and other sentences."""
    places = min(2 * (2 + own["others"]), 1 + settings.expected.sentences)
    yield training_traces(settings)
    yield searches(settings, "unsafe", "unsafe", own["unsafe_traces"])
    yield "around cues", own["unsafe_traces"] * places * own["move_draws"], HALF * settings.expected.trace, ""


def interventions(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Rounds of every trigger and of a neutral sentence, the controls, and cues put into safe traces; not the null world's."""
    harmful, pool = settings.prompts["train_harmful"].size, settings.plan.pool
    part, neutral = HALF * settings.expected.trace, len(settings.neutral)
    yield training_traces(settings)
    yield "first round, controls", harmful * (2 * pool + neutral + 4), part, ""
    yield "later rounds", harmful * own["rounds"], part, ""
    yield searches(settings, "safe", "safe", own["safe_traces"])
    yield "cues in safe traces", own["safe_traces"] * own["reverse_draws"] * (own["cues"] + 1), part, ""


def training(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Algorithm 1 once per trigger on fresh traces, what benign prompts are refused, and harm on the way."""
    harmful, benign = (settings.prompts[name].size for name in ("train_harmful", "train_benign"))
    trace, pool = settings.expected.trace, settings.plan.pool
    yield "a trace for each trigger", harmful * pool, trace, "traces"
    yield "corrections", harmful * pool * settings.plan.rounds, HALF * trace, ""
    yield "benign responses", 2 * benign, trace + settings.expected.answer, ""
    for name in settings.evaluation.harmful:
        count, each = settings.prompts[name].size * own["draws"], response(settings, name)
        yield f"{name}, before", count, each, f"before/{name}"
        yield f"{name}, after stage 1", count, each, f"after/{name}"
        yield f"{name}, on the way", settings.stage1.keep * count, each, ""
    yield training_traces(settings)
    yield "benign traces for KL", own["kl_traces"], trace, ""


def evaluation(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Whole responses on every set, by the base model and after each stage."""
    for name in settings.evaluation.sets:
        count, each = settings.prompts[name].size * settings.evaluation.draws, response(settings, name)
        yield f"{name}, before", count, each, f"before/{name}"
        yield f"{name}, after stage 1", count, each, f"after/{name}"
        yield f"{name}, after stage 2", count, each, ""
    harmful = sum(settings.prompts[name].size for name in settings.evaluation.harmful)
    yield "triggers barred", BARRED * harmful, settings.expected.trace + settings.expected.answer, ""
    yield from full_run(settings, own, "table2")


def ablations(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Nothing but what a full run costs: the row that is made again is 06's and 07's."""
    for name in (name for name, book in STUDIED.items() if book == "08_ablations"):
        yield from full_run(settings, own, name)


def full_run(settings: Profile, own: Mapping[str, Any], table: str) -> Drawn:
    """Where it is asked for: Algorithm 1 (or as many tokens of GRPO) once a cell, and each cell's evaluation. Cells of one seed
    share traces, so that this is an upper end."""
    if own.get("full") and table in settings.studies:
        study = settings.studies[table]
        cells, harmful = study.seeds * len(study.rows or tables()[table]), settings.prompts["train_harmful"].size
        yield f"{table}, data", cells * harmful * settings.plan.pool * 2, (1 + HALF) / 2 * settings.expected.trace, ""
        for name in settings.evaluation.sets:
            rollouts = cells * settings.prompts[name].size * settings.evaluation.draws
            yield f"{table}, {name}", rollouts, response(settings, name), ""


def estimators(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Every estimator on a few traces: at all tokens, at all sentence ends, and by three searches."""
    draws = settings.csr.draws * (settings.expected.trace + settings.expected.sentences) + 4 * max(
        settings.expected.search.values()
    )
    yield training_traces(settings)
    yield "every estimator", own["live_traces"] * draws, HALF * settings.expected.trace, ""


NOTEBOOKS = {
    "00_quickstart": quickstart,
    "01_reasoning_vs_response": safety,
    "02_rollout_diversity": diversity,
    "03_safety_triggers": triggers,
    "04_compliance_cues": cues,
    "05_corrective_intervention": interventions,
    "06_ipo_training": training,
    "07_evaluation": evaluation,
    "08_ablations": ablations,
    "09_cost_of_csr": estimators,
}


STUDIED = {"table1": "02_rollout_diversity", "table2": "07_evaluation"} | dict.fromkeys(
    ("part_and_full", "detectors", "grid", "sweeps"), "08_ablations")  # fmt: skip


def minutes(bill: list[Cost], settings: Profile) -> float:
    """Wall-clock time of a bill on the machine whose speeds the profile states."""
    at = settings.expected
    seconds = paid(bill) / at.tokens_per_second + sum(one.pairs for one in bill) * at.seconds_per_pair
    return (seconds + at.seconds_per_notebook * len(settings.notebooks)) / 60


def verdicts(bill: Iterable[Cost]) -> float:
    """Texts to judge, at most: of every rollout its trace and its answer, those of several lines once."""
    largest: dict[str, float] = {}
    for one in bill:
        largest[one.pool] = max(largest.get(one.pool, 0.0), one.rollouts)
    return PARTS * sum(largest.values())


def money(bill: list[Cost], settings: Profile) -> float:
    """Dollars for judge and detector, at most, at the prices that the profile states; 0 where it states none."""
    per_trace, total = settings.expected.trace, 0.0
    for part, texts, read, written in (
        (settings.judge, verdicts(bill), per_trace + RUBRIC, VERDICT),
        (settings.detector, verdicts(bill) / PARTS, per_trace + RUBRIC, FIND),
    ):
        for one in part.all if part else ():
            prices = [float(one.arguments.get(name, 0.0)) for name in ("dollars_in", "dollars_out")]
            total += texts * (read * prices[0] + written * prices[1]) / 1_000_000
    return total


def measured(figures: Path) -> dict[str, int]:
    """Tokens that each notebook's last run asked for, by its two digits, from the sidecars of its figures."""
    found: dict[str, int] = {}
    for path in sorted(figures.glob("[0-9][0-9]-*.json")):
        tokens = json.loads(path.read_text("utf-8")).get("tokens", 0)
        found[path.name[:2]] = max(found.get(path.name[:2], 0), tokens)
    return found


def table(bill: list[Cost], settings: Profile, found: Mapping[str, int]) -> str:
    """The bill as text: one line an entry, a sum a notebook beside what its last run asked for, and the whole."""
    lines = []
    for name in settings.notebooks:
        own = [one for one in bill if one.notebook == name]
        last = f"   last run {found[name[:2]]:,}" if name[:2] in found else ""
        lines.append(f"{name:26} {sum(one.rollouts for one in own):9,.0f} rollouts {paid(own):11,.0f} tokens{last}")
        lines += [f"  {one.what:24} {one.rollouts:9,.0f} {one.tokens:20,.0f}" for one in own if one.rollouts]
    total = f"at most {paid(bill):,.0f} generated tokens, draws that notebooks share counted once"
    time, price = minutes(bill, settings), money(bill, settings)
    spent = f"{time:.0f} minutes" if time < LONG else f"{time / 60:.0f} hours"
    paid_for = f"\njudge and detector: at most {verdicts(bill):,.0f} verdicts and {price:,.0f} dollars" if price else ""
    return "\n".join([*lines, f"{settings.name}: {total}, about {spent} on {settings.expected.machine}{paid_for}"])
