"""Both training stages of a profile in one or several processes (``ipo train``, also under ``accelerate launch``).

The first process samples, judges and builds the pairs; the others wait and read them from the store.
Then all of them train, each on its share of every step. Nothing that is stored is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ipo_lib import pipeline, training
from ipo_lib.engines import processes
from ipo_lib.engines.lora import Rows
from ipo_lib.experiments import recipes
from ipo_lib.profiles.run import Run
from ipo_lib.records import Pair
from ipo_lib.training import untrained

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stages:
    """What ``train`` made."""

    stage1: Path  # adapter folder
    stage2: Path | None  # adapter folder; None where stage 2 was left out
    pairs: int  # of stage 1
    counts: dict[str, int]  # pairs of stage 1, and why there are not more
    benign: dict[str, int]  # benign pairs of stage 2, and why there are not more
    rows: Rows  # metrics of stage 1, one row a step
    message: str  # what stage 2 did, in one sentence


def train(run: Run, harmful_set: str, benign_set: str) -> Stages:
    """Pairs by Algorithm 1, stage 1 on them, benign pairs with the result, stage 2.

    Args:
        bench: the opened profile; its settings are those of one process, whatever the launcher started.
        harmful_set: name of the prompt set that pairs are made from.
        benign_set: name of the prompt set of stage 2's benign pairs.

    Raises:
        BadInput: no pairs, or a launcher that shards parameters.
    """
    settings, session = run.profile, run.session
    processes.join(settings.stage1.use_cpu or settings.model.device == "cpu")
    harmful, benign = run.prompts(harmful_set), run.prompts(benign_set)
    pairs, counts = first_alone(lambda: recipes.gather(run, harmful))
    stage1, rows = training.train_first_stage(session, pairs, run.folder, settings.stage1, counts)
    finder = recipes.detector(run, settings.recipe.detector, harmful)

    def refusals() -> tuple[list[Pair], dict[str, int]]:
        triggers = recipes.triggers(run, harmful, finder)
        after = run.adapted(stage1)
        found, reasons, _ = pipeline.benign_pairs(
            session, after, benign, settings.pairs, settings.sampling, settings.stage2, triggers
        )
        return found, reasons

    refused, reasons = first_alone(refusals)
    stage2, _, message = training.train_second_stage(
        session, pairs, refused, run.folder, stage1, settings.stage2
    )
    return Stages(stage1, stage2, len(pairs), counts, reasons, rows, untrained(rows) or message)


def first_alone(work: Callable[[], Result]) -> Result:
    """``work()`` by the first process, then by the others, who find all of it in the store."""
    if not processes.is_first():
        processes.wait()
        return work()
    found = work()
    processes.wait()
    return found
