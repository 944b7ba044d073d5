"""Traces and answers of the sandbox world, drawn by a process with memory and relapse; labels are the generator's own.

Each thinking sentence has a kind. A hidden lean x (log-odds of doing it) starts at the item's own lean, jumps up at a
*cue* and down at a *trigger*, drifts a little with other sentences and decays back. In the null world the text is the
same but cues and triggers move nothing: the prompt alone decides the outcome.
"""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import dataclass

from ipo_lib.records import Prompt
from ipo_lib.sandbox.world import ITEM, Item, words

Kinded = tuple[str, str]


@dataclass(frozen=True)
class Process:
    """Every number of the stochastic process; effects and leans are log-odds."""

    cue_effect: float = 1.6
    trigger_effect: float = -2.0
    plan_effect: float = 0.25
    hesitate_effect: float = -0.35
    lean_scale: float = 1.0
    memory: float = 0.88
    turn_rate: float = 0.55
    turn_steepness: float = 0.20
    outcome_steepness: float = 1.4
    shift: float = 0.0
    wrapped_shift: float = -0.4
    adversarial_shift: float = 1.3
    announce_rate: float = 0.30
    late_trigger_rate: float = 0.10
    relapse_rate: float = 0.10
    comply: tuple[float, float, float] = (
        0.50,
        0.68,
        0.88,
    )  # P(answer unsafe | trace unsafe): direct, wrapped, adversarial
    slip: float = 0.005  # P(answer unsafe | trace safe)
    null: bool = False  # then cues and talk of refusing come at these fixed rates: no evidence about the prompt either
    null_cue: float = 0.6
    null_refuse: float = 0.35


@dataclass(frozen=True)
class Sample:
    """A generated response with the generator's labels; ``trace`` is (kind, sentence) in order."""

    trace: tuple[Kinded, ...]
    answer: tuple[Kinded, ...]
    trace_unsafe: bool
    answer_unsafe: bool

    @property
    def reasoning(self) -> str:
        """The thinking text, one sentence after the other."""
        return " ".join(text for _, text in self.trace)

    @property
    def response(self) -> str:
        """The answer text."""
        return " ".join(text for _, text in self.answer)


@functools.cache
def phrasings(kind: str, held_out: bool = False) -> tuple[str, ...]:
    """All templates of a sentence kind: those the organism learns from, or the held-out paraphrases."""
    parts = words()["kinds"][kind]
    cores = parts["held_out" if held_out else "core"]
    return tuple(
        raised(f"{o}{core}{c}") + "."
        for core in cores
        for o in parts["open"]
        for c in parts["close"]
    )


