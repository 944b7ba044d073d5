"""The objects every module shares: frozen records with plain fields, JSON both ways, in terms of arXiv 2509.24393. A *prompt* is
answered by a *rollout* (trace, answer), judged by *verdicts*; the Continuation Safety Ratio (Eq. 1) is counted in *CSR points*;
Eq. 2 and 3 give *turning points*; a corrected trace is an *intervention*, two suffixes after one prefix are a *pair* (Eq. 4)."""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Protocol, TypeVar

Ids = tuple[int, ...]
Record = TypeVar("Record")

TRACE, ANSWER, BOTH, CONTINUATION = "trace", "answer", "trace+answer", "continuation"
SAFE, UNSAFE = "safe", "unsafe"
SPARSE = {
    "sparse": True
}  # metadata of a field that came later: at its default the stores of before keep their keys


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
    ``finish``: ``stop`` (EOS came; it is not among the ids), ``think`` (at ``</think>``, as asked) or ``length``.
    ``forced``: the place of the first token of a ``</think>`` that was put there after so many tokens of thinking and not
    sampled (``Sampling.think_tokens``); None: the model closed its trace itself, or never."""

    id: str
    prompt_id: str
    prefix_len: int
    token_ids: Ids
    text: str
    finish: str
    draw: int
    sampler: str
    forced: int | None = field(default=None, metadata=SPARSE)


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
class Evidence:
    """What was drawn at a cut. ``n_safe`` of ``n``: all judged draws that pass through it, which decided where to look next and
    so give no interval. ``fresh_safe`` of ``fresh``: a fixed number of draws made when the search was over, with their
    Clopper-Pearson interval of S, [``low``, ``high``]."""

    cut: int
    n_safe: int
    n: int
    fresh_safe: int = 0
    fresh: int = 0
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class TurningPoint:
    """Where CSR turns (Eq. 2 ``safe``, Eq. 3 ``unsafe``): ``token`` and ``sentence``, None when there is no turn. ``interval``
    (last cut before it, the turn] holds it. ``flags`` name special cases, ``start-locked`` first. ``before`` and ``after``: the
    draws at the two ends of the interval. ``tested``: cuts decided at full strength (``pass``, ``fail``, ``undecided``).
    ``rollouts``, ``tokens``, ``judged``: what finding it cost."""

    rollout_id: str
    kind: str
    token: int | None
    sentence: int | None
    interval: tuple[int, int] | None
    flags: tuple[str, ...] = ()
    before: Evidence | None = None
    after: Evidence | None = None
    tested: tuple[tuple[int, str], ...] = ()
    rollouts: int = 0
    tokens: int = 0
    judged: int = 0


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
    """A preference (x, chosen > rejected, h): both suffixes follow ``prompt_ids`` = chat ids + common prefix, which is ``h``
    response tokens long; ``why`` says where the pair came from. The first ``given`` chosen tokens are a trigger's, put there and
    not sampled; ``weight`` scales the pair's loss. Without ``rejected_ids`` it is an example for SFT."""

    id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    h: int
    why: str
    given: int = 0
    weight: float = 1.0


Prompts = Mapping[str, Prompt]  # by id
Rollouts = Sequence[Rollout]
Verdicts = Sequence[Verdict]
Labels = Mapping[str, str | None]  # of verdicts, by rollout id
Curves = Mapping[str, Sequence[CsrPoint]]  # by rollout id


class HasId(Protocol):
    """Anything that is known by an id of its own."""

    @property
    def id(self) -> str:
        """The id."""


Named = TypeVar("Named", bound=HasId)


def by_id(items: Iterable[Named]) -> dict[str, Named]:
    """The items by their ``id``, in order. An item that comes again is no fault; BadInput when two different ones share an id."""
    found: dict[str, Named] = {}
    for item in items:
        if found.setdefault(item.id, item) != item:
            kind = type(item).__name__.lower()
            raise BadInput(
                f"two different {kind}s have the id {item.id!r}; give each {kind} an id of its own"
            )
    return found


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON values; tuples become lists. A field marked SPARSE is left out at its default."""
    found = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if not (one.metadata.get("sparse") and value == one.default):
            found[one.name] = list(value) if isinstance(value, tuple) else value
    return found


def from_json(kind: type[Record], data: Any, where: str = "") -> Record:
    """The record and those inside it from plain data; BadInput names what is missing, unknown or mistyped, after ``where``."""
    if not isinstance(data, Mapping):
        raise BadInput(
            f"{kind.__name__}: expected settings{where and f' for {where!r}'}, found {data!r:.60}"
        )
    hints, prefix = typing.get_type_hints(kind), where and f"{where}."
    for name in (str(name) for name in data if name not in hints):
        near = difflib.get_close_matches(name, hints, 1)
        hint = f"did you mean {prefix + near[0]!r}?" if near else f"known: {', '.join(hints)}"
        raise BadInput(f"{kind.__name__}: {prefix + name!r} is unknown; {hint}")
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name not in data and one.default is one.default_factory is MISSING:
            raise BadInput(f"{kind.__name__}: {prefix + one.name!r} is missing")
    return kind(
        **{
            name: _typed(hints[name], value, prefix + name, kind.__name__)
            for name, value in data.items()
        }
    )


def _typed(hint: Any, value: Any, where: str, owner: str) -> Any:
    """``value`` if it fits the annotation (lists become tuples, ints may stand for floats), else BadInput."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    plain = hint is Any or (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) == (hint is bool)
    )
    if plain or (value is None and type(None) in inner):
        return value
    if origin is types.UnionType:  # a type or None; there are no others in records
        return _typed(inner[0], value, where, owner)
    if is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is Mapping and isinstance(value, Mapping):
        return {
            str(key): _typed(inner[1], one, f"{where}.{key}", owner) for key, one in value.items()
        }
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = inner[:1] * len(value) if inner[1:] == (Ellipsis,) else inner
        if len(inner) == len(value):
            return tuple(
                _typed(one, item, where, owner) for one, item in zip(inner, value, strict=True)
            )
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = "a mapping" if origin is Mapping else hint.__name__ if origin is None else hint
    raise BadInput(f"{owner}: expected {expected} for {where!r}, found {value!r:.60}")


def canonical(data: Any) -> str:
    """One text for equal JSON values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(data: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:length]
