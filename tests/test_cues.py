"""Cue detectors on planted truth: cues are found, names of prompts are not."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from ipo_lib.cues import KeywordCues, LexiconCues, ngrams
from ipo_lib.records import BadInput, Prompt, Rollout, canonical, from_json, to_json

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


def traces(
    count: int, seed: int, steps: bool = True
) -> tuple[list[tuple[list[str], bool]], list[int | None], list[str]]:
    """Traces, their true first cues and prompts.

    Unsafe traces hold a cue and then steps; some safe traces hold a cue.
    """
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


def test_keywords_find_the_first_sentence_with_a_phrase() -> None:
    detector = KeywordCues(["sure", "I will"])
    assert detector.first(rollout("r"), PROMPT, ["Hm.", "SURE thing.", "i will."]) == 1
    assert detector.first(rollout("r"), PROMPT, ["Hm."]) is None
    assert detector.fingerprint()["toy"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("मैं नहीं करूँगा", ["मैं", "नहीं", "करूँगा"]),
        ("I can\u2019t, can't", ["can't", "i"]),
        ("Ｈｅｌｐ help", ["help"]),
        ("cafe\u0301 café", ["café"]),
        ("不行 12 kg", ["0", "kg", "不行"]),  # a number counts as 0
    ],
)
def test_words_of_any_script_are_whole(text: str, words: list[str]) -> None:
    assert sorted(ngrams(text, 1)) == sorted(words)
