"""Prompt sets by name, and what two sets share.

1. ``PromptSet`` says where a set comes from: a known set (``prompt_sets.yml``), a local file, a hub
   data set at a fixed revision, or any function that returns prompts.
2. ``load_prompts`` reads it, filters and shuffles its rows, and may put attack templates around
   them.
3. ``measure_overlap`` and ``without_overlap`` compare training sets with test sets.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import regex
import yaml

from ipo_lib.prompts.tables import Row, read_rows, text_cell
from ipo_lib.records import BadInput, Prompt, by_id, digest
from ipo_lib.stats import Interval, wilson

KNOWN = Path(__file__).with_name("prompt_sets.yml")
SLOT = "{request}"  # the place of the request in an attack template
OVERLAP_WORDS = 8  # so many words in a row make two prompts overlap
WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
Words = tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """Where a set comes from and how much of it is taken.

    Give exactly one of ``known``, ``file``, ``hub`` and ``function``.
    """

    count: int  # so many prompts, the first ones
    harm: bool = True  # a helpful answer would be harmful
    # A name in prompt_sets.yml: read from $IPO_DATA if it is there, else from the hub.
    known: str = ""
    file: str = ""  # CSV, TSV, JSON lines, a JSON array or Parquet, also .gz; "~" is allowed
    hub: str = ""  # "name@revision" of a hub data set
    function: str = ""  # "module:name", called with `name`, `count` and `arguments`
    name: str = ""  # for `function`; "": the name of the set in the profile
    config: str = ""  # configuration of the hub data set
    split: str = "train"  # split of the hub data set
    options: Mapping[str, Any] = field(default_factory=dict)  # more options of `load_dataset`
    text: str = "prompt"  # column of the text
    id: str = "id"  # column of the id; "": the number of the row
    category: str = ""  # column of the category
    where: Mapping[str, str] = field(default_factory=dict)  # keeps rows with these values
    shuffle: int | None = None  # seed of the order, as `datasets` shuffles; None: as they come
    digest: str = ""  # of all texts in order; "": not checked
    templates: str = ""  # file of attack templates to put around each prompt
    attacks: tuple[str, ...] = ()  # ids of the templates in use; (): all
    apart: tuple[str, ...] = ()  # sets of the profile; prompts that overlap with them are left out
    arguments: Mapping[str, Any] = field(default_factory=dict)  # for `function`

    @property
    def size(self) -> int:
        """The number of prompts at most: ``count``, once for each of the named ``attacks``."""
        return self.count * max(len(self.attacks), 1)


# ---------------------------------------------------------------------- loading


@functools.cache
def known_prompt_sets() -> dict[str, dict[str, Any]]:
    """The entries of ``prompt_sets.yml``, which explains their fields, by name."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(KNOWN.read_text("utf-8"))
    return entries


def data_folder() -> Path | None:
    """The folder of local copies, ``$IPO_DATA``; None if it is not set."""
    folder = os.environ.get("IPO_DATA", "")
    return Path(folder).expanduser() if folder else None


def located(name: str, spec: PromptSet) -> PromptSet:
    """The set with its known name replaced by the local file or the hub data set.

    Raises:
        BadInput: there is no such known set, or no place to take it from.
    """
    if not spec.known:
        return spec
    entries = known_prompt_sets()
    if spec.known not in entries:
        raise BadInput(
            f"prompt set {name!r}: {spec.known!r} is not known; choose one of {', '.join(entries)}"
        )
    entry, folder = entries[spec.known], data_folder()
    file = entry["local"]["file"]
    if folder and (folder / file).is_file():
        source = {**entry["local"], "file": str(folder / file)}
    elif "hub" in entry:
        source = entry["hub"]
    else:
        raise BadInput(
            f"prompt set {name!r}: {spec.known} is on no hub; put {file} under $IPO_DATA"
        )
    chosen = {}  # what the profile sets itself wins over the entry
    for column in fields(spec):
        value = getattr(spec, column.name)
        if value not in (column.default, {}):
            chosen[column.name] = value
    values = {**entry["fields"], "digest": entry.get("digest", ""), **source, **chosen}
    return PromptSet(**{**values, "known": ""})


