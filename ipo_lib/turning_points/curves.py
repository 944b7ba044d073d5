"""Recorded outcome curves: traces on which S is known exactly, so that estimators need no model.

At each token of a recorded trace, continuations that depart there were sampled once and judged.
From these and the token probabilities, S follows at every cut (``Curve.truth``), and as many
continuations as an estimator requests can be drawn (``Curve.draw``).

A file holds one trace a line, in JSON (``.gz`` or not):

- ``id``, ``token_ids``; ``sentence_ends``: each a number of tokens.
- ``label``: the trace's own outcome: safe or 1, unsafe or 0, null.
- ``p_token``: the sampler's probability of the trace's own token, at each position.
- ``leave``: at each position a list of ``[weight, safe, tokens]``, one for each kind of
  continuation that departs there. ``safe`` is 1, 0, null (unjudged) or a share; ``tokens`` counts
  from the departing one on.
- ``prompt`` (optional): ``id``, ``text``, ``source`` and ``harm`` of the question. Without it, only
  a run that draws the same trace knows its question.
- ``grid`` (optional): positions. Then ``leave`` has one entry for each of these, and so may
  ``p_token``; in that case nothing departs between them. With a ``p_token`` for every token,
  continuations depart between two grid positions as they do at the first.

A position that is left with a probability over ``RARE`` needs an entry in ``leave``. Below that, an
empty one means that nothing departs there.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from ipo_lib.records import (
    SAFE,
    UNSAFE,
    BadInput,
    Prompt,
    Rollout,
    by_id,
    digest,
    from_json,
    to_json,
)
from ipo_lib.stages import JudgedRollouts, Session
from ipo_lib.turning_points.draws import (
    UNJUDGED,
    Array,
    Drawing,
    Draws,
    Requests,
    Result,
    Trace,
    run_together,
    summed_before,
)

RARE = 0.01
ROUNDED = 1e-4  # by which a recorder may have rounded a probability
FLOOR = 1e-12  # of a probability whose logarithm is taken
LABELS = {SAFE: SAFE, UNSAFE: UNSAFE, 1: SAFE, 0: UNSAFE, None: None}
FIELDS = ("id", "token_ids", "sentence_ends", "p_token", "leave", "label")
Way = tuple[float, float, int]  # weight, safe (nan: unjudged), tokens


@dataclass(frozen=True)
class Curve:
    """A recorded trace with the ways in which continuations depart at each of its tokens."""

    trace: Trace
    ways: Sequence[Sequence[Way]]
    prompt: Prompt | None = None  # None: the recording does not say

    @property
    def id(self) -> str:
        """That of its trace."""
        return self.trace.id

    @property
    def prompt_id(self) -> str:
        """That of its prompt; where the recording does not say, its own."""
        return self.prompt.id if self.prompt else self.id

    @cached_property
    def truth(self) -> Array:
        """S at every cut, exactly, [tokens + 1]; nan throughout where the label is None.

        S_c = p_c S_{c+1} + (1 - p_c) D_c, from S = 1 or 0 at the end. D_c is the safe share of what
        departs at c; unjudged ways carry no weight.
        """
        p = self.trace.p
        end = {SAFE: 1.0, UNSAFE: 0.0}.get(self.trace.label or "", math.nan)
        s = np.full(len(p) + 1, end)
        for place in reversed(range(len(p))):
            total = safe_total = 0.0
            for weight, safe, _ in self.ways[place]:
                if not math.isnan(safe):
                    total += weight
                    safe_total += weight * safe
            departed = safe_total / total if total else s[place + 1]
            s[place] = p[place] * s[place + 1] + (1 - p[place]) * departed
        return s

    @cached_property
    def _tables(self) -> tuple[Array, ...]:
        """What ``draw`` looks up.

        Returns:
            The falling log-survival at every cut; the ways of all positions in a row as rising
            weights, safe and tokens; the rising weight at which each position's ways begin.
        """
        log_survival = summed_before(np.log(np.maximum(self.trace.p, FLOOR)))
        ways = [*chain.from_iterable(self.ways)] or [(0.0, 0.0, 0)]
        weights, safe, tokens = np.array(ways, dtype=float).T
        rising = summed_before(weights)
        first_ways = [0, *accumulate(len(here) for here in self.ways)]
        edges = rising[np.minimum(first_ways, len(ways))]
        return log_survival, rising, safe, tokens, edges

    def draw(self, requests: Requests, random: np.random.Generator) -> Draws:
        """The continuations requested, request by request."""
        log_survival, rising, safe, tokens, edges = self._tables
        length = len(self.trace.p)
        cuts = [request.cut for request in requests]
        start = np.repeat(cuts, [request.n for request in requests])
        leave, choice, toss = random.random((3, len(start)))
        # 1. Where it departs, from the inverse of the survival function.
        limit = log_survival[start] + np.log1p(-leave)
        departure = np.searchsorted(-log_survival[1:], -limit, side="right")
        departed = departure < length
        # 2. How, among the ways of that place.
        place = np.minimum(departure, length - 1)
        weight = edges[place] + choice * (edges[place + 1] - edges[place])
        way = np.searchsorted(rising, weight, side="right") - 1
        way = np.minimum(way, len(safe) - 1)
        # 3. How it ends, and what it costs.
        outcome = np.where(np.isnan(safe[way]), UNJUDGED, toss < safe[way])
        own_outcome = {SAFE: 1, UNSAFE: 0}.get(self.trace.label or "", UNJUDGED)
        outcome = np.where(departed, outcome, own_outcome).astype(int)
        cost = departure - start + np.where(departed, tokens[way], 0)
        return Draws(start, departure, outcome, cost.astype(int))


def run_on_curves(
    curves: Sequence[Curve], estimator: Callable[[Trace], Drawing[Result]], seed: int = 0
) -> dict[str, Result]:
    """What an estimator finds, by trace id; a trace's draws depend on the seed and its id alone."""
    curves_by_id = by_id(curves)
    generators = {}
    for key in curves_by_id:
        generators[key] = np.random.default_rng([seed, zlib.crc32(key.encode())])

    def draw(requests: Mapping[str, Requests]) -> dict[str, Draws]:
        drawn = {}
        for key, wanted in requests.items():
            drawn[key] = curves_by_id[key].draw(wanted, generators[key])
        return drawn

    searches = {key: estimator(curve.trace) for key, curve in curves_by_id.items()}
    return run_together(searches, draw)


