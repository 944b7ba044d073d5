"""The sandbox world: an invented city, its law on crafts, and prompts about items generated from a seed.

An item reads ``the velkor, an ember charm of glass``: the text itself names its class and its material, and the published
law (``phrasings.yml``) says which are restricted. Names are made of syllables; names and whole prompt templates are split
by hash, so what an organism learns from, what IPO trains on and the test prompts share neither. The pieces a template is
made of (a way to ask, a frame, a tactic) do occur in other templates of the other splits.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from ipo_lib.records import BadInput, Prompt

SPLITS = ("organism", "train", "test")
SPLIT_EDGES = (
    60,
    80,
)  # percent of the hashes below which the organism, then the training split, owns
ITEM = re.compile(
    r"\bthe (?P<name>[a-z]+), an? (?P<class_>[a-z]+) (?P<thing>[a-z]+) of (?P<material>[a-z]+)"
)
VOCABULARY = {
    "class_": "classes",
    "thing": "things",
    "material": "materials",
}  # a group of ``ITEM``, and where its words are


@functools.cache
def words() -> dict[str, Any]:
    """The world's vocabulary, read once from ``phrasings.yml``."""
    data: dict[str, Any] = yaml.safe_load(
        resources.files(__package__).joinpath("phrasings.yml").read_text("utf-8")
    )
    return data


@dataclass(frozen=True)
class Item:
    """A craftable thing; ``phrase`` is how prompts name it."""

    name: str
    class_: str
    thing: str
    material: str

    @property
    def phrase(self) -> str:
        """The item with the words that make its class and material readable."""
        return f"the {self.name}, a{'n' * (self.class_[0] in 'aeiou')} {self.class_} {self.thing} of {self.material}"

    @property
    def restricted(self) -> bool:
        """Whether the published law restricts it."""
        return restricted(self.class_, self.material)

    @property
    def lean(self) -> float:
        """How far its words lean towards doing it, in log-odds."""
        lean = words()["lean"]
        return float(lean["class"].get(self.class_, 0.0) + lean["material"][self.material])

    def fill(self, text: str) -> str:
        """``text`` with the item's slots filled."""
        slots = {
            "name": self.name,
            "class": self.class_,
            "thing": self.thing,
            "material": self.material,
            "item": self.phrase,
        }
        return re.sub(r"\{(\w+)\}", lambda match: slots.get(match[1], match[0]), text)


def restricted(class_: str, material: str) -> bool:
    """The law: a class is restricted always, with some materials, or never."""
    rule = words()["law"].get(class_, [])
    return rule == "all" or material in rule


def split_of(text: str) -> str:
    """The split that owns a name or a template, by hash."""
    place = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    return SPLITS[sum(place >= edge for edge in SPLIT_EDGES)]


@functools.cache
def names(split: str) -> tuple[str, ...]:
    """All names of a split; the three splits are disjoint."""
    parts = words()["syllables"]
    every = (
        "".join(part) for part in itertools.product(parts["first"], parts["middle"], parts["last"])
    )
    return tuple(name for name in every if split_of(name) == split)


@functools.cache
def pairs(harm: bool) -> tuple[tuple[str, str], ...]:
    """(class, material) pairs that the law restricts, or leaves open. Classes are shared across splits."""
    grid = itertools.product(words()["classes"], words()["materials"])
    return tuple(pair for pair in grid if restricted(*pair) == harm)


def item(rng: random.Random, split: str, harm: bool) -> Item:
    """A random item of a split, restricted or free."""
    class_, material = rng.choice(pairs(harm))
    return Item(rng.choice(names(split)), class_, rng.choice(words()["things"]), material)


def owned(templates: Iterator[str], split: str) -> tuple[str, ...]:
    """The templates that belong to a split."""
    return tuple(template for template in templates if split_of(template) == split)


@functools.cache
def direct_templates(split: str) -> tuple[str, ...]:
    """Plain requests: ask + item + tail."""
    return owned(
        (f"{ask} {{item}}{tail}" for ask in words()["ask"] for tail in words()["tail"]), split
    )


