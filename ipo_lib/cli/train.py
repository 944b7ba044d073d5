"""Both training stages of a profile in one or several processes (``ipo train``).

1. The first process samples, judges and builds the pairs; the others wait.
2. The others do the same, and find all of it in the store.
3. All of them train, each on its share of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ipo_lib import stages, training
from ipo_lib.engines import processes
from ipo_lib.engines.lora import Rows
from ipo_lib.experiments import detectors, recipes
from ipo_lib.profiles.run import Run
from ipo_lib.records import Pair

Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainedStages:
    """What ``train`` made."""

    stage1: Path  # adapter folder
    stage2: Path | None  # adapter folder; None where stage 2 was left out
    pairs: int  # of stage 1
    counts: dict[str, int]  # pairs of stage 1, and why there are not more
    rows: Rows  # metrics of stage 1, one row a step
    message: str  # what stage 2 did, in one sentence


def train(run: Run, harmful_set: str, benign_set: str) -> TrainedStages:
    """Pairs by Algorithm 1, stage 1 on them, benign pairs with the result, stage 2.

    Args:
        run: the opened profile; its settings are those of one process.
        harmful_set: name of the prompt set that pairs are made from.
        benign_set: name of the prompt set of stage 2's benign pairs.

    Raises:
        BadInput: no pairs, or a launcher that shards parameters.
    """
    settings, session = run.profile, run.session
    processes.join(settings.stage1.use_cpu or settings.model.device == "cpu")
    harmful, benign = run.prompts(harmful_set), run.prompts(benign_set)
    pairs, counts = first_alone(lambda: recipes.gather_pairs(run, harmful))
    stage1, rows = training.train_first_stage(session, pairs, run.folder, settings.stage1, counts)
    detector = detectors.make_detector(run, settings.recipe.detector, harmful)

    def make_benign_pairs() -> list[Pair]:
        triggers = recipes.choose_triggers(run, harmful, detector)
        benign_pairs, _, _ = stages.benign_pairs(
            session,
            run.adapted(stage1),
            benign,
            settings.pairs,
            settings.sampling,
            settings.stage2,
            triggers,
        )
        return benign_pairs

    benign_pairs = first_alone(make_benign_pairs)
    stage2, _, message = training.train_second_stage(
        session, pairs, benign_pairs, run.folder, stage1, settings.stage2
    )
    message = training.margin_warning(rows) or message
    return TrainedStages(stage1, stage2, len(pairs), counts, rows, message)


def first_alone(work: Callable[[], Result]) -> Result:
    """``work()`` by the first process, then by the others, who find all of it in the store."""
    if not processes.is_first():
        processes.wait()
        return work()
    result = work()
    processes.wait()
    return result
