"""The steps of the method: sample, judge, measure CSR, find cues, intervene.

(Not the two training stages of the paper: ``ipo_lib.training`` has those.)

Every step takes a ``Session`` first and returns records in a fixed order. Only here does the store
meet the model: a step looks into the store, computes what is missing there, and stores it before it
returns. ``ipo_lib.pipeline`` puts the steps together as the paper does.
"""

from ipo_lib.stages.drawing import (
    Prefix,
    draw_available,
    draw_rollouts,
    probabilities,
    sample,
    stored_draws,
)
from ipo_lib.stages.interventions import (
    CorrectionSettings,
    CuesByRollout,
    Replacement,
    find_cues,
    intervene,
)
from ipo_lib.stages.pairing import benign_pairs, harvested_pairs, pair_rollouts
from ipo_lib.stages.safety_ratio import (
    continuations,
    continuations_by_sentence,
    find_turning_points,
    measure_csr,
)
from ipo_lib.stages.session import (
    FRESH,
    JUDGE_VERSION,
    SAMPLE_VERSION,
    WRITE_EVERY,
    Continuations,
    Session,
    Usage,
)
from ipo_lib.stages.traces import (
    count_label,
    example_pair,
    first_of_each_prompt,
    mixed_prompts,
    random_subset,
    trace_end,
    trace_sentences,
    trace_texts,
)
from ipo_lib.stages.verdicts import JudgedRollouts, judge, sample_and_judge, stored_labels

__all__ = [
    "FRESH",
    "JUDGE_VERSION",
    "SAMPLE_VERSION",
    "WRITE_EVERY",
    "Continuations",
    "CorrectionSettings",
    "CuesByRollout",
    "JudgedRollouts",
    "Prefix",
    "Replacement",
    "Session",
    "Usage",
    "benign_pairs",
    "continuations",
    "continuations_by_sentence",
    "count_label",
    "draw_available",
    "draw_rollouts",
    "example_pair",
    "find_cues",
    "find_turning_points",
    "first_of_each_prompt",
    "harvested_pairs",
    "intervene",
    "judge",
    "measure_csr",
    "mixed_prompts",
    "pair_rollouts",
    "probabilities",
    "random_subset",
    "sample",
    "sample_and_judge",
    "stored_draws",
    "stored_labels",
    "trace_end",
    "trace_sentences",
    "trace_texts",
]
