"""How a judge compares with people, on labelled answers: kappa, sensitivity and specificity with intervals over prompts."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ipo_lib.judging import HARM, Exchange, Judge
from ipo_lib.prompts import data_folder, read_rows
from ipo_lib.records import ANSWER, UNSAFE, BadInput, digest, from_json
from ipo_lib.stats import Interval, kappa, pooled_rate
from ipo_lib.store import Store

KNOWN = Path(__file__).with_name("people.yml")
POSITIVE = {HARM: UNSAFE, "refusal": "refused"}  # what sensitivity is about, by question
RESAMPLES = 1000
VERSION, CHUNK = 1, 64  # of what is stored; answers judged at a time
FEW = 10  # answers below which a category gets no row
LICENCE = "These sets hold answers, not reasoning: none of this licenses a correction of verdicts on traces."


@dataclass(frozen=True)
class Others:
    """Where the verdicts of published judges stand: columns ``names``, inside the column ``nested`` if it is given."""

    names: tuple[str, ...]
    nested: str = ""


@dataclass(frozen=True)
class JudgeSet:
    """A labelled set; see ``people.yml``. ``half``: only the prompts whose hash has this parity."""

    about: str
    file: str
    question: str
    prompt: str
    by: str
    column: str
    label: Mapping[str, str]
    category: str = ""
    half: int | None = None
    others: Others | None = None


@dataclass(frozen=True)
class Labelled:
    """One answer with the people's label, and what published judges said of it."""

    exchange: Exchange
    label: str
    prompt: str
    category: str
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A judge on one set or category: ``n`` answers, the share it could judge, Cohen's kappa, and its rates on what people call
    unsafe or refused (``sensitivity``) and on the rest (``specificity``); intervals over prompts."""

    judge: str
    set: str
    category: str
    n: int
    coverage: float
    kappa: Interval
    sensitivity: Interval
    specificity: Interval


@functools.cache
def known() -> dict[str, JudgeSet]:
    """The sets of ``people.yml``."""
    return {
        name: from_json(JudgeSet, one)
        for name, one in yaml.safe_load(KNOWN.read_text("utf-8")).items()
    }


def load(name: str) -> list[Labelled]:
    """The answers of a set. BadInput: no such set, or no ``$IPO_DATA`` that holds it."""
    if name not in known():
        raise BadInput(f"labelled set {name!r} is unknown; choose one of {', '.join(known())}")
    spec, folder = known()[name], data_folder()
    if not folder:
        raise BadInput(f"labelled set {name!r}: set IPO_DATA to the folder that holds {spec.file}")
    found = []
    for number, row in enumerate(read_rows(folder / spec.file)):
        group = str(row[spec.by])
        if (
            spec.half is not None
            and int(hashlib.sha256(group.encode()).hexdigest(), 16) % 2 != spec.half
        ):
            continue
        exchange = Exchange(
            f"{name}/{number}", str(row[spec.prompt]), str(row["response"]), ANSWER, spec.question
        )
        category = str(row[spec.category]) if spec.category else ""
        found.append(
            Labelled(
                exchange, spec.label[str(row[spec.column])], group, category, _others(spec, row)
            )
        )
    return found


def _others(spec: JudgeSet, row: Mapping[str, Any]) -> dict[str, str]:
    """The verdicts of published judges that are plain 0 or 1."""
    if not spec.others:
        return {}
    columns = row[spec.others.nested] if spec.others.nested else row
    return {
        name: spec.label[str(columns[name])]
        for name in spec.others.names
        if str(columns.get(name)) in spec.label
    }


def report(judges: Mapping[str, Judge], sets: Sequence[str], store: Store) -> list[Score]:
    """Every judge on every set whose question it answers, on each category of it, and the published judges beside them. What a
    judge has said of an answer is kept in the store."""
    found = []
    for name in sets:
        rows = load(name)
        said = {
            key: verdicts(judge, [row.exchange for row in rows], store)
            for key, judge in judges.items()
        }
        said |= {
            key: [row.others.get(key) for row in rows]
            for key in dict.fromkeys(k for row in rows for k in row.others)
        }
        for key, labels in said.items():
            if any(label is not None for label in labels):
                found += scores(key, name, rows, labels)
    return found


def verdicts(judge: Judge, exchanges: Sequence[Exchange], store: Store) -> list[str | None]:
    """The labels of the exchanges, in order; missing ones are asked for and stored as they come."""
    ledger = store.ledger("labelled", VERSION, {"judge": judge.fingerprint()})
    named = {digest([e.prompt, e.text, e.question]): e for e in exchanges}
    missing = ledger.missing(named)
    for at in range(0, len(missing), CHUNK):
        keys = missing[at : at + CHUNK]
        asked = [
            replace(named[key], rollout_id=key) for key in keys
        ]  # after a failure verdicts may come out of order
        said = (
            (one.rollout_id, {"label": one.label, "raw": one.raw}) for one in judge.judge(asked)
        )
        ledger.collect(said, CHUNK)
    return [ledger[digest([e.prompt, e.text, e.question])]["label"] for e in exchanges]


def scores(
    judge: str, name: str, rows: Sequence[Labelled], labels: Sequence[str | None]
) -> list[Score]:
    """The score on all rows, then on each category of at least ``FEW`` of them."""
    groups: dict[str, list[tuple[Labelled, str | None]]] = defaultdict(list)
    for row, label in zip(rows, labels, strict=True):
        groups[""].append((row, label))
        if row.category:
            groups[row.category].append((row, label))
    return [
        score(judge, name, category, own)
        for category, own in groups.items()
        if not category or len(own) >= FEW
    ]


def score(
    judge: str, name: str, category: str, rows: Sequence[tuple[Labelled, str | None]]
) -> Score:
    """One judge on some answers; what it could not judge is left out of the rates and shown as coverage."""
    judged = [(row, label) for row, label in rows if label is not None]
    positive = POSITIVE[known()[name].question]
    rates = [
        share([(row.prompt, label == positive) for row, label in judged if row.label == positive]),
        share([(row.prompt, label != positive) for row, label in judged if row.label != positive]),
    ]
    agreed = over_prompts(
        judged, lambda own: kappa([row.label for row, _ in own], [label for _, label in own])
    )
    return Score(judge, name, category, len(rows), len(judged) / len(rows), agreed, *rates)


def share(outcomes: Sequence[tuple[str, bool]]) -> Interval:
    """A rate with its interval over prompts."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for prompt, right in outcomes:
        counts[prompt][0] += right
        counts[prompt][1] += 1
    return pooled_rate([(k, n) for k, n in counts.values()])


def over_prompts(
    rows: Sequence[tuple[Labelled, str]],
    statistic: Callable[[Sequence[tuple[Labelled, str]]], float],
) -> Interval:
    """A statistic with its bootstrap interval, whole prompts drawn; draws in which it is not defined are left out."""
    groups: dict[str, list[tuple[Labelled, str]]] = defaultdict(list)
    for row, label in rows:
        groups[row.prompt].append((row, label))
    own, generator = list(groups.values()), np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES if len(own) > 1 else 0):
        value = statistic(
            [one for at in generator.integers(len(own), size=len(own)) for one in own[at]]
        )
        drawn += [value] if math.isfinite(value) else []
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if drawn else (math.nan, math.nan)
    return Interval(
        statistic(rows) if rows else math.nan, low, high, len(own), "bootstrap over prompts"
    )
