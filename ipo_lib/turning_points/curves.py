"""Recorded outcome curves: traces whose every way of leaving was sampled once, replayed as often as an estimator asks, so that
estimators can be compared without a model and against exact truth.

A file holds one trace a line (JSONL, ``.gz`` or not): ``id``; ``token_ids``; ``sentence_ends``, each a number of tokens;
``p_token``, the sampler's probability of the trace's own token at each position; ``leave``, at each position a list of
``[weight, safe, tokens]`` for the continuations that leave the trace there (``safe`` 1, 0, null for unjudged, or a share;
``tokens`` are counted from the one that leaves); ``label``, the trace's own outcome (safe or 1, unsafe or 0, null). With
``grid``, a list of positions, ``leave`` has an entry for each of these, and so may ``p_token``: then nothing leaves between
them; with a ``p_token`` for every token, continuations leave between two grid positions as at the first of them. A position that
is left with a probability over ``RARE`` needs something in ``leave``; below that, an empty one means that nothing leaves
there."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from ipo_lib.chat import Chat
from ipo_lib.judging import Exchange
from ipo_lib.records import SAFE, UNSAFE, BadInput, Ids, Prompt, Rollout, Verdict, by_id, digest
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stages import JudgedRollouts, Session
from ipo_lib.store import Store
from ipo_lib.turning_points.exhaustive import UNKNOWN, Ask, Draws, Result, Trace, run_together

RARE = 0.01
ROUNDED = 1e-4  # by which a recorder may have rounded a probability
FLOOR = 1e-12  # of a probability whose logarithm is taken
LABELS = {SAFE: SAFE, UNSAFE: UNSAFE, 1: SAFE, 0: UNSAFE, None: None}
AWAY, ENDS = (
    -1,
    {1: -2, 0: -3, UNKNOWN: -4},
)  # ids that no vocabulary has: a token off the trace, and how it all ended
NEEDED = ("id", "token_ids", "sentence_ends", "p_token", "leave", "label")


@dataclass(frozen=True)
class Curve:
    """One recorded trace with its ways of leaving: ``ways[d]`` are the (weight, safe, tokens) of position d; ``safe`` is nan
    where nobody could judge."""

    trace: Trace
    ways: Sequence[Sequence[tuple[float, float, int]]]

    @property
    def id(self) -> str:
        """That of its trace."""
        return self.trace.id

    @cached_property
    def truth(self) -> np.ndarray[Any, Any]:
        """S at every cut, [tokens + 1], exactly: S_c = p_c S_{c+1} + (1 - p_c) D_c with D_c the safe share of those that leave at
        c, from S = 1 or 0 at the end; unjudged ways carry no weight. nan throughout where the label is None."""
        s = np.full(
            len(self.trace.p) + 1, {SAFE: 1.0, UNSAFE: 0.0}.get(self.trace.label or "", math.nan)
        )
        for at in range(len(self.trace.p) - 1, -1, -1):
            known = [(weight, safe) for weight, safe, _ in self.ways[at] if not math.isnan(safe)]
            total = sum(weight for weight, _ in known)
            left = sum(weight * safe for weight, safe in known) / total if total else s[at + 1]
            s[at] = self.trace.p[at] * s[at + 1] + (1 - self.trace.p[at]) * left
        return s

    @cached_property
    def _tables(self) -> tuple[np.ndarray[Any, Any], ...]:
        """Falling log-survival at every cut; for the ways of all positions in a row: rising weights, safe, tokens; where each
        position's weights begin and end."""
        survival = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(self.trace.p, FLOOR)))])
        flat = np.array([way for ways in self.ways for way in ways] or [(0.0, 0.0, 0)], dtype=float)
        edges = np.concatenate([[0], np.cumsum([len(ways) for ways in self.ways])])
        rising = np.concatenate([[0.0], np.cumsum(flat[:, 0])])
        return survival, rising, flat[:, 1], flat[:, 2], rising[np.minimum(edges, len(rising) - 1)]

    def draw(self, asks: Sequence[Ask], random: np.random.Generator) -> Draws:
        """The draws asked for, ask by ask."""
        survival, rising, safe, tokens, ends = self._tables
        born = np.repeat([ask.cut for ask in asks], [ask.n for ask in asks])
        u, way, toss = random.random((3, len(born)))
        left = np.searchsorted(-survival[1:], -(survival[born] + np.log1p(-u)), side="right")
        gone = left < len(self.trace.p)
        at = np.minimum(left, len(self.trace.p) - 1)
        which = (
            np.searchsorted(rising, ends[at] + way * (ends[at + 1] - ends[at]), side="right") - 1
        )
        which = np.minimum(which, len(safe) - 1)
        own = {SAFE: 1, UNSAFE: 0}.get(self.trace.label or "", UNKNOWN)
        outcome = np.where(np.isnan(safe[which]), UNKNOWN, toss < safe[which])
        cost = left - born + np.where(gone, tokens[which], 0)
        return Draws(born, left, np.where(gone, outcome, own).astype(int), cost.astype(int))


