"""Capability by lm-eval: what is asked, and that code runs only where it is allowed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from ipo_lib.cli import capability
from ipo_lib.profiles.reading import read_profile
from ipo_lib.records import BadInput


def command(*tasks: str, **options: object) -> list[str]:
    profile = read_profile("ds-8b")
    return capability.lm_eval_command(profile, Path("m"), tasks, Path("o"), **options)  # type: ignore[arg-type]


def test_the_call_has_the_model_the_adapter_and_the_profile_s_sampling() -> None:
    words = command("math-500", "gsm8k", adapter=Path("a"), limit=5)
    assert words[:4] == [sys.executable, "-m", "lm_eval", "run"]
    text = " ".join(words)
    assert " --model hf --model_args pretrained=m,think_end_token=</think>,peft=a" in text
    assert "--tasks minerva_math500,gsm8k_cot_zeroshot " in text
    sampling = "do_sample=True,temperature=0.6,top_p=0.95,max_gen_toks=8192"
    assert f"--gen_kwargs {sampling} " in text
    assert "--apply_chat_template" in words
    assert "--log_samples" in words
    assert "--output_path o " in text
    assert text.endswith("--limit 5")
    assert capability.ALLOW_CODE not in words


def test_code_of_a_model_runs_only_with_leave() -> None:
    with pytest.raises(
        BadInput,
        match=r"humaneval executes code that the model writes; use a sandbox, then say --run-code",
    ):
        command("gsm8k", "humaneval")
    assert command("humaneval", run_code=True)[-1] == capability.ALLOW_CODE
    assert capability.ALLOW_CODE not in command("gsm8k", run_code=True)
    with pytest.raises(BadInput, match="'chess' is unknown; choose of math-500"):
        command("chess")


def test_lm_eval_is_run_with_leave_for_code_in_its_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    script = "import os; print(os.environ.get('HF_ALLOW_CODE_EVAL'))"
    for words, seen in (([], "None"), ([capability.ALLOW_CODE], "1")):
        capability.run_lm_eval([sys.executable, "-c", script, *words])
        printed = capfd.readouterr().out.splitlines()
        assert printed[0].startswith(f"{sys.executable} -c")  # the command itself
        assert printed[-1] == seen
    with pytest.raises(BadInput, match="lm-eval ended with code 3; its own message is above"):
        capability.run_lm_eval([sys.executable, "-c", "raise SystemExit(3)"])


def test_without_lm_eval_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install -e "\.\[eval\]"'):
        capability.run_lm_eval(["true"])


def test_every_task_is_one_of_lm_eval_s() -> None:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip('needs lm-eval: pip install -e ".[eval]"')
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    files = [path.read_text("utf-8", "replace") for path in folder.rglob("*.yaml")]
    for task in capability.TASKS.values():
        assert any(f"task: {task.name}\n" in file for file in files), task.name


def test_a_limit_that_cuts_off_long_thinking_is_said() -> None:
    tasks = ["gsm8k", "aime-2024"]
    (warning,) = capability.length_warnings(read_profile("ds-8b"), tasks)
    assert "aime-2024: sampling.max_tokens is 8,192, long thinking needs 32,768" in warning
    assert warning.endswith("-p sampling.max_tokens=32768")
    longer = read_profile("ds-8b", {"sampling.max_tokens": 32_768})
    assert list(capability.length_warnings(longer, tasks)) == []
