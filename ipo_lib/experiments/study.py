"""A full run: tables of recipes (``notebooks/studies.yml``), each row with several seeds. A *cell* is one row and one seed: what
it cost and how often each prompt came out how, so that every interval and paired test can be computed from the committed
tables."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from ipo_lib import evaluation
from ipo_lib.engines.lora import Untrainable
from ipo_lib.engines.progress import FILE, say
from ipo_lib.experiments import learned, recipes
from ipo_lib.experiments.kl import Divergence, measure_divergence
from ipo_lib.profiles.layered import Yaml
from ipo_lib.profiles.reading import checkout
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.profiles.settings import PROFILE, Expected, StudySettings
from ipo_lib.records import (
    ANSWER,
    SAFE,
    TRACE,
    UNSAFE,
    BadInput,
    Prompt,
    Record,
    Rollout,
    by_id,
    digest,
    from_json,
    to_json,
)
from ipo_lib.stages import Session, by_prompt, judge
from ipo_lib.stats import pooled_rate
from ipo_lib.store import Store

VERSION = 1
Changes = Mapping[str, Any]
Counts = dict[str, tuple[tuple[int, int], ...]]
UNSAFE_AFTER = {SAFE: "unsafe answer to a safe trace", UNSAFE: "unsafe answer to an unsafe trace"}


@dataclass(frozen=True)
class Cell:
    """One row with one seed, made on ``date`` in ``seconds``. ``pairs``, and ``counts`` of them by reason. ``measured``: by
    "set: measure" the prompts' (k, n), in the order of the set. ``tokens``: generated to make the model; ``answer_tokens``: a
    response of the evaluation. ``failed``: why there is nothing to evaluate but the untouched model. ``coverage``: the share of
    each measure that was judged. ``learned``: what its traces are like; ``steps``: (tokens, reward) of GRPO."""

    row: str
    seed: int
    pairs: int
    tokens: int
    answer_tokens: float
    seconds: float
    adapter: str
    counts: Mapping[str, int]
    measured: Mapping[str, tuple[tuple[int, int], ...]]
    learned: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[tuple[float, float], ...] = ()
    failed: str = ""
    coverage: Mapping[str, float] = field(default_factory=dict)
    date: str = ""


def read_studies() -> dict[str, Any]:
    """``notebooks/studies.yml``: tables and claims."""
    return dict(yaml.load((checkout() / "notebooks" / "studies.yml").read_text("utf-8"), Yaml))


def tables() -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of every table: what each changes in a profile, by dotted name."""
    return {
        name: {row: change or {} for row, change in own.items()}
        for name, own in read_studies()["tables"].items()
    }


def rows(run: Run, table: str) -> dict[str, dict[str, Any]]:
    """The rows of a table that the profile runs."""
    known, own = tables(), run.profile.studies.get(table)
    if table not in known:
        raise BadInput(f"study: table {table!r} is unknown; known: {', '.join(known)}")
    if unknown := [name for name in run.profile.studies if name not in known]:
        raise BadInput(
            f"study: profile {run.profile.name!r} names table {unknown[0]!r}; known: {', '.join(known)}"
        )
    if own is None:
        return {}
    if strange := [name for name in own.rows if name not in known[table]]:
        raise BadInput(
            f"study: table {table!r} has no row {strange[0]!r}; known: {', '.join(known[table])}"
        )
    return {
        name: change for name, change in known[table].items() if not own.rows or name in own.rows
    }


def cell(
    run: Run,
    row: str,
    change: Changes,
    seed: int,
    harmful: str = "train_harmful",
    benign: str = "train_benign",
) -> Cell:
    """One row with one seed: made, evaluated and stored; nothing is done twice."""
    own = recipes.seeded(run.changed(change), seed)
    spec = _spec(own, harmful, benign)
    ledger = own.session.store.ledger("cells", VERSION, spec)
    if "cell" not in ledger:
        started = time.monotonic()
        try:
            made = recipes.run_recipe(own, own.prompts(harmful), own.prompts(benign))
        except Untrainable as error:  # what the row has then is the untouched model
            made = recipes.RecipeResult(
                own.session, None, 0, sum(own.session.store.drawn.values()), {}, [], str(error)
            )
        session = replace(
            made.session, store=Store(own.session.store.root)
        )  # which counts the evaluation alone
        measured, shares, taught, answers = _evaluated(own, session, made, own.prompts(harmful))
        done = Cell(
            "",
            0,
            made.pairs,
            made.tokens,
            round(sum(session.store.drawn.values()) / max(answers, 1), 1),
            round(time.monotonic() - started, 1),
            made.adapter.parent.name if made.adapter else "",
            made.counts,
            measured,
            {name: round(value, 4) for name, value in taught.items() if not math.isnan(value)},
            tuple((one["tokens"], one["reward"]) for one in made.rows if "reward" in one),
            made.failed,
            shares,
            datetime.date.today().isoformat(),
        )
        ledger.append({"cell": asdict(done)})
        ledger.finish()
    return replace(from_json(Cell, ledger["cell"]), row=row, seed=seed)


