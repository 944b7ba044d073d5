"""Prompt sets by name: a known set (``prompt_sets.yml``), a local file, a hub data set at a pinned revision, or any function
that returns prompts."""

from __future__ import annotations

import csv
import functools
import importlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ipo_lib.records import BadInput, Prompt, digest

KNOWN = Path(__file__).with_name("prompt_sets.yml")
SLOT = "{request}"  # where a template takes the request; one without it is put before the request


@dataclass(frozen=True)
class PromptSet:
    """Where a set comes from and how much of it is taken. One of ``known`` (a name of ``prompt_sets.yml``: its file under
    ``$IPO_DATA`` where there is one, else the hub), ``file`` (JSONL, CSV or TSV; ``~`` allowed, relative to the working folder),
    ``hub`` (``name@revision``, with ``config``, ``split`` and ``options`` of ``load_dataset``) and ``function`` (``module:name``,
    called with ``name``, ``count`` and ``arguments``) is given. ``text`` and ``id`` name the columns (id "": the row's number).
    ``where`` keeps rows with these values; ``shuffle``: their order by this seed, as ``datasets`` shuffles; ``digest``: of all
    their texts in this order. ``templates``: a file of attacks; each, or each of ``attacks``, is put around every prompt.
    ``apart``: sets of the profile; prompts that overlap with them are left out. ``harm``: helping would be harmful."""

    count: int
    harm: bool = True
    known: str = ""
    file: str = ""
    hub: str = ""
    function: str = ""
    name: str = ""
    config: str = ""
    split: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str = "prompt"
    id: str = "id"
    category: str = ""
    where: Mapping[str, str] = field(default_factory=dict)
    shuffle: int | None = None
    digest: str = ""
    templates: str = ""
    attacks: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Prompts at most: every one of ``count`` once for each of the named ``attacks``."""
        return self.count * max(len(self.attacks), 1)


@functools.cache
def known_prompt_sets() -> dict[str, dict[str, Any]]:
    """The known sets: what each is, the fields it has wherever it comes from, and those of its local and its hub copy."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(KNOWN.read_text("utf-8"))
    return found


def data_folder() -> Path | None:
    """The folder of local copies, ``$IPO_DATA``."""
    return Path(folder).expanduser() if (folder := os.environ.get("IPO_DATA", "")) else None


def located(name: str, spec: PromptSet) -> PromptSet:
    """The set with its known name resolved to the local file or the hub. BadInput: no such name, or nowhere to take it from."""
    if not spec.known:
        return spec
    if spec.known not in known_prompt_sets():
        raise BadInput(
            f"prompt set {name!r}: {spec.known!r} is not known; choose one of {', '.join(known_prompt_sets())}"
        )
    entry, folder = known_prompt_sets()[spec.known], data_folder()
    local = folder / entry["local"]["file"] if folder else None
    if local and local.is_file():
        source = {**entry["local"], "file": str(local)}
    elif "hub" in entry:
        source = entry["hub"]
    else:
        raise BadInput(
            f"prompt set {name!r}: {spec.known} is on no hub; put {entry['local']['file']} under $IPO_DATA"
        )
    own = {
        one.name: value
        for one in fields(spec)
        if one.default != (value := getattr(spec, one.name)) and value != {}
    }
    return PromptSet(
        **{**entry["fields"], "digest": entry.get("digest", ""), **source, **own, "known": ""}
    )


def load_prompts(name: str, spec: PromptSet) -> list[Prompt]:
    """The first ``spec.count`` prompts of a set. Raises BadInput when it is missing, gated, misdescribed or empty."""
    if sum(map(bool, (spec.known, spec.file, spec.hub, spec.function))) != 1:
        raise BadInput(f"prompt set {name!r}: give exactly one of known, file, hub and function")
    if spec.count < 1:
        raise BadInput(f"prompt set {name!r}: count {spec.count} leaves no prompt; use at least 1")
    where = located(name, spec)
    if where.function:
        prompts: list[Prompt] = object_named(where.function)(
            where.name or name, where.count, **where.arguments
        )
    else:
        rows = (
            read_rows(Path(where.file).expanduser()) if where.file else hub(name, where, spec.known)
        )
        prompts = from_rows(name, where, rows, spec.known or where.file or where.hub)
    if not prompts:
        passes = f"no row of {where.file or where.hub or where.function} passes {dict(where.where)}"
        raise BadInput(f"prompt set {name!r} is empty: {passes}; mend `where` or the file")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise BadInput(
            f"prompt set {name!r}: column {where.id!r} repeats; name a column of distinct ids"
        )
    return attacked(name, where, prompts) if where.templates else prompts


