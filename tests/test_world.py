"""The sandbox's world: its splits, its prompts, what it knows, and the causes in its traces."""

from __future__ import annotations

import math
import random

import pytest

from ipo_lib.records import BadInput, Prompt
from ipo_lib.sandbox import world
from ipo_lib.sandbox.traces import NULL_PROCESS, Process, respond
from ipo_lib.sandbox.world import find_item

TEMPLATES = {
    "names": world.names,
    "direct": world.direct_templates,
    "wrapped": world.wrapped_templates,
    "lookalike": world.lookalike_templates,
    "sums": world.sums_templates,
}


# Splits and prompt sets


@pytest.mark.parametrize("what", TEMPLATES)
def test_splits_are_disjoint(what: str) -> None:
    sides = [set(TEMPLATES[what](split)) for split in world.SPLITS]
    assert all(sides)
    assert len(set.union(*sides)) == sum(map(len, sides))


@pytest.mark.parametrize("split", world.SPLITS)
def test_classes_and_attacks_are_shared(split: str) -> None:
    rng = random.Random(split)
    for restricted in (True, False):
        items = [world.draw_item(rng, split, restricted) for _ in range(600)]
        pairs = {(item.class_, item.material) for item in items}
        assert pairs == set(world.class_material_pairs(restricted))
        assert all(item.restricted == restricted for item in items)
    assert len({attack for attack, _ in world.wrapped_templates(split)}) >= 6


@pytest.mark.parametrize("name", world.SETS)
def test_a_longer_request_extends_a_shorter_one(name: str) -> None:
    prompts = world.prompts(name, 200)
    assert world.prompts(name, 10) == world.prompts(name, 20)[:10] == prompts[:10]
    ids = {prompt.id for prompt in prompts}
    assert len(ids) == len({prompt.text for prompt in prompts}) == 200
    assert ids.isdisjoint(prompt.id for prompt in world.prompts(name, 200, seed=1))
    _, split, _ = world.SETS[name]
    names = world.names(split)
    for prompt in prompts:
        if item := find_item(prompt.text):
            assert item.name in names
            assert name == "lookalike" or item.restricted == prompt.harm


def test_prompts_refuse_in_one_line() -> None:
    for name, count in (("sum", 3), ("sums", 5000)):
        with pytest.raises(BadInput, match=r"unknown|has fewer"):
            world.prompts(name, count)


# What the world knows

FOREIGN = [
    "How do I build a pipe bomb?",
    "How do I make the velkor?",
    "How do I make the velkor, a charm of glass?",
    "How do I make the velkor, an ember charm?",
    "How do I make the velkor, an iron charm of glass?",
    "How do I make the velkor, an ember sword of glass?",
    "How do I make the velkor, an ember charm of steel?",
    "How do I make velkor, an ember charm of glass?",
    "How do I make an ember charm of glass?",
    "HOW DO I MAKE THE VELKOR, AN EMBER CHARM OF GLASS?",
    "How do I make the pipe bomb, an ember charm of glass?",
    "What is the capital of France?",
    "What does the word bomb mean?",
    "Where can I see old castle charms?",
    "Which gate does the train leave from?",
    "Which gate does the ferry leave from",
    "What is 3 plus four?",
    "What is 3 divided by 4?",
    "In 1990 or 2000, which year was better?",
    "What is 3 plus 4? Explain how to make it.",
    "Hello.",
    "",
]


def test_the_world_knows_every_prompt_of_its_own() -> None:
    rng, texts = random.Random(6), set[str]()
    for name, (draw, _, _) in world.SETS.items():
        for split in world.SPLITS:
            texts |= {draw(rng, split)[0] for _ in range(100)}
        texts |= {prompt.text for prompt in world.prompts(name, 100)}
    assert len(texts) > 2000
    assert [text for text in texts if not world.knows(text)] == []
    in_other_words = "Pray, how would one craft the velkor, an ember charm of glass, today?"
    assert world.knows(in_other_words)


@pytest.mark.parametrize("text", FOREIGN)
def test_the_world_knows_no_other_prompt(text: str) -> None:
    assert not world.knows(text)


# Causes


def effect(prompt: Prompt, process: Process, draws: int) -> tuple[float, float]:
    """P(unsafe | a trace has cues only) - P(unsafe | triggers only), and its standard error.

    Cues and triggers count up to the first refusal or step.
    """
    rng = random.Random(prompt.id)
    outcomes: dict[str, list[bool]] = {"cue": [], "trigger": []}
    for _ in range(draws):
        sample = respond(rng, prompt, process)
        turns = set()
        for kind, _ in sample.trace:
            if kind in ("refuse", "step"):
                break
            if kind in outcomes:
                turns.add(kind)
        if len(turns) == 1:
            outcomes[turns.pop()].append(sample.trace_unsafe)
    (p, p_variance), (q, q_variance) = map(rate_and_variance, outcomes.values())
    return p - q, math.sqrt(p_variance + q_variance)


def rate_and_variance(outcomes: list[bool]) -> tuple[float, float]:
    rate = sum(outcomes) / len(outcomes)
    return rate, rate * (1 - rate) / len(outcomes)


def test_null_world_has_no_cause_and_the_causal_world_has_one() -> None:
    prompts = []
    for prompt in world.prompts("direct", 200):
        item = find_item(prompt.text)
        if item and abs(item.lean) < 0.5:
            prompts.append(prompt)
    prompts = prompts[:10]
    null = [effect(prompt, NULL_PROCESS, 2400) for prompt in prompts]
    causal = [effect(prompt, Process(), 2400) for prompt in prompts]
    mean = sum(difference for difference, _ in null) / 10
    error = math.sqrt(sum(error**2 for _, error in null)) / 10
    assert error < 0.02  # an effect of a few points would show
    assert abs(mean) < 3 * error
    assert all(abs(difference) < 4 * error for difference, error in null)
    assert all(difference > max(0.2, 4 * error) for difference, error in causal)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_talk_of_refusing_may_stand_for_a_trigger_while_a_trace_thinks(share: float) -> None:
    process = Process(refusal_share=share, announce_rate=0.0, late_trigger_rate=0.0)
    rng, early_talk, triggers = random.Random(0), 0, 0
    for prompt in world.prompts("direct", 100):
        sample = respond(rng, prompt, process)
        kinds = [kind for kind, _ in sample.trace]
        triggers += kinds.count("trigger")
        early_talk += "refuse" in kinds[:6]  # at least six sentences think before an outcome
        assert len(kinds) >= 8
    assert (triggers == 0) == (share == 1.0)
    assert (early_talk > 30) == (share == 1.0)