def _spec(run: Run, harmful: str, benign: str) -> dict[str, Any]:
    """All that decides a cell: settings, model, judge, detector, triggers and prompts."""
    p, session = run.profile, run.session
    deciding = replace(
        p,
        about="",
        notebooks=(),
        parameters={},
        expected=Expected(),
        studies={},
        beside={},
        calibrated=(),
    )
    sets = [
        [to_json(one) for one in run.prompts(name)]
        for name in (harmful, benign, *p.evaluation.sets)
    ]
    known: list[Any] = [one.fingerprint() for one in (session.sampler, session.judge)]
    if p.detector and p.triggers:
        finder = run.detector([], [])
        known += [
            finder.fingerprint(),
            [to_json(one) for one in [*run.triggers({}, [], [], finder), *run.pool()]],
        ]
    return {
        "profile": digest(repr(deciding)),
        "sets": [harmful, benign, digest(sets)],
        "doors": digest(known),
    }


def _evaluated(
    run: Run, session: Session, made: recipes.RecipeResult, prompts: Sequence[Prompt]
) -> tuple[Counts, dict[str, float], dict[str, float], int]:
    """(what was measured, the share of it that was judged, what the traces are like, how many responses there are) of a model
    that a recipe made."""
    p, sets = run.profile, {name: run.prompts(name) for name in run.profile.evaluation.sets}
    found = evaluation.evaluate(session, sets, p.evaluation, p.sampling, made.respond)
    measured = {f"{one.set}: {one.measure}": tuple(one.counts.values()) for one in found}
    shares = {
        f"{one.set}: {one.measure}": round(1 - one.unknown / max(one.total, 1), 4) for one in found
    }
    answers = sum(
        one.total
        for one in found
        if one.measure in (evaluation.TRACE_HARM, evaluation.REFUSED, evaluation.CORRECT)
    )
    named, rollouts = dict[str, Prompt](), list[Rollout]()
    for name in p.evaluation.harmful:
        own, asked = (
            made.respond(session, sets[name], p.sampling, p.evaluation.draws),
            by_id(sets[name]),
        )
        pairs = list(
            zip(*(judge(session, asked, own, part) for part in (TRACE, ANSWER)), strict=True)
        )
        for label in (SAFE, UNSAFE):
            kept = [at for at, (trace, _) in enumerate(pairs) if trace.label == label]
            counts = by_prompt([own[at] for at in kept], [pairs[at][1] for at in kept])
            measured[f"{name}: {UNSAFE_AFTER[label]}"] = tuple(
                counts.get(one.id, (0, 0)) for one in sets[name]
            )
        named = by_id([*named.values(), *sets[name]])
        rollouts += own
    finder = recipes.detector(run, PROFILE, prompts)
    taught = learned.sentences(
        session, named, rollouts, recipes.triggers(run, prompts, finder), finder
    )
    return measured, shares, taught, answers


def run_table(run: Run, table: str) -> list[Cell]:
    """Every cell of a table, written to ``full-<table>.json`` among the profile's figures as they come."""
    settings, own = run.profile.studies.get(table, StudySettings()), rows(run, table)
    if (workers := min(settings.workers, settings.seeds, os.cpu_count() or 1)) > 1:
        _ahead(
            run,
            table,
            [(row, change, seed) for row, change in own.items() for seed in range(settings.seeds)],
            workers,
        )
    wanted = [(row, change, seed) for seed in range(settings.seeds) for row, change in own.items()]
    found = []
    for at, (row, change, seed) in enumerate(wanted):
        say(at, len(wanted), f"{table}: {row}, seed {seed}")
        found.append(cell(run, row, change, seed))
        _write(run, table, own, found)
    return found


