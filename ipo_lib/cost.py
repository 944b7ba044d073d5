"""What a profile costs before it runs: rollouts and generated tokens by notebook, from its settings and expected lengths.

Counts are the most that can be asked for (every loser has a cue, no correction is accepted at once); lengths are means. What a
run did ask for stands in the sidecars of its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib.profiles import Profile

HALF = 0.5  # of a trace is still to come at a cut, on average
Drawn = Iterator[tuple[str, float, float]]  # what for, rollouts, tokens of each


@dataclass(frozen=True)
class Cost:
    """One line of the bill: ``rollouts`` drawn, ``tokens`` generated, ``pairs`` trained on (an epoch each counts)."""

    notebook: str
    what: str
    rollouts: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0


def plan(settings: Profile, parameters: Mapping[str, Mapping[str, Any]]) -> list[Cost]:
    """The bill of a profile's notebooks, given each notebook's own parameters. A notebook unknown here costs nothing."""
    bill = []
    for name in settings.notebooks:
        if (lines := NOTEBOOKS.get(name)) is not None:
            bill += [Cost(name, what, count, count * each) for what, count, each in lines(settings, parameters.get(name, {}))]
    if "06_ipo_training" in settings.notebooks:
        count, plan_ = settings.prompts["train_harmful"].count, settings.plan
        bill.append(Cost("06_ipo_training", "stage 1, stage 2", pairs=2 * count * plan_.pool * settings.stage1.epochs))
    return bill


def quickstart(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Traces of some prompts, two CSR curves, every replacement of one cue."""
    trace = settings.expected.trace
    yield "traces", own["candidates"] * own["draws"], trace
    yield "CSR of two traces", 2 * settings.expected.sentences * settings.csr.draws, HALF * trace
    yield "replacements", (2 + settings.plan.pool) * own["draws"], HALF * trace


def training(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Algorithm 1 once per trigger on fresh traces, the causal check, and what benign prompts are refused."""
    harmful, benign = (settings.prompts[name].count for name in ("train_harmful", "train_benign"))
    trace, pool = settings.expected.trace, settings.plan.pool
    yield "traces", harmful * settings.plan.draws, trace
    yield "causal check", harmful * (pool + len(settings.neutral)), HALF * trace
    yield "a trace for each trigger", harmful * pool, trace
    yield "corrections", harmful * pool * settings.plan.rounds, HALF * trace
    yield "benign responses", 2 * benign, trace + settings.expected.answer


def evaluation(settings: Profile, own: Mapping[str, Any]) -> Drawn:
    """Whole responses on every set, by the base model and after each stage."""
    for name in settings.evaluation.sets:
        count = settings.prompts[name].count * settings.evaluation.draws
        yield f"{name}, three models", 3 * count, settings.expected.trace + settings.expected.answer


NOTEBOOKS = {"00_quickstart": quickstart, "06_ipo_training": training, "07_evaluation": evaluation}


def minutes(bill: list[Cost], settings: Profile) -> float:
    """Wall-clock time of a bill on the machine whose speeds the profile states."""
    at = settings.expected
    seconds = sum(one.tokens / at.tokens_per_second + one.pairs * at.seconds_per_pair for one in bill)
    return (seconds + at.seconds_per_notebook * len(settings.notebooks)) / 60


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
        lines.append(
            f"{name:26} {sum(one.rollouts for one in own):9,.0f} rollouts {sum(one.tokens for one in own):11,.0f} tokens{last}"
        )
        lines += [f"  {one.what:24} {one.rollouts:9,.0f} {one.tokens:20,.0f}" for one in own if one.rollouts]
    total = f"at most {sum(one.tokens for one in bill):,.0f} generated tokens"
    return "\n".join(
        [*lines, f"{settings.name}: {total}, about {minutes(bill, settings):.0f} minutes on {settings.expected.machine}"]
    )
