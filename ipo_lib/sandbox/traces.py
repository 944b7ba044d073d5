"""Responses of the sandbox's world: traces and answers drawn by a random process with known causes.

1. A response is a list of sentences, each of one *kind*. Its trace (the thinking) comes first, then
   its answer.
2. While a trace about a restricted item is written, a hidden *lean* x changes: the log-odds of
   complying. It starts at the item's own lean, jumps up at a *cue* (a sentence that commits to
   helping) and down at a *trigger* (a sentence that recalls the law), drifts a little with other
   sentences, and decays back to its start.
3. After the thinking, the outcome is drawn: the trace is unsafe with probability logistic(k x). An
   unsafe trace gives steps of the procedure, a safe one talks of refusing.
4. The answer is drawn given the outcome of the trace. All labels are the generator's own.

In the *null world* the text is the same, but no sentence moves x: the prompt alone decides the
outcome. A method that finds causes there is wrong.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from dataclasses import dataclass

from ipo_lib.records import Prompt
from ipo_lib.sandbox.answers import calculation, fact
from ipo_lib.sandbox.world import Item, find_item, words

CLOSE = "</think>"
KindedSentence = tuple[str, str]  # (kind, text)
PLAIN, WRAPPED, ADVERSARIAL = range(3)  # styles of a request


@dataclass(frozen=True)
class Process:
    """Every number of the random process. Effects, leans and shifts are log-odds of complying."""

    cue_effect: float = 3.2  # what a cue adds to x
    trigger_effect: float = -2.1
    plan_effect: float = 0.25
    hesitate_effect: float = -0.35
    lean_scale: float = 1.25  # factor on the item's own lean
    memory: float = 0.88  # share of the distance from the start of x that a sentence leaves
    thinking: tuple[int, int] = (6, 8)  # fewest and most thinking sentences
    turn_rate: float = 0.6  # P(a thinking sentence is a cue or a trigger)
    refusal_share: float = 0.35  # of these triggers, those that talk of refusing
    turn_steepness: float = 0.6  # P(cue rather than trigger) = logistic(turn_steepness x)
    outcome_steepness: float = 2.0  # P(trace unsafe) = logistic(outcome_steepness x)
    shift: float = -0.5  # added to the start of x for every request
    wrapped_shift: float = -0.6  # and for a request in a frame
    adversarial_shift: float = 1.4  # and for one among tactics
    announce_rate: float = 0.30  # P(a trace says its outcome before it acts, if it did not yet)
    late_trigger_rate: float = 0.10  # P(a trigger and a refusal after the steps of an unsafe trace)
    relapse_rate: float = 0.10  # P(a safe trace turns unsafe after it talked of refusing)
    # P(answer unsafe | trace unsafe) by style: plain, wrapped, adversarial
    comply: tuple[float, float, float] = (0.71, 0.85, 0.97)
    slip: float = 0.005  # P(answer unsafe | trace safe)
    null: bool = False  # the null world: effects are 0, and sentences tell nothing of the prompt
    null_cue: float = 0.6  # there, P(cue rather than trigger)
    null_refuse: float = 0.35  # there, P(the trace talks of refusing)


# The null world: the same rates of harm, reached by the prompt alone.
NULL_PROCESS = Process(
    null=True,
    outcome_steepness=1.0,
    lean_scale=1.25,
    shift=0.25,
    wrapped_shift=-0.4,
    adversarial_shift=1.1,
)


@dataclass(frozen=True)
class Sample:
    """A drawn response with the generator's labels."""

    trace: tuple[KindedSentence, ...]
    answer: tuple[KindedSentence, ...]
    trace_unsafe: bool
    answer_unsafe: bool

    @property
    def reasoning(self) -> str:
        """The text of the trace."""
        return " ".join(text for _, text in self.trace)

    @property
    def response(self) -> str:
        """The text of the answer."""
        return " ".join(text for _, text in self.answer)

    @property
    def text(self) -> str:
        """All of it, as a model writes it."""
        return f"{self.reasoning}\n{CLOSE}\n\n{self.response}"


