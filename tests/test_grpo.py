"""GRPO through TRL: our prompt ids, our stop ids, our judge's rewards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipo_lib.dpo import DpoSettings
from ipo_lib.experiments import grpo
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.profiles.settings import GrpoSettings
from ipo_lib.records import BadInput
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Prefix, judge, sample

LORA = DpoSettings(dtype="float32", use_cpu=True, rank=4)
SETTINGS = GrpoSettings(
    reward="I[z]", budget=2500, batch_size=16, accumulation=1, learning_rate=1e-3
)
SAMPLING = Sampling(max_tokens=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(
        "tiny", {"prompts.train_harmful.count": 4}, str(tmp_path_factory.mktemp("grpo"))
    )


def test_rewards_are_their_formulas(run: Run) -> None:
    prompts = run.prompts("train_harmful")
    rollouts = sample(run.session, [Prefix(prompt) for prompt in prompts], SAMPLING, 6)
    named = {prompt.id: prompt for prompt in prompts}
    z, y = (
        [v.label == "safe" for v in judge(run.session, named, rollouts, part)]
        for part in ("trace", "answer")
    )
    assert {(a, b) for a, b in zip(z, y, strict=True)} >= {
        (True, True),
        (False, False),
        (False, True),
    }
    sums = {"I[z]": (1, 0), "I[y]": (0, 1), "I[z]+I[y]": (1, 1), "I[z]-I[y]": (1, -1)}
    asked, ids = [named[one.prompt_id] for one in rollouts], [one.token_ids for one in rollouts]
    for reward, (p, q) in sums.items():
        expected = [p * a + q * b for a, b in zip(z, y, strict=True)]
        ended = [True] * len(ids)
        assert (
            grpo.rewards(run.session, asked, ids, ended, replace(SETTINGS, reward=reward))
            == expected
        )
    cut = [rollouts[0].token_ids[:3]]  # no trace was closed, no answer begun: nothing to reward
    first = [named[rollouts[0].prompt_id]]
    for reward in sums:
        assert grpo.rewards(run.session, first, cut, [False], replace(SETTINGS, reward=reward)) == [
            0.0
        ]


def test_a_response_that_was_cut_off_earns_nothing(run: Run) -> None:
    """A model that is rewarded for a trace with no harm in it yet learns to write without end."""
    prompts = run.prompts("train_harmful")
    rollouts = sample(run.session, [Prefix(prompt) for prompt in prompts], SAMPLING, 6)
    named = {prompt.id: prompt for prompt in prompts}
    answers = judge(run.session, named, rollouts, "answer")
    one = next(r for r, v in zip(rollouts, answers, strict=True) if v.label == "safe")
    asked, settings = [named[one.prompt_id]], replace(SETTINGS, reward="I[y]")
    assert grpo.rewards(run.session, asked, [one.token_ids], [True], settings) == [1.0]
    assert grpo.rewards(run.session, asked, [one.token_ids], [False], settings) == [0.0]


def test_trl_is_given_our_prompt_ids_and_ends(run: Run, tmp_path: Path) -> None:
    prompts = run.prompts("train_harmful")
    made = grpo.trainer(run.session, prompts, run.folder, LORA, SETTINGS, SAMPLING, tmp_path, None)
    ids, images, fields = made._tokenize_prompts([prompt.id for prompt in prompts])
    assert [tuple(one) for one in ids] == [
        run.session.chat.prompt_ids(prompt) for prompt in prompts
    ]
    assert (images, fields) == (None, {})
    assert made.generation_config.eos_token_id == [*run.session.chat.eos_ids]
    assert (
        made.generation_config.temperature,
        made.generation_config.top_p,
        made.generation_config.top_k,
    ) == (0.6, 0.95, 0)
    assert made.args.loss_type == "grpo"
    assert made.args.lr_scheduler_type == "constant"


def test_training_ends_with_its_budget_and_moves_only_the_adapter(run: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    prompts = run.prompts("train_harmful")
    rows = grpo.train(run.session, prompts, run.folder, LORA, SETTINGS, SAMPLING, tmp_path / "one")
    assert rows[-1]["tokens"] >= SETTINGS.budget > rows[-2]["tokens"]
    assert all(0 <= row["reward"] <= 1 for row in rows)
    assert len({row["reward"] for row in rows}) > 1
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "training.json",
    }
    summary = json.loads((tmp_path / "one" / "training.json").read_text())
    assert summary["generated"] == rows[-1]["tokens"]
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    more = grpo.train(
        run.session,
        prompts,
        run.folder,
        LORA,
        replace(SETTINGS, budget=1),
        SAMPLING,
        tmp_path / "two",
        adapter=tmp_path / "one",
    )
    assert len(more) == 1
    again = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert not all(torch.equal(weights[name], again[name]) for name in weights)
    drift = max(float((weights[name] - again[name]).abs().max()) for name in weights)
    assert drift < 0.01  # one step from there, not from fresh LoRA


def test_bad_settings_are_one_line(run: Run, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"reward": "I[w]"}, "unknown"),
        ({"batch_size": 12}, "groups of 8"),
        ({"learning_rate": 0}, "above 0"),
    ]
    for changes, said in cases:
        with pytest.raises(BadInput, match=said):
            replace(SETTINGS, **changes)
    with pytest.raises(BadInput, match="budget 0"):
        grpo.train(
            run.session, [], run.folder, LORA, replace(SETTINGS, budget=0), SAMPLING, tmp_path
        )
