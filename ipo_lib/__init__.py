"""Intervened Preference Optimization (arXiv 2509.24393): safe reasoning by corrective intervention.

    import ipo_lib as ipo

    run = ipo.open_run("tiny")  # a profile: model, judge, prompts
    prompts = run.prompts("train_harmful")[:8]
    judged = ipo.sample_and_judge(run.session, prompts, run.thinking, draws=8)
    detector = run.detector(judged.rollouts, judged.verdicts)
    cues = ipo.find_cues(run.session, judged.prompts, judged.rollouts, detector)
    unsafe, safe = ipo.example_pair(judged.rollouts, judged.labels, cues)
    table = ipo.responses(judged.rollouts, trace=judged.verdicts)  # a DataFrame
    print(ipo.rate(ipo.counts(table, "trace")))  # share of harmful traces, with its interval

``ipo_lib.pipeline`` is where a reader begins: Algorithm 1 and both training stages. Importing the
package loads neither torch nor any other module; a name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "profiles.run": ("open_run", "Run"),
    "profiles.reading": ("read_profile", "profile_names"),
    "records": ("BadInput", "Prompt", "Rollout", "Verdict", "CsrPoint", "TurningPoint", "Pair"),
    "sampling": ("Sampling",),
    "stages": (
        "Prefix",
        "Replacement",
        "sample",
        "sample_and_judge",
        "judge",
        "trace_texts",
        "measure_csr",
        "find_turning_points",
        "find_cues",
        "intervene",
        "example_pair",
    ),
    "turning_points.locate": ("find_turns",),
    "frame": ("responses", "counts", "rate", "difference"),
    "pipeline": ("corrected_pairs", "run_pipeline"),
    "evaluation": ("evaluate",),
    "profiles.claims": ("claim", "estimate"),
    "experiments.asking": ("csr_table", "compare_sentences", "before_and_after"),
    "experiments.trying": ("explore",),
    "viewer": ("show",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"ipo_lib has no {name!r}; it has {', '.join(_MODULE_OF)}")
    return getattr(importlib.import_module(f"ipo_lib.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
