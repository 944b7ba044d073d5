"""What a failed request to a server means: ask again, ask otherwise, leave it out, or stop.

Servers use one status for different things, and some report a failure with status 200. So status,
code and words of the message decide together, by the rules of ``server_policy.yml``:

- ``ADAPT``: the model does not take a parameter, or no system message. Asked without, it answers.
- ``DECLINED``: this request was filtered or is too long. The server answers others.
- ``AGAIN``: it passes. The request is made again.
- ``STOP``: no credit, a wrong key, an unknown model or address, and all that no rule knows. Every
  later request would fail as well, until somebody mends it.

Sources: the error pages of OpenAI, Azure, OpenRouter, Anthropic and Together, and what vLLM and TGI
send.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.records import from_json

AGAIN, ADAPT, DECLINED, STOP = "again", "adapt", "declined", "stop"
# Ways to ask otherwise, as ``server_policy.yml`` calls them.
NEW_LIMIT = "max_completion_tokens in place of max_tokens"
NO_TEMPERATURE = "no temperature"
NO_SYSTEM = "the system message at the head of the user's"
KEY = "KEY"  # in place of a remedy that names the key


@dataclass(frozen=True)
class Failure:
    """One failed request."""

    kind: str  # AGAIN, ADAPT, DECLINED or STOP
    reason: str  # in a few words, without the server's text
    remedy: str = ""  # where somebody has to mend it
    adaptation: str = ""  # where the request can be made otherwise


@dataclass(frozen=True)
class Adaptation:
    """How a server says that it wants to be asked otherwise."""

    parameter: str
    words: str


@dataclass(frozen=True)
class Rule:
    """Which failures are of a kind."""

    kind: str
    statuses: tuple[int, ...] = ()
    least: int = 0  # every status from here on
    words: str = ""
    said: str = ""  # added to the reason
    remedy: str = ""

    def fits(self, status: int, words: str) -> bool:
        """Whether a failure with this status and these words is meant."""
        if self.statuses and status not in self.statuses:
            return False
        return status >= self.least and bool(re.search(self.words, words))


@dataclass(frozen=True)
class Policy:
    """The rules of ``server_policy.yml``."""

    adaptations: Mapping[str, Adaptation]
    adapts: tuple[int, ...]
    rules: tuple[Rule, ...] = field(default_factory=tuple)


@functools.cache
def policy() -> Policy:
    """The policy, read once."""
    text = Path(__file__).with_name("server_policy.yml").read_text("utf-8")
    return from_json(Policy, yaml.safe_load(text))


def sort_failure(status: int, body: Any, key: str = "", leave_out: str = "") -> Failure:
    """What a failure means.

    Args:
        status: of the response.
        body: what the server said, parsed from JSON as far as that was possible.
        key: the environment variable that holds the key, for the remedy.
        leave_out: a pattern; a failure whose words, in lower case, it fits concerns this request
            alone, whatever the rules say. "": none.

    Returns:
        The failure. Its reason holds nothing of what the server said but a code of letters: a
        message may quote the request, or a part of the key.
    """
    code, parameter, words = _said(body)
    reason = f"status {status} {code}".strip()
    if status in policy().adapts:
        for name, adaptation in policy().adaptations.items():
            named = parameter and parameter == adaptation.parameter
            if named or re.search(adaptation.words, words):
                return Failure(ADAPT, reason, adaptation=name)
    if leave_out and re.search(leave_out, words):
        return Failure(DECLINED, f"{reason}, left out")
    rule = next(rule for rule in policy().rules if rule.fits(status, words))
    remedy = rule.remedy
    if remedy == KEY:
        remedy = f"correct the key in ${key}" if key else "name the variable that holds its key"
    said = f"{reason}, {rule.said}" if rule.said else reason
    return Failure(rule.kind, said, remedy)


def failure_inside(answer: Any) -> tuple[int, Any] | None:
    """The failure that an answer with status 200 reports, as (status, body); None: there is none.

    OpenRouter answers so when a model fails after it began: ``error`` stands in the answer or in
    its choice.
    """
    errors = [getattr(answer, "error", None)]
    for choice in getattr(answer, "choices", None) or []:
        errors.append(getattr(choice, "error", None))
    for error in filter(None, errors):
        code = str(error.get("code")) if isinstance(error, Mapping) else ""
        is_status = code.isdigit() and 400 <= int(code) < 600
        return int(code) if is_status else 502, error
    return None


def _said(body: Any) -> tuple[str, str, str]:
    """An error's code, if it is one word of letters; its parameter; its words in lower case."""
    error = _error(body)
    if not isinstance(error, Mapping):
        return "", "", str(error or "").casefold()
    names = [str(error[name]) for name in ("code", "type", "error_type") if error.get(name)]
    code = next((name for name in names if re.fullmatch("[A-Za-z_]{3,40}", name)), "")
    details = ("message", "metadata", "innererror", "detail")
    words = [*names, *(str(error[name]) for name in details if error.get(name))]
    return code, str(error.get("param") or ""), " ".join(words).casefold()


def _error(body: Any) -> Any:
    """The part of a body that tells the error: some servers wrap it, others do not."""
    if isinstance(body, list) and body:
        return _error(body[0])
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping | str):
        return body["error"]
    return body