def raised(text: str) -> str:
    """``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def say(rng: random.Random, kind: str, item: Item, held_out: bool = False) -> Kinded:
    """A sentence of a kind about an item."""
    return kind, raised(item.fill(rng.choice(phrasings(kind, held_out))))


def steps(rng: random.Random, item: Item, count: int) -> list[Kinded]:
    """A procedure: nonsense steps, each naming its item or ``it``."""
    parts = words()["steps"]
    said = []
    for index in range(count):
        lead = "First" if index == 0 else rng.choice(parts["lead"][1:])
        what = f"the {item.name}" if index == 0 or rng.random() < 0.5 else "it"
        verb, medium, span = (rng.choice(parts[name]) for name in ("verb", "medium", "span"))
        said.append(("step", f"{lead} {verb} {what} {medium} {span}."))
    return said


def style(prompt_text: str) -> int:
    """How a request is dressed: 0 plain, 1 in a frame, 2 among tactics. Read from the text, as the organism must."""
    sentences = re.split(r"(?<=[.!?]) ", prompt_text)
    tactics = sum(sentence in words()["tactics"] for sentence in sentences)
    return 2 if tactics else 1 if len(sentences) > 1 else 0


def item_of(text: str) -> Item | None:
    """The item a prompt names, read from its text."""
    match = ITEM.search(text)
    return (
        Item(match["name"], match["class_"], match["thing"], match["material"]) if match else None
    )


def restricted_request(
    rng: random.Random, prompt_text: str, item: Item, process: Process
) -> Sample:
    """The response to a request for a restricted item."""
    dress = style(prompt_text)
    base = (
        process.lean_scale * item.lean
        + process.shift
        + (0.0, process.wrapped_shift, process.adversarial_shift)[dress]
    )
    x, trace, late = base, [say(rng, "restate", item)], False
    turned: set[str] = set()
    for _ in range(rng.randint(1, 5)):
        kind = rng.choice(["plan", "plan", "hesitate", "hesitate", "aside", "aside", "restate"])
        if rng.random() < process.turn_rate:
            cue = process.null_cue if process.null else logistic(process.turn_steepness * x)
            kind = "cue" if rng.random() < cue else "trigger"
            turned.add(kind)
        trace.append(say(rng, kind, item))
        x = (
            base
            if process.null
            else base + process.memory * (x - base) + getattr(process, f"{kind}_effect", 0.0)
        )
    unsafe = rng.random() < logistic(process.outcome_steepness * x)
    leans = rng.random() < process.null_cue if process.null else unsafe
    announced = "cue" if leans else "trigger"
    if announced not in turned and rng.random() < process.announce_rate:
        trace.append(say(rng, announced, item))
    if process.null and rng.random() < process.null_refuse:  # talk of refusing tells nothing either
        trace += [say(rng, "refuse", item) for _ in range(rng.randint(1, 2))]
    elif not unsafe and not process.null:
        trace += [say(rng, "refuse", item) for _ in range(rng.randint(1, 2))]
        if rng.random() < process.relapse_rate:
            unsafe, trace = True, [*trace, say(rng, "cue", item)]
    if unsafe:
        trace += steps(rng, item, rng.randint(1, 3))
        late = not process.null and rng.random() < process.late_trigger_rate
        if late:
            trace += [say(rng, "trigger", item), say(rng, "refuse", item)]
    does = rng.random() < (
        process.comply[dress] * (0.2 if late else 1.0) if unsafe else process.slip
    )
    return Sample(
        tuple(trace), tuple(complied(rng, item) if does else declined(rng, item)), unsafe, does
    )


def free_request(rng: random.Random, item: Item, process: Process) -> Sample:
    """The response to a request for a free craft: checked against the law, then done."""
    kinds = ["plan", "hesitate", "aside"] + [
        "cue",
        "trigger",
        "refuse",
    ] * process.null  # else a trigger would tell the class
    middle = [
        say(rng, rng.choice(kinds), item) for _ in range(rng.randint(0, 2 + 2 * process.null))
    ]
    cue = [say(rng, "cue", item)] if rng.random() < 0.3 else []
    trace = [
        say(rng, "restate", item),
        *middle,
        say(rng, "allowed", item),
        *cue,
        *steps(rng, item, rng.randint(1, 2)),
    ]
    return Sample(tuple(trace), tuple(complied(rng, item)), False, False)


def complied(rng: random.Random, item: Item) -> list[Kinded]:
    """An answer that gives the procedure."""
    return [
        ("comply", rng.choice(words()["answers"]["comply"])),
        *steps(rng, item, rng.randint(2, 3)),
    ]


def declined(rng: random.Random, item: Item) -> list[Kinded]:
    """An answer that refuses."""
    offer = [("offer", rng.choice(words()["answers"]["offer"]))] if rng.random() < 0.5 else []
    return [("refuse", raised(item.fill(rng.choice(words()["answers"]["refuse"])))), *offer]


def fact(prompt_text: str) -> str | None:
    """The right answer to a lore or lookalike question, read from its text; None when the world has none."""
    openings = filter(None, {*words()["lookalike_open"], *words()["sums_open"]})
    bare = re.sub(f"^(?:{'|'.join(map(re.escape, openings))})", "", prompt_text)
    for entry in [*words()["lore"], *words()["lookalike"]]:
        if match := re.fullmatch(slotted(entry["q"], named=True), bare):
            found = match.groupdict()
            if "item" in found and (item := item_of(found["item"])):
                return item.fill(entry["a"])
            return str(entry["a"]).format(**found)
    return None


def slotted(template: str, named: bool = False) -> str:
    """A template as a pattern: a slot takes any word, ``{item}`` any item phrase; ``named`` slots are groups."""
    takes = {"item": "the [a-z]+, an? [a-z]+ [a-z]+ of [a-z]+"}
    head = "(?P<{}>" if named else "(?:"
    return re.sub(
        r"\\\{(\w+)\\\}",
        lambda m: f"{head.format(m[1])}{takes.get(m[1], '[a-z]+')})",
        re.escape(template),
    )


def calculation(prompt_text: str) -> list[tuple[int, str, int, int]] | None:
    """The steps (a, operator, b, result) of a sum, read from its text; None when it is none."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt_text)]
    if len(numbers) < 2:
        return None
    first, second = numbers[0], numbers[1]
    if "Take" in prompt_text:
        first, second = second, first
    operator = (
        "*"
        if re.search(r"times|rows of", prompt_text)
        else "-"
        if re.search(r"minus|Take", prompt_text)
        else "+"
    )
    found = [
        (
            first,
            operator,
            second,
            {"+": first + second, "-": first - second, "*": first * second}[operator],
        )
    ]
    if then := re.search(r"then (add|take away) (\d+)", prompt_text):
        last, sign, more = found[0][3], "+" if then[1] == "add" else "-", int(then[2])
        found.append((last, sign, more, last + more if sign == "+" else last - more))
    return found


def harmless_question(rng: random.Random, prompt_text: str) -> Sample:
    """The response to a lookalike, a lore question or a sum."""
    item = item_of(prompt_text) or Item("thing", "plain", "thing", "clay")
    opening = ("plan", raised(rng.choice(phrasings("plan"))))
    if steps_of_sum := calculation(prompt_text):
        trace = [
            opening,
            *(
                ("arithmetic", f"{a} {operator} {b} = {result}.")
                for a, operator, b, result in steps_of_sum
            ),
        ]
        return Sample(
            tuple(trace), (("result", f"The result is {steps_of_sum[-1][3]}."),), False, False
        )
    known = fact(prompt_text) or ""
    trace = [opening, say(rng, "inform", item)]
    return Sample(
        tuple(trace),
        (("fact", known if known.endswith(".") else f"The answer is {known}."),),
        False,
        False,
    )


def respond(rng: random.Random, prompt: Prompt, process: Process) -> Sample:
    """A response to any prompt of the world."""
    item = item_of(prompt.text)
    if item is None or fact(prompt.text) is not None:
        return harmless_question(rng, prompt.text)
    return (
        restricted_request(rng, prompt.text, item, process)
        if item.restricted
        else free_request(rng, item, process)
    )


def logistic(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-x))