def load_prompts(name: str, spec: PromptSet) -> list[Prompt]:
    """The first ``spec.count`` prompts of a set.

    Raises:
        BadInput: the set is missing, not accessible, wrongly described or empty.
    """
    sources = (spec.known, spec.file, spec.hub, spec.function)
    if sum(map(bool, sources)) != 1:
        raise BadInput(f"prompt set {name!r}: give exactly one of known, file, hub and function")
    if spec.count < 1:
        raise BadInput(f"prompt set {name!r}: count {spec.count} leaves no prompt; use at least 1")
    source = located(name, spec)
    prompts: list[Prompt]
    if source.function:
        function = object_named(source.function)
        prompts = function(source.name or name, source.count, **source.arguments)
    elif source.file:
        rows = read_rows(Path(source.file).expanduser())
        prompts = _prompts_from_rows(name, source, rows, spec.known or source.file)
    else:
        hub_rows = _hub_rows(name, source, spec.known)
        places = ((f"{source.hub}, row {number}", row) for number, row in enumerate(hub_rows, 1))
        prompts = _prompts_from_rows(name, source, places, spec.known or source.hub)
    if not prompts:
        place = source.file or source.hub or source.function
        raise BadInput(
            f"prompt set {name!r} is empty: no row of {place} passes {dict(source.where)}; "
            "correct `where` or the file"
        )
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise BadInput(
            f"prompt set {name!r}: column {source.id!r} repeats; name a column of distinct ids"
        )
    return _apply_attacks(name, source, prompts) if source.templates else prompts


def _prompts_from_rows(
    name: str, spec: PromptSet, rows: Iterable[tuple[str, Row]], source: str
) -> list[Prompt]:
    """The rows of a table as prompts: filtered, shuffled, checked, and the first of them taken.

    Args:
        name: of the set.
        spec: of the set.
        rows: with the place of each. If they are not shuffled, only as many as needed are read.
        source: named in the prompts.
    """

    def taken() -> Iterator[tuple[int, Row, str]]:
        for number, (place, row) in enumerate(rows):
            if _matches(row, spec.where):
                where = f"prompt set {name!r}, {place}"
                yield number, row, text_cell(row, spec.text, where)

    needed = None if spec.shuffle is not None or spec.digest else spec.count
    kept = list(itertools.islice(taken(), needed))
    if spec.shuffle is not None:
        order = np.random.default_rng(spec.shuffle).permutation(len(kept))
        kept = [kept[index] for index in order]
    texts_digest = digest([text for *_, text in kept]) if spec.digest else ""
    if texts_digest != spec.digest:
        raise BadInput(
            f"prompt set {name!r}: the texts of {source} have digest {texts_digest}, not "
            f"{spec.digest}; take another revision or copy, or leave the digest out"
        )
    prompts = []
    for number, row, text in kept[: spec.count]:
        category = row.get(spec.category) if spec.category else None
        key = row.get(spec.id)
        prompt_id = f"{name}-{number if key in (None, '') else key}"
        prompts.append(
            Prompt(prompt_id, text, source, spec.harm, "" if category is None else str(category))
        )
    return prompts


def _matches(row: Row, where: Mapping[str, str]) -> bool:
    return all(str(row.get(column)) == str(value) for column, value in where.items())


