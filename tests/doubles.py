"""Torch-free stand-ins for the doors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ipo_lib.sampling import Completion, Request, Sampling


class ScriptedSampler:
    """A sampler that asks ``script``; it remembers the requests it answered."""

    def __init__(self, script: Callable[[Request, Sampling], Completion], name: str = "script") -> None:
        self.script, self.name, self.answered = script, name, list[Request]()

    def fingerprint(self) -> dict[str, Any]:
        return {"engine": "scripted", "name": self.name}

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.answered.append(request)
            yield self.script(request, sampling)
