"""``ipo train``: both training stages with the profile's recipe, in one or several processes."""

from __future__ import annotations

from collections.abc import Sequence

from ipo_lib.experiments import detectors, recipes
from ipo_lib.pipeline import TrainedStages, run_pipeline
from ipo_lib.profiles.run import Run
from ipo_lib.triggers import Trigger


def train(run: Run, harmful_set: str, benign_set: str) -> TrainedStages:
    """``run_pipeline`` with the pairs and the triggers of the profile's recipe.

    Args:
        run: the opened profile; its settings are those of one process.
        harmful_set: name of the prompt set that pairs are made from.
        benign_set: name of the prompt set of stage 2's benign pairs.

    Raises:
        BadInput: no pairs, or a launcher that shards parameters.
    """
    harmful, benign = run.prompts(harmful_set), run.prompts(benign_set)

    def choose_triggers() -> Sequence[Trigger]:
        detector = detectors.make_detector(run, run.profile.recipe.detector, harmful)
        return recipes.choose_triggers(run, harmful, detector)

    return run_pipeline(
        run, harmful, benign, lambda: recipes.gather_pairs(run, harmful), choose_triggers
    )