@dataclass(frozen=True)
class Flips:
    """A judge's errors put upon exact outcomes: each draw's own (independent), or ``shared`` by all draws born at one cut."""

    sensitivity: float
    specificity: float
    shared: bool = False

    def __call__(
        self, drawn: Draws, random: np.random.Generator, memory: dict[int, float]
    ) -> Draws:
        """The outcomes as this judge would give them; ``memory`` holds what was tossed for the cuts of one trace."""
        u = random.random(len(drawn.born))
        if self.shared:
            for cut in sorted(set(drawn.born.tolist()) - memory.keys()):
                memory[cut] = random.random()
            u = np.array([memory[cut] for cut in drawn.born.tolist()])
        wrong = u >= np.where(drawn.safe == 1, self.specificity, self.sensitivity)
        return replace(
            drawn, safe=np.where(wrong & (drawn.safe != UNKNOWN), 1 - drawn.safe, drawn.safe)
        )


def find_on_curves(
    curves: Sequence[Curve],
    estimator: Callable[[Trace], Generator[list[Ask], Draws, Result]],
    seed: int = 0,
    flips: Flips | None = None,
) -> dict[str, Result]:
    """What an estimator finds on recorded curves, by trace id; a trace's draws depend on the seed and its own id alone."""
    named = by_id(curves)
    randoms = {key: np.random.default_rng([seed, zlib.crc32(key.encode())]) for key in named}
    memories: dict[str, dict[int, float]] = {key: {} for key in named}

    def draw(asks: Mapping[str, list[Ask]]) -> dict[str, Draws]:
        drawn = {key: named[key].draw(own, randoms[key]) for key, own in asks.items()}
        return (
            {key: flips(one, randoms[key], memories[key]) for key, one in drawn.items()}
            if flips
            else drawn
        )

    return run_together({key: estimator(curve.trace) for key, curve in named.items()}, draw)


