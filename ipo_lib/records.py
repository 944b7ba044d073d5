"""The objects every module shares: frozen records with plain fields, JSON both ways, in terms of arXiv 2509.24393. A
*prompt* is answered by a *rollout* (trace, then answer), judged by *verdicts*; the Continuation Safety Ratio (Eq. 1) is
counted in *CSR points*; Eq. 2 and 3 give *turning points*; a corrected trace is an *intervention*, two suffixes after
one prefix are a *pair* (Eq. 4)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from contextlib import suppress
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
    """One draw: ``token_ids`` follow the prompt ids, the first ``prefix_len`` were given; ``text`` is their decoding.
    ``finish``: ``stop`` (EOS came; it is not among the ids), ``think`` (at ``</think>``, as asked) or ``length``."""

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
    """A judge's word on one part of a rollout; ``label`` None means *not judged* and is counted as such.
    Labels by ``question``: ``harm`` safe/unsafe, ``refusal`` refused/partly/answered, ``correct`` correct/wrong.
    ``p`` is the probability of unsafe where the judge gives one; ``raw`` is what it said."""

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
    """Where CSR turns (Eq. 2 ``safe``, Eq. 3 ``unsafe``): ``token`` and ``sentence``, None when there is no turn.
    ``interval`` (last cut before it, the turn] holds it. ``flags`` name special cases, ``start-locked`` first."""

    rollout_id: str
    kind: str
    token: int | None
    sentence: int | None
    interval: tuple[int, int] | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intervention:
    """One replacement: at ``cut`` of ``rollout_id`` a sentence gave way to ``trigger_id``; ``result``: a rollout id."""

    rollout_id: str
    cut: int
    trigger_id: str
    result: str
    round: int = 1
    accepted: bool | None = None


@dataclass(frozen=True)
class Pair:
    """A preference (x, chosen > rejected, h): both suffixes follow ``prompt_ids`` = chat ids + common prefix, which is
    ``h`` response tokens long; ``why`` says where the pair came from."""

    id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    h: int
    why: str


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON values; tuples become lists."""
    values = ((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def from_json(kind: type[Record], data: Any) -> Record:
    """The record back from its JSON. Raises BadInput naming the field that is missing, unknown or mistyped."""
    if not isinstance(data, dict):
        raise BadInput(f"{kind.__name__}: expected an object, found {type(data).__name__}")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(hints)):
        raise BadInput(f"{kind.__name__}: unknown field {unknown[0]!r}; known: {', '.join(hints)}")
    required = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in data]:
        raise BadInput(f"{kind.__name__}: field {missing[0]!r} is missing")
    return kind(**{name: typed(hints[name], value, f"{kind.__name__}.{name}") for name, value in data.items()})


def typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` if it fits the annotation (lists become tuples, ints may stand for floats), else BadInput."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            with suppress(BadInput):
                return typed(option, value, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = inner[:1] * len(value) if inner[1:] == (Ellipsis,) else inner
        if len(inner) == len(value):
            return tuple(typed(one, item, where) for one, item in zip(inner, value, strict=True))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise BadInput(f"{where}: expected {expected}, found {value!r:.60}")


def canonical(data: Any) -> str:
    """One text for equal JSON values: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(data: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:length]