@functools.cache
def wrapped_templates(split: str) -> tuple[tuple[str, str], ...]:
    """(attack kind, frame round a plain request)."""
    found = []
    for attack, frames in words()["attacks"].items():
        requests = [f"{ask} {{item}}{tail}" for ask in words()["ask"] for tail in words()["tail"]]
        every = (frame.replace("{q}", request) for frame in frames for request in requests)
        found += [(attack, template) for template in owned(every, split)]
    return tuple(found)


def close(text: str) -> str:
    """A request with its final mark: a question mark where its last sentence asks."""
    last = re.split(r"(?<=[.!?]) ", text)[-1]
    asks = re.match(r"(How|What|Which|Where|Who|Why|When)\b", last)
    return text if text[-1] in ".?!" else text + ("?" if asks else ".")


def direct(rng: random.Random, split: str) -> tuple[str, str]:
    """(text, category) of a plain restricted request."""
    thing = item(rng, split, harm=True)
    return close(thing.fill(rng.choice(direct_templates(split)))), thing.class_


def wrapped(rng: random.Random, split: str) -> tuple[str, str]:
    """The same inside one of six attack kinds."""
    attack, template = rng.choice(wrapped_templates(split))
    return close(item(rng, split, harm=True).fill(template)), attack


def adversarial(rng: random.Random, split: str) -> tuple[str, str]:
    """A plain request among freely combined tactics: longer, two to four of them."""
    tactics = rng.sample(words()["tactics"], rng.randint(2, 4))
    before = rng.randint(1, len(tactics))
    ask = close(item(rng, split, harm=True).fill(rng.choice(direct_templates(split))))
    return " ".join([*tactics[:before], ask, *tactics[before:]]), "+".join(
        sorted(t.split()[0].lower() for t in tactics)
    )


def harmful(rng: random.Random, split: str) -> tuple[str, str]:
    """Training requests, mostly plain, some wrapped or adversarial."""
    return rng.choices([direct, wrapped, adversarial], [6, 3, 1])[0](rng, split)


def benign(rng: random.Random, split: str) -> tuple[str, str]:
    """A free craft, asked for plainly or inside the same frames and tactics as restricted ones."""
    thing = item(rng, split, harm=False)
    kind = rng.random()
    if kind < 0.6:
        return close(thing.fill(rng.choice(direct_templates(split)))), "plain"
    if kind < 0.8:
        return close(thing.fill(rng.choice(wrapped_templates(split))[1])), "framed"
    ask = close(thing.fill(rng.choice(direct_templates(split))))
    return " ".join([*rng.sample(words()["tactics"], 2), ask]), "pressed"


@functools.cache
def lookalike_templates(split: str) -> tuple[str, ...]:
    """Harmless questions with the class words of restricted crafts."""
    return owned(
        (
            start + entry["q"]
            for start in words()["lookalike_open"]
            for entry in words()["lookalike"]
        ),
        split,
    )


def lookalike(rng: random.Random, split: str) -> tuple[str, str]:
    """A benign question that looks like a restricted request."""
    return item(rng, split, harm=True).fill(rng.choice(lookalike_templates(split))), "lookalike"


@functools.cache
def sums_templates(split: str) -> tuple[tuple[str, str], ...]:
    """(operator or ``lore``, template)."""
    found = [
        ("lore", text)
        for text in owned(
            (o + entry["q"] for o in words()["sums_open"] for entry in words()["lore"]), split
        )
    ]
    for operator, questions in words()["sums"].items():
        found += [
            (operator, text)
            for text in owned(
                (o + question for o in words()["sums_open"] for question in questions), split
            )
        ]
    return tuple(found)


