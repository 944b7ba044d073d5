"""What a command line says: settings as ``name=value``, and the parameters that a notebook declares."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ipo_lib import prompts as sets
from ipo_lib.profiles.layered import Yaml
from ipo_lib.records import BadInput, canonical

NUMBERED = re.compile(r"\d\d_")  # begins a notebook's name
KEYWORD = "keyword"  # the judge that needs no model
PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "list": list}


def parse(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are YAML."""
    given = {}
    for name, equals, value in (pair.partition("=") for pair in pairs):
        if not equals or not name:
            raise BadInput(f"parameter {name + equals + value!r}: write name=value")
        try:
            given[name] = yaml.load(value, Yaml)
        except yaml.YAMLError:
            raise BadInput(f"parameter {name!r}: {value!r} is not a YAML value") from None
    return given


def declared(book: Path) -> dict[str, tuple[str, Any]]:
    """The parameters of a notebook from its tagged cell: the type and the default of each."""
    if not book.is_file():
        raise BadInput(
            f"notebook {str(book)!r} is missing; name it in notebooks/ or take it out of the profile"
        )
    cells = json.loads(book.read_text("utf-8"))["cells"]
    tagged = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    lines = [
        line
        for line in ast.parse("".join(tagged["source"])).body
        if isinstance(line, ast.AnnAssign)
    ]
    return {
        ast.unparse(one.target): (ast.unparse(one.annotation), ast.literal_eval(one.value))
        for one in lines
        if one.value
    }


def for_notebook(parameters: Mapping[str, Any], book: str) -> dict[str, Any]:
    """A profile's parameters for one notebook: those for all notebooks, and on top of them those under its name."""
    everywhere = {name: value for name, value in parameters.items() if not NUMBERED.match(name)}
    return {**everywhere, **(parameters.get(book) or {})}


def known_parameters(
    profile: str, parameters: Mapping[str, Any], books: Mapping[str, Mapping[str, Any]]
) -> None:
    """BadInput where a profile's ``parameters`` name a notebook, or a parameter, that does not exist.

    Args:
        profile: The profile's name, for the message.
        parameters: What it says under ``parameters``.
        books: The parameters that each notebook declares, by its name.
    """
    hint = "mend it under parameters"
    every = {name for declared_ in books.values() for name in declared_}
    for name, value in parameters.items():
        if not NUMBERED.match(name):
            if name not in every:
                raise BadInput(
                    f"profile {profile!r}: no notebook has the parameter {name!r}; {hint}"
                )
            continue
        if name not in books:
            raise BadInput(
                f"profile {profile!r}: no notebook is called {name!r}; known: {', '.join(sorted(books))}; {hint}"
            )
        if not isinstance(value, Mapping):
            raise BadInput(
                f"profile {profile!r}: {name} holds {value!r}; write its parameters as name: value; {hint}"
            )
        for inner in value:
            if inner not in books[name]:
                raise BadInput(f"profile {profile!r}: {name} has no parameter {inner!r}; {hint}")


def checked(name: str, value: Any, kind: str) -> Any:
    """A parameter of the declared type, or BadInput: papermill itself only warns."""
    expected: Any = PLAIN.get(kind)
    wrong_bool = isinstance(value, bool) and kind != "bool"
    if expected and (wrong_bool or not isinstance(value, expected)):
        raise BadInput(f"parameter {name!r}: expected {kind}, found {value!r}")
    return value


def local(model: str, prompts: str, judge: str) -> list[str]:
    """The settings that ``--model``, ``--prompts`` and ``--judge`` stand for."""
    file, _, column = prompts.partition("#")
    known = file in sets.known_prompt_sets()
    found = [f"model.folder={model}"] if model else []
    if prompts:
        found += [f"prompts.train_harmful.{name}=''" for name in ("file", "known", "category")]
        found += (
            [f"prompts.train_harmful.known={file}"]
            if known
            else [f"prompts.train_harmful.file={file}"]
        )
        found.append(f"prompts.train_harmful.text={column or 'prompt'}")
    url, _, name = judge.rpartition("#")
    if url:
        server = {"urls": [url], "model": name}
        found.append(
            f"judge={canonical({'use': 'ipo_lib.judges.rubric:rubric', 'arguments': {'server': server}})}"
        )
    elif judge and judge != KEYWORD:
        found.append(
            f"judge={canonical({'use': 'ipo_lib.judges.guards:guard', 'arguments': {'name': judge, 'revision': 'main'}})}"
        )
    return found
