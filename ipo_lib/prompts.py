"""Prompt sets by name: a local file, a hub data set at a pinned revision, or any function that returns prompts."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput, Prompt


@dataclass(frozen=True)
class PromptSet:
    """Where a set comes from and how much of it is taken. One of ``file`` (JSONL or CSV; ``~`` allowed, relative to the working
    folder), ``hub`` (``name@revision``) and ``function`` (``module:name``, called with ``name``, ``count`` and ``arguments``) is
    given. ``text`` and ``id`` name the columns. ``where`` keeps rows with these values; ``harm``: helping would be harmful."""

    count: int
    harm: bool = True
    file: str = ""
    hub: str = ""
    function: str = ""
    name: str = ""
    split: str = "train"
    text: str = "prompt"
    id: str = "id"
    category: str = ""
    where: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


def load(name: str, spec: PromptSet) -> list[Prompt]:
    """The first ``spec.count`` prompts of a set. Raises BadInput when it is missing, gated, misdescribed or empty."""
    if sum(map(bool, (spec.file, spec.hub, spec.function))) != 1:
        raise BadInput(f"prompt set {name!r}: give exactly one of file, hub and function")
    if spec.count < 1:
        raise BadInput(f"prompt set {name!r}: count {spec.count} leaves no prompt; use at least 1")
    if spec.function:
        found: list[Prompt] = reference(spec.function)(spec.name or name, spec.count, **spec.arguments)
    else:
        found = from_rows(name, spec, read(Path(spec.file).expanduser()) if spec.file else hub(name, spec))
    if not found:
        passes = f"no row of {spec.file or spec.hub or spec.function} passes {dict(spec.where)}"
        raise BadInput(f"prompt set {name!r} is empty: {passes}; mend `where` or the file")
    if len({prompt.id for prompt in found}) < len(found):
        raise BadInput(f"prompt set {name!r}: column {spec.id!r} repeats; name a column of distinct ids")
    return found


def from_rows(name: str, spec: PromptSet, rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """Rows of a table as prompts."""
    found: list[Prompt] = []
    for number, row in enumerate(rows):
        if any(str(row.get(column)) != str(value) for column, value in spec.where.items()):
            continue
        if spec.text not in row:
            raise BadInput(f"prompt set {name!r}: no column {spec.text!r} (text); columns: {', '.join(map(str, row))}")
        if len(found) == spec.count:
            break
        key, category = f"{name}-{row.get(spec.id, number)}", str(row.get(spec.category, "")) if spec.category else ""
        found.append(Prompt(key, str(row[spec.text]), spec.file or spec.hub, spec.harm, category))
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or CSV file."""
    if not path.is_file():
        raise BadInput(f"prompt file {str(path)!r} is missing; put it there or name another in the profile")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"prompt file {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside strings
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise BadInput(f"prompt file {str(path)!r}, line {number}: no JSON object; mend or delete the line") from None
    return rows


def hub(name: str, spec: PromptSet) -> Iterable[Mapping[str, Any]]:
    """The rows of a hub data set at its pinned revision."""
    dataset, _, revision = spec.hub.partition("@")
    if not revision:
        raise BadInput(f"prompt set {name!r}: {spec.hub!r} names no revision; write {dataset}@<commit>")
    from datasets import load_dataset

    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(dataset, revision=revision, split=spec.split)
    except (OSError, ValueError) as error:
        said, mend = str(error).splitlines()[0], "check the name, your access or the network"
        raise BadInput(f"prompt set {name!r}: {spec.hub} cannot be loaded ({said}); {mend}") from None
    return rows


def reference(path: str) -> Any:
    """The object that ``module:name`` names, so that settings can point at any judge, detector or prompt source."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise BadInput(f"{path!r} names no object; write module:name, for example ipo_lib.judging:KeywordJudge") from None
