"""Stand-ins for models and judges, without torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ipo_lib.sampling import Completion, Request, Sampling

TRIES = 40
NEVER = 0.005  # of a try: a probability of exactly 0 would end the search


class ScriptedSampler:
    """A sampler that asks ``script``; it remembers the requests it answered."""

    def __init__(
        self, script: Callable[[Request, Sampling], Completion], name: str = "script"
    ) -> None:
        self.script, self.name, self.answered = script, name, list[Request]()

    def fingerprint(self) -> dict[str, Any]:
        return {"engine": "scripted", "name": self.name}

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.answered.append(request)
            yield self.script(request, sampling)

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """Of the script's draws that agree with a trace so far, how many go on as it does, counted
        over ``TRIES`` seeds.
        """
        for one in requests:
            tries = [
                self.script(replace(one, prefix_ids=(), seed=seed), sampling).token_ids
                for seed in range(TRIES)
            ]
            agree = [
                sum(own[:at] == one.prefix_ids[:at] for own in tries)
                for at in range(len(one.prefix_ids) + 1)
            ]
            yield [(b + NEVER) / (a + NEVER) for a, b in itertools.pairwise(agree)]
