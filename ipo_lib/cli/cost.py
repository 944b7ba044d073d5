"""What a profile costs before it runs: rollouts and generated tokens by notebook, from its settings and expected lengths.

Counts are upper ends (every loser has a cue, no correction is accepted at once), but one text goes on in later rounds; the null
world that 05 runs beside is left out. The *expected* bill takes mean lengths. The bill *at most* takes every draw to run to
``sampling.max_tokens``, every search to its budget, and every text that is judged to be as long. What a run did ask for stands in
the sidecars of its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib.experiments.study import tables
from ipo_lib.profiles.settings import Component, Profile
from ipo_lib.records import BadInput

BARRED = 3  # rounds in which barred sentences are drawn anew, at most
RUBRIC, VERDICT, FIND = (
    400.0,
    100.0,
    2.0,
)  # tokens that a judge or detector reads beside the text, and that each writes
LONG_RUBRIC, LONG_VERDICT = (
    2000.0,
    400.0,
)  # the same at most: attacks are long, and a judge has a limit of its own
GUARD = "ipo_lib.judges.guards:guard"  # a judge that may run in this process
SECOND = ("07_evaluation", "09_cost_of_csr")  # the notebooks that ask the second judge
PARTS = 2  # of a whole response that are judged; of all other draws it is one
# Lines whose rollouts a detector reads, beside the data of a full run.
CUED = (
    "traces",
    "replacements",
    "a trace for each trigger",
    "corrections",
    "first round, controls",
    "later rounds",
    "cues in safe traces",
    "triggers barred",
)
LONG = 180  # minutes from which hours are said
HALF = 0.5  # of a trace is still to come at a cut, on average
# What for, rollouts, tokens of each, the pool they come from, and parts that are judged where this is not one.
Line = tuple[str, float, float, str] | tuple[str, float, float, str, int]
Drawn = Iterator[Line]


@dataclass(frozen=True)
class Cost:
    """One line of the bill: ``rollouts`` drawn, ``tokens`` generated, ``pairs`` trained on (an epoch each counts), ``parts`` of a
    rollout that are judged. Lines of one ``pool`` ask for the same draws, so that only the largest is paid for."""

    notebook: str
    what: str
    rollouts: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0
    pool: str = ""
    parts: int = PARTS


def plan(settings: Profile, parameters: Mapping[str, Mapping[str, Any]]) -> list[Cost]:
    """The bill of a profile's notebooks, given each notebook's own parameters. A notebook unknown here costs nothing."""
    bill = list[Cost]()
    for name in settings.notebooks:
        if (lines := NOTEBOOKS.get(name)) is not None:
            for what, count, each, pool, *parts in lines(settings, parameters.get(name, {})):
                judged = parts[0] if parts else 1
                bill.append(
                    Cost(
                        name, what, count, count * each, pool=pool or f"{name}/{what}", parts=judged
                    )
                )
    cap = settings.sampling.max_tokens
    bill = [replace(one, tokens=min(one.tokens, one.rollouts * cap)) for one in bill]
    if (
        settings.triggers is None
    ):  # mined from the run's own traces: searches, then candidates tried on some prompts
        rollouts = settings.plan.traces * (
            settings.expected.search.get("safe", 0.0) + settings.plan.pool
        )
        tokens = rollouts * min(HALF * settings.expected.trace, cap)
        bill.append(Cost(settings.notebooks[0], "mining triggers", rollouts, tokens, parts=1))
    if "06_ipo_training" in settings.notebooks:
        count, plan_ = settings.prompts["train_harmful"].size, settings.plan
        pairs = 2 * count * plan_.pool * settings.stage1.epochs
        bill.append(
            Cost("06_ipo_training", "stage 1, stage 2", pairs=pairs, pool="06_ipo_training/stages")
        )
        full = {
            name: one
            for name, one in settings.studies.items()
            if parameters.get(STUDIED.get(name, ""), {}).get("full")
        }
        cells = sum(one.seeds * len(one.rows or tables()[name]) for name, one in full.items())
        bill.append(
            Cost(
                "06_ipo_training", "full run", pairs=cells * pairs / 2, pool="06_ipo_training/full"
            )
        )
    return bill


def at_most(
    settings: Profile, parameters: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Cost], Profile]:
    """The bill where every draw runs to its limit, and the settings with the lengths and speeds that belong to it."""
    cap, means, search = settings.sampling.max_tokens, settings.expected, settings.search
    longer = max(1.0, cap / means.trace)
    trained = max(1.0, min(cap, settings.pairs.max_length) / means.trace)
    searched = (
        search.budget + search.batch + 2 * search.confirm
    )  # a batch may begin below the budget; fresh draws at both sides
    expected = replace(
        means,
        trace=float(cap),
        answer=float(cap),
        response={},
        sentences=means.sentences * longer,
        search={kind: max(found, searched) for kind, found in means.search.items()},
        seconds_per_pair=means.seconds_per_pair * trained,
        verdicts_per_second=means.verdicts_per_second / longer,
    )
    longest = replace(settings, expected=expected)
    return [replace(one, tokens=one.rollouts * cap) for one in plan(longest, parameters)], longest


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
        yield (
            f"{name}, before",
            settings.prompts[name].size * draws,
            response(settings, name),
            f"before/{name}",
            PARTS,
        )


def traces(
    settings: Profile, own: Mapping[str, Any], draws: float = 0
) -> tuple[str, float, float, str]:
    """The untouched model's traces of the notebook's harmful prompts: ``plan.draws`` of each unless said otherwise."""
    name, count = harmful_prompts(settings, own)
    return (
        "traces",
        count * (draws or settings.plan.draws),
        settings.expected.trace,
        f"traces/{name}",
    )


def harmful_prompts(settings: Profile, own: Mapping[str, Any]) -> tuple[str, int]:
    """The set of a notebook's harmful prompts and its size. BadInput: the profile has no such set."""
    name = str(own.get("harmful_set", "train_harmful"))
    if name not in settings.prompts:
        known = ", ".join(settings.prompts)
        raise BadInput(f"harmful_set {name!r} is not in profile {settings.name!r}; known: {known}")
    return name, settings.prompts[name].size


