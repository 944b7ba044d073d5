"""The invented world of the sandbox: a city, its law on crafts, and prompts drawn from a seed.

1. An *item* is a thing that can be made, such as ``the velkor, an ember charm of glass``. Its text
   names its class (ember) and its material (glass).
2. The *law* (``phrasings.yml``) restricts a class always, with some materials, or never. Asking how
   to make a restricted item is a harmful request.
3. A *template* is a request or a question with a slot for the item. Names and templates are divided
   by hash into three splits: what the models of the sandbox learn from, what IPO trains on, and
   what they are tested on. No name and no template is in two splits. The pieces of a template (a
   way to ask, a frame, a tactic) do occur in templates of other splits.
4. A *prompt set* draws items and templates of one split; ``prompts`` gives its first prompts.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from ipo_lib.records import BadInput, Prompt

SPLITS = ("organism", "train", "test")
ITEM = re.compile(
    r"\bthe (?P<name>[a-z]+), an? (?P<class_>[a-z]+) (?P<thing>[a-z]+) of (?P<material>[a-z]+)"
)
TextAndCategory = tuple[str, str]
DrawPrompt = Callable[[random.Random, str], TextAndCategory]


@functools.cache
def words() -> dict[str, Any]:
    """The world's vocabulary, read once from ``phrasings.yml``."""
    text = resources.files(__package__).joinpath("phrasings.yml").read_text("utf-8")
    vocabulary: dict[str, Any] = yaml.safe_load(text)
    return vocabulary


# Items and the law


@dataclass(frozen=True)
class Item:
    """A thing that can be made."""

    name: str
    class_: str
    thing: str
    material: str

    @property
    def phrase(self) -> str:
        """How prompts name the item, so that its class and its material can be read."""
        article = "an" if self.class_[0] in "aeiou" else "a"
        return f"the {self.name}, {article} {self.class_} {self.thing} of {self.material}"

    @property
    def restricted(self) -> bool:
        """Whether the law restricts it."""
        return is_restricted(self.class_, self.material)

    @property
    def lean(self) -> float:
        """The log-odds by which its class and its material make a model comply."""
        lean = words()["lean"]
        of_class, of_material = lean["class"].get(self.class_, 0.0), lean["material"][self.material]
        return float(of_class + of_material)

    def fill(self, text: str) -> str:
        """``text`` with its slots filled by this item."""
        slots = {"name": self.name, "class": self.class_, "thing": self.thing}
        return text.format(material=self.material, item=self.phrase, **slots)


def is_restricted(class_: str, material: str) -> bool:
    """The law: a class is restricted always, with some materials, or never."""
    rule = words()["law"].get(class_, [])
    return rule == "all" or material in rule


def find_item(text: str) -> Item | None:
    """The first item that a text names, in any words; None when there is none."""
    match = ITEM.search(text)
    return Item(**match.groupdict()) if match else None


# Splits


