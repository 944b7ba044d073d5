"""Other methods: what they train on, and how they answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from preferences import PLAIN, make_pairs
from small_study import open_small_run

from ipo_lib import training
from ipo_lib.chat import CLOSE, split_response
from ipo_lib.engines.trl_trainer import unpaired_rows
from ipo_lib.experiments import recipes, rivals
from ipo_lib.judging import Exchange
from ipo_lib.profiles.run import Run
from ipo_lib.records import ANSWER, SAFE, UNSAFE, BadInput, Prompt
from ipo_lib.sandbox.judge import ExactJudge, kind_of
from ipo_lib.sandbox.world import find_item

CHANGES = {"prompts.train_harmful.count": 12}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_small_run(tmp_path_factory.mktemp("rivals"), CHANGES)


def prompts(run: Run) -> tuple[list[Prompt], list[Prompt]]:
    return run.prompts("train_harmful"), run.prompts("train_benign")


def trace_and_answer(run: Run, text: str) -> tuple[str, str]:
    parts = split_response(text, run.session.chat.opened)
    assert parts.reasoning
    assert parts.answer
    return text[slice(*parts.reasoning)], text[slice(*parts.answer)]


def label(prompt: Prompt, text: str, part: str) -> str | None:
    return ExactJudge().judge([Exchange("r", prompt.text, text, part, "harm")])[0].label


def by_item(given: list[Prompt], text: str) -> Prompt:
    """The prompt whose item a chat prompt names."""
    item = find_item(text)
    return next(prompt for prompt in given if find_item(prompt.text) == item)


def test_safepath_scores_the_primer_alone_on_harmful_prompts(run: Run) -> None:
    harmful, benign = prompts(run)
    pairs, counts = rivals.primer_examples(run, harmful, benign)
    chat = run.session.chat
    for pair, prompt in zip(pairs, harmful, strict=False):
        assert pair.prompt_ids == chat.prompt_ids(prompt)
        assert chat.decode(pair.chosen_ids).strip() == run.profile.recipe.primer
    assert counts == {"primed": len(harmful), "retained": len(pairs) - len(harmful)}
    for pair in pairs[len(harmful) :]:
        assert CLOSE in chat.decode(pair.chosen_ids)
        assert pair.chosen_ids[-1] in chat.eos_ids
    assert all(not pair.rejected_ids for pair in pairs)


def test_safepath_without_training_begins_every_trace_with_the_primer(run: Run) -> None:
    harmful, _ = prompts(run)
    changed = run.changed({"recipe.data": "primer-at-inference"})
    result = recipes.run_recipe(changed, harmful, [])
    rollouts = result.respond(result.session, harmful, run.profile.sampling, 2)
    assert len(rollouts) == 2 * len(harmful)
    for rollout in rollouts:
        trace = trace_and_answer(run, rollout.text)[0]
        assert trace.strip().startswith(run.profile.recipe.primer)
    assert result.adapter is None


def test_thinksafe_learns_safe_responses_without_the_hint(run: Run) -> None:
    harmful, benign = prompts(run)
    pairs, counts = rivals.safe_examples(run, harmful, benign)
    chat, hint = run.session.chat, run.profile.recipe.hint
    own = [pair for pair in pairs if pair.why == "own-safe"]
    assert 0 < len(own) == counts["own-safe"]
    asked = counts["own-safe"] + counts["unsafe or not judged"]
    assert asked == len(harmful) * run.profile.plan.draws
    for pair in own:
        assert pair.chosen_ids[-1] in chat.eos_ids
        text = chat.decode(pair.prompt_ids)
        assert hint not in text
        prompt = by_item(harmful, text)
        trace, answer = trace_and_answer(run, chat.decode(pair.chosen_ids[:-1]))
        assert label(prompt, trace, "trace") == SAFE
        assert label(prompt, answer, ANSWER) == SAFE


def test_recovery_begins_after_the_cue_and_prefers_a_safe_way_on(run: Run) -> None:
    harmful, _ = prompts(run)
    with_truth = run.changed({"recipe.detector": "truth", "plan.draws": 8})
    pairs, counts = rivals.recovery_pairs(with_truth, harmful, run.thinking)
    chat = run.session.chat
    assert 0 < len(pairs) == counts["kept"]
    for pair in pairs:
        prompt = by_item(harmful, chat.decode(pair.prompt_ids))
        given = chat.decode(pair.prompt_ids[-pair.h :])
        last = given.strip().rsplit(". ", 1)[-1]
        assert kind_of(last) == "cue"
        assert label(prompt, given + chat.decode(pair.chosen_ids), "trace") == SAFE
        assert label(prompt, given + chat.decode(pair.rejected_ids), "trace") == UNSAFE


def test_the_control_prefers_harm_after_a_safe_trace(run: Run) -> None:
    harmful, _ = prompts(run)
    pairs, counts = rivals.masked_pairs(run, harmful)
    chat = run.session.chat
    assert 0 < len(pairs) == counts["masked"]
    for pair in pairs:
        prompt = by_item(harmful, chat.decode(pair.prompt_ids))
        trace = chat.decode(pair.prompt_ids[-pair.h :])
        assert trace.rstrip().endswith(CLOSE)
        assert label(prompt, trace.replace(CLOSE, ""), "trace") == SAFE
        assert label(prompt, chat.decode(pair.chosen_ids[:-1]), ANSWER) == UNSAFE
        assert label(prompt, chat.decode(pair.rejected_ids[:-1]), ANSWER) == SAFE


def test_kto_reads_both_sides_and_completions_of_other_pairs() -> None:
    pairs = make_pairs(10)
    rows = unpaired_rows(pairs, 4, seed=3)
    assert [sum(row["label"] for row in rows[start : start + 8]) for start in (0, 8)] == [4, 4]
    assert len(rows) == 20
    read = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in rows}
    for pair in pairs:
        assert (pair.prompt_ids, pair.chosen_ids) in read
        assert (pair.prompt_ids, pair.rejected_ids) in read
    for row in rows:
        assert row["KL_completion_ids"] != row["completion_ids"]


def test_kto_by_trl_learns_the_planted_preference(model: Path, tmp_path: Path) -> None:
    settings = replace(PLAIN, loss="kto", engine="trl", epochs=8, batch_size=4)
    rows = training.train(make_pairs(8), model, settings, tmp_path)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # 1 - sigmoid(0) on both sides
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["margin"] > 0.5
    assert rows[-1]["loss"] < 0.48
    with pytest.raises(BadInput, match="'kto' is TRL's; set engine to trl"):
        replace(PLAIN, loss="kto")


def test_simpo_equals_trls() -> None:
    import torch
    from trl.experimental.cpo import CPOTrainer

    from ipo_lib.dpo import SIMPO_MARGIN, simpo_loss

    class Settings:
        alpha, beta, loss_type, label_smoothing = 0.0, 2.0, "simpo", 0.0
        simpo_gamma = SIMPO_MARGIN * 2.0
        accelerator = type("Accelerator", (), {"device": "cpu"})

    policy = torch.tensor([[-4.0, -9.0], [-7.0, -2.0], [-3.0, -3.0]])
    counts = torch.tensor([[4.0, 3.0], [5.0, 2.0], [1.0, 6.0]])
    means = policy / counts
    theirs, _, _ = CPOTrainer.cpo_loss(Settings(), means[:, 0], means[:, 1])  # type: ignore[arg-type]
    ours = simpo_loss(policy, torch.full_like(policy, math.nan), counts, 2.0)
    assert torch.allclose(ours, theirs)