def logistic(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-x))


# Sentences


@functools.cache
def phrasings(kind: str, held_out: bool = False) -> tuple[str, ...]:
    """All templates of a kind of sentence: what models learn from, or held-out paraphrases."""
    parts = words()["kinds"][kind]
    cores = parts["held_out" if held_out else "core"]
    texts = []
    for core, opening in itertools.product(cores, parts["open"]):
        texts += [capitalize(f"{opening}{core}{ending}.") for ending in parts["close"]]
    return tuple(texts)


def capitalize(text: str) -> str:
    """``text`` with its first letter in upper case; the others stay as they are."""
    return text[:1].upper() + text[1:]


def say(rng: random.Random, kind: str, item: Item, held_out: bool = False) -> KindedSentence:
    """A sentence of a kind about an item."""
    return kind, capitalize(item.fill(rng.choice(phrasings(kind, held_out))))


def say_times(rng: random.Random, kind: str, item: Item, most: int) -> list[KindedSentence]:
    """1 to ``most`` sentences of a kind."""
    return [say(rng, kind, item) for _ in range(rng.randint(1, most))]


def steps(rng: random.Random, item: Item, count: int) -> list[KindedSentence]:
    """A procedure of invented steps, each naming its item or ``it``."""
    parts = words()["steps"]
    procedure = []
    for index in range(count):
        lead = "First" if index == 0 else rng.choice(parts["lead"][1:])
        target = f"the {item.name}" if index == 0 or rng.random() < 0.5 else "it"
        verb = rng.choice(parts["verb"])
        medium, span = rng.choice(parts["medium"]), rng.choice(parts["span"])
        procedure.append(("step", f"{lead} {verb} {target} {medium} {span}."))
    return procedure


def comply(rng: random.Random, item: Item) -> list[KindedSentence]:
    """An answer that gives the procedure."""
    opening = ("comply", rng.choice(words()["answers"]["comply"]))
    return [opening, *steps(rng, item, rng.randint(2, 3))]


def refuse(rng: random.Random, item: Item) -> list[KindedSentence]:
    """An answer that refuses, and in half of all cases offers something else."""
    answers, sentences = words()["answers"], []
    if rng.random() < 0.5:
        sentences.append(("offer", rng.choice(answers["offer"])))
    refusal = item.fill(rng.choice(answers["refuse"]))
    return [("refuse", capitalize(refusal)), *sentences]


# Responses


def request_style(prompt_text: str) -> int:
    """Whether a request is plain, in a frame or among tactics; read from its text."""
    sentences = re.split(r"(?<=[.!?]) ", prompt_text)
    if not set(words()["tactics"]).isdisjoint(sentences):
        return ADVERSARIAL
    return WRAPPED if len(sentences) > 1 else PLAIN


def think(
    rng: random.Random, item: Item, start: float, process: Process
) -> tuple[list[KindedSentence], float]:
    """The thinking about a restricted item.

    Args:
        rng: the source of chance.
        item: what the prompt asks for.
        start: where x starts and decays back to.
        process: the numbers of the process.

    Returns:
        The sentences, and x after the last one.
    """
    x, sentences = start, [say(rng, "restate", item)]
    for _ in range(rng.randint(*process.thinking)):
        kind = rng.choice(["plan", "plan", "hesitate", "hesitate", "aside", "aside", "restate"])
        if rng.random() < process.turn_rate:
            p_cue = process.null_cue if process.null else logistic(process.turn_steepness * x)
            kind = "cue" if rng.random() < p_cue else "trigger"
        # Without a share nothing is drawn, so that such a process writes the texts that it wrote
        # before there was one: the first passes of the shipped models were trained on them.
        may_refuse = kind == "trigger" and process.refusal_share > 0
        refuses = may_refuse and rng.random() < process.refusal_share
        sentences.append(say(rng, "refuse" if refuses else kind, item))
        if not process.null:
            x = start + process.memory * (x - start) + getattr(process, f"{kind}_effect", 0.0)
    return sentences, x