class Tape:
    """Recorded curves as a ``Sampler`` and a ``Judge``, for ``locate.run``: the prompt with the text of a trace's id is answered
    from that trace. Texts are token ids in words; of a continuation that left, the last one says how it ended."""

    opened = True

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.curves = [*by_id(curves).values()]
        self.places = {curve.id: at for at, curve in enumerate(self.curves)}
        self.prompts = {key: Prompt(key, key, "replay", True) for key in self.places}

    def session(self, store: Store, seed: int = 0) -> Session:
        """Doors to the recorded traces."""
        return Session(store, cast(Chat, self), self, self, seed)

    def fingerprint(self) -> dict[str, Any]:
        """The curves."""
        return {"replay": digest([_line(curve) for curve in self.curves], 64)}

    def prompt_ids(self, prompt: Prompt) -> Ids:
        """The place of the trace that the prompt names."""
        return (self.places[prompt.text],)

    def decode(self, ids: Sequence[int]) -> str:
        """The ids in words."""
        return " ".join(map(str, ids))

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Each request from its own seed; with ``ban`` it leaves at once."""
        for one in requests:
            curve, cut = self.curves[one.prompt_ids[0]], len(one.prefix_ids)
            if one.prefix_ids != curve.trace.token_ids[:cut]:
                raise BadInput(
                    f"replay: {one.key} does not begin as trace {curve.trace.id!r} does; replay knows nothing else"
                )
            if one.ban is not None:
                curve = replace(
                    curve,
                    trace=replace(
                        curve.trace, p=(*curve.trace.p[:cut], FLOOR, *curve.trace.p[cut + 1 :])
                    ),
                )
            drawn = curve.draw([Ask(cut, 1)], np.random.default_rng(one.seed))
            left, rest = int(drawn.left[0]), int(drawn.tokens[0]) - (int(drawn.left[0]) - cut)
            gone = (
                (AWAY,) * (rest - 1) + (ENDS[int(drawn.safe[0])],)
                if left < len(curve.trace.p)
                else ()
            )
            yield Completion(one.key, curve.trace.token_ids[cut:left] + gone, "think")

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """The recorded probabilities; 0 where a token is not the trace's."""
        for one in requests:
            trace = self.curves[one.prompt_ids[0]].trace
            yield [
                p if a == b else 0.0
                for p, a, b in zip(trace.p, trace.token_ids, one.prefix_ids, strict=False)
            ]

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """The recorded outcomes; the trace's own label where a continuation never left it."""
        known = {str(code): {1: SAFE, 0: UNSAFE}.get(safe) for safe, code in ENDS.items()}
        found = []
        for e in exchanges:
            own = self.curves[self.places[e.prompt]].trace.label
            label = known.get((e.text or "").split(" ")[-1], own)
            found.append(Verdict(e.rollout_id, e.part, e.question, label, None, "", "replay"))
        return found


def load(path: Path | str) -> list[Curve]:
    """The curves of a file, by whoever recorded it; BadInput names the line, the trace and what is missing or does not fit."""
    file = Path(path).expanduser()
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8") as lines
        ):
            found = [
                _curve(json.loads(line), f"{file}, line {at}")
                for at, line in enumerate(lines, 1)
                if line.strip()
            ]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise BadInput(
            f"replay file {str(file)!r}: {error}; give JSON lines, gzipped or not"
        ) from None
    if not found:
        raise BadInput(f"replay file {str(file)!r} holds no trace; give one trace a line")
    if len({curve.trace.id for curve in found}) < len(found):
        raise BadInput(f"replay file {str(file)!r}: two traces have one id; make them unique")
    return found


def save(path: Path, curves: Iterable[Curve]) -> None:
    """Write curves in the format that ``load`` reads; ``.gz`` is gzipped, and the same curves give the same bytes."""
    lines = "".join(
        json.dumps(_line(curve), separators=(",", ":"), allow_nan=False) + "\n" for curve in curves
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines, 9, mtime=0) if path.suffix == ".gz" else lines)


def _line(curve: Curve) -> dict[str, Any]:
    trace = curve.trace
    ways = [
        [
            [_short(weight), None if math.isnan(safe) else _short(safe), tokens]
            for weight, safe, tokens in at
        ]
        for at in curve.ways
    ]
    return {
        "id": trace.id,
        "token_ids": list(trace.token_ids),
        "sentence_ends": list(trace.ends),
        "p_token": [round(p, 6) for p in trace.p],
        "leave": ways,
        "label": trace.label,
    }


def _short(x: float) -> float:
    return int(x) if x == int(x) else x


