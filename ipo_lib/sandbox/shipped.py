"""What profiles of the sandbox name besides a model and a judge: files that come with an organism,
and texts that the world itself provides."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ipo_lib.cues import LexiconCues
from ipo_lib.records import Prompt, from_json
from ipo_lib.sandbox import organism
from ipo_lib.sandbox.traces import Process, capitalize, respond
from ipo_lib.sandbox.world import draw_request, find_item, words
from ipo_lib.triggers import Trigger


def read(name: str, file: str) -> Any:
    """A JSON file of an organism."""
    return json.loads((organism.shipped(name) / file).read_text("utf-8"))


def lexicon(name: str) -> LexiconCues:
    """The cue lexicon that was learnt from an organism's traces."""
    return from_json(LexiconCues, read(name, "lexicon.json"))


def triggers(name: str) -> list[Trigger]:
    """The triggers in use, mined from an organism's traces."""
    return [from_json(Trigger, data) for data in read(name, "triggers.json")["in_use"]]


def pool(name: str) -> list[Trigger]:
    """Every trigger that was mined from an organism's traces, the most frequent first."""
    return [from_json(Trigger, data) for data in read(name, "triggers.json")["pool"]]


def forks(name: str) -> Path:
    """The file of outcome curves that were recorded on an organism's traces."""
    return organism.shipped(name) / "forks.jsonl.gz"


def paraphrases() -> list[str]:
    """Trigger sentences that no organism and no detector has seen, about "the thing"."""
    cores = words()["kinds"]["trigger"]["held_out"]
    return [re.sub(r"\{\w+\}", "thing", f"{capitalize(core)}.") for core in cores]


def templates() -> list[str]:
    """Frames around a request, for attacks: those of the world's ``wrapped`` prompts."""
    frames = [frame for frames in words()["attacks"].values() for frame in frames]
    return [frame.replace("{q}", "{request}") for frame in frames]


def subject() -> Callable[[str], str]:
    """Finds the name of the item that a prompt asks for; empty where it asks for none."""
    return named_item


def named_item(text: str) -> str:
    """The name of the item in a text."""
    item = find_item(text)
    return item.name if item else ""


def rewrite() -> Callable[[str, random.Random], str]:
    """Says a request for an item in other words of the world."""
    return other_words


def other_words(text: str, rng: random.Random) -> str:
    """A request for the item of a text, by a random template of the test split."""
    item = find_item(text)
    return draw_request(rng, "test", item) if item else text


def teacher(prompts: Sequence[Prompt], seed: int) -> list[str]:
    """A safe response to every prompt, as a stronger source would write it.

    It is drawn from the world's process, again until trace and answer are both safe. So it is in
    the process's words and not in the organism's.
    """
    texts = []
    for prompt in prompts:
        rng = random.Random(f"teacher/{seed}/{prompt.id}")
        sample = respond(rng, prompt, Process())
        while sample.trace_unsafe or sample.answer_unsafe:
            sample = respond(rng, prompt, Process())
        texts.append(sample.text)
    return texts
