"""A command line's arguments, read and checked before anything runs.

A *parameter* is what a notebook declares in its tagged cell, such as ``draws``. A *setting* is what
a profile holds, such as ``csr.draws``. Both are given as ``-p name=value``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ipo_lib import prompts as prompt_sets
from ipo_lib.profiles.reading import Yaml, checkout, read_profile
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput, canonical, digest, hint_at
from ipo_lib.store import Store

NUMBERED = re.compile(r"\d\d_")  # begins a notebook's name
KEYWORD = "keyword"  # the judge that needs no model
TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "dict": dict,
    "list": list,
}


@dataclass(frozen=True)
class RunPlan:
    """What ``ipo reproduce`` was asked for."""

    settings: Profile
    order: list[Path]  # all notebooks of the profile, and the asked ones if they are others
    notebooks: list[Path]  # those that were asked for
    values: dict[Path, dict[str, Any]]  # the parameters given to each notebook
    store: Path
    figures: Path
    runs: Path  # folder of the executed notebooks and of their records

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Every notebook's parameters, by its name, with the defaults of those not given."""
        parameters = {}
        for notebook in self.notebooks:
            defaults = {name: value for name, (_, value) in read_parameters(notebook).items()}
            parameters[notebook.stem] = {**defaults, **self.values[notebook]}
        return parameters


def plan_run(profile: str, pairs: list[str], store: str, figures: str) -> RunPlan:
    """Read a command line.

    Args:
        profile: a profile's name, or the path of its file.
        pairs: settings and notebook parameters as ``name=value``.
        store: folder of the run store; empty: the default one.
        figures: folder that figures are written to; empty: the profile's own in the checkout.

    Raises:
        BadInput: a name is unknown, or a value has another type.
    """
    if profile.endswith(".yml"):
        profile = str(Path(profile).resolve())
    # 1. The notebooks, and the parameters that they declare.
    folder = checkout() / "notebooks"
    chosen = parse_pairs([pair for pair in pairs if pair.startswith("notebooks=")])
    names = read_profile(profile, chosen).notebooks
    notebooks = [folder / f"{name}.ipynb" for name in names]
    all_names = dict.fromkeys([*read_profile(profile).notebooks, *names])
    order = [folder / f"{name}.ipynb" for name in all_names]
    declared = {notebook: read_parameters(notebook) for notebook in notebooks}
    kinds: dict[str, str] = {}
    for parameters in declared.values():
        kinds |= {name: kind for name, (kind, _) in parameters.items()}
    arguments = parse_pairs(pairs, kinds)
    # 2. What no notebook declares is a setting.
    overrides = dict(arguments)
    for parameters in declared.values():
        for name in parameters:
            overrides.pop(name, None)
    settings = read_profile(profile, overrides)
    shipped = {path.stem: read_parameters(path) for path in sorted(folder.glob("*.ipynb"))}
    check_profile_parameters(settings, shipped)
    # 3. The values of each notebook: those given win over the profile's.
    root = Store(store or None).root
    target = Path(figures).expanduser() if figures else checkout() / "figures" / settings.name
    common = {"profile": profile, "overrides": overrides}
    common |= {"store": str(root), "figures": str(target)}
    values = {}
    for notebook, parameters in declared.items():
        values[notebook] = dict(common)
        for name, value in {**profile_values(settings, notebook.stem), **arguments}.items():
            if name in parameters:
                values[notebook][name] = check_type(name, value, parameters[name][0])
    runs = root / "runs" / f"{settings.name}-{digest([str(target.resolve())], 6)}"
    return RunPlan(settings, order, notebooks, values, root, target, runs)


def choose_notebooks(profile: str, words: Sequence[str]) -> str:
    """The pair ``notebooks=[...]`` for notebooks that are named by how they begin, such as ``04``.

    Args:
        profile: a profile's name, or the path of its file.
        words: how the names begin; of the profile's notebooks, or else of any other.

    Raises:
        BadInput: no notebook begins so.
    """
    names = read_profile(profile).notebooks
    others = [path.stem for path in sorted((checkout() / "notebooks").glob("*.ipynb"))]
    chosen = []
    for word in words:
        begin = word.removesuffix(".ipynb")
        found = [name for name in names if Path(name).name.startswith(begin)]
        found = found or [name for name in others if name.startswith(begin)]
        if not found:
            known = dict.fromkeys([*names, *others])
            raise BadInput(f"there is no notebook {word!r}; there are {', '.join(known)}")
        chosen += found
    return f"notebooks=[{', '.join(dict.fromkeys(chosen))}]"


def profile_family(profile: str) -> list[str]:
    """The names of a profile and of those that it is ``like``, the nearest first."""
    path = Path(profile)
    if path.suffix != ".yml":
        path = checkout() / "notebooks" / "profiles" / f"{profile}.yml"
    names = []
    while path.is_file():
        names.append(path.stem)
        settings = yaml.load(path.read_text("utf-8"), Yaml)
        path = path.with_name(f"{settings.get('like')}.yml")
    return names


