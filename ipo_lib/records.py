"""The records that all modules share: frozen dataclasses with plain fields, and their JSON form.

In the order in which the method (arXiv 2509.24393) makes them:

1. A ``Prompt`` is answered by a ``Rollout``: a reasoning trace and an answer. A trace consists of
   ``Sentence``s.
2. A judge gives a ``Verdict`` on the trace or on the answer.
3. A ``CsrPoint`` counts how often a prefix is continued safely (Eq. 1). A ``TurningPoint`` is where
   that rate turns (Eq. 2 and 3).
4. An ``Intervention`` puts a safety trigger in the place of a compliance cue.
5. A ``Pair`` is two continuations of one prefix, of which training prefers one (Eq. 4).
"""

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
# Metadata of a field that was added later. JSON leaves it out at its default, so that the keys of
# stores that were written before the field existed stay the same.
SPARSE = {"sparse": True}


class BadInput(ValueError):
    """A mistake of the user, in one line that names the value and the remedy.

    The command line prints the message and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it names may have lines


@dataclass(frozen=True)
class Prompt:
    """One question to the model."""

    id: str
    text: str
    source: str  # name of the prompt set
    harm: bool  # whether a helpful answer would be harmful
    category: str = ""


@dataclass(frozen=True)
class Rollout:
    """One sampled response to a prompt."""

    id: str
    prompt_id: str
    prefix_len: int  # the first so many response tokens were given, not sampled
    token_ids: Ids  # all response tokens, without the prompt's and without a final EOS
    text: str  # the decoded response tokens
    finish: str  # "stop": EOS; "think": stopped at </think>, as asked; "length": cut off
    draw: int  # index of the draw among those of the same prefix and settings
    sampler: str
    # Index of the first token of a </think> that was put after `Sampling.think_tokens` tokens of
    # thinking. None: the model closed the trace itself, or the trace is open.
    forced: int | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True)
class Sentence:
    """One sentence of a trace, as two half-open spans: of characters and of tokens."""

    index: int
    char_start: int
    char_end: int
    token_start: int
    token_end: int


@dataclass(frozen=True)
class Verdict:
    """What a judge says about one part of a rollout."""

    rollout_id: str
    part: str
    question: str
    # "harm": safe, unsafe; "refusal": refused, partly, answered; "correct": correct, wrong.
    # None: not judged, and counted as such.
    label: str | None
    p: float | None  # probability of "unsafe", where the judge gives one
    raw: str  # the judge's own words
    judge: str


@dataclass(frozen=True)
class CsrPoint:
    """The counts behind S_i of Eq. 1: judged continuations of ``token_ids[:cut]`` of a rollout."""

    rollout_id: str
    cut: int
    n_safe: int
    n_unsafe: int
    n_unknown: int

    @property
    def n(self) -> int:
        """Number of judged continuations."""
        return self.n_safe + self.n_unsafe

    @property
    def s(self) -> float:
        """The estimate of S_i; nan if nothing was judged."""
        return self.n_safe / self.n if self.n else float("nan")


@dataclass(frozen=True)
class Evidence:
    """The continuations behind one end of a turning point's interval."""

    cut: int
    # All judged draws that pass through the cut. The search chose its next cuts by them, so they
    # give no unbiased interval.
    n_safe: int
    n: int
    # A fixed number of draws after the search, and the Clopper-Pearson interval of S from them.
    fresh_safe: int = 0
    fresh: int = 0
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class TurningPoint:
    """Where the CSR of one trace turns: Eq. 2 (``kind`` safe) or Eq. 3 (``kind`` unsafe)."""

    rollout_id: str
    kind: str
    token: int | None  # the cut of the turn; None: no turn
    sentence: int | None  # index of the sentence that ends at the turn or contains it
    interval: tuple[int, int] | None  # (last judged cut before the turn, the turn]
    flags: tuple[str, ...] = ()  # special cases, named in `ipo_lib.csr`
    before: Evidence | None = None  # draws at the lower end of the interval
    after: Evidence | None = None  # draws at the upper end
    # (cut, "pass" | "fail" | "undecided") for each cut that was tested with all its draws
    tested: tuple[tuple[int, str], ...] = ()
    rollouts: int = 0  # cost of the search: continuations,
    tokens: int = 0  # generated tokens,
    judged: int = 0  # and verdicts


@dataclass(frozen=True)
class Intervention:
    """One replacement: at ``cut`` a trigger took the place of a sentence of the rollout."""

    rollout_id: str
    cut: int
    trigger_id: str
    result: str  # id of the rollout that continues after the trigger
    round: int = 1
    accepted: bool | None = None


@dataclass(frozen=True, repr=False)
class Pair:
    """A preference of Eq. 4: after one prefix, ``chosen_ids`` are better than ``rejected_ids``."""

    id: str
    prompt_ids: Ids  # the chat prompt and the response tokens that both sides share
    chosen_ids: Ids
    rejected_ids: Ids  # empty: an example for supervised fine-tuning
    h: int  # number of shared response tokens
    why: str  # where the pair comes from
    given: int = 0  # the first so many chosen tokens are a trigger's, not sampled
    weight: float = 1.0  # factor of the pair's loss

    def __repr__(self) -> str:
        """In one line: its ids would fill pages."""
        lengths = f"{len(self.chosen_ids)} chosen and {len(self.rejected_ids)} rejected tokens"
        return f"Pair({self.id}, {self.why}: {lengths} after h = {self.h}, weight {self.weight:g})"