def respond_to_restricted(
    rng: random.Random, prompt_text: str, item: Item, process: Process
) -> Sample:
    """The response to a request for a restricted item.

    Args:
        rng: the source of chance.
        prompt_text: the request.
        item: what it asks for.
        process: the numbers of the process.
    """
    # 1. Think, and draw the outcome.
    style = request_style(prompt_text)
    style_shift = (0.0, process.wrapped_shift, process.adversarial_shift)[style]
    start = process.lean_scale * item.lean + process.shift + style_shift
    trace, x = think(rng, item, start, process)
    unsafe = rng.random() < logistic(process.outcome_steepness * x)

    # 2. A sentence may announce the outcome; in the null world it says anything.
    complies = rng.random() < process.null_cue if process.null else unsafe
    announced = "cue" if complies else "trigger"
    kinds = {kind for kind, _ in trace}
    if announced not in kinds and rng.random() < process.announce_rate:
        trace.append(say(rng, announced, item))

    # 3. A safe trace talks of refusing, and may relapse; in the null world such talk tells nothing.
    if process.null:
        if rng.random() < process.null_refuse:
            trace += say_times(rng, "refuse", item, 2)
    elif not unsafe:
        trace += say_times(rng, "refuse", item, 2)
        unsafe = rng.random() < process.relapse_rate
        if unsafe:
            trace.append(say(rng, "cue", item))

    # 4. An unsafe trace gives the procedure. A trigger that comes after it is too late.
    late = False
    if unsafe:
        trace += steps(rng, item, rng.randint(1, 3))
        late = not process.null and rng.random() < process.late_trigger_rate
        if late:
            trace += [say(rng, "trigger", item), say(rng, "refuse", item)]

    # 5. The answer.
    p_comply = process.slip
    if unsafe:
        p_comply = process.comply[style] * (0.2 if late else 1.0)
    complies = rng.random() < p_comply
    answer = comply(rng, item) if complies else refuse(rng, item)
    return Sample(tuple(trace), tuple(answer), unsafe, complies)


def respond_to_free(rng: random.Random, item: Item, process: Process) -> Sample:
    """The response to a request for an item that is not restricted: check the law, then comply."""
    kinds = ["plan", "hesitate", "aside"]
    if process.null:  # in the causal world a trigger would tell that the item is restricted
        kinds += ["cue", "trigger", "refuse"]
    count = rng.randint(0, 4 if process.null else 2)
    thinking = [say(rng, rng.choice(kinds), item) for _ in range(count)]
    cues = [say(rng, "cue", item)] if rng.random() < 0.3 else []
    trace = [say(rng, "restate", item), *thinking]
    trace += [say(rng, "allowed", item), *cues]
    trace += steps(rng, item, rng.randint(1, 2))
    return Sample(tuple(trace), tuple(comply(rng, item)), False, False)


def respond_to_question(rng: random.Random, prompt_text: str) -> Sample:
    """The response to a lookalike, a question about the city or a sum."""
    item = find_item(prompt_text) or Item("thing", "plain", "thing", "clay")
    trace = [say(rng, "plan", item)]
    if calculations := calculation(prompt_text):
        for a, operator, b, result in calculations:
            trace.append(("arithmetic", f"{a} {operator} {b} = {result}."))
        answer = ("result", f"The result is {calculations[-1].result}.")
    else:
        trace.append(say(rng, "inform", item))
        text = fact(prompt_text) or ""
        answer = ("fact", text if text.endswith(".") else f"The answer is {text}.")
    return Sample(tuple(trace), (answer,), False, False)


def respond(rng: random.Random, prompt: Prompt, process: Process) -> Sample:
    """A response to any prompt of the world."""
    item = find_item(prompt.text)
    if item is None or fact(prompt.text) is not None:
        return respond_to_question(rng, prompt.text)
    if item.restricted:
        return respond_to_restricted(rng, prompt.text, item, process)
    return respond_to_free(rng, item, process)
