"""TODO: what ipo_lib.profiles.reading is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipo_lib.profiles.layered import layered
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput, from_json


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
    """A profile by name or by the path of a ``.yml`` file, with settings changed by dotted name."""
    path = (
        Path(name)
        if name.endswith(".yml")
        else checkout() / "notebooks" / "profiles" / f"{name}.yml"
    )
    if not path.is_file():
        raise BadInput(
            f"profile {name!r} is unknown; known: {', '.join(profile_names())}, or the path of a .yml file"
        )
    data = {"name": path.stem, **layered(path)}
    for dotted, value in (overrides or {}).items():
        (*steps, last), place = dotted.split("."), data
        for step in steps:
            if not isinstance(place := place.setdefault(step, {}), dict):
                raise BadInput(f"parameter {dotted!r}: {step!r} holds a value, not settings")
        place[last] = value
    settings = _one_base(from_json(Profile, data))
    used = [
        *settings.evaluation.sets,
        *(one for spec in settings.prompts.values() for one in spec.apart),
    ]
    if strange := next((one for one in used if one not in settings.prompts), ""):
        raise BadInput(
            f"profile {settings.name!r}: prompt set {strange!r} is used but not there; known: {', '.join(settings.prompts)}"
        )
    return settings


def _one_base(settings: Profile) -> Profile:
    """The profile with its stages trained on the weights that are sampled.

    BadInput: a stage asks for another precision than the model, or a server would sample other weights.
    """
    own = settings.model.quantize
    for name in ("stage1", "stage2"):
        asked = getattr(settings, name).quantize
        if asked not in ("auto", own):
            hint = f"set model.quantize to {asked or 'null'}, or {name}.quantize to auto"
            raise BadInput(
                f"profile {settings.name!r}: {name}.quantize is {asked!r}, the model is sampled with {own!r}; {hint}"
            )
    if own and settings.model.server:
        hint = "drop model.quantize, or sample in this process"
        raise BadInput(
            f"profile {settings.name!r}: model.quantize is {own!r}, but a server samples whole weights; {hint}"
        )
    if own is None:
        return settings
    stages = {name: replace(getattr(settings, name), quantize=own) for name in ("stage1", "stage2")}
    return replace(settings, **stages)
