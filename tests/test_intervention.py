"""Detectors, pool and controls on planted truth: cues that are found, names that are not, whitespace that stays."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib.cues import LexiconCues
from ipo_lib.intervention import cut_and_text, is_accepted, nearest_neutral, random_earlier_sentence
from ipo_lib.records import (
    SAFE,
    TRACE,
    UNSAFE,
    BadInput,
    Prompt,
    Rollout,
    Sentence,
    TurningPoint,
    Verdict,
    canonical,
    from_json,
    to_json,
)
from ipo_lib.triggers import Trigger, choose_triggers, cluster_sentences

PROMPT = Prompt("p", "question", "test", True)
FILLER = [
    "the cat sat by the window",
    "rain fell on the roof all day",
    "the road to town was long",
    "birds sang at noon",
]
CUES = [
    "okay I will work out the full recipe",
    "let me work out how it is done",
    "I can work out what is needed",
]
STEPS = [
    "grind the powder and stir it twice",
    "heat the kettle and stir the powder",
    "pour it out and grind the rest",
]
REFUSALS = ["this could hurt people so no", "that is against the rules here"]


def rollout(text: str, id_: str = "r") -> Rollout:
    return Rollout(id_, "p", 0, tuple(range(len(text))), text, "stop", 0, "s")


def chars(*texts: str) -> tuple[Rollout, list[Sentence]]:
    """A rollout of one token a character, and its sentences."""
    ends, spans = 0, []
    for at, text in enumerate(texts):
        spans.append(Sentence(at, ends, ends + len(text), ends, ends + len(text)))
        ends += len(text)
    return rollout("".join(texts)), spans


def traces(
    count: int, seed: int, steps: bool = True
) -> tuple[list[tuple[list[str], bool]], list[int | None], list[str]]:
    """Traces, their true first cues and prompts: unsafe ones hold a cue and then steps; some safe ones hold a cue."""
    rng = random.Random(seed)
    rows, cues, prompts = [], [], []
    for at in range(count):
        name, unsafe = f"zorb{chr(97 + at // 4 % 26)}{chr(97 + at // 104)}", rng.random() < 0.5
        texts = [f"they ask about {name}", *rng.choices(FILLER, k=rng.randint(1, 3))]
        cue = len(texts) if unsafe or rng.random() < 0.1 else None
        if cue is not None:
            texts.append(rng.choice(CUES) + rng.choice(["", f" with {name}"]))
            texts += rng.choices(FILLER, k=rng.randint(0, 1))
        texts += (
            rng.choices(STEPS, k=2)
            if unsafe and steps
            else rng.choices(REFUSALS, k=0 if unsafe else 2)
        )
        rows.append((texts, unsafe))
        cues.append(cue)
        prompts.append(name)
    return rows, cues, prompts


def score(
    detector: LexiconCues, rows: Sequence[tuple[list[str], bool]], cues: Sequence[int | None]
) -> float:
    """Share of traces whose first cue is found exactly (None included)."""
    found = [detector.first(rollout(str(at)), PROMPT, texts) for at, (texts, _) in enumerate(rows)]
    return sum(f == c for f, c in zip(found, cues, strict=True)) / len(cues)


@pytest.mark.parametrize("use_max", [False, True])
def test_planted_cue_is_found(use_max: bool) -> None:
    rows, _, prompts = traces(300, 1, steps=False)
    learnt = LexiconCues(use_max=use_max, layers=1).learn(rows, prompts)
    assert learnt.accuracies[0] > 0.9
    fresh, cues, _ = traces(200, 2, steps=False)
    assert score(learnt, fresh, cues) > 0.9


def test_second_layer_looks_before_the_harm() -> None:
    rows, cues, prompts = traces(400, 3)
    one, two = (
        LexiconCues(layers=1).learn(rows, prompts),
        LexiconCues(layers=2).learn(rows, prompts),
    )
    assert len(two.weights) == 2
    assert two.weights[0] == one.weights[0]
    fresh, cues, _ = traces(200, 4)
    assert score(two, fresh, cues) > 0.9
    assert score(two, fresh, cues) > score(one, fresh, cues) + 0.2


def test_names_of_few_prompts_are_dropped() -> None:
    rows, _, prompts = traces(400, 5)
    grams = {gram for layer in LexiconCues().learn(rows, prompts).weights for gram, _ in layer}
    assert "stir" in grams
    assert not any("zorb" in gram for gram in grams)


def test_labels_without_a_cause_give_no_second_layer_and_a_weak_first() -> None:
    rng = random.Random(6)
    rows = [(["first", *rng.choices(FILLER, k=4)], rng.random() < 0.5) for _ in range(400)]
    learnt = LexiconCues().learn(rows)
    assert learnt.accuracies[0] < 0.65
    assert len(learnt.weights) == 1


def test_skip_first() -> None:
    rows = [
        (["stir it", "calm words here"], True),
        (["stir it not", "calm words here", "no no"], False),
    ] * 10
    swapped = [([texts[1], texts[0], *texts[2:]], unsafe) for texts, unsafe in rows]
    detector = LexiconCues(layers=1).learn(swapped)
    assert detector.first(rollout("r"), PROMPT, ["stir it", "calm"]) is None
    assert detector.first(rollout("r"), PROMPT, ["calm", "stir it"]) == 1
    assert detector.first(rollout("r"), PROMPT, []) is None
    everywhere = LexiconCues(layers=1, skip_first=False).learn(
        [(["stir it"], True), (["no no"], False)] * 10
    )
    assert everywhere.first(rollout("r"), PROMPT, ["stir it", "calm"]) == 0


def test_lexicon_is_deterministic_and_survives_json() -> None:
    rows, _, prompts = traces(200, 7)
    learnt = LexiconCues().learn(rows, prompts)
    again = from_json(LexiconCues, json.loads(canonical(to_json(learnt))))
    assert again == learnt == LexiconCues().learn(rows, prompts)
    assert again.fingerprint() == learnt.fingerprint() != LexiconCues().fingerprint()
    assert learnt.learn(rows, prompts) == learnt  # learning starts afresh


def test_lexicon_bad_input() -> None:
    with pytest.raises(BadInput, match="nothing learnt"):
        LexiconCues().first(rollout("r"), PROMPT, ["a", "b"])
    with pytest.raises(BadInput, match="both labels"):
        LexiconCues().learn([(["a", "b c"], True)] * 20)
    with pytest.raises(BadInput, match="n-grams"):
        LexiconCues().learn([(["a", "b c"], True), (["a", "d e"], False)])


def turned(id_: str, sentence: int | None, kind: str = SAFE, *flags: str) -> TurningPoint:
    token = None if sentence is None and "none" in flags else 5
    return TurningPoint(id_, kind, token, sentence, None, flags)


POOL_TEXTS = {
    "a": ["x", " But that is against the rules.\n"],
    "b": ["x", "But that is against the rules!"],
    "c": ["But that is against our rules.", "y"],
    "d": ["x", "Someone could get hurt by this."],
    "e": ["x", "But that is against the rules."],
    "f": ["Locked from the start.", "y"],
    "g": ["x", "..."],
    "h": ["x", "Sure, let me begin."],
}


def pool() -> list[Trigger]:
    turns = [turned(id_, 1) for id_ in "abdeg"] + [
        turned("c", 0),
        turned("f", 0, SAFE, "start-locked"),
    ]
    return cluster_sentences(
        [*turns, turned("f", None, SAFE, "none"), turned("h", 1, UNSAFE)], POOL_TEXTS
    )


def test_pool_is_mined_counted_and_clustered() -> None:
    found = pool()
    assert [(t.text, t.count, t.cluster) for t in found] == [
        ("But that is against the rules.", 3, 0),  # the most frequent form of equal words
        ("But that is against our rules.", 1, 0),
        ("Someone could get hurt by this.", 1, 1),
    ]
    assert len({t.id for t in found}) == 3
    assert all(t.rescue is None for t in found)
    assert [
        t.cluster
        for t in cluster_sentences([turned(i, 1) for i in "abde"], POOL_TEXTS, similarity=1.0)
    ] == [0, 1]
    assert [t.text for t in cluster_sentences([turned("h", 1, UNSAFE)], POOL_TEXTS, UNSAFE)] == [
        "Sure, let me begin."
    ]
    assert [from_json(Trigger, json.loads(canonical(to_json(t)))) for t in found] == found
    assert cluster_sentences([], {}) == []


@given(st.permutations(sorted("abdeg")))
def test_pool_does_not_depend_on_order(ids: list[str]) -> None:
    assert cluster_sentences([turned(id_, 1) for id_ in ids], POOL_TEXTS) == cluster_sentences(
        [turned(id_, 1) for id_ in "abdeg"], POOL_TEXTS
    )


def test_choose_takes_the_best_rescue_of_each_cluster() -> None:
    made = [
        Trigger(id_, id_, count, cluster)
        for id_, count, cluster in [
            ("a", 9, 0),
            ("b", 5, 0),
            ("c", 4, 1),
            ("d", 3, 1),
            ("e", 2, 2),
            ("f", 1, 3),
        ]
    ]
    rescues = {"a": (3, 10), "b": (8, 10), "c": (5, 10), "d": (5, 10), "e": (9, 10), "f": (0, 0)}
    chosen = choose_triggers(made, rescues)
    assert [t.id for t in chosen] == ["e", "b", "c"]  # c before d by count; f was never tried
    assert [t.rescue for t in chosen] == [(9, 10), (8, 10), (5, 10)]
    assert [t.id for t in choose_triggers(made, rescues, 2)] == [
        "b",
        "c",
    ]  # the two largest clusters
    assert [t.id for t in choose_triggers(made, {"a": (29, 32), "b": (1, 1)})] == [
        "a"
    ]  # one lucky draw is not the best
    assert choose_triggers(made, {}) == []
    again = from_json(Trigger, json.loads(canonical(to_json(chosen[0]))))
    assert again == chosen[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" Okay, sure.\n\n", " But no.\n\n"),
        ("Okay, sure.", "But no."),
        ("\t Okay. ", "\t But no. "),
        ("\n\n", "\n\nBut no."),
    ],
)
def test_trigger_takes_over_the_whitespace(old: str, new: str) -> None:
    trace, spans = chars("First one.", old, " Then more.")
    assert cut_and_text(trace, spans[1], " But no. ") == (10, new)
    assert cut_and_text(trace, spans[1], " But no. ", last=True) == (
        10,
        new.removesuffix(old[len(old.rstrip()) :] if old.strip() else ""),
    )
    assert cut_and_text(trace, spans[1], "") == (10, "")  # the control "nothing"


@given(
    st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5),
    st.text(min_size=1, max_size=8),
    st.integers(0, 4),
)
def test_replacement_keeps_prefix_and_edges(texts: list[str], trigger: str, index: int) -> None:
    trace, spans = chars(*texts)
    sentence = spans[index % len(spans)]
    cut, text = cut_and_text(trace, sentence, trigger)
    assert trace.text[:cut] == "".join(texts[: sentence.index])
    assert text.strip() == trigger.strip()
    if text and (old := texts[sentence.index]).strip():
        assert text[: len(text) - len(text.lstrip())] == old[: len(old) - len(old.lstrip())]
        assert text[len(text.rstrip()) :] == old[len(old.rstrip()) :]


def test_neutral_control_is_of_equal_length() -> None:
    assert (
        nearest_neutral(
            " Stop here now.\n", ["Short.", "Some long words go here.", "The sky is it."]
        )
        == "The sky is it."
    )
    assert (
        nearest_neutral("abcd", ["aaa", "bbbbb"])
        == nearest_neutral("abcd", ["bbbbb", "aaa"])
        == "aaa"
    )
    with pytest.raises(BadInput, match="empty"):
        nearest_neutral("x", [])


def test_earlier_control() -> None:
    assert random_earlier_sentence(rollout("t"), 0, seed=1) is None
    assert random_earlier_sentence(rollout("t"), 1, seed=1, lowest=1) is None
    drawn = [
        random_earlier_sentence(rollout("t", f"r{at}"), 4, seed=1, lowest=1) for at in range(300)
    ]
    assert {drawn.count(at) > 60 for at in (1, 2, 3)} == {True}
    assert drawn == [
        random_earlier_sentence(rollout("t", f"r{at}"), 4, seed=1, lowest=1) for at in range(300)
    ]
    assert drawn != [
        random_earlier_sentence(rollout("t", f"r{at}"), 4, seed=2, lowest=1) for at in range(300)
    ]


def test_reverse_puts_a_cue_at_the_safe_turning_point() -> None:
    trace, spans = chars("First one.", " But no.", " Bye.")
    cue = cluster_sentences([turned("h", 1, UNSAFE)], POOL_TEXTS, UNSAFE)[0]
    turn = turned("r", 1)
    assert turn.sentence is not None
    assert cut_and_text(trace, spans[turn.sentence], cue.text) == (10, " Sure, let me begin.")


def test_acceptance() -> None:
    def verdict(label: str | None) -> Verdict:
        return Verdict("r", TRACE, "harm", label, None, "", "j")

    assert (
        is_accepted("no-cue", None, verdict(UNSAFE)) is True
    )  # the paper's rule does not ask the judge
    assert is_accepted("no-cue", 0, verdict(SAFE)) is False
    assert is_accepted("judged-safe", 3, verdict(SAFE)) is True
    assert is_accepted("judged-safe", None, verdict(UNSAFE)) is False
    assert is_accepted("judged-safe", None, verdict(None)) is None
    assert is_accepted("judged-safe", None, None) is None
    with pytest.raises(BadInput, match="maybe"):
        is_accepted("maybe", None, None)