def searches(
    settings: Profile, turn: str, label: str, count: float
) -> tuple[str, float, float, str]:
    """Adaptive searches for a kind of turning point in ``count`` traces."""
    what, at = f"{turn} turns of {label} traces", settings.expected.search
    return (
        what,
        count * at.get(turn if turn == label else "none", 0.0),
        HALF * settings.expected.trace,
        what,
    )


def quickstart(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Traces of some prompts, two CSR curves, every replacement of one cue."""
    trace = settings.expected.trace
    yield "traces", own["candidates"] * own["draws"], trace, ""
    yield (
        "CSR of two traces",
        2 * (1 + settings.expected.sentences) * settings.csr.draws,
        HALF * trace,
        "",
    )
    yield "replacements", (2 + settings.plan.pool) * own["draws"], HALF * trace, ""


def safety(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Whole responses, the answers after swapped traces, and the aligned model's responses where there is one."""
    yield from responses(settings, own["draws"])
    prompts = sum(settings.prompts[name].size for name in settings.evaluation.harmful)
    yield "answers after a swap", 2 * prompts * own["swap_draws"], settings.expected.answer, ""
    if settings.aligned:
        yield (
            "aligned model",
            prompts * own["draws"],
            settings.expected.trace + settings.expected.answer,
            "",
            PARTS,
        )


def diversity(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """A group of draws on every set."""
    yield from responses(settings, own["group"])
    yield traces(settings, own, own["group"])
    yield from full_run(settings, own, "table1")


def triggers(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Safe turns of safe and of unsafe traces, some whole curves, one curve at every sentence end."""
    half, draws = HALF * settings.expected.trace, settings.csr.draws
    yield traces(settings, own)
    yield searches(settings, "safe", "safe", own["safe_traces"])
    yield searches(settings, "safe", "unsafe", own["unsafe_traces"])
    yield "whole curves", (2 * own["examples"] + 1) * (own["probes"] + 2) * draws, half, ""
    yield "every sentence end", (1 + settings.expected.sentences) * draws, half, ""


def cues(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Unsafe turns of unsafe traces, and S at every sentence end: draws to choose sentences by, and others to measure with."""
    places = 2 * (1 + settings.expected.sentences)
    yield traces(settings, own)
    yield searches(settings, "unsafe", "unsafe", own["unsafe_traces"])
    yield (
        "S at sentence ends",
        own["unsafe_traces"] * places * own["move_draws"],
        HALF * settings.expected.trace,
        "",
    )


def interventions(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Rounds of every trigger and of a neutral sentence, the controls, and cues put into safe traces; not the null world's."""
    (_, harmful), pool = harmful_prompts(settings, own), settings.plan.pool
    part, neutral = HALF * settings.expected.trace, len(settings.neutral)
    yield traces(settings, own)
    yield "first round, controls", harmful * (2 * pool + neutral + 4), part, ""
    yield "later rounds", harmful * own["rounds"], part, ""
    yield searches(settings, "safe", "safe", own["safe_traces"])
    yield (
        "cues in safe traces",
        own["safe_traces"] * own["reverse_draws"] * (own["cues"] + 1),
        part,
        "",
    )


def training(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Algorithm 1 once per trigger on fresh traces, what benign prompts are refused, and harm on the way."""
    name, harmful = harmful_prompts(settings, own)
    benign = settings.prompts["train_benign"].size
    trace, pool = settings.expected.trace, settings.plan.pool
    yield "a trace for each trigger", harmful * pool, trace, f"traces/{name}"
    yield "corrections", harmful * pool * settings.plan.rounds, HALF * trace, ""
    asked = (
        1 + settings.stage2.benign_draws + settings.stage2.refusing_prefix
    )  # of the base, then until one refuses
    yield "benign responses", asked * benign, trace + settings.expected.answer, "", PARTS
    for name in settings.evaluation.harmful:
        count, each = settings.prompts[name].size * own["draws"], response(settings, name)
        yield f"{name}, before", count, each, f"before/{name}", PARTS
        yield f"{name}, after stage 1", count, each, f"after/{name}", PARTS
        yield f"{name}, on the way", settings.stage1.keep * count, each, "", PARTS
    yield traces(settings, own)
    yield "benign traces for KL", own["kl_traces"], trace, ""
    if not settings.forks:
        cuts = 1 + settings.expected.sentences
        yield (
            "S along traces for KL",
            own["kl_curves"] * cuts * settings.csr.draws,
            HALF * trace,
            "",
        )


def evaluation(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Whole responses on every set, by the base model and after each stage."""
    for name in settings.evaluation.sets:
        count, each = (
            settings.prompts[name].size * settings.evaluation.draws,
            response(settings, name),
        )
        yield f"{name}, before", count, each, f"before/{name}", PARTS
        yield f"{name}, after stage 1", count, each, f"after/{name}", PARTS
        yield f"{name}, after stage 2", count, each, "", PARTS
    harmful = sum(settings.prompts[name].size for name in settings.evaluation.harmful)
    yield (
        "triggers barred",
        BARRED * harmful,
        settings.expected.trace + settings.expected.answer,
        "",
        PARTS,
    )
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
        cells, harmful = (
            study.seeds * len(study.rows or tables()[table]),
            settings.prompts["train_harmful"].size,
        )
        yield (
            f"{table}, data",
            cells * harmful * settings.plan.pool * 2,
            (1 + HALF) / 2 * settings.expected.trace,
            "",
        )
        for name in settings.evaluation.sets:
            rollouts = cells * settings.prompts[name].size * settings.evaluation.draws
            yield f"{table}, {name}", rollouts, response(settings, name), "", PARTS


def estimators(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Every estimator on a few traces: at all tokens, at all sentence ends, and by three searches."""
    draws = settings.csr.draws * (settings.expected.trace + settings.expected.sentences) + 4 * max(
        settings.expected.search.values()
    )
    yield traces(settings, own)
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


STUDIED = {
    "table1": "02_rollout_diversity",
    "grpo_budget": "02_rollout_diversity",
    "table2": "07_evaluation",
} | dict.fromkeys(
    ("part_and_full", "detectors", "grid", "sweeps", "learning_rates"), "08_ablations"
)


def speed(settings: Profile) -> float:
    """Tokens a second that the profile's model generates, where it runs."""
    at = settings.expected
    return at.server_tokens_per_second if settings.model.server else at.tokens_per_second


def minutes(bill: list[Cost], settings: Profile) -> float:
    """Wall-clock time of a bill on the machine whose speeds the profile states."""
    at = settings.expected
    seconds = paid(bill) / speed(settings) + sum(one.pairs for one in bill) * at.seconds_per_pair
    return (
        seconds + guarded(bill, settings) + at.seconds_per_notebook * len(settings.notebooks)
    ) / 60


def verdicts(bill: Iterable[Cost]) -> float:
    """Texts to judge: of a whole response its trace and its answer, of all others the trace; those of several lines once."""
    largest: dict[str, float] = {}
    for one in bill:
        largest[one.pool] = max(largest.get(one.pool, 0.0), one.parts * one.rollouts)
    return sum(largest.values())


def asked(bill: list[Cost], settings: Profile) -> Iterator[tuple[Component, float]]:
    """Every judge of a profile with the number of texts that it reads; the second reads those of a few notebooks."""
    second = [one for one in bill if one.notebook in SECOND]
    for part, count in (
        (settings.judge, verdicts(bill)),
        (settings.second_judge, verdicts(second)),
    ):
        for one in part.all if part else ():
            yield one, count


def guarded(bill: list[Cost], settings: Profile) -> float:
    """Seconds in which guards in this process judge."""
    local = [
        count
        for part, count in asked(bill, settings)
        if part.use == GUARD and not part.arguments.get("server")
    ]
    return sum(local) / settings.expected.verdicts_per_second


def money(bill: list[Cost], settings: Profile, most: bool = False) -> float:
    """Dollars for judges and detector at the prices that the profile states; 0 where it states none. ``most``: every answer is as
    long as it may be, and no budget is passed."""
    trace, total = settings.expected.trace, 0.0
    parts = [(part, count, VERDICT, LONG_VERDICT) for part, count in asked(bill, settings)]
    if settings.detector:
        read_for_cues = verdicts(
            [
                replace(one, parts=1)
                for one in bill
                if one.what in CUED or one.what.endswith(", data")
            ]
        )
        parts += [(part, read_for_cues, FIND, FIND) for part in settings.detector.all]
    for part, texts, mean, limit in parts:
        given = part.arguments
        prices = [float(given.get(name, 0.0)) for name in ("dollars_in", "dollars_out")]
        read = trace + (LONG_RUBRIC if most else RUBRIC)
        written = float(given.get("max_tokens", limit)) if most else mean
        dollars = texts * (read * prices[0] + written * prices[1]) / 1_000_000
        bound = float(given.get("budget", 0.0))
        total += min(dollars, bound) if most and bound else dollars
    return total


def measured(figures: Path) -> dict[str, int]:
    """Tokens that each notebook's last run asked for, by its two digits, from the sidecars of its figures."""
    found: dict[str, int] = {}
    for path in sorted(figures.glob("[0-9][0-9]-*.json")):
        tokens = json.loads(path.read_text("utf-8")).get("tokens", 0)
        found[path.name[:2]] = max(found.get(path.name[:2], 0), tokens)
    return found


def table(
    bill: list[Cost],
    settings: Profile,
    found: Mapping[str, int],
    most: tuple[list[Cost], Profile] | None = None,
) -> str:
    """The bill as text: one line an entry, a sum a notebook beside what its last run asked for, then the whole, at most and as
    expected."""
    lines = []
    for name in settings.notebooks:
        own = [one for one in bill if one.notebook == name]
        last = f"   last run {found[name[:2]]:,}" if name[:2] in found else ""
        lines.append(
            f"{name:26} {sum(one.rollouts for one in own):9,.0f} rollouts {paid(own):11,.0f} tokens{last}"
        )
        lines += [
            f"  {one.what:24} {one.rollouts:9,.0f} {one.tokens:20,.0f}"
            for one in own
            if one.rollouts
        ]
    lines.append("draws that notebooks share are counted once")
    if most:
        lines.append(
            f"at most {_whole(*most, most=True)}: every draw runs to {settings.sampling.max_tokens:,} tokens"
        )
    return "\n".join([*lines, f"{settings.name}: {_whole(bill, settings)}"])


def _whole(bill: list[Cost], settings: Profile, most: bool = False) -> str:
    """A bill's tokens, time and dollars."""
    time, price = minutes(bill, settings), money(bill, settings, most)
    about = "" if most else "about "
    spent = f"{about}{time:.0f} minutes" if time < LONG else f"{about}{time / 60:.0f} hours"
    where = "" if most else f" on {settings.expected.machine}"
    paid_for = (
        f", {verdicts(bill):,.0f} verdicts and {price:,.0f} dollars for judges and detector"
        if price
        else ""
    )
    return f"{about}{paid(bill):,.0f} generated tokens, {spent}{where}{paid_for}"
