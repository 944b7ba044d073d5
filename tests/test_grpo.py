"""GRPO through TRL: our prompt ids, our stop ids, our judge's rewards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import checkpoints
from ipo_lib.experiments import grpo
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.profiles.settings import GrpoSettings
from ipo_lib.records import ANSWER, SAFE, TRACE, BadInput, Rollout, by_id
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Prefix, judge, sample

LORA = DpoSettings(dtype="float32", use_cpu=True, rank=4)
SETTINGS = GrpoSettings(
    reward="I[z]", budget=4000, batch_size=16, accumulation=1, learning_rate=1e-3
)
SAMPLING = Sampling(max_tokens=256)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(
        "tiny", {"prompts.train_harmful.count": 4}, str(tmp_path_factory.mktemp("grpo"))
    )


def with_eos(run: Run, rollout: Rollout) -> list[int]:
    """The rollout's ids as TRL has them where the model ended the response."""
    return [*rollout.token_ids, run.session.chat.eos_ids[0]]


def rewarder(run: Run, reward: str) -> grpo.Rewarder:
    prompts = by_id(run.prompts("train_harmful"))
    return grpo.Rewarder(run.session, prompts, replace(SETTINGS, reward=reward))


@pytest.fixture(scope="module")
def rollouts(run: Run) -> list[Rollout]:
    prefixes = [Prefix(prompt) for prompt in run.prompts("train_harmful")]
    return sample(run.session, prefixes, SAMPLING, 6)


def safe(run: Run, rollouts: list[Rollout], part: str) -> list[bool]:
    prompts = by_id(run.prompts("train_harmful"))
    return [verdict.label == SAFE for verdict in judge(run.session, prompts, rollouts, part)]


def test_rewards_are_their_formulas(run: Run, rollouts: list[Rollout]) -> None:
    outcomes = list(zip(safe(run, rollouts, TRACE), safe(run, rollouts, ANSWER), strict=True))
    assert set(outcomes) >= {(True, True), (False, False), (False, True)}
    asked = [rollout.prompt_id for rollout in rollouts]
    responses = [with_eos(run, rollout) for rollout in rollouts]
    cut = rollouts[0].token_ids[:3]  # no trace was closed, no answer begun: nothing to reward
    weights = {"I[z]": (1, 0), "I[y]": (0, 1), "I[z]+I[y]": (1, 1), "I[z]-I[y]": (1, -1)}
    for reward, (trace, answer) in weights.items():
        expected = [trace * z + answer * y for z, y in outcomes]
        assert rewarder(run, reward)(asked, responses) == expected
        assert rewarder(run, reward)(asked[:1], [cut]) == [0.0]


def test_a_response_that_was_cut_off_earns_nothing(run: Run, rollouts: list[Rollout]) -> None:
    """A model that is rewarded for a trace with no harm in it yet learns to write without end."""
    rollout = rollouts[safe(run, rollouts, ANSWER).index(True)]
    reward = rewarder(run, "I[y]")
    assert reward([rollout.prompt_id], [with_eos(run, rollout)]) == [1.0]
    assert reward([rollout.prompt_id], [rollout.token_ids]) == [0.0]
    assert reward.generated == 2 * len(rollout.token_ids) + 1


class Killed(BaseException):
    """Stands for a signal: nothing in a training catches it."""


def test_a_killed_training_ends_as_one_that_was_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checkpoints.VARIABLE, "0")
    prompts = run.prompts("train_harmful")
    settings = replace(SETTINGS, batch_size=8, accumulation=2)

    def train(name: str) -> list[dict[str, float]]:
        out = tmp_path / name
        return grpo.train(run.session, prompts, run.folder, LORA, settings, SAMPLING, out)

    def kill(*_: Any) -> None:
        if list(tmp_path.glob(f"killed/*/{checkpoints.MARK}")):
            raise Killed

    rows = train("whole")
    assert len(rows) > 1
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "say", kill)
        with pytest.raises(Killed):
            train("killed")
    assert train("killed") == rows
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_trl_is_given_our_prompt_ids_and_ends(run: Run, tmp_path: Path) -> None:
    prompts, chat = run.prompts("train_harmful"), run.session.chat
    trainer = grpo.make_trainer(
        run.session, prompts, run.folder, LORA, SETTINGS, SAMPLING, tmp_path, None
    )
    ids, images, fields = trainer._tokenize_prompts([prompt.id for prompt in prompts])
    assert list(map(tuple, ids)) == [chat.prompt_ids(prompt) for prompt in prompts]
    assert (images, fields) == (None, {})
    config = trainer.generation_config
    assert config.eos_token_id == [*chat.eos_ids]
    assert (config.temperature, config.top_p, config.top_k) == (0.6, 0.95, 0)
    assert trainer.args.loss_type == "grpo"
    assert trainer.args.lr_scheduler_type == "constant"


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
    settings, start = replace(SETTINGS, budget=1), tmp_path / "one"
    more = grpo.train(
        run.session, prompts, run.folder, LORA, settings, SAMPLING, tmp_path / "two", adapter=start
    )
    assert len(more) == 1
    again = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert not all(torch.equal(weights[name], again[name]) for name in weights)
    drift = max(float((weights[name] - again[name]).abs().max()) for name in weights)
    assert drift < 0.01  # one step from there, not from fresh LoRA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "I[w]"}, "unknown"),
        ({"batch_size": 12}, "groups of 8"),
        ({"learning_rate": 0}, "above 0"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(SETTINGS, **changes)


def test_a_budget_of_0_is_refused(run: Run, tmp_path: Path) -> None:
    settings = replace(SETTINGS, budget=0)
    with pytest.raises(BadInput, match="budget 0"):
        grpo.train(run.session, [], run.folder, LORA, settings, SAMPLING, tmp_path)