def recorded_rollouts(
    session: Session, seen: JudgedRollouts, curves: Iterable[Curve]
) -> list[tuple[Rollout, Curve]]:
    """The recorded traces as rollouts, with their curves.

    A draw of a 16-bit model may come out otherwise on another machine, under the same id. So the
    tokens are those of the recording, and a rollout with other tokens gets another id.

    Args:
        session: for its chat.
        seen: rollouts of this run. A curve of another trace is left out if it has no prompt.
        curves: recorded curves.
    """
    rollouts = by_id(seen.rollouts)
    pairs = []
    for curve in curves:
        rollout, ids = rollouts.get(curve.id), curve.trace.token_ids
        if rollout and rollout.token_ids == ids:
            pairs.append((rollout, curve))
            continue
        text = session.chat.decode(ids)
        if rollout:
            key = digest([rollout.id, list(ids)])
            rollout = replace(rollout, id=key, token_ids=ids, text=text, finish="think")
        elif curve.prompt:
            rollout = Rollout(curve.id, curve.prompt.id, 0, ids, text, "think", 0, "recording")
        else:
            continue
        pairs.append((rollout, curve))
    return pairs


def recorded_prompts(seen: JudgedRollouts, curves: Iterable[Curve]) -> dict[str, Prompt]:
    """The prompts of a run and those that came with curves, by id."""
    return {**by_id(curve.prompt for curve in curves if curve.prompt), **seen.prompts}


# Files.


