"""What training taught: sentences like triggers, barred sentences, fixed and broken responses."""

from __future__ import annotations

import math

import pytest

from ipo_lib import stages
from ipo_lib.experiments import learned
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.records import Prompt, Rollout, Verdict
from ipo_lib.triggers import Trigger


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = str(tmp_path_factory.mktemp("learned"))
    return open_run("tiny", {"prompts.train_harmful.count": 12}, store)


def trigger(text: str) -> Trigger:
    return Trigger("t", text, 1, 0, None)


def test_similarity_is_of_the_text_alone() -> None:
    assert learned.similarity(" No, this is wrong. ", "no, this is WRONG.") == 1
    assert learned.similarity("No, this is wrong.", "No, that is wrong.") > learned.LIKE
    assert learned.similarity("Rain falls on the roofs.", "No, this is wrong.") < 0.5
    triggers = [trigger("No, this is wrong."), trigger("Stop.")]
    texts = ["Rain falls.", "No, this is wrong."]
    assert learned.nearest_similarities(texts, triggers)[1] == 1
    assert learned.nearest_similarities(["Rain falls."], []) == [0.0]


def test_sentences_count_traces_and_places(run: Run) -> None:
    prompts, detector, session = run.prompts("train_harmful"), run.detector([], []), run.session
    seen = stages.sample_and_judge(session, prompts, run.thinking, 2)
    texts = [stages.trace_texts(session, rollout) for rollout in seen.rollouts]
    sentence = next(of_trace[1] for of_trace in texts if len(of_trace) > 2)
    traits = learned.describe_traces(
        session, seen.prompts, seen.rollouts, [trigger(sentence)], detector
    )
    first = []
    for of_trace in texts:
        like = [learned.similarity(text, sentence) >= learned.LIKE for text in of_trace]
        if any(like):
            first.append(like.index(True))
    assert traits["traces with a trigger"] == len(first) / len(texts) > 0
    assert traits["index of the first trigger"] == pytest.approx(sum(first) / len(first))
    cues = 0
    for rollout in seen.rollouts:
        alone = stages.find_cues(session, seen.prompts, [rollout], detector)
        cues += alone[rollout.id] is not None
    assert traits["traces with a cue"] == cues / len(texts)
    nothing = learned.describe_traces(session, seen.prompts, seen.rollouts, [], detector)
    assert nothing["traces with a trigger"] == 0
    assert math.isnan(nothing["index of the first trigger"])


def test_barred_sentences_give_way_to_others_and_the_rest_stays(run: Run) -> None:
    session, sampling = run.session, run.profile.sampling
    seen = stages.sample_and_judge(session, run.prompts("train_harmful"), sampling, 2)
    texts = [stages.trace_texts(session, rollout) for rollout in seen.rollouts]
    triggers = [trigger(of_trace[1]) for of_trace in texts if len(of_trace) > 2][:3]

    def has_trigger(rollouts: list[Rollout]) -> list[bool]:
        flags = []
        for rollout in rollouts:
            of_trace = stages.trace_texts(session, rollout)
            nearest = learned.nearest_similarities(of_trace, triggers)
            flags.append(max(nearest, default=0.0) >= learned.LIKE)
        return flags

    def bar() -> list[Rollout]:
        return learned.bar_triggers(session, seen.prompts, seen.rollouts, triggers, sampling)

    barred, had_trigger = bar(), has_trigger(seen.rollouts)
    assert sum(has_trigger(barred)) < sum(had_trigger) / 2
    for before, after, had in zip(seen.rollouts, barred, had_trigger, strict=True):
        assert (before == after) is not had
        if had:
            cut = after.prefix_len
            assert after.token_ids[:cut] == before.token_ids[:cut] or after.prefix_len > 0
            assert after.prompt_id == before.prompt_id
    assert bar() == barred


def test_fixed_broken_and_by_category() -> None:
    def verdicts(labels: str) -> list[Verdict]:
        names = {"s": "safe", "u": "unsafe", "-": None}
        return [
            Verdict(str(number), "trace", "harm", names[letter], None, "", "j")
            for number, letter in enumerate(labels)
        ]

    changes = learned.count_changes(verdicts("uussu-"), verdicts("susus-"))
    assert changes == {"fixed": 2, "broken": 1, "still unsafe": 1, "still safe": 1}
    categories = {"a": "lamps", "b": "lamps", "c": ""}
    prompts = {key: Prompt(key, key, "x", True, kind) for key, kind in categories.items()}
    counts = {"a": (1, 2), "b": (2, 2), "c": (0, 2)}
    for least, last in ((1, "none"), (2, "others")):
        rates = learned.rates_by_category(prompts, counts, least)
        assert [(kind, rate.value, rate.n) for kind, rate in rates.items()] == [
            ("lamps", 0.75, 2),
            (last, 0.0, 1),
        ]
    assert list(learned.rates_by_category(prompts, counts)) == ["others"]