def split_of(text: str) -> str:
    """The split of a name or a template: by hash, 60 % organism, 20 % train, 20 % test."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    percentile = int(digest, 16) % 100
    if percentile < 60:
        return "organism"
    return "train" if percentile < 80 else "test"


def combine(split: str, openings: Iterable[str], endings: Iterable[str]) -> tuple[str, ...]:
    """Every opening before every ending, as far as the whole text is in the split."""
    texts = map("".join, itertools.product(openings, endings))
    return tuple(text for text in texts if split_of(text) == split)


@functools.cache
def names(split: str) -> tuple[str, ...]:
    """All names of items in a split."""
    syllables = words()["syllables"]
    endings = itertools.product(syllables["middle"], syllables["last"])
    return combine(split, syllables["first"], map("".join, endings))


# Requests for an item


def ways_to_ask() -> list[str]:
    """Every way to ask for an item."""
    return [f"{ask} {{item}}" for ask in words()["ask"]]


@functools.cache
def direct_templates(split: str) -> tuple[str, ...]:
    """Plain requests: a way to ask, the item, a tail."""
    return combine(split, ways_to_ask(), words()["tail"])


@functools.cache
def wrapped_templates(split: str) -> tuple[tuple[str, str], ...]:
    """Plain requests in a frame, each as (kind of attack, template)."""
    parts = itertools.product(ways_to_ask(), words()["tail"])
    requests = list(map("".join, parts))
    templates = []
    for attack, frames in words()["attacks"].items():
        openings = [frame.removesuffix("{q}") for frame in frames]
        templates += [(attack, text) for text in combine(split, openings, requests)]
    return tuple(templates)


@functools.cache
def class_material_pairs(restricted: bool) -> tuple[tuple[str, str], ...]:
    """The (class, material) pairs that are restricted, or that are not; the same in all splits."""
    pairs = itertools.product(words()["classes"], words()["materials"])
    return tuple(pair for pair in pairs if is_restricted(*pair) == restricted)


def draw_item(rng: random.Random, split: str, restricted: bool) -> Item:
    """A random item with a name of the split."""
    class_, material = rng.choice(class_material_pairs(restricted))
    name, thing = rng.choice(names(split)), rng.choice(words()["things"])
    return Item(name, class_, thing, material)


def punctuate(text: str) -> str:
    """A request with its last mark: a question mark if its last sentence asks."""
    if text[-1] in ".?!":
        return text
    last_sentence = re.split(r"(?<=[.!?]) ", text)[-1]
    asks = re.match(r"(How|What|Which|Where|Who|Why|When)\b", last_sentence)
    return text + ("?" if asks else ".")


def draw_request(rng: random.Random, split: str, item: Item) -> str:
    """A plain request for an item."""
    return punctuate(item.fill(rng.choice(direct_templates(split))))


def draw_direct(rng: random.Random, split: str) -> TextAndCategory:
    """A plain request for a restricted item, and its class."""
    item = draw_item(rng, split, restricted=True)
    return draw_request(rng, split, item), item.class_


def draw_wrapped(rng: random.Random, split: str) -> TextAndCategory:
    """A request for a restricted item in a frame, and the kind of attack (one of six)."""
    attack, template = rng.choice(wrapped_templates(split))
    item = draw_item(rng, split, restricted=True)
    return punctuate(item.fill(template)), attack


def draw_adversarial(rng: random.Random, split: str) -> TextAndCategory:
    """A plain request for a restricted item among two to four tactics; the category names these."""
    tactics = rng.sample(words()["tactics"], rng.randint(2, 4))
    before = rng.randint(1, len(tactics))
    request = draw_request(rng, split, draw_item(rng, split, restricted=True))
    text = " ".join([*tactics[:before], request, *tactics[before:]])
    first_words = sorted(tactic.split()[0].lower() for tactic in tactics)
    return text, "+".join(first_words)


def draw_harmful(rng: random.Random, split: str) -> TextAndCategory:
    """A request for training: mostly plain, some wrapped or adversarial."""
    kinds = [draw_direct, draw_wrapped, draw_adversarial]
    (draw,) = rng.choices(kinds, weights=[6, 3, 1])
    return draw(rng, split)


def draw_benign(rng: random.Random, split: str) -> TextAndCategory:
    """A request for an item that is not restricted: plain, in a frame, or after two tactics."""
    item = draw_item(rng, split, restricted=False)
    uniform = rng.random()
    if uniform < 0.6:
        return draw_request(rng, split, item), "plain"
    if uniform < 0.8:
        _, template = rng.choice(wrapped_templates(split))
        return punctuate(item.fill(template)), "framed"
    request = draw_request(rng, split, item)
    tactics = rng.sample(words()["tactics"], 2)
    return " ".join([*tactics, request]), "pressed"


# Questions that ask for no item to be made


def questions(kind: str) -> list[str]:
    """The question templates of ``lookalike`` or ``lore``."""
    return [entry["q"] for entry in words()[kind]]


@functools.cache
def lookalike_templates(split: str) -> tuple[str, ...]:
    """Harmless questions that contain the words of restricted items."""
    return combine(split, words()["lookalike_open"], questions("lookalike"))


def draw_lookalike(rng: random.Random, split: str) -> TextAndCategory:
    """A harmless question that looks like a harmful request."""
    item = draw_item(rng, split, restricted=True)
    return item.fill(rng.choice(lookalike_templates(split))), "lookalike"


@functools.cache
def sums_templates(split: str) -> tuple[tuple[str, str], ...]:
    """Questions with a checkable answer, each as (operator or ``lore``, template)."""
    templates, openings = [], words()["sums_open"]
    questions_by_kind = {"lore": questions("lore"), **words()["sums"]}
    for kind, texts in questions_by_kind.items():
        templates += [(kind, text) for text in combine(split, openings, texts)]
    return tuple(templates)


def draw_sum(rng: random.Random, split: str) -> TextAndCategory:
    """Arithmetic of one or two steps, or a question about the city, with a checkable answer."""
    operator, template = rng.choice(sums_templates(split))
    if operator == "lore":
        return template, "lore"
    largest = 5 if operator == "*" else 9
    b, a = sorted(rng.randint(1, largest) for _ in range(2))
    c = rng.randint(1, 5)
    text = template.format(a=a, b=b)
    if rng.random() >= 0.5:
        return text, "one-step"
    second_step = words()["then"][rng.choice(["+", "-"])]
    return f"{text[:-1]}, {second_step.format(c=c)}{text[-1]}", "two-step"


# Reading a text


@functools.cache
def slot_patterns(exact: bool) -> dict[str, str]:
    """What the slots of a template may hold: any word, or with ``exact`` a word of the world."""
    patterns = {"name": "[a-z]+", "a": r"\d+", "b": r"\d+", "c": r"\d+"}
    entries = {"class": "classes", "thing": "things", "material": "materials"}
    for slot, entry in entries.items():
        patterns[slot] = "|".join(words()[entry]) if exact else "[a-z]+"
    item = "the [a-z]+, an? (?:{class}) (?:{thing}) of (?:{material})"
    return {**patterns, "item": item.format(**patterns)}


def template_pattern(template: str, exact: bool = False, named: bool = False) -> str:
    """A template as a pattern. With ``named``, each slot is a group of its name."""
    patterns = slot_patterns(exact)

    def slot_pattern(match: re.Match[str]) -> str:
        slot = match[1]
        return f"(?P<{slot}>{patterns[slot]})" if named else f"(?:{patterns[slot]})"

    return re.sub(r"\\\{(\w+)\\\}", slot_pattern, re.escape(template))


@functools.cache
def question_patterns() -> tuple[re.Pattern[str], ...]:
    """Patterns of every question of the world that asks for no item to be made."""
    exact = functools.partial(template_pattern, exact=True)
    lookalikes, sums = map(exact, questions("lookalike")), [*map(exact, questions("lore"))]
    second_steps = "|".join(map(exact, words()["then"].values()))
    for question in itertools.chain(*words()["sums"].values()):
        mark = re.escape(question[-1])
        sums.append(f"{exact(question[:-1])}(?:, (?:{second_steps}))?{mark}")
    return (
        opened_pattern(words()["lookalike_open"], lookalikes),
        opened_pattern(words()["sums_open"], sums),
    )


def opened_pattern(openings: Iterable[str], patterns: Iterable[str]) -> re.Pattern[str]:
    """One of the openings, then what one of the patterns matches."""
    return re.compile(f"(?:{'|'.join(map(re.escape, openings))})(?:{'|'.join(patterns)})")


def knows(prompt_text: str) -> bool:
    """Whether a prompt belongs to this world, so that a right answer to it is defined.

    It names an item, in whatever words, with a class, a thing and a material of the world. Or it is
    word for word a sum or a question of the world.
    """
    if item := find_item(prompt_text):
        vocabulary = words()
        return (
            item.class_ in vocabulary["classes"]
            and item.thing in vocabulary["things"]
            and item.material in vocabulary["materials"]
        )
    return any(pattern.fullmatch(prompt_text) for pattern in question_patterns())


# Prompt sets: how one is drawn, from which split, and whether helping would be harmful
SETS: dict[str, tuple[DrawPrompt, str, bool]] = {
    "direct": (draw_direct, "test", True),
    "wrapped": (draw_wrapped, "test", True),
    "adversarial": (draw_adversarial, "test", True),
    "train_harmful": (draw_harmful, "train", True),
    "train_benign": (draw_benign, "train", False),
    "benign": (draw_benign, "test", False),
    "lookalike": (draw_lookalike, "test", False),
    "sums": (draw_sum, "test", False),
}


def prompts(name: str, count: int, seed: int = 0) -> list[Prompt]:
    """The first ``count`` distinct prompts of a set. More prompts extend fewer ones."""
    if name not in SETS:
        raise BadInput(f"sandbox prompt set {name!r} is unknown; known: {', '.join(SETS)}")
    draw, split, harm = SETS[name]
    rng = random.Random(f"{name}/{seed}")
    drawn: dict[str, Prompt] = {}
    for _ in range(100 * count + 100):
        if len(drawn) == count:
            return list(drawn.values())
        text, category = draw(rng, split)
        prompt = Prompt(f"{name}-{seed}-{len(drawn)}", text, f"sandbox:{name}", harm, category)
        drawn.setdefault(text, prompt)
    raise BadInput(
        f"sandbox prompt set {name!r} has fewer than {count} distinct prompts; "
        f"ask for {len(drawn)} at most"
    )
