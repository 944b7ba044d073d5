"""What training taught: sentences like triggers, barred sentences, fixed and broken responses."""

from __future__ import annotations

import pytest

from ipo_lib import stages
from ipo_lib.experiments import learned
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.records import Prompt, Verdict
from ipo_lib.triggers import Trigger


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(
        "tiny", {"prompts.train_harmful.count": 12}, str(tmp_path_factory.mktemp("learned"))
    )


def trigger(text: str) -> Trigger:
    return Trigger("t", text, 1, 0, None)


def test_similarity_is_of_the_text_alone() -> None:
    assert learned.similarity(" No, this is wrong. ", "no, this is WRONG.") == 1
    assert learned.similarity("No, this is wrong.", "No, that is wrong.") > learned.LIKE
    assert learned.similarity("Rain falls on the roofs.", "No, this is wrong.") < 0.5
    assert (
        learned.nearest(
            ["Rain falls.", "No, this is wrong."], [trigger("No, this is wrong."), trigger("Stop.")]
        )[1]
        == 1
    )
    assert learned.nearest(["Rain falls."], []) == [0.0]


def test_sentences_count_traces_and_places(run: Run) -> None:
    prompts, detector = run.prompts("train_harmful"), run.detector([], [])
    seen = stages.sample_and_judge(run.session, prompts, run.thinking, 2)
    texts = [stages.trace_texts(run.session, one) for one in seen.rollouts]
    one = next(own[1] for own in texts if len(own) > 2)
    found = learned.sentences(run.session, seen.prompts, seen.rollouts, [trigger(one)], detector)
    like = [[learned.similarity(text, one) >= learned.LIKE for text in own] for own in texts]
    assert found["traces with a trigger"] == sum(map(any, like)) / len(texts) > 0
    assert found["index of the first trigger"] == pytest.approx(
        sum(own.index(True) for own in like if any(own)) / sum(map(any, like))
    )
    cued = [
        stages.find_cues(run.session, seen.prompts, [one], detector)[one.id] is not None
        for one in seen.rollouts
    ]
    assert found["traces with a cue"] == sum(cued) / len(cued)
    nothing = learned.sentences(run.session, seen.prompts, seen.rollouts, [], detector)
    assert nothing["traces with a trigger"] == 0
    assert (
        nothing["index of the first trigger"] != nothing["index of the first trigger"]
    )  # nan: there is none


def test_barred_sentences_give_way_to_others_and_the_rest_stays(run: Run) -> None:
    prompts = run.prompts("train_harmful")
    seen = stages.sample_and_judge(run.session, prompts, run.profile.sampling, 2)
    wanted = [
        own[1] for one in seen.rollouts if len(own := stages.trace_texts(run.session, one)) > 2
    ][:3]
    triggers = [trigger(text) for text in wanted]

    def like(rollouts: list[stages.Rollout]) -> list[bool]:
        near = [learned.nearest(stages.trace_texts(run.session, one), triggers) for one in rollouts]
        return [any(value >= learned.LIKE for value in own) for own in near]

    found = learned.barred(run.session, seen.prompts, seen.rollouts, triggers, run.profile.sampling)
    assert sum(like(found)) < sum(like(seen.rollouts)) / 2
    for before, after, had in zip(seen.rollouts, found, like(seen.rollouts), strict=True):
        assert (before == after) is not had
        if had:
            cut = after.prefix_len
            assert after.token_ids[:cut] == before.token_ids[:cut] or after.prefix_len > 0
            assert after.prompt_id == before.prompt_id
    assert (
        learned.barred(run.session, seen.prompts, seen.rollouts, triggers, run.profile.sampling)
        == found
    )


def test_fixed_broken_and_by_category() -> None:
    def verdicts(labels: str) -> list[Verdict]:
        names = {"s": "safe", "u": "unsafe", "-": None}
        return [
            Verdict(str(at), "trace", "harm", names[one], None, "", "j")
            for at, one in enumerate(labels)
        ]

    found = learned.changed(verdicts("uussu-"), verdicts("susus-"))
    assert found == {"fixed": 2, "broken": 1, "still unsafe": 1, "still safe": 1}
    prompts = {
        key: Prompt(key, key, "x", True, kind)
        for key, kind in (("a", "lamps"), ("b", "lamps"), ("c", ""))
    }
    counts = {"a": (1, 2), "b": (2, 2), "c": (0, 2)}
    for least, last in ((1, "none"), (2, "others")):
        rates = learned.by_category(prompts, counts, least)
        assert [(kind, rate.value, rate.n) for kind, rate in rates.items()] == [
            ("lamps", 0.75, 2),
            (last, 0.0, 1),
        ]
    assert list(learned.by_category(prompts, counts)) == ["others"]