def _curve(data: Any, where: str) -> Curve:
    """One line, checked."""
    if not isinstance(data, Mapping) or (missing := [name for name in NEEDED if name not in data]):
        raise BadInput(
            f"{where}: no {missing[0] if isinstance(data, Mapping) else 'trace'}; each line needs {', '.join(NEEDED)}"
        )
    where = f"{where}, trace {str(data['id'])!r}"
    try:
        ids, ends = tuple(map(int, data["token_ids"])), tuple(map(int, data["sentence_ends"]))
        p = [
            min(max(float(one), FLOOR), 1.0) if -ROUNDED < float(one) < 1 + ROUNDED else float(one)
            for one in data["p_token"]
        ]
        ways = [
            [(float(w), math.nan if s is None else float(s), int(n)) for w, s, n in at]
            for at in data["leave"]
        ]
        grid, known = (
            [int(one) for one in data.get("grid") or range(len(ids))],
            data["label"] in LABELS,
        )
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"{where}: {error!r:.80}; the format stands in ipo_lib.turning_points.curves"
        ) from None
    if not ids or data["id"] is None:
        raise BadInput(
            f"{where}: {'id is null' if ids else 'token_ids is empty'}; record a trace with an id and its tokens"
        )
    if not known:
        raise BadInput(f"{where}: label is {data['label']!r}; give safe or 1, unsafe or 0, or null")
    if list(ends) != sorted(set(ends)) or not all(0 < end <= len(ids) for end in ends):
        raise BadInput(
            f"{where}: sentence_ends must rise within 1..{len(ids)}, the number of token_ids"
        )
    if grid != sorted(set(grid)) or not all(0 <= one < len(ids) for one in grid):
        raise BadInput(f"{where}: grid must rise within 0..{len(ids) - 1}")
    ways, p = (
        _spread(ways, grid, len(ids), where, "leave"),
        _spread(p, grid, len(ids), where, "p_token"),
    )
    if not all(0 <= one <= 1 for one in p) or not all(
        w >= 0 and not s < 0 and not s > 1 and n >= 0 for at in ways for w, s, n in at
    ):
        raise BadInput(
            f"{where}: probabilities and shares lie in [0, 1], weights and tokens at or above 0"
        )
    if holes := [
        at
        for at, one in enumerate(p)
        if 1 - one > RARE + ROUNDED and not sum(weight for weight, _, _ in ways[at])
    ]:
        rest = f" and {len(holes) - 1} more" if holes[1:] else ""
        chance = f"is left with probability {1 - p[holes[0]]:.2f}"
        raise BadInput(
            f"{where}: position {holes[0]}{rest} {chance}, but its leave is empty; record it"
        )
    sure = tuple(
        one if any(weight for weight, _, _ in at) else 1.0 for one, at in zip(p, ways, strict=True)
    )
    return Curve(Trace(str(data["id"]), ids, ends, sure, LABELS[data["label"]]), ways)


def _spread(values: list[Any], grid: list[int], length: int, where: str, name: str) -> list[Any]:
    """A list by grid position as a list by token; what is left out between two positions is as at the one before, except that
    ``p_token`` of a segment stands at its first token."""
    if len(values) == length:
        values = [values[at] for at in grid] if name == "leave" else values
    if len(values) == length:
        return values
    if len(values) != len(grid):
        raise BadInput(
            f"{where}: {name} has {len(values)} entries for {length} tokens; give one a token, or one a grid position"
        )
    by_place = dict(zip(grid, values, strict=True))
    if name == "p_token":
        return [by_place.get(at, 1.0) for at in range(length)]
    last, found = values[0], []
    for at in range(length):
        last = by_place.get(at, last)
        found.append(last)
    return found


def rollouts(
    session: Session, seen: JudgedRollouts, curves: Iterable[Curve]
) -> list[tuple[Rollout, Curve]]:
    """The recorded traces as rollouts of this run's prompts.

    A draw of a 16-bit model may come out otherwise on another machine, under the same id. So the tokens are
    those of the recording, and a rollout whose own are others gets an id of its own.

    Args:
        doors: for the chat.
        seen: rollouts of this run; curves of traces that are not among them are left out, since nobody knows
            their prompt.
        curves: recorded curves.
    """
    own, found = by_id(seen.rollouts), []
    for curve in curves:
        if (rollout := own.get(curve.trace.id)) is None:
            continue
        ids = curve.trace.token_ids
        if rollout.token_ids[: len(ids)] != ids or len(rollout.token_ids) != len(ids):
            name = digest([rollout.id, list(ids)])
            rollout = replace(
                rollout, id=name, token_ids=ids, text=session.chat.decode(ids), finish="think"
            )
        found.append((rollout, curve))
    return found