def _ahead(run: Run, table: str, wanted: Sequence[tuple[str, Changes, int]], workers: int) -> None:
    """Bring cells to the store from several processes, each with its share of the cores. Seeds of one row come after each other:
    cells of one seed build on the same data and adapters, and would be in each other's way."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _share_cores, (workers,)) as pool:
        running = [pool.submit(_bring, run.given, *one) for one in wanted]
        try:
            for at, _ in enumerate(as_completed(running), 1):
                say(at, len(wanted), f"{table}, {workers} at a time")
            for one in running:
                one.result()
        except BrokenProcessPool as error:
            hint = f"if memory ran out, run again with -p studies.{table}.workers=1; finished cells are kept"
            raise BadInput(
                f"study: a process that made cells of {table!r} was killed; {hint}"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _share_cores(workers: int) -> None:
    """Before torch is loaded; what libraries print would come in the way of the notebook's own output."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    os.environ.pop(FILE, None)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _bring(given: tuple[str, Changes, str, str], row: str, change: Changes, seed: int) -> None:
    """One cell; bad input, also that another process builds what is needed, is met again where cells are read."""
    with suppress(BadInput):
        cell(open_run(*given), row, change, seed)


def _write(run: Run, table: str, changes: Changes, found: Sequence[Any]) -> str:
    """Write the records of a full run, one a line; returns the date."""
    run.figures.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {"table": table, "profile": run.profile.name, "about": run.profile.about}
    said |= {
        "date": datetime.date.today().isoformat(),
        "changes": changes,
        "cells": [asdict(one) for one in found],
    }
    lines = json.dumps(said, separators=(",", ":")).replace('{"row"', '\n{"row"')
    (run.figures / f"full-{table}.json").write_text(lines + "\n")
    return str(said["date"])


def table(run: Run, name: str, full: bool) -> tuple[list[Cell], str]:
    """The cells of a table and their date: run now, or as committed with the last full run; none where the profile runs none."""
    if not rows(run, name):
        return [], "never"
    if full:
        return run_table(run, name), datetime.date.today().isoformat()
    return committed(run.profile.name, name, Cell, run.figures)


def committed(
    profile: str, table: str, kind: type[Record], figures: Path | None = None
) -> tuple[list[Record], str]:
    """The records of the last full run of a profile and its date, from ``figures`` or else the checkout's; none where there was
    none."""
    places = [*([figures] if figures else []), checkout() / "figures" / profile]
    path = next((one for place in places if (one := place / f"full-{table}.json").is_file()), None)
    if path is None:
        return [], "never"
    said = json.loads(path.read_bytes())
    return [from_json(kind, one) for one in said["cells"]], said["date"]


def kl(
    run: Run, full: bool, seeds: int, harmful: str, benign: str, count: int
) -> tuple[list[Divergence], str]:
    """How far each trained row of table 2 moved, the first ``seeds`` of each, as ``table``: run now, or as committed."""
    if not full:
        return committed(run.profile.name, "kl", Divergence, run.figures)
    if not (own := rows(run, "table2")):
        return [], "never"
    found = list[Divergence]()
    sets = run.prompts(harmful), run.prompts(benign)
    every = range(min(seeds, run.profile.studies["table2"].seeds))
    for seed in every:
        for at, (row, change) in enumerate(own.items()):
            if folder := cell(run, row, change, seed, harmful, benign).adapter:
                say(seed * len(own) + at, len(every) * len(own), f"KL: {row}, seed {seed}")
                found.append(
                    measure_divergence(
                        run,
                        row,
                        seed,
                        run.session.store.root / "adapters" / folder / "files",
                        *sets,
                        count,
                    )
                )
    return found, _write(run, "kl", own, found)


def repeated(cells: Sequence[Cell], fresh: Cell | None) -> str:
    """How a cell that was made again compares with the committed one: the largest difference of a pooled rate, in points."""
    old = next(
        (one for one in cells if fresh and (one.row, one.seed) == (fresh.row, fresh.seed)), None
    )
    if fresh is None or old is None:
        return "nothing"
    rates = {
        name: [pooled_rate(pairs).value for pairs in (old.measured[name], new)]
        for name, new in fresh.measured.items()
        if name in old.measured
    }
    name, (before, after) = max(
        rates.items(),
        key=lambda one: abs(one[1][1] - one[1][0]) if not any(map(math.isnan, one[1])) else -1.0,
    )
    same = (
        "the same in every measure"
        if before == after
        else f"most unlike in {name}: {100 * before:.1f} then, {100 * after:.1f} now"
    )
    return f"{fresh.row}, seed {fresh.seed}: {same}"
