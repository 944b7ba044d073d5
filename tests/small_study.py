"""A full run in small, on the base model that comes along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipo_lib.profiles.run import Run, open_run

SETS = (
    "train_harmful",
    "train_benign",
    "direct",
    "wrapped",
    "adversarial",
    "lookalike",
    "benign",
    "sums",
)
COUNT = 6  # prompts of every set
SMALL: dict[str, Any] = {
    **{f"prompts.{name}.count": COUNT for name in SETS},
    "evaluation.draws": 1,
    "plan.draws": 4,
    "plan.pool": 4,
    "stage1.epochs": 1,
    "stage1.keep": 0,
    "stage2.min_refusals": 1,
    "stage1.warmup": 0.0,
    "stage1.batch_size": 4,
    "sampling.max_tokens": 256,
    "grpo.batch_size": 8,
    "grpo.accumulation": 1,
    "grpo.budget": 1800,
    "csr.draws": 4,
    "search.cap": 16,
    "studies": {"table2": {"seeds": 1, "rows": ["base", "DPO on Part"]}},
}


def open_small_run(root: Path, changes: dict[str, Any] | None = None) -> Run:
    settings = {**SMALL, **(changes or {})}
    return open_run("tiny", settings, str(root / "store"), str(root / "figures"))
