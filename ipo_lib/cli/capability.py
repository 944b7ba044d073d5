"""Capability beside safety (Table 2, right side): lm-eval runs the tasks, on the model as it is or with an adapter."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput


@dataclass(frozen=True)
class Task:
    """A task of lm-eval: its name there, the metric read, whether it executes code that the model wrote, and how many tokens a
    reasoning model may need for it (0: not known to be many)."""

    name: str
    metric: str
    runs_code: bool = False
    tokens: int = 0


TASKS = {
    "math-500": Task("minerva_math500", "math_verify,none"),
    "gsm8k": Task("gsm8k_cot_zeroshot", "exact_match,flexible-extract"),
    "aime-2024": Task("aime24", "exact_match,none", tokens=32_768),
    "gpqa-diamond": Task(
        "gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"
    ),  # gated: Idavidrein/gpqa
    "humaneval": Task("humaneval_instruct", "pass@1,create_test", runs_code=True),
}
CODE = "--confirm_run_unsafe_code"
RESULTS = "results_*.json"  # lm-eval's file
THINK_END = "</think>"


@dataclass(frozen=True)
class Accuracy:
    """What lm-eval found for a task; ``error`` is its standard error over problems."""

    task: str
    value: float
    error: float
    n: int


def command(
    settings: Profile,
    folder: Path,
    task: str,
    out: Path,
    *,
    adapter: Path | None = None,
    limit: int = 0,
    run_code: bool = False,
) -> list[str]:
    """The lm-eval call for one task. BadInput: it is unknown, or executes code and ``run_code`` does not allow it."""
    if task not in TASKS:
        raise BadInput(f"capability task {task!r} is unknown; choose of {', '.join(TASKS)}")
    if TASKS[task].runs_code and not run_code:
        raise BadInput(
            f"{task} executes code that the model writes; use a sandbox, then say --run-code"
        )
    sampling = settings.sampling
    given: dict[str, Any] = {"pretrained": folder, "think_end_token": THINK_END}
    given |= {"peft": adapter} if adapter else {}
    given |= {"dtype": settings.model.dtype} if settings.model.dtype != "auto" else {}
    drawn = {
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    drawn |= {"max_gen_toks": sampling.max_tokens}
    found = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        _pairs(given),
        "--tasks",
        TASKS[task].name,
    ]
    found += [
        "--gen_kwargs",
        _pairs(drawn),
        "--apply_chat_template",
        "--output_path",
        str(out),
        "--log_samples",
    ]
    found += ["--batch_size", "auto", "--seed", str(settings.seed)]
    return [
        *found,
        *(["--limit", str(limit)] if limit else []),
        *([CODE] if TASKS[task].runs_code else []),
    ]


def too_short(settings: Profile, task: str) -> str:
    """A warning where the profile's limit cuts off the thinking that a task needs; empty where it does not."""
    needed, limit = TASKS[task].tokens, settings.sampling.max_tokens
    if limit >= needed:
        return ""
    return (
        f"{task}: sampling.max_tokens is {limit:,}, long thinking needs {needed:,}; what is cut off counts as wrong, so that the "
        f"accuracy is too low: -p sampling.max_tokens={needed}"
    )


def _pairs(given: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in given.items())


def measure(task: str, asked: Sequence[str], out: Path, environment: Mapping[str, str]) -> Accuracy:
    """What lm-eval finds for a task; a task that was measured before is read. BadInput: lm-eval is missing, or it failed."""
    if not any(out.rglob(RESULTS)):
        if importlib.util.find_spec("lm_eval") is None:
            raise BadInput('capability needs lm-eval; run pip install -e ".[eval]"')
        allowed = {"HF_ALLOW_CODE_EVAL": "1"} if CODE in asked else {}
        done = subprocess.run(list(asked), env={**environment, **allowed}, check=False)
        if done.returncode:
            raise BadInput(
                f"lm-eval ended with code {done.returncode} on {task}; its own message stands above"
            )
    return result(task, out)


def result(task: str, out: Path) -> Accuracy:
    """The accuracy in lm-eval's newest results file under a folder. BadInput when the task is not in it."""
    files = sorted(out.rglob(RESULTS), key=lambda file: file.stat().st_mtime)
    if not files:
        raise BadInput(f"{out} holds no results of lm-eval; run it first")
    said, name = json.loads(files[-1].read_text("utf-8")), TASKS[task].name
    metric, _, filtered = TASKS[task].metric.partition(",")
    if TASKS[task].metric not in (row := said["results"].get(name, {})):
        raise BadInput(
            f"{files[-1]} has no {TASKS[task].metric} of {name}; its lm-eval is another version than 0.4.13"
        )
    error = row.get(f"{metric}_stderr,{filtered}")
    spread = float(error) if isinstance(error, int | float) else math.nan
    n = int(said.get("n-samples", {}).get(name, {}).get("effective", 0))
    return Accuracy(task, float(row[TASKS[task].metric]), spread, n)