def load(path: Path | str) -> list[Curve]:
    """The curves of a file, whoever recorded it.

    Raises:
        BadInput: names the line, the trace and what is missing or does not fit.
    """
    file = Path(path).expanduser()
    curves = []
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        for number, line in enumerate(content.decode("utf-8").split("\n"), 1):
            if line.strip():
                curves.append(_read_line(json.loads(line), f"{file}, line {number}"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise BadInput(
            f"replay file {str(file)!r}: {error}; give JSON lines, gzipped or not"
        ) from None
    if not curves:
        raise BadInput(f"replay file {str(file)!r} holds no trace; give one trace a line")
    if len({curve.id for curve in curves}) < len(curves):
        raise BadInput(f"replay file {str(file)!r}: two traces have one id; make them unique")
    return curves


def save(path: Path, curves: Iterable[Curve]) -> None:
    """Write curves in the format that ``load`` reads; the same curves give the same bytes."""
    lines = []
    for curve in curves:
        data = json.dumps(_line(curve), separators=(",", ":"), allow_nan=False)
        lines.append(f"{data}\n")
    content = "".join(lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, 9, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _line(curve: Curve) -> dict[str, Any]:
    """A curve as JSON values."""
    leave = []
    for ways in curve.ways:
        entry = []
        for weight, safe, tokens in ways:
            outcome = None if math.isnan(safe) else _as_integer(safe)
            entry.append([_as_integer(weight), outcome, tokens])
        leave.append(entry)
    prompt = {"prompt": to_json(curve.prompt)} if curve.prompt else {}
    return {
        "id": curve.trace.id,
        **prompt,
        "token_ids": list(curve.trace.token_ids),
        "sentence_ends": list(curve.trace.ends),
        "p_token": [round(p, 6) for p in curve.trace.p],
        "leave": leave,
        "label": curve.trace.label,
    }


def _as_integer(x: float) -> float:
    """The shorter spelling of a whole number."""
    return int(x) if x == int(x) else x


def _read_line(data: Any, where: str) -> Curve:
    """One line of a file, checked."""
    if not isinstance(data, Mapping):
        raise BadInput(f"{where}: no trace; each line needs {', '.join(FIELDS)}")
    for name in FIELDS:
        if name not in data:
            raise BadInput(f"{where}: no {name}; each line needs {', '.join(FIELDS)}")
    where = f"{where}, trace {str(data['id'])!r}"

    # 1. Types.
    try:
        ids = tuple(map(int, data["token_ids"]))
        ends = tuple(map(int, data["sentence_ends"]))
        p = [_clipped(float(value)) for value in data["p_token"]]
        ways = [[_read_way(*way) for way in entry] for entry in data["leave"]]
        grid = [int(place) for place in data.get("grid") or range(len(ids))]
        label_known = data["label"] in LABELS
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"{where}: {error!r:.80}; the format stands in ipo_lib.turning_points.curves"
        ) from None

    # 2. Places.
    problem = None
    if not ids or data["id"] is None:
        missing = "id is null" if ids else "token_ids is empty"
        problem = f"{missing}; record a trace with an id and its tokens"
    elif not label_known:
        problem = f"label is {data['label']!r}; give safe or 1, unsafe or 0, or null"
    elif not _rises_within(ends, 1, len(ids)):
        problem = f"sentence_ends must rise within 1..{len(ids)}, the number of token_ids"
    elif not _rises_within(grid, 0, len(ids) - 1):
        problem = f"grid must rise within 0..{len(ids) - 1}"
    if problem:
        raise BadInput(f"{where}: {problem}")

    # 3. Values, one a token.
    ways = _one_a_token(ways, grid, len(ids), where, "leave")
    p = _one_a_token(p, grid, len(ids), where, "p_token")
    if problem := _value_problem(p, ways):
        raise BadInput(f"{where}: {problem}")
    for place, entry in enumerate(ways):
        if not _has_weight(entry):
            p[place] = 1.0  # nothing departs there
    label = LABELS[data["label"]]
    prompt = from_json(Prompt, data["prompt"], where) if data.get("prompt") else None
    return Curve(Trace(str(data["id"]), ids, ends, tuple(p), label), ways, prompt)


def _rises_within(places: Sequence[int], first: int, last: int) -> bool:
    if list(places) != sorted(set(places)):
        return False
    return all(first <= place <= last for place in places)


def _clipped(p: float) -> float:
    """A probability that may have been rounded, within [FLOOR, 1]; others stay as they are."""
    return min(max(p, FLOOR), 1.0) if -ROUNDED < p < 1 + ROUNDED else p


def _read_way(weight: Any, safe: Any, tokens: Any) -> Way:
    return float(weight), math.nan if safe is None else float(safe), int(tokens)


def _has_weight(ways: Sequence[Way]) -> bool:
    return any(weight for weight, _, _ in ways)


def _value_problem(p: Sequence[float], ways: Sequence[Sequence[Way]]) -> str | None:
    """What is wrong with the probabilities and the ways, or None."""
    fits = all(0 <= value <= 1 for value in p)
    for weight, safe, tokens in chain.from_iterable(ways):
        fits = fits and weight >= 0 and tokens >= 0 and not (safe < 0 or safe > 1)
    if not fits:
        return "probabilities and shares lie in [0, 1], weights and tokens at or above 0"
    holes = []
    for place, chance in enumerate(p):
        if 1 - chance > RARE + ROUNDED and not _has_weight(ways[place]):
            holes.append(place)
    if not holes:
        return None
    more = f" and {len(holes) - 1} more" if holes[1:] else ""
    chance = 1 - p[holes[0]]
    return (
        f"position {holes[0]}{more} is left with probability {chance:.2f}, "
        "but its leave is empty; record it"
    )


def _one_a_token(
    values: list[Any], grid: Sequence[int], length: int, where: str, name: str
) -> list[Any]:
    """A list by grid position as a list by token.

    Between two grid positions nothing departs if ``p_token`` was given by grid position; all else
    is as at the position before.
    """
    if len(values) == length and name == "leave":
        values = [values[place] for place in grid]
    if len(values) == length:
        return values
    if len(values) != len(grid):
        raise BadInput(
            f"{where}: {name} has {len(values)} entries for {length} tokens; "
            "give one a token, or one a grid position"
        )
    by_place = dict(zip(grid, values, strict=True))
    last = values[0]
    filled = []
    for place in range(length):
        last = by_place.get(place, 1.0 if name == "p_token" else last)
        filled.append(last)
    return filled
