"""Profiles as YAML files: one may build on another, and settings can be changed by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput, from_json


class Yaml(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """Plain data, in which 2e-4 is a number: YAML 1.1 asks for 2.0e-4 and takes it for text."""


Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def checkout() -> Path:
    """The checkout that holds ``notebooks/`` and ``figures/``. Raises BadInput outside one."""
    for folder in (Path(__file__).parents[2], Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks" / "profiles").is_dir():
            return folder
    raise BadInput(
        "no notebooks/profiles here: run inside a checkout, installed with pip install -e ."
    )


def profile_names() -> list[str]:
    """The names of the shipped profiles."""
    return sorted(path.stem for path in (checkout() / "notebooks" / "profiles").glob("*.yml"))


def read_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """A profile with some settings changed.

    Args:
        name: a shipped profile's name, or the path of a ``.yml`` file.
        overrides: new values by dotted name, such as ``{"csr.draws": 16}``.
    """
    path = Path(name)
    if path.suffix != ".yml":
        path = checkout() / "notebooks" / "profiles" / f"{name}.yml"
    if not path.is_file():
        listed = ", ".join(profile_names())
        raise BadInput(f"profile {name!r} is unknown; known: {listed}, or the path of a .yml file")
    data = {"name": path.stem, **read_layers(path)}
    for dotted, value in (overrides or {}).items():
        _set(data, dotted, value)
    profile = _with_one_precision(from_json(Profile, data))
    _check_prompt_sets(profile)
    return profile


def read_layers(path: Path) -> dict[str, Any]:
    """The settings of a profile's file, over those of the profile that it is ``like``."""
    try:
        settings = {**yaml.load(path.read_text("utf-8"), Yaml)}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"profile {str(path)!r} is not YAML: {reason}") from None
    except TypeError:
        raise BadInput(
            f"profile {str(path)!r} holds no settings; write them as name: value"
        ) from None
    parent = settings.pop("like", "")
    if not parent:
        return settings
    parent_path = path.with_name(f"{parent}.yml")
    if not parent_path.is_file():
        raise BadInput(f"profile {str(path)!r}: it is like {parent!r}, which is not beside it")
    return _merged(read_layers(parent_path), settings)


def _merged(lower: dict[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``lower`` with the values of ``upper``; a ``Component`` is replaced as a whole."""
    for name, value in upper.items():
        both_nested = isinstance(value, dict) and isinstance(lower.get(name), dict)
        if both_nested and "use" not in value:
            lower[name] = _merged(lower[name], value)
        else:
            lower[name] = value
    return lower


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value by its dotted name."""
    *steps, last = dotted.split(".")
    for step in steps:
        data = data.setdefault(step, {})
        if not isinstance(data, dict):
            raise BadInput(f"parameter {dotted!r}: {step!r} holds a value, not settings")
    data[last] = value


def _check_prompt_sets(profile: Profile) -> None:
    """BadInput where a prompt set is used that the profile does not have."""
    used = list(profile.evaluation.sets)
    for prompt_set in profile.prompts.values():
        used += prompt_set.apart
    for name in used:
        if name not in profile.prompts:
            listed = ", ".join(profile.prompts)
            raise BadInput(
                f"profile {profile.name!r}: prompt set {name!r} is used but not there; "
                f"known: {listed}"
            )


def _with_one_precision(profile: Profile) -> Profile:
    """The profile with both stages trained on the weights that are sampled.

    Raises:
        BadInput: a stage asks for another precision, or a server would sample other weights.
    """
    quantize = profile.model.quantize
    for name in ("stage1", "stage2"):
        asked = getattr(profile, name).quantize
        if asked not in ("auto", quantize):
            hint = f"set model.quantize to {asked or 'null'}, or {name}.quantize to auto"
            raise BadInput(
                f"profile {profile.name!r}: {name}.quantize is {asked!r}, the model is sampled "
                f"with {quantize!r}; {hint}"
            )
    if quantize is None:
        return profile
    if profile.model.server:
        raise BadInput(
            f"profile {profile.name!r}: model.quantize is {quantize!r}, but a server samples whole "
            "weights; drop model.quantize, or sample in this process"
        )
    return replace(
        profile,
        stage1=replace(profile.stage1, quantize=quantize),
        stage2=replace(profile.stage2, quantize=quantize),
    )
