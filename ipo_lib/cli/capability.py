"""Capability beside safety (Table 2, right side): lm-eval's command line for a profile's model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput


@dataclass(frozen=True)
class Task:
    """A task of lm-eval."""

    name: str  # there
    runs_code: bool = False  # it executes code that the model writes
    tokens: int = 0  # that a reasoning model may need; 0: not known to be many


TASKS = {
    "math-500": Task("minerva_math500"),  # read math_verify
    "gsm8k": Task("gsm8k_cot_zeroshot"),  # read exact_match, flexible-extract
    "aime-2024": Task("aime24", tokens=32_768),
    "gpqa-diamond": Task("gpqa_diamond_cot_zeroshot"),  # gated: Idavidrein/gpqa
    "humaneval": Task("humaneval_instruct", runs_code=True),
}
ALLOW_CODE = "--confirm_run_unsafe_code"
THINK_END = "</think>"


def lm_eval_command(
    settings: Profile,
    folder: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    adapter: Path | None = None,
    limit: int = 0,
    run_code: bool = False,
) -> list[str]:
    """The call of lm-eval for some tasks.

    Args:
        settings: the profile; its sampling is used.
        folder: of the model.
        tasks: names of TASKS.
        output: folder for lm-eval's results and samples.
        adapter: folder of a trained adapter.
        limit: problems of each task; 0: all.
        run_code: whether tasks may execute code that the model writes.

    Raises:
        BadInput: a task is unknown, or executes code without being allowed to.
    """
    for task in tasks:
        if task not in TASKS:
            raise BadInput(f"capability task {task!r} is unknown; choose of {', '.join(TASKS)}")
        if TASKS[task].runs_code and not run_code:
            raise BadInput(
                f"{task} executes code that the model writes; use a sandbox, then say --run-code"
            )
    model: dict[str, Any] = {"pretrained": folder, "think_end_token": THINK_END}
    if adapter:
        model["peft"] = adapter
    if settings.model.dtype != "auto":
        model["dtype"] = settings.model.dtype
    sampling = settings.sampling
    generation = {
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_gen_toks": sampling.max_tokens,
    }
    options = {
        "--model": "hf",
        "--model_args": _joined(model),
        "--tasks": ",".join(TASKS[task].name for task in tasks),
        "--gen_kwargs": _joined(generation),
        "--output_path": str(output),
        "--batch_size": "auto",
        "--seed": str(settings.seed),
    }
    if limit:
        options["--limit"] = str(limit)
    command = [sys.executable, "-m", "lm_eval", "run", "--apply_chat_template", "--log_samples"]
    for name, value in options.items():
        command += [name, value]
    runs_code = any(TASKS[task].runs_code for task in tasks)
    return [*command, ALLOW_CODE] if runs_code else command


def _joined(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


def length_warnings(settings: Profile, tasks: Sequence[str]) -> Iterator[str]:
    """A warning for each task whose thinking the profile's limit cuts off."""
    limit = settings.sampling.max_tokens
    for task in tasks:
        needed = TASKS[task].tokens
        if limit < needed:
            yield (
                f"{task}: sampling.max_tokens is {limit:,}, long thinking needs {needed:,}; what "
                "is cut off counts as wrong, so that the accuracy is too low: "
                f"-p sampling.max_tokens={needed}"
            )


def run_lm_eval(command: Sequence[str]) -> None:
    """Print the command and run it; lm-eval prints its own table of results.

    Raises:
        BadInput: lm-eval is missing, or it failed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput('capability needs lm-eval; run pip install -e ".[eval]"')
    print(*command, flush=True)
    code = {"HF_ALLOW_CODE_EVAL": "1"} if ALLOW_CODE in command else {}
    finished = subprocess.run(list(command), env={**os.environ, **code}, check=False)
    if finished.returncode:
        raise BadInput(f"lm-eval ended with code {finished.returncode}; its own message is above")
