"""Outcome curves with a planted turn, and a sampler and judge that answer from recorded curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ipo_lib.judging import Exchange
from ipo_lib.records import SAFE, UNSAFE, Prompt, Verdict
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stages import Session
from ipo_lib.store import Store
from ipo_lib.turning_points.curves import Curve, Way
from ipo_lib.turning_points.draws import UNJUDGED, DrawRequest, Trace

STAY = 0.8  # probability of an ordinary token
SENTENCE = 6  # tokens
AWAY = -1  # a token off the trace
LAST_IDS = {1: -2, 0: -3, UNJUDGED: -4}  # how a continuation ends


def step(low: float, high: float, turn: int, tokens: int = 60, label: str = SAFE) -> Curve:
    """S is near ``low`` up to the token ``turn`` and near ``high`` after it."""
    p = [STAY] * tokens
    p[turn] = 0.05 + 0.9 * low / high if high > low else 0.2
    targets = [low if place <= turn else high for place in range(tokens)]
    return _planted(f"step-{low}-{high}-{turn}", p, targets, label)


def course(*levels: float, label: str = SAFE) -> Curve:
    """S is near the given level after each sentence; it moves at a sentence's first token."""
    tokens = SENTENCE * len(levels)
    p = [STAY if place % SENTENCE else 0.02 for place in range(tokens)]
    targets = [levels[max((place - 1) // SENTENCE, 0)] for place in range(tokens)]
    return _planted(f"course-{levels}", p, targets, label)


def _planted(name: str, p: list[float], targets: list[float], label: str) -> Curve:
    """What departs at each token ends so that S comes as near to its target as it can."""
    tokens = len(p)
    s = float(label == SAFE)
    ways: list[list[Way]] = [[] for _ in p]
    for place in reversed(range(tokens)):
        share = (targets[place] - p[place] * s) / (1 - p[place])
        share = min(max(share, 0.0), 1.0)
        s = p[place] * s + (1 - p[place]) * share
        ways[place] = [(share, 1.0, tokens - place), (1 - share, 0.0, tokens - place)]
    ends = tuple(range(SENTENCE, tokens + 1, SENTENCE))
    return Curve(Trace(name, tuple(range(tokens)), ends, tuple(p), label), ways)


class RecordedWorld:
    """Sampler, judge and chat of recorded curves, for ``locate.run_searches``.

    The prompt whose text is a trace's id is answered from that trace. A text is its ids in words.
    A continuation that departs goes on with ids no vocabulary has; the last says how it ends.
    """

    opened = True

    def __init__(self, curves: Sequence[Curve], before_draw: Callable[[], None] = int) -> None:
        self.curves = list(curves)
        self.before_draw = before_draw
        self.index = {curve.id: index for index, curve in enumerate(self.curves)}
        self.prompts = {key: Prompt(key, key, "recorded", True) for key in self.index}

    def session(self, store: Store) -> Session:
        return Session(store, self, self, self, 0)  # type: ignore[arg-type]

    def fingerprint(self) -> dict[str, Any]:
        return {"recorded": list(self.index)}

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return (self.index[prompt.text],)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.before_draw()
            curve = self.curves[request.prompt_ids[0]]
            ids = curve.trace.token_ids
            cut = len(request.prefix_ids)
            assert request.prefix_ids == ids[:cut]
            drawn = curve.draw([DrawRequest(cut, 1)], np.random.default_rng(request.seed))
            departure, tokens = int(drawn.departure[0]), int(drawn.tokens[0])
            new_ids = ids[cut:departure]
            if departure < len(ids):
                others = tokens - len(new_ids) - 1
                new_ids += (AWAY,) * others + (LAST_IDS[int(drawn.safe[0])],)
            yield Completion(request.key, new_ids, "think")

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        labels = {str(LAST_IDS[1]): SAFE, str(LAST_IDS[0]): UNSAFE}
        labels[str(LAST_IDS[UNJUDGED])] = None
        verdicts = []
        for exchange in exchanges:
            own_label = self.curves[self.index[exchange.prompt]].trace.label
            label = labels.get((exchange.text or "").split(" ")[-1], own_label)
            question = exchange.question
            verdicts.append(
                Verdict(exchange.rollout_id, exchange.part, question, label, None, "", "recorded")
            )
        return verdicts
