"""What every step works with: store, model and judge, and a count of what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipo_lib.chat import Chat
from ipo_lib.judging import Judge
from ipo_lib.records import Rollout, Verdict
from ipo_lib.sampling import Sampler
from ipo_lib.store import Store

SAMPLE_VERSION = JUDGE_VERSION = 1  # raised when the meaning of a stored record changes
WRITE_EVERY = 64  # records brought to the disk at once
FRESH = 1_000  # number of CSR's first draw: none by which a trace or a prompt was chosen
Continuations = list[tuple[Rollout, Verdict]]


@dataclass
class Usage:
    """What this process has asked for, whether it was in the store or not."""

    tokens: dict[str, int] = field(default_factory=dict)  # generated, by rollout id
    closed: dict[str, bool] = field(default_factory=dict)  # did a whole response close its trace?

    @property
    def total_tokens(self) -> int:
        """Generated tokens of all rollouts."""
        return sum(self.tokens.values())


@dataclass(frozen=True)
class Session:
    """What a step works with."""

    store: Store
    chat: Chat
    sampler: Sampler  # asked for draws that the store lacks
    judge: Judge  # asked for verdicts that the store lacks
    seed: int = 0
    usage: Usage = field(default_factory=Usage, compare=False)