def _apply_attacks(name: str, spec: PromptSet, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt inside every chosen attack template, prompt by prompt."""
    path, folder = Path(spec.templates).expanduser(), data_folder()
    if folder and not path.is_file():
        path = folder / path
    templates = {}
    for place, row in read_rows(path):
        templates[text_cell(row, "id", place)] = text_cell(row, "template", place)
    for attack in spec.attacks:
        if attack not in templates:
            raise BadInput(
                f"prompt set {name!r}: no attack {attack!r} in {path}; "
                f"it holds {', '.join(templates)}"
            )
    attacked = []
    for prompt in prompts:
        for attack, template in templates.items():
            if spec.attacks and attack not in spec.attacks:
                continue
            # A template without a slot goes before the request.
            whole = template if SLOT in template else f"{template}\n\n{SLOT}"
            text = whole.replace(SLOT, prompt.text)
            prompt_id = f"{prompt.id}/{attack}"
            attacked.append(Prompt(prompt_id, text, prompt.source, prompt.harm, attack))
    return attacked


def _hub_rows(name: str, spec: PromptSet, known: str) -> Iterable[Row]:
    """The rows of a hub data set at its revision; ``known`` is its name in ``prompt_sets.yml``."""
    dataset, _, revision = spec.hub.partition("@")
    if not revision:
        raise BadInput(
            f"prompt set {name!r}: {spec.hub!r} names no revision; write {dataset}@<commit>"
        )
    from datasets import load_dataset

    config = [spec.config] if spec.config else []
    try:
        rows: Iterable[Row] = load_dataset(
            dataset, *config, revision=revision, split=spec.split, **spec.options
        )
    except (OSError, ValueError) as error:
        entry = known_prompt_sets().get(known, {})
        hint = entry.get("access", "check the name, the revision, your access or the network")
        if entry:
            hint += f", or put {entry['local']['file']} under $IPO_DATA"
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"prompt set {name!r}: {spec.hub} cannot be loaded ({reason}); {hint}"
        ) from None
    return rows


def object_named(path: str) -> Any:
    """The object that ``module:name`` names: a judge, a detector or another part of a profile."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"{path!r} names no object ({error}); "
            "write module:name, for example ipo_lib.judging:KeywordJudge"
        ) from None


# ---------------------------------------------------------------------- overlap


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt of one set that overlaps with a prompt of another."""

    id: str
    other: str  # id of the first prompt of the other set that it overlaps with
    exact: bool  # all words are the same; else `OVERLAP_WORDS` in a row


@dataclass(frozen=True)
class Overlap:
    """What a test set shares with a training set."""

    train: str  # name of the training set
    test: str  # name of the test set
    size: int  # prompts of the test set
    short: int  # prompts of the test set with fewer than `OVERLAP_WORDS` words
    shared: tuple[SharedPrompt, ...]  # prompts of the test set, each once

    @property
    def exact(self) -> int:
        """Number of test prompts that are training prompts word for word."""
        return sum(prompt.exact for prompt in self.shared)

    @property
    def rate(self) -> Interval:
        """The share of the test set that overlaps; the interval is for sets like this one."""
        return wilson(len(self.shared), self.size)


def split_words(text: str) -> Words:
    """The words of a text, without case and punctuation.

    Composed and full-width letters count as plain ones (NFKC).
    """
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _word_runs(words: Words) -> Iterator[Words]:
    """Every ``OVERLAP_WORDS`` words in a row."""
    for start in range(len(words) - OVERLAP_WORDS + 1):
        yield words[start : start + OVERLAP_WORDS]


def find_shared_prompts(train: Iterable[Prompt], test: Iterable[Prompt]) -> list[SharedPrompt]:
    """The prompts of ``test`` that overlap with ``train``, in order."""
    id_by_words: dict[Words, str] = {}
    id_by_run: dict[Words, str] = {}
    for prompt in train:
        words = split_words(prompt.text)
        id_by_words.setdefault(words, prompt.id)
        for run in _word_runs(words):
            id_by_run.setdefault(run, prompt.id)
    shared = []
    for prompt in test:
        words = split_words(prompt.text)
        runs = [run for run in _word_runs(words) if run in id_by_run]
        if words in id_by_words:
            shared.append(SharedPrompt(prompt.id, id_by_words[words], True))
        elif runs:
            shared.append(SharedPrompt(prompt.id, id_by_run[runs[0]], False))
    return shared


def measure_overlap(
    sets: Mapping[str, Sequence[Prompt]], train: Sequence[str], test: Sequence[str]
) -> list[Overlap]:
    """The overlap of every set named in ``test`` with every other set named in ``train``."""
    overlaps = []
    for train_name in train:
        for test_name in test:
            if train_name == test_name:
                continue
            prompts = sets[test_name]
            short = sum(len(split_words(prompt.text)) < OVERLAP_WORDS for prompt in prompts)
            shared = tuple(find_shared_prompts(sets[train_name], prompts))
            overlaps.append(Overlap(train_name, test_name, len(prompts), short, shared))
    return overlaps


def without_overlap(prompts: Sequence[Prompt], others: Iterable[Prompt]) -> list[Prompt]:
    """``prompts`` without those that overlap with ``others``."""
    dropped = {shared.id for shared in find_shared_prompts(others, prompts)}
    return [prompt for prompt in by_id(prompts).values() if prompt.id not in dropped]