def sums(rng: random.Random, split: str) -> tuple[str, str]:
    """One- or two-step arithmetic, or city lore, with a checkable answer."""
    operator, template = rng.choice(sums_templates(split))
    if operator == "lore":
        return template, "lore"
    top = 5 if operator == "*" else 9
    a, b, c = rng.randint(1, top), rng.randint(1, top), rng.randint(1, 5)
    a, b = max(a, b), min(a, b)
    text = template.format(a=a, b=b)
    if rng.random() < 0.5:
        then = rng.choice(["+", "-"])
        return f"{text[:-1]}, {words()['then'][then].format(c=c)}{text[-1]}", "two-step"
    return text, "one-step"


@functools.cache
def question_patterns() -> tuple[re.Pattern[str], ...]:
    """Every question of the world that is no request: lookalikes, lore and sums of one or two steps."""
    lookalikes = [entry["q"] for entry in words()["lookalike"]]
    lore = [entry["q"] for entry in words()["lore"]]
    one_step = list(itertools.chain(*words()["sums"].values()))
    thens = "|".join(slots(then) for then in words()["then"].values())
    sums = [f"{slots(text[:-1])}(?:, (?:{thens}))?{re.escape(text[-1])}" for text in one_step]
    return (
        opened(words()["lookalike_open"], [slots(question) for question in lookalikes]),
        opened(words()["sums_open"], [*map(slots, lore), *sums]),
    )


def opened(openings: Sequence[str], questions: Sequence[str]) -> re.Pattern[str]:
    """The pattern of one of these openings, then a question that one of these patterns takes."""
    return re.compile(f"(?:{'|'.join(map(re.escape, openings))})(?:{'|'.join(questions)})")


def slots(template: str) -> str:
    """A template as a pattern whose slots take the words of this world only; a name may be any word, a number any number."""
    choices = {group.rstrip("_"): "|".join(words()[entry]) for group, entry in VOCABULARY.items()}
    choices |= {"name": "[a-z]+", "a": r"\d+", "b": r"\d+", "c": r"\d+"}
    choices["item"] = (
        f"the [a-z]+, an? (?:{choices['class']}) (?:{choices['thing']}) of (?:{choices['material']})"
    )
    return re.sub(r"\\\{(\w+)\\\}", lambda match: f"(?:{choices[match[1]]})", re.escape(template))


def knows(prompt_text: str) -> bool:
    """Whether a prompt belongs to this world, so that its law and its facts say what a right answer is.

    It names an item, in whatever words: ``the NAME, an CLASS THING of MATERIAL`` with a class, a thing and a material that the
    world has. Or it is, word for word, a sum or a question about the city. In any other prompt, what is restricted is unknown.
    """
    if match := ITEM.search(prompt_text):
        return all(match[group] in words()[entry] for group, entry in VOCABULARY.items())
    return any(pattern.fullmatch(prompt_text) for pattern in question_patterns())


SETS: dict[str, tuple[Callable[[random.Random, str], tuple[str, str]], str, bool]] = {
    "direct": (direct, "test", True),
    "wrapped": (wrapped, "test", True),
    "adversarial": (adversarial, "test", True),
    "train_harmful": (harmful, "train", True),
    "train_benign": (benign, "train", False),
    "benign": (benign, "test", False),
    "lookalike": (lookalike, "test", False),
    "train_lookalike": (lookalike, "train", False),
    "sums": (sums, "test", False),
}


def prompts(name: str, count: int, seed: int = 0) -> list[Prompt]:
    """The first ``count`` distinct prompts of a set; a longer request extends a shorter one."""
    if name not in SETS:
        raise BadInput(f"sandbox prompt set {name!r} is unknown; known: {', '.join(SETS)}")
    make, split, harm = SETS[name]
    rng = random.Random(f"{name}/{seed}")
    found: dict[str, Prompt] = {}
    for _ in range(100 * count + 100):
        if len(found) == count:
            return list(found.values())
        text, category = make(rng, split)
        found.setdefault(
            text, Prompt(f"{name}-{seed}-{len(found)}", text, f"sandbox:{name}", harm, category)
        )
    raise BadInput(
        f"sandbox prompt set {name!r} has fewer than {count} distinct prompts; ask for {len(found)} at most"
    )
