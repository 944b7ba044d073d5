"""Overlap between prompt sets: the same prompt, or eight words in a row, in what a model is trained and what it is tested on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ipo_lib.records import Prompt, by_id
from ipo_lib.stats import Interval, wilson

WIDTH = 8  # words of a shared run
WORD = re.compile(r"\w+")
Words = tuple[str, ...]


@dataclass(frozen=True)
class Shared:
    """A prompt of one set that another set holds too; ``exact``: all of its words, else ``WIDTH`` of them in a row."""

    id: str
    other: str
    exact: bool


@dataclass(frozen=True)
class Overlap:
    """What ``test`` shares with ``train``: ``shared`` prompts of the test set, each once; ``short``: how many of its prompts have
    fewer than ``WIDTH`` words, so that only a match of the whole prompt could find them."""

    train: str
    test: str
    size: int
    short: int
    shared: tuple[Shared, ...]

    @property
    def exact(self) -> int:
        """Test prompts that are training prompts word for word."""
        return sum(one.exact for one in self.shared)

    @property
    def rate(self) -> Interval:
        """The share of the test set that overlaps (the set is the whole population: the interval is for one like it)."""
        return wilson(len(self.shared), self.size)


def words(text: str) -> Words:
    """The words of a prompt, without case and punctuation."""
    return tuple(WORD.findall(text.casefold()))


def runs(own: Words) -> Iterator[Words]:
    """Every run of ``WIDTH`` words."""
    return (own[at : at + WIDTH] for at in range(len(own) - WIDTH + 1))


def shared(train: Iterable[Prompt], test: Iterable[Prompt]) -> list[Shared]:
    """The prompts of ``test`` that overlap with ``train``, in order, each with the first one it was found in."""
    whole: dict[Words, str] = {}
    parts: dict[Words, str] = {}
    for prompt in train:
        whole.setdefault(own := words(prompt.text), prompt.id)
        for run in runs(own):
            parts.setdefault(run, prompt.id)
    found = []
    for prompt in test:
        if (own := words(prompt.text)) in whole:
            found.append(Shared(prompt.id, whole[own], True))
        elif other := next((parts[run] for run in runs(own) if run in parts), ""):
            found.append(Shared(prompt.id, other, False))
    return found


def table(
    sets: Mapping[str, Sequence[Prompt]], train: Sequence[str], test: Sequence[str]
) -> list[Overlap]:
    """Every test set against every training set."""
    short = {name: sum(len(words(one.text)) < WIDTH for one in sets[name]) for name in test}
    pairs = [(a, b) for a in train for b in test if a != b]
    return [
        Overlap(a, b, len(sets[b]), short[b], tuple(shared(sets[a], sets[b]))) for a, b in pairs
    ]


def apart(prompts: Sequence[Prompt], others: Iterable[Prompt]) -> list[Prompt]:
    """``prompts`` without those that overlap with ``others``."""
    dropped = {one.id for one in shared(others, prompts)}
    return [prompt for key, prompt in by_id(prompts).items() if key not in dropped]
