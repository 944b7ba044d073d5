"""Sentences put in and the model's own: what is compared, and of which kind a sentence is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_study import open_small_run

import ipo_lib as ipo
from ipo_lib.experiments import on_policy, replacements
from ipo_lib.profiles.run import Run
from ipo_lib.records import UNSAFE
from ipo_lib.stages import trace_sentences, trace_texts
from ipo_lib.triggers import Trigger


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_small_run(tmp_path_factory.mktemp("on-policy"), {"prompts.train_harmful.count": 8})


@pytest.fixture(scope="module")
def continued(run: Run) -> list[on_policy.Continued]:
    judged = ipo.sample_and_judge(run.session, run.prompts("train_harmful"), run.thinking, 4)
    truth = run.truth()
    assert truth
    cues = ipo.find_cues(run.session, judged.prompts, judged.rollouts, truth)
    losers = replacements.unsafe_with_cue(judged, cues, 1)
    triggers = run.triggers({}, [], [], truth)
    return on_policy.continue_before_cues(
        run, judged.prompts, losers, cues, triggers, truth, draws=24
    )


def test_both_begin_with_the_trace_before_its_cue(
    run: Run, continued: list[on_policy.Continued]
) -> None:
    sources = {one.source for one in continued}
    assert sources == {on_policy.OWN, on_policy.SWAPPED}
    for one in continued:
        cut = trace_sentences(run.session, one.loser)[one.sentence].token_start
        assert one.rollout.token_ids[:cut] == one.loser.token_ids[:cut]
        own = one.source == on_policy.OWN
        assert (one.rollout.prefix_len == cut) == own


def test_each_trace_has_draws_of_its_own(run: Run) -> None:
    """Traces with one beginning, and those with the cue first, are drawn apart and anew."""
    judged = ipo.sample_and_judge(run.session, run.prompts("train_harmful"), run.thinking, 4)
    unsafe = judged.labelled(UNSAFE)[0]
    losers = [unsafe, replace(unsafe, id="its twin")]
    truth = run.truth()
    assert truth
    triggers = run.triggers({}, [], [], truth)
    for at in (0, 1):
        cues = {loser.id: at for loser in losers}
        both = on_policy.continue_before_cues(
            run, judged.prompts, losers, cues, triggers, truth, draws=6
        )
        drawn = [one.rollout.id for one in both]
        assert len(set(drawn)) == len(drawn) > 2 * 6
        assert not set(drawn) & {rollout.id for rollout in judged.rollouts}


def test_what_was_put_in_is_what_is_counted(run: Run, continued: list[on_policy.Continued]) -> None:
    triggers = {trigger.text for trigger in run.triggers({}, [], [], run.detector([], []))}
    put_in = [one for one in continued if one.source == on_policy.SWAPPED]
    kinds = {one.kind for one in put_in}
    assert kinds == {on_policy.TRIGGER, on_policy.NEUTRAL}
    for one in put_in:
        text = trace_texts(run.session, one.rollout)[one.sentence].strip()
        known = triggers if one.kind == on_policy.TRIGGER else set(run.profile.neutral)
        assert text in known


def test_kinds_of_sentences() -> None:
    triggers = [Trigger("t", "The law does not allow this.", 0, 0, None)]
    neutral = [Trigger("n", "The lamps are lit early.", 0, 0, None)]

    def kind(text: str, is_cue: bool = False) -> str:
        return on_policy.kind_of_sentence(text, triggers, neutral, is_cue)

    assert kind("The law does not allow that.") == on_policy.TRIGGER
    assert kind("The lamps are lit early!") == on_policy.NEUTRAL
    assert kind("So I write it down.", is_cue=True) == on_policy.CUE
    assert kind("So I write it down.") == on_policy.OTHER


def test_effects_count_every_continuation_once(
    run: Run, continued: list[on_policy.Continued]
) -> None:
    prompts = {prompt.id: prompt for prompt in run.prompts("train_harmful")}
    table = on_policy.effects(run, prompts, continued)
    assert sum(effect.count for effect in table.values()) == len(continued)
    for (kind, source), effect in table.items():
        group = [one for one in continued if (one.kind, one.source) == (kind, source)]
        assert sum(n for _, n in effect.safe.values()) == len(group)
        assert sum(k for k, _ in effect.safe.values()) == sum(one.safe for one in group)
        assert effect.log_probability.value < 0
    # What the model writes itself it finds more likely than what is put in.
    own = max(
        effect.log_probability.value
        for (_, source), effect in table.items()
        if source == on_policy.OWN
    )
    put_in = table[on_policy.TRIGGER, on_policy.SWAPPED].log_probability.value
    assert own > put_in
    assert all(one.loser.prompt_id == one.rollout.prompt_id for one in continued)
    assert UNSAFE != on_policy.OWN