Prompts = Mapping[str, Prompt]  # by id
Rollouts = Sequence[Rollout]
Verdicts = Sequence[Verdict]
Labels = Mapping[str, str | None]  # of verdicts, by rollout id
Curves = Mapping[str, Sequence[CsrPoint]]  # by rollout id


class HasId(Protocol):
    """Anything with an id."""

    @property
    def id(self) -> str:
        """The id."""


Identified = TypeVar("Identified", bound=HasId)


def by_id(items: Iterable[Identified]) -> dict[str, Identified]:
    """The items by their id, in order; equal items count once.

    Raises:
        BadInput: two different items share an id.
    """
    unique: dict[str, Identified] = {}
    for item in items:
        if unique.setdefault(item.id, item) != item:
            kind = type(item).__name__.lower()
            raise BadInput(
                f"two different {kind}s have the id {item.id!r}; give each {kind} an id of its own"
            )
    return unique


OWN = "own"  # source of a prompt that was given as text


def as_prompts(prompts: Prompt | str | Iterable[Prompt | str]) -> list[Prompt]:
    """One prompt or several, each a ``Prompt`` or its text, as a list.

    A text becomes a prompt of the source ``own``, and its id comes from the text.
    """
    listed = [prompts] if isinstance(prompts, Prompt | str) else prompts
    return [_as_prompt(prompt) for prompt in listed]


def _as_prompt(prompt: Prompt | str) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput(f"a prompt is {prompt!r:.60}; give a Prompt or its text")
    return Prompt(f"{OWN}-{digest(prompt)}", prompt, OWN, harm=True)


def as_rollouts(rollouts: Rollout | Iterable[Rollout]) -> list[Rollout]:
    """One rollout or several as a list."""
    listed = list(rollouts) if isinstance(rollouts, Iterable) else [rollouts]
    for rollout in listed:
        if not isinstance(rollout, Rollout):
            raise BadInput(f"a rollout is {rollout!r:.60}; give a Rollout or a list of them")
    return listed


def prompt_of(rollout: Rollout, prompts: Prompts) -> Prompt:
    """The prompt of a rollout. BadInput: it is not among these."""
    if rollout.prompt_id not in prompts:
        raise BadInput(
            f"prompt {rollout.prompt_id!r} of rollout {rollout.id} is not among the {len(prompts)} "
            "given; give all prompts by id, as in `prompts` of judged rollouts"
        )
    return prompts[rollout.prompt_id]


def to_json(record: Any) -> dict[str, Any]:
    """The fields of a record, tuples as lists; a SPARSE field at its default is left out."""
    values = {}
    for column in fields(record):
        value = getattr(record, column.name)
        if not (column.metadata.get("sparse") and value == column.default):
            values[column.name] = list(value) if isinstance(value, tuple) else value
    return values


def from_json(kind: type[Record], data: Any, where: str = "") -> Record:
    """The record of class ``kind``, with the records inside it, from plain data.

    Args:
        kind: a dataclass.
        data: a mapping of its fields.
        where: dotted name of ``data`` in a larger whole, for messages.

    Raises:
        BadInput: a field is missing, unknown or of the wrong type.
    """
    owner = kind.__name__
    if not isinstance(data, Mapping):
        place = f" for {where!r}" if where else ""
        raise BadInput(f"{owner}: expected settings{place}, found {data!r:.60}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for name in data:
        if name not in hints:
            similar = difflib.get_close_matches(str(name), hints, 1)
            hint = f"known: {', '.join(hints)}"
            if similar:
                hint = f"did you mean {prefix + similar[0]!r}?"
            raise BadInput(f"{owner}: {f'{prefix}{name}'!r} is unknown; {hint}")
    for column in fields(kind):  # type: ignore[arg-type]
        required = column.default is MISSING and column.default_factory is MISSING
        if required and column.name not in data:
            raise BadInput(f"{owner}: {prefix + column.name!r} is missing")
    values = {}
    for name, value in data.items():
        values[name] = _convert(hints[name], value, prefix + name, owner)
    return kind(**values)


def hint_at(kind: Any, dotted: str) -> Any:
    """The type of a field by its dotted name, such as ``csr.draws``; None: there is no such field.

    Args:
        kind: a dataclass.
        dotted: names of fields, and keys of mappings.
    """
    hint: Any = kind
    for step in dotted.split("."):
        if typing.get_origin(hint) is types.UnionType:
            hint = typing.get_args(hint)[0]
        if is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(step)
        elif typing.get_origin(hint) is Mapping:
            hint = typing.get_args(hint)[1]
        else:
            return None
    return hint


def _convert(hint: Any, value: Any, name: str, owner: str) -> Any:
    """``value`` as the annotation ``hint`` asks for; BadInput if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # "a type or None": records have no other unions
        return None if value is None else _convert(arguments[0], value, name, owner)
    same_kind = isinstance(value, bool) == (hint is bool)  # in Python a bool is an int, too
    if hint is Any or (isinstance(hint, type) and isinstance(value, hint) and same_kind):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, name)
    if origin is Mapping and isinstance(value, Mapping):
        return {
            str(key): _convert(arguments[1], item, f"{name}.{key}", owner)
            for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) == len(value):
            items = zip(arguments, value, strict=True)
            return tuple(_convert(item_hint, item, name, owner) for item_hint, item in items)
    expected = hint if origin else hint.__name__
    if origin is Mapping:
        expected = "a mapping"
    elif origin is tuple and arguments[-1] is Ellipsis:
        expected = "a list, such as [a, b],"
    raise BadInput(f"{owner}: expected {expected} for {name!r}, found {value!r:.60}")


def canonical(data: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(data: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:length]
