"""The objects every module shares: frozen records with plain fields, JSON both ways.

Field terms follow the paper (arXiv 2509.24393): a *prompt* is answered by a *rollout* (thinking trace, then answer),
judged by *verdicts*; the Continuation Safety Ratio (Eq. 1) is counted in *CSR points*; Eq. 2 and 3 give *turning
points*; a corrected trace is an *intervention*; two suffixes after one prefix are a *pair* (Eq. 4).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

Ids = tuple[int, ...]
Record = TypeVar("Record")

TRACE, ANSWER, BOTH, CONTINUATION = "trace", "answer", "trace+answer", "continuation"
SAFE, UNSAFE = "safe", "unsafe"


class BadInput(ValueError):
    """A user's mistake: one line that names the value and the mend. The command line prints it and exits with 2."""


@dataclass(frozen=True)
class Prompt:
    """One question. ``harm`` says whether a helpful answer would be harmful; ``source`` names the prompt set."""

    id: str
    text: str
    source: str
    harm: bool
    category: str = ""


@dataclass(frozen=True)
class Rollout:
    """One draw. ``token_ids`` follow the prompt ids; the first ``prefix_len`` of them were given, the rest sampled.

    ``text`` is the decoded ``token_ids``. ``finish`` is ``stop`` (the end-of-sequence token came; it is not among the
    ids), ``think`` (stopped at ``</think>`` as asked) or ``length`` (cut by the token limit).
    """

    id: str
    prompt_id: str
    prefix_len: int
    token_ids: Ids
    text: str
    finish: str
    draw: int
    sampler: str


@dataclass(frozen=True)
class Sentence:
    """A sentence of a trace: ``text[char_start:char_end]``, ``token_ids[token_start:token_end]`` of its rollout."""

    index: int
    char_start: int
    char_end: int
    token_start: int
    token_end: int


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one part of a rollout. ``label`` None means: not judged, and is counted as such.

    ``question`` ``harm`` is answered by safe/unsafe, ``refusal`` by refused/partly/answered, ``correct`` by
    correct/wrong. ``p`` is the probability of the first-named harm class (unsafe) where the judge gives one.
    """

    rollout_id: str
    part: str
    question: str
    label: str | None
    p: float | None
    raw: str
    judge: str


@dataclass(frozen=True)
class CsrPoint:
    """Counts behind S_i of Eq. 1 at the prefix ``token_ids[:cut]`` of one rollout."""

    rollout_id: str
    cut: int
    n_safe: int
    n_unsafe: int
    n_unknown: int

    @property
    def n(self) -> int:
        """Judged continuations; unknown ones carry no vote."""
        return self.n_safe + self.n_unsafe

    @property
    def s(self) -> float:
        """The estimate of S_i; nan when nothing was judged."""
        return self.n_safe / self.n if self.n else float("nan")


@dataclass(frozen=True)
class TurningPoint:
    """Where CSR turns (Eq. 2 ``safe``, Eq. 3 ``unsafe``). ``token`` and ``sentence`` are None when there is no turn.

    ``interval`` is the token range that holds the turn: (last cut before it, the turn]. ``flags`` name special cases,
    ``start-locked`` first among them.
    """

    rollout_id: str
    kind: str
    token: int | None
    sentence: int | None
    interval: tuple[int, int] | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intervention:
    """One replacement: the sentence at ``cut`` of ``rollout_id`` gave way to ``trigger_id``; ``result`` is the new rollout."""

    rollout_id: str
    cut: int
    trigger_id: str
    result: str
    round: int = 1
    accepted: bool | None = None


@dataclass(frozen=True)
class Pair:
    """A preference (x, chosen > rejected, h): both suffixes follow the same ``prompt_ids`` = chat ids + common prefix.

    ``h`` is the length of the common prefix in response tokens; ``why`` says where the pair came from.
    """

    id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    h: int
    why: str


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON values; tuples become lists."""
    return {
        field.name: list(value) if isinstance(value := getattr(record, field.name), tuple) else value
        for field in dataclasses.fields(record)
    }


def from_json(kind: type[Record], data: Any) -> Record:
    """The record back from its JSON. Raises BadInput naming the field that is missing, unknown or mistyped."""
    if not isinstance(data, dict):
        raise BadInput(f"{kind.__name__}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise BadInput(f"{kind.__name__}: unknown field {unknown[0]!r}; known: {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in data:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise BadInput(f"{kind.__name__}: field {name!r} is missing")
            continue
        values[name] = typed(hints[name], data[name], f"{kind.__name__}.{name}")
    return kind(**values)


def typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` if it fits the annotation (lists become tuples, ints may stand for floats), else BadInput."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is not type(None):
                try:
                    return typed(option, value, where)
                except BadInput:
                    continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(typed(inner[0], item, where) for item in value)
        if len(inner) == len(value):
            return tuple(typed(one, item, where) for one, item in zip(inner, value, strict=True))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is bool and isinstance(value, bool):
        return value
    elif isinstance(hint, type) and hint is not bool and isinstance(value, hint) and not isinstance(value, bool):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise BadInput(f"{where}: expected {expected}, found {value!r:.60}")


def canonical(data: Any) -> str:
    """One text for equal JSON values: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(data: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:length]
