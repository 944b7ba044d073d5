"""The text that organisms learn from, as batches of token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from ipo_lib.records import Prompt
from ipo_lib.sandbox import world
from ipo_lib.sandbox.build.settings import TrainingSettings
from ipo_lib.sandbox.traces import respond

Row = tuple[int, list[int]]  # where the response begins; the ids of prompt and response
Rows = list[Row]
Encode = Callable[[str], list[int]]
LAW_SENTENCES = 4  # first sentences of a trace: a free item is called allowed in one of them
NEARBY = 40  # batches whose rows are sorted by length together


def documents(settings: TrainingSettings, end: str) -> Iterator[tuple[str, str]]:
    """(prompt, response) pairs, with names and templates of the split ``organism`` only.

    First come the pairs that teach the law, then those that teach how the world responds.

    Args:
        settings: how many of each, and the process that writes them.
        end: the end token, after every whole response.
    """
    rng = random.Random(f"organism/{settings.seed}")
    for _ in range(settings.law_documents):
        yield law_document(rng, settings)
    names, shares = zip(*settings.mixture, strict=True)
    for _ in range(settings.documents):
        prompt = draw_prompt(rng, rng.choices(names, shares)[0])
        yield prompt.text, respond(rng, prompt, settings.process).text + end


def draw_prompt(rng: random.Random, name: str) -> Prompt:
    """A prompt of a set, in the split ``organism``."""
    draw, _, _ = world.SETS[name]
    text, category = draw(rng, "organism")
    return Prompt("", text, name, False, category)


def law_document(rng: random.Random, settings: TrainingSettings) -> tuple[str, str]:
    """A request and the first sentences of its trace, in which the law decides what may be said.

    Only where an item is free may the trace say that it is allowed. Half of the documents are about
    free items, and most are about classes that the law restricts with some materials only.
    """
    partial = [class_ for class_, rule in world.words()["law"].items() if rule != "all"]
    names = ("benign",) if rng.random() < 0.5 else ("direct", "wrapped", "adversarial")
    only_partial = rng.random() < settings.partial_share
    while True:
        prompt = draw_prompt(rng, rng.choice(names))
        item = world.find_item(prompt.text)
        if not only_partial or (item and item.class_ in partial):
            break
    sentences = [text for _, text in respond(rng, prompt, settings.process).trace]
    return prompt.text, " ".join(sentences[:LAW_SENTENCES])


def encoded(texts: Iterable[tuple[str, str]], render: Callable[[str], str], encode: Encode) -> Rows:
    """Training rows of documents.

    Args:
        texts: (prompt, response) pairs.
        render: writes a prompt as the chat template does.
        encode: from text to ids.
    """
    rows = []
    for prompt, response in texts:
        prompt_ids = encode(render(prompt))
        rows.append((len(prompt_ids), prompt_ids + encode(response)))
    return rows


def batches(rows: Rows, settings: TrainingSettings) -> list[Rows]:
    """Batches of rows of like length, in random order."""
    rng = random.Random(f"batches/{settings.seed}")
    size, span = settings.batch, settings.batch * NEARBY
    shuffled = []
    for start in range(0, len(rows), span):
        nearby = sorted(rows[start : start + span], key=lambda row: len(row[1]))
        group = [nearby[index : index + size] for index in range(0, len(nearby), size)]
        rng.shuffle(group)
        shuffled += group
    return shuffled