def parse_pairs(pairs: list[str], kinds: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``name=value`` pairs as values of the type that they set.

    A text is taken as it was written, so that ``no``, ``1e3`` or ``a #b`` stay texts. All else is
    YAML, such as ``[a, b]``.

    Args:
        pairs: as written.
        kinds: the types of notebook parameters, by name; all others are settings of a profile.

    Raises:
        BadInput: a pair has no equals sign, or a value is no YAML.
    """
    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadInput(f"parameter {pair!r}: write name=value")
        kind = hint_at(Profile, name)
        if kinds and name in kinds:
            kind = str if kinds[name] == "str" else None
        if kind is str:
            arguments[name] = value
            continue
        texts_only = kind in (tuple[str, ...], Mapping[str, str])
        try:
            arguments[name] = yaml.load(value, yaml.BaseLoader if texts_only else Yaml)
        except yaml.YAMLError:
            raise BadInput(f"parameter {name!r}: {value!r} is not a YAML value") from None
    return arguments


def read_parameters(notebook: Path) -> dict[str, tuple[str, Any]]:
    """The type and the default of each parameter that a notebook's tagged cell declares."""
    if not notebook.is_file():
        raise BadInput(
            f"notebook {str(notebook)!r} is missing; name it in notebooks/ or take it out of the "
            "profile"
        )
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    tagged = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    parameters = {}
    for line in ast.parse("".join(tagged["source"])).body:
        if isinstance(line, ast.AnnAssign) and line.value:
            kind, default = ast.unparse(line.annotation), ast.literal_eval(line.value)
            parameters[ast.unparse(line.target)] = (kind, default)
    return parameters


def profile_values(settings: Profile, notebook: str) -> dict[str, Any]:
    """A profile's parameters for one notebook: those for all, then those under its name."""
    values = {}
    for name, value in settings.parameters.items():
        if not NUMBERED.match(name):
            values[name] = value
    return {**values, **(settings.parameters.get(notebook) or {})}


def check_profile_parameters(settings: Profile, declared: Mapping[str, Mapping[str, Any]]) -> None:
    """BadInput where a profile's ``parameters`` name a notebook or a parameter that is not there.

    Args:
        settings: the profile.
        declared: the parameters that each notebook declares, by its name.
    """
    profile, hint = f"profile {settings.name!r}", "correct it under parameters"
    for name, value in settings.parameters.items():
        if not NUMBERED.match(name):
            if not any(name in parameters for parameters in declared.values()):
                raise BadInput(f"{profile}: no notebook has the parameter {name!r}; {hint}")
            continue
        if name not in declared:
            known = ", ".join(sorted(declared))
            raise BadInput(f"{profile}: no notebook is called {name!r}; known: {known}; {hint}")
        if not isinstance(value, Mapping):
            raise BadInput(
                f"{profile}: {name} holds {value!r}; write its parameters as name: value; {hint}"
            )
        for parameter in value:
            if parameter not in declared[name]:
                raise BadInput(f"{profile}: {name} has no parameter {parameter!r}; {hint}")


def check_type(name: str, value: Any, kind: str) -> Any:
    """A parameter's value, or BadInput where it is not of the declared type."""
    wrong_bool = isinstance(value, bool) and kind != "bool"
    if kind in TYPES and (wrong_bool or not isinstance(value, TYPES[kind])):
        raise BadInput(f"parameter {name!r}: expected {kind}, found {value!r}")
    return value


def model_settings(model: str, prompts: str, judge: str) -> list[str]:
    """The settings that ``--model``, ``--prompts`` and ``--judge`` stand for.

    Args:
        model: the model's folder.
        prompts: a known prompt set, or ``FILE#column``.
        judge: ``keyword``, a guard's name, or ``URL#model``.
    """
    pairs = [f"model.folder={model}"] if model else []
    if prompts:
        file, _, column = prompts.partition("#")
        source = "known" if file in prompt_sets.known_prompt_sets() else "file"
        prefix = "prompts.train_harmful"
        pairs += [f"{prefix}.{name}=" for name in ("file", "known", "category")]
        pairs += [f"{prefix}.{source}={file}", f"{prefix}.text={column or 'prompt'}"]
    url, _, name = judge.rpartition("#")
    component: dict[str, Any] = {}
    if url:
        server = {"urls": [url], "model": name}
        component = {"use": "ipo_lib.judges.rubric:rubric", "arguments": {"server": server}}
    elif judge and judge != KEYWORD:
        arguments = {"name": judge, "revision": "main"}
        component = {"use": "ipo_lib.judges.guards:guard", "arguments": arguments}
    if component:
        pairs.append(f"judge={canonical(component)}")
    return pairs
