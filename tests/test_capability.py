"""Capability by lm-eval: what is asked, that code needs leave, and how results are read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ipo_lib.cli import capability
from ipo_lib.profiles.reading import read_profile
from ipo_lib.records import BadInput


def asked(task: str, **more: object) -> list[str]:
    return capability.command(read_profile("ds-8b"), Path("/m"), task, Path("/o"), **more)  # type: ignore[arg-type]


def test_the_call_has_the_model_the_adapter_and_the_profile_s_sampling() -> None:
    found = asked("math-500", adapter=Path("/a"), limit=5)
    text = " ".join(found[1:])
    assert text.startswith(
        "-m lm_eval run --model hf --model_args pretrained=/m,think_end_token=</think>,peft=/a"
    )
    assert "--tasks minerva_math500 " in text
    assert (
        "--gen_kwargs do_sample=True,temperature=0.6,top_p=0.95,max_gen_toks=8192 --apply_chat_template"
        in text
    )
    assert text.endswith("--limit 5")
    assert capability.CODE not in found


def test_code_of_a_model_runs_only_with_leave() -> None:
    with pytest.raises(
        BadInput,
        match=r"humaneval executes code that the model writes; use a sandbox, then say --run-code",
    ):
        asked("humaneval")
    assert asked("humaneval", run_code=True)[-1] == capability.CODE
    with pytest.raises(BadInput, match="'chess' is unknown; choose of math-500"):
        asked("chess")


def test_results_are_read_by_their_own_metric(tmp_path: Path) -> None:
    row = {
        "alias": "gsm8k",
        "exact_match,flexible-extract": 0.75,
        "exact_match_stderr,flexible-extract": 0.02,
        "exact_match,strict-match": 0.1,
    }
    said = {
        "results": {"gsm8k_cot_zeroshot": row},
        "n-samples": {"gsm8k_cot_zeroshot": {"original": 1319, "effective": 100}},
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m/results_2026.json").write_text(json.dumps(said))
    assert capability.result("gsm8k", tmp_path) == capability.Accuracy("gsm8k", 0.75, 0.02, 100)
    assert (
        capability.measure("gsm8k", ["false"], tmp_path, {}).value == 0.75
    )  # measured before: read, not run
    with pytest.raises(
        BadInput,
        match=r"has no math_verify,none of minerva_math500; its lm-eval is another version",
    ):
        capability.result("math-500", tmp_path)
    with pytest.raises(BadInput, match="holds no results of lm-eval"):
        capability.result("gsm8k", tmp_path / "empty")


def test_without_lm_eval_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install -e "\.\[eval\]"'):
        capability.measure("gsm8k", ["true"], tmp_path, {})


def test_every_task_is_one_of_lm_eval_s() -> None:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip('needs lm-eval: pip install -e ".[eval]"')
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    declared = "\n".join(path.read_text("utf-8", "replace") for path in folder.rglob("*.yaml"))
    for one in capability.TASKS.values():
        assert f"task: {one.name}\n" in declared, one.name


def test_a_limit_that_cuts_off_long_thinking_is_said() -> None:
    said = capability.too_short(read_profile("ds-8b"), "aime-2024")
    assert "sampling.max_tokens is 8,192, long thinking needs 32,768" in said
    assert said.endswith("-p sampling.max_tokens=32768")
    assert (
        capability.too_short(read_profile("ds-8b", {"sampling.max_tokens": 32_768}), "aime-2024")
        == ""
    )
    assert capability.too_short(read_profile("ds-8b"), "gsm8k") == ""