def from_rows(
    name: str, spec: PromptSet, rows: Iterable[Mapping[str, Any]], source: str
) -> list[Prompt]:
    """Rows of a table as prompts."""
    kept = [
        (number, row)
        for number, row in enumerate(rows)
        if all(str(row.get(c)) == str(v) for c, v in spec.where.items())
    ]
    if lacking := next((row for _, row in kept if spec.text not in row), None):
        raise BadInput(
            f"prompt set {name!r}: no column {spec.text!r} (text); columns: {', '.join(map(str, lacking))}"
        )
    if spec.shuffle is not None:
        kept = [kept[at] for at in np.random.default_rng(spec.shuffle).permutation(len(kept))]
    if spec.digest and (own := digest([row[spec.text] for _, row in kept])) != spec.digest:
        hint = "take another revision or copy, or leave the digest out"
        raise BadInput(
            f"prompt set {name!r}: the texts of {source} have digest {own}, not {spec.digest}; {hint}"
        )
    chosen = []
    for number, row in kept[: spec.count]:
        category = str(row.get(spec.category, "")) if spec.category else ""
        chosen.append(
            Prompt(
                f"{name}-{row.get(spec.id, number)}",
                str(row[spec.text]),
                source,
                spec.harm,
                category,
            )
        )
    return chosen


def attacked(name: str, spec: PromptSet, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt inside every chosen attack template, prompt by prompt."""
    path, folder = Path(spec.templates).expanduser(), data_folder()
    path = folder / path if folder and not path.is_file() else path
    templates = {str(row["id"]): str(row["template"]) for row in read_rows(path)}
    if missing := [one for one in spec.attacks if one not in templates]:
        raise BadInput(
            f"prompt set {name!r}: no attack {missing[0]!r} in {path}; it holds {', '.join(templates)}"
        )
    chosen = {
        key: template if SLOT in template else f"{template}\n\n{SLOT}"
        for key, template in templates.items()
    }
    return [
        Prompt(f"{one.id}/{key}", template.replace(SLOT, one.text), one.source, one.harm, key)
        for one in prompts
        for key, template in chosen.items()
        if not spec.attacks or key in spec.attacks
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL, CSV or TSV file."""
    if not path.is_file():
        raise BadInput(
            f"prompt file {str(path)!r} is missing; put it there or name another in the profile"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"prompt file {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    if path.suffix in (".csv", ".tsv"):
        return list(
            csv.DictReader(
                io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ","
            )
        )
    rows = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # splitlines would cut at U+2028 inside strings
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise BadInput(
                f"prompt file {str(path)!r}, line {number}: no JSON object; mend or delete the line"
            ) from None
    return rows


def hub(name: str, spec: PromptSet, listed: str = "") -> Iterable[Mapping[str, Any]]:
    """The rows of a hub data set at its pinned revision; of the ``listed`` known one the mend is known, too."""
    dataset, _, revision = spec.hub.partition("@")
    if not revision:
        raise BadInput(
            f"prompt set {name!r}: {spec.hub!r} names no revision; write {dataset}@<commit>"
        )
    from datasets import load_dataset

    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(
            dataset,
            *filter(None, [spec.config]),
            revision=revision,
            split=spec.split,
            **spec.options,
        )
    except (OSError, ValueError) as error:
        said, entry = str(error).splitlines()[0], known_prompt_sets().get(listed, {})
        local = f", or put {entry['local']['file']} under $IPO_DATA" if entry else ""
        hint = (
            entry.get("access", "check the name, the revision, your access or the network") + local
        )
        raise BadInput(
            f"prompt set {name!r}: {spec.hub} cannot be loaded ({said}); {hint}"
        ) from None
    return rows


def object_named(path: str) -> Any:
    """The object that ``module:name`` names, so that settings can point at any judge, detector or prompt source."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise BadInput(
            f"{path!r} names no object; write module:name, for example ipo_lib.judging:KeywordJudge"
        ) from None
