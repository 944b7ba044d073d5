"""Settings files: YAML, one on top of another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.records import BadInput


class Yaml(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """Plain data, in which 2e-4 is a number: YAML 1.1 asks for 2.0e-4 and takes it for text."""


Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def layered(path: Path) -> dict[str, Any]:
    """The settings of a profile file, on top of those of the profile that it is ``like``."""
    try:
        own = {**yaml.load(path.read_text("utf-8"), Yaml)}
    except yaml.YAMLError as error:
        raise BadInput(
            f"profile {str(path)!r} is not YAML: {' '.join(str(error).split())}"
        ) from None
    except TypeError:
        raise BadInput(
            f"profile {str(path)!r} holds no settings; write them as name: value"
        ) from None
    if not (parent := own.pop("like", "")):
        return own
    if not (other := path.with_name(f"{parent}.yml")).is_file():
        raise BadInput(f"profile {str(path)!r}: it is like {parent!r}, which is not beside it")
    return _over(layered(other), own)


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others on top; a ``Part`` is replaced as a whole."""
    for name, value in above.items():
        nested = (
            isinstance(value, dict) and isinstance(below.get(name), dict) and "use" not in value
        )
        below[name] = _over(below[name], value) if nested else value
    return below
