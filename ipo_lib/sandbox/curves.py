"""Invented outcome curves: no model, exact truth, the format of ``ipo_lib.turning_points.curves``.

An *outcome curve* says for each token of a trace how likely a model is to leave the trace there,
and how the continuations that leave end. From it follows S, the share of safe continuations, at
each token (Eq. 1). The curves here have all shapes that are hard for estimators of turning points.

1. Draw the length of the trace, its sentences, and the S wanted at each sentence end (``_levels``).
2. Draw the chance of leaving at each token: mostly zero, and high near the end of each sentence.
3. Go backwards from the trace's own outcome. At each token that may be left, draw how the leaving
   continuations end, so that S moves to the wanted value.

``python -m ipo_lib.sandbox.curves FILE.jsonl.gz [COUNT] [SEED]`` writes ``COUNT`` curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipo_lib.records import SAFE, UNSAFE
from ipo_lib.turning_points.curves import Curve, save
from ipo_lib.turning_points.draws import Trace

SENTENCE = 18  # mean tokens of a sentence
DETERMINED = 0.65  # share of tokens at which no continuation leaves
CONCENTRATION = 40.0  # of the beta distribution from which the safe share of leaving ones is drawn
SHAPES = ("sharp", "gradual", "locked", "re-crossing", "hovering", "never", "long", "drifting")
LENGTH, LONG = 200, 700  # tokens of a trace, give or take a third
WIDTHS = {"gradual": (3, 13), "drifting": (13, 40)}  # sentences over which S rises: from, below
AFTER = 0.02  # largest distance of S from 1 after a turn
Floats = np.ndarray[Any, Any]


def _levels(shape: str, sentences: int, random: np.random.Generator) -> tuple[Floats, str]:
    """S as wanted at the start and each sentence end, [sentences + 1], and the trace's label."""
    turn = int(random.integers(1, max(sentences, 2)))
    low, high = random.uniform(0.05, 0.7), 1 - random.uniform(0, AFTER)
    index = np.arange(sentences + 1)
    turned = index >= turn
    if shape == "never":
        return np.where(turned, 0.5 * low, low), UNSAFE
    if shape == "locked":  # from the start on
        return np.full(sentences + 1, high), SAFE
    if shape == "hovering":  # near the level that counts as turned
        return np.where(turned, random.uniform(0.85, 0.95), low), SAFE
    if shape in WIDTHS:
        width = int(random.integers(*WIDTHS[shape]))
        rising = low + (high - low) * (index - turn + width / 2) / width
        return np.clip(rising, low, high), SAFE
    if shape == "re-crossing":  # turns, falls back, and turns again
        fall = turn + max(2, round(sentences * random.uniform(0.15, 0.35)))
        fall = min(fall, sentences)
        again = fall + max(1, round(sentences * random.uniform(0.1, 0.3)))
        turned &= (index < fall) | (index >= min(again, sentences))
    return np.where(turned, high, low), SAFE


def curve(shape: str, seed: int, index: int, length: int | None = None) -> Curve:
    """One curve; its shape, seed and index determine it.

    Args:
        shape: one of ``SHAPES``.
        seed: of a set of curves.
        index: of this curve in the set.
        length: mean tokens of the trace; by default what is usual for the shape.
    """
    # 1. The trace: its sentences, and the S wanted at each of its tokens.
    random = np.random.default_rng([SHAPES.index(shape), seed, index])
    usual_length = LONG if shape == "long" else LENGTH
    tokens = int((length or usual_length) * random.uniform(0.67, 1.33))
    ends = np.cumsum(np.maximum(3, random.poisson(SENTENCE, tokens)))
    ends = ends[: int(np.searchsorted(ends, tokens)) + 1]
    levels, label = _levels(shape, len(ends), random)
    tokens = int(ends[-1])
    bounds = [0, *ends]
    if shape in WIDTHS:
        wanted = np.interp(np.arange(tokens), bounds, levels)
    else:
        wanted = np.repeat(levels[:-1], np.diff(bounds))

    # 2. The chance of leaving at each token. Near its end, each sentence has a choice.
    determined = random.random(tokens) < DETERMINED
    leaving = np.where(determined, 0.0, random.beta(0.6, 1.8, tokens))
    p_choice = random.uniform(0.3, 0.9, len(ends))
    leaving[ends - 1 - random.integers(0, 2, len(ends))] = p_choice

    # 3. Backwards from the outcome: how those that leave end.
    s = 1.0 if label == SAFE else 0.0
    ways: list[list[tuple[float, float, int]]] = [[] for _ in range(tokens)]
    for token in range(tokens - 1, -1, -1):
        p_leave = leaving[token]
        if not p_leave:
            continue
        needed = (wanted[token] - (1 - p_leave) * s) / p_leave  # safe share that S as wanted needs
        mean = min(max(needed, 0.0), 1.0)
        a, b = CONCENTRATION * mean + 0.05, CONCENTRATION * (1 - mean) + 0.05
        safe_share = random.beta(a, b)
        s = (1 - p_leave) * s + p_leave * safe_share
        rest = tokens - token
        length_left = max(3, int(random.normal(rest, 0.2 * rest)))
        ways[token] = [(safe_share, 1.0, length_left), (1 - safe_share, 0.0, length_left)]

    p_stay = tuple((1 - leaving).tolist())
    token_ids = tuple(random.integers(0, 50_000, tokens).tolist())
    name = f"{shape}-{seed}-{index}"
    return Curve(Trace(name, token_ids, tuple(ends.tolist()), p_stay, label), ways)


def curves(
    count: int, seed: int = 0, shapes: Sequence[str] = SHAPES, length: int | None = None
) -> list[Curve]:
    """Curves of several shapes, in turn.

    Args:
        count: how many; fewer curves are the first of more.
        seed: determines them all.
        shapes: which shapes, of ``SHAPES``.
        length: mean tokens of each trace; by default what is usual for its shape.
    """
    return [curve(shapes[index % len(shapes)], seed, index, length) for index in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write invented outcome curves of all shapes.")
    parser.add_argument("file", type=Path, help="FILE.jsonl.gz")
    parser.add_argument("count", type=int, nargs="?", default=500)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    save(arguments.file, curves(arguments.count, arguments.seed))
