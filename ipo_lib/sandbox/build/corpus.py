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
NEARBY = 40  # batches whose rows are sorted by length together


def documents(settings: TrainingSettings) -> Iterator[tuple[str, str]]:
    """(prompt, response) pairs, with names and templates of the split ``organism`` only."""
    rng = random.Random(f"organism/{settings.seed}")
    names, shares = zip(*settings.mixture, strict=True)
    for _ in range(settings.documents):
        name = rng.choices(names, shares)[0]
        draw, _, _ = world.SETS[name]
        text, category = draw(rng, "organism")
        sample = respond(rng, Prompt("", text, name, False, category), settings.process)
        yield text, sample.text


def encoded(
    texts: Iterable[tuple[str, str]], render: Callable[[str], str], end: str, encode: Encode
) -> Rows:
    """Training rows of documents.

    Args:
        texts: (prompt, response) pairs.
        render: writes a prompt as the chat template does.
        end: the end token, after every response.
        encode: from text to ids.
    """
    rows = []
    for prompt, response in texts:
        prompt_ids = encode(render(prompt))
        rows.append((len(prompt_ids), prompt_ids + encode(response + end)))
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
