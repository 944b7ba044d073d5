"""Synthetic outcome curves in the format of ``ipo_lib.turning_points.curves``: no model, exact truth, every shape that estimators stumble over.

``python -m ipo_lib.sandbox.curves FILE.jsonl.gz [COUNT] [SEED]`` writes ``COUNT`` curves of mixed shapes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ipo_lib.records import SAFE, UNSAFE
from ipo_lib.turning_points.curves import Curve, save
from ipo_lib.turning_points.exhaustive import Trace

SENTENCE = 18  # mean tokens
DETERMINED = 0.65  # share of tokens that no continuation leaves
INERT = 40.0  # how alike the outcomes of leaving and of staying are where nothing turns: a beta's concentration
SHAPES = ("sharp", "gradual", "locked", "re-crossing", "hovering", "never", "long", "drifting")
LENGTHS = {"long": 700}
WIDTHS = {"gradual": (3, 13), "drifting": (13, 40)}  # sentences over which S rises, from, below
LENGTH = 200  # tokens, give or take a third
AFTER = 0.02  # how far from certain S lies behind a turn


def _levels(shape: str, sentences: int, random: np.random.Generator) -> tuple[list[float], str]:
    """S that a trace is led along at its sentence ends, start first, and its label; ``long`` is a sharp one of more tokens."""
    turn = int(random.integers(1, max(sentences, 2)))
    low, high = random.uniform(0.05, 0.7), 1 - random.uniform(0, AFTER)
    steps = np.arange(sentences + 1)
    if shape in ("sharp", "long"):
        return list(np.where(steps < turn, low, high)), SAFE
    if shape in WIDTHS:
        width = int(random.integers(*WIDTHS[shape]))
        return list(
            np.clip(low + (high - low) * (steps - turn + width / 2) / width, low, high)
        ), SAFE
    if shape == "locked":
        return list(np.full(sentences + 1, high)), SAFE
    if shape == "re-crossing":
        back = min(turn + max(2, round(sentences * random.uniform(0.15, 0.35))), sentences)
        again = min(back + max(1, round(sentences * random.uniform(0.1, 0.3))), sentences)
        return list(np.where((steps >= turn) & (steps < back) | (steps >= again), high, low)), SAFE
    if shape == "hovering":
        return list(np.where(steps < turn, low, random.uniform(0.85, 0.95))), SAFE
    return list(np.where(steps < turn, low, 0.5 * low)), UNSAFE


def curve(shape: str, seed: int, place: int, length: int | None = None) -> Curve:
    """The curve of this shape, seed and place. At a determined token nothing leaves; elsewhere the chance of leaving is a
    beta's. Leaving mostly does not matter; where S moves from one level to the next, tokens whose alternatives end otherwise
    bring the move about."""
    random = np.random.default_rng([SHAPES.index(shape), seed, place])
    tokens = int((length or LENGTHS.get(shape, LENGTH)) * random.uniform(0.67, 1.33))
    sizes = np.maximum(3, random.poisson(SENTENCE, tokens))
    ends = np.cumsum(sizes)[: int(np.searchsorted(np.cumsum(sizes), tokens)) + 1]
    levels, label = _levels(shape, len(ends), random)
    tokens = int(ends[-1])
    hazard = np.where(random.random(tokens) < DETERMINED, 0.0, random.beta(0.6, 1.8, tokens))
    hazard[ends - 1 - random.integers(0, 2, len(ends))] = random.uniform(
        0.3, 0.9, len(ends)
    )  # a sentence has a choice
    s, ways = (
        1.0 if label == SAFE else 0.0,
        [list[tuple[float, float, int]]() for _ in range(tokens)],
    )
    targets = (
        np.interp(np.arange(tokens), [0, *ends], levels)
        if shape in WIDTHS
        else np.repeat(levels[:-1], np.diff([0, *ends]))
    )
    for at in range(tokens - 1, -1, -1):
        if h := hazard[at]:
            wanted = (
                targets[at] - (1 - h) * s
            ) / h  # of those that leave, so that S becomes the target
            share = min(max(wanted, 0.0), 1.0)
            share = random.beta(INERT * share + 0.05, INERT * (1 - share) + 0.05)
            s = (1 - h) * s + h * share
            rest = max(3, int(random.normal(tokens - at, 0.2 * (tokens - at))))
            ways[at] = [(share, 1.0, rest), (1 - share, 0.0, rest)]
    p = tuple(float(1 - h) for h in hazard)
    ids = tuple(int(one) for one in random.integers(0, 50_000, tokens))
    return Curve(
        Trace(f"{shape}-{seed}-{place}", ids, tuple(int(end) for end in ends), p, label), ways
    )


def curves(
    count: int, seed: int = 0, shapes: Sequence[str] = SHAPES, length: int | None = None
) -> list[Curve]:
    """``count`` curves, the shapes in turn."""
    return [curve(shapes[at % len(shapes)], seed, at, length) for at in range(count)]


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4 or not all(one.isdigit() for one in sys.argv[2:]):
        sys.exit("usage: python -m ipo_lib.sandbox.curves FILE.jsonl.gz [COUNT] [SEED]")
    count, seed = (*map(int, sys.argv[2:]), *(500, 0)[len(sys.argv) - 2 :])
    save(Path(sys.argv[1]), curves(count, seed))
