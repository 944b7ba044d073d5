"""Requests and answers for tests of samplers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import Ids, Prompt
from ipo_lib.sampling import Completion, Request, Sampling, draw_seed

TEXTS = (
    "The",
    "How tall is a lighthouse?",
    "Bread needs flour",
    "Wait",
    "I answer the question. " * 3,
    "salt",
    "A book",
)


def prompt_ids(chat: Chat, text: str) -> Ids:
    return chat.prompt_ids(Prompt("p", text, "t", False))


def make_requests(chat: Chat, prefix: str = "") -> list[Request]:
    """One draw for each of TEXTS, after the same prefix."""
    requests = []
    for number, text in enumerate(TEXTS):
        ids = prompt_ids(chat, text)
        request = Request(f"r{number}", ids, chat.encode(prefix), draw_seed(0, number))
        requests.append(request)
    return requests


def many_draws(ids: Ids, count: int, base: int, ban: int | None = None) -> list[Request]:
    """Draws after one prompt, named by their number."""
    return [Request(str(n), ids, (), draw_seed(base, n), ban) for n in range(count)]


def by_key(completions: Iterable[Completion]) -> dict[str, Completion]:
    return {completion.key: completion for completion in completions}


def answers(
    sampler: TransformersSampler, requests: Sequence[Request], sampling: Sampling
) -> dict[str, Completion]:
    return by_key(sampler.sample(requests, sampling))
