"""Sampling, through the store: a draw is made once, and named by its prefix and its number.

A *prefix* is a prompt and the response tokens that a draw goes on from. A *draw* is one sampled
continuation of it; its number decides its seed, so that 16 draws after 8 pay for 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipo_lib.chat import Chat, split_response
from ipo_lib.engines import progress
from ipo_lib.engines.scoring import set_forced_to_one
from ipo_lib.records import (
    Ids,
    Prompt,
    Prompts,
    Rollout,
    Rollouts,
    by_id,
    digest,
    from_json,
    to_json,
)
from ipo_lib.sampling import Completion, PausingSampler, Request, Sampler, Sampling, draw_seed
from ipo_lib.stages.session import SAMPLE_VERSION, WRITE_EVERY, Session


@dataclass(frozen=True)
class Prefix:
    """Where a draw begins: a prompt and the response tokens given to it."""

    prompt: Prompt
    prefix_ids: Ids = ()
    ban: int | None = None  # token that must not come first

    @property
    def key(self) -> str:
        """Name of the prefix in the store."""
        parts: list[Any] = [self.prompt.text, self.prefix_ids]
        if self.ban is not None:
            parts.append(self.ban)
        return f"{self.prompt.id}/{digest(parts)}"


def sample(
    session: Session,
    prefixes: Sequence[Prefix],
    sampling: Sampling,
    draws: int,
    *,
    first: int = 0,
    stage: str = "rollouts",
) -> list[Rollout]:
    """Sample every prefix several times.

    Args:
        session: store, model and judge.
        prefixes: where the draws begin.
        sampling: temperature, top-p and length.
        draws: number of draws from each prefix.
        first: number of the first draw. Draws are stored by number: 16 after 8 pays for 8.
        stage: kind of draw, which names the folder in the store.

    Returns:
        The draws of the first prefix in order, then those of the second, and so on.
    """
    numbers = range(first, first + draws)
    wanted = [(prefix, number) for prefix in prefixes for number in numbers]
    return draw_rollouts(session, wanted, sampling, stage)


def draw_rollouts(
    session: Session, wanted: Sequence[tuple[Prefix, int]], sampling: Sampling, stage: str
) -> list[Rollout]:
    """Sample single draws, each named by its prefix and its number.

    Args:
        session: store, model and judge.
        wanted: prefix and number of each draw.
        sampling: temperature, top-p and length.
        stage: kind of draw, which names the folder in the store.
    """
    rollouts = draw_available(session, wanted, sampling, stage, wait=True)
    return [rollout for rollout in rollouts if rollout is not None]


def draw_available(
    session: Session,
    wanted: Sequence[tuple[Prefix, int]],
    sampling: Sampling,
    stage: str,
    wait: bool = False,
) -> list[Rollout | None]:
    """Sample single draws, and leave out those that would keep the others waiting.

    Args:
        session: store, model and judge.
        wanted: prefix and number of each draw.
        sampling: temperature, top-p and length.
        stage: kind of draw, which names the folder in the store.
        wait: wait for every draw. Else a sampler that gains by it (``PausingSampler``) leaves
            the last few for the next call that asks for them.

    Returns:
        One rollout per draw, in order; None for a draw that still goes on.
    """
    # 1. The ledger is named by all that decides a draw, the draw in it by prefix and number.
    spec = _spec(session, sampling)
    name = digest(spec)
    ledger = session.store.ledger(stage, SAMPLE_VERSION, spec)
    prefixes = dict.fromkeys(prefix for prefix, _ in wanted)
    names = {prefix: prefix.key for prefix in prefixes}
    by_id(prefix.prompt for prefix in names)  # two prompts of one id could not be told apart
    keys = [f"{names[prefix]}/{number}" for prefix, number in wanted]
    by_key = dict(zip(keys, wanted, strict=True))

    # 2. The sampler is asked for what is missing.
    requests = []
    for key in ledger.missing(by_key):
        prefix, _ = by_key[key]
        prompt_ids = session.chat.prompt_ids(prefix.prompt)
        seed = draw_seed(session.seed, key, name)
        requests.append(Request(key, prompt_ids, prefix.prefix_ids, seed, prefix.ban))
    if requests:
        draws = _answers(session.sampler, requests, sampling, wait)
        ledger.collect(_finished_rollouts(session.chat, draws, by_key, name), WRITE_EVERY)
    else:
        ledger.finish()

    # 3. All of them are read from the ledger.
    rollouts = [from_json(Rollout, ledger[key]) if key in ledger else None for key in keys]
    _record_usage(session, [rollout for rollout in rollouts if rollout is not None])
    return rollouts


def _spec(session: Session, sampling: Sampling) -> dict[str, Any]:
    """All that decides a draw but its prefix and its number."""
    return {
        "sampler": session.sampler.fingerprint(),
        "chat": session.chat.fingerprint(),
        "sampling": to_json(sampling),
        "seed": session.seed,
    }


def stored_draws(session: Session, sampling: Sampling, stage: str) -> dict[str, list[Rollout]]:
    """All draws of a stage that the store holds, by the ``Prefix.key`` from which they begin.

    Args:
        session: store and model. Nothing is drawn.
        sampling: with which they were drawn.
        stage: kind of draw, which names the folder in the store.
    """
    ledger = session.store.ledger(stage, SAMPLE_VERSION, _spec(session, sampling))
    draws: dict[str, list[Rollout]] = {}
    for key, record in ledger.items():
        draws.setdefault(key.rpartition("/")[0], []).append(from_json(Rollout, record))
    return {key: sorted(of_key, key=lambda rollout: rollout.draw) for key, of_key in draws.items()}


def _answers(
    sampler: Sampler, requests: Sequence[Request], sampling: Sampling, wait: bool
) -> Iterator[Completion]:
    """The sampler's completions; without the slowest ones where nobody waits for them."""
    if not wait and isinstance(sampler, PausingSampler) and sampler.pauses:
        return sampler.sample_some(requests, sampling)
    return sampler.sample(requests, sampling)


def _finished_rollouts(
    chat: Chat,
    completions: Iterator[Completion],
    wanted: Mapping[str, tuple[Prefix, int]],
    sampler: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Completions as rollouts to store, by the key of their draw; their tokens are counted."""
    tokens = 0
    try:
        for completion in completions:
            prefix, number = wanted[completion.key]
            token_ids = prefix.prefix_ids + completion.token_ids
            tokens += len(completion.token_ids)
            rollout = Rollout(
                id=digest([sampler, completion.key]),
                prompt_id=prefix.prompt.id,
                prefix_len=len(prefix.prefix_ids),
                token_ids=token_ids,
                text=chat.decode(token_ids),
                finish=completion.finish,
                draw=number,
                sampler=sampler,
                forced=completion.forced,
            )
            yield completion.key, to_json(rollout)
    finally:
        progress.count_generated(tokens)


def _record_usage(session: Session, rollouts: Rollouts) -> None:
    """Note the generated tokens, and which whole responses closed their trace by themselves."""
    for rollout in rollouts:
        session.usage.tokens[rollout.id] = len(rollout.token_ids) - rollout.prefix_len
        if not rollout.prefix_len:
            closed = split_response(rollout.text, session.chat.opened).closed
            session.usage.closed[rollout.id] = closed and rollout.forced is None


def probabilities(
    session: Session, prompts: Prompts, rollouts: Rollouts, sampling: Sampling
) -> dict[str, list[float]]:
    """By rollout id, the probability that the sampler gives each of its tokens.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: responses, as they were sampled.
        sampling: temperature and top-p under which the probabilities hold. Tokens of a closing tag
            that was put (``Rollout.forced``) have probability 1: nothing else could come.
    """
    spec = {
        "sampler": session.sampler.fingerprint(),
        "chat": session.chat.fingerprint(),
        "sampling": to_json(sampling),
    }
    ledger = session.store.ledger("probabilities", SAMPLE_VERSION, spec)
    rollouts_by_id = by_id(rollouts)
    missing = [rollouts_by_id[key] for key in ledger.missing(rollouts_by_id)]
    requests = []
    for rollout in missing:
        prompt_ids = session.chat.prompt_ids(prompts[rollout.prompt_id])
        requests.append(Request(rollout.id, prompt_ids, rollout.token_ids, 0))
    if requests:
        scores = session.sampler.score(requests, sampling)
        for rollout, score in zip(missing, scores, strict=True):
            ledger.append({rollout.id: {"p": score}})
    ledger.finish()
    return {
        rollout.id: set_forced_to_one(
            ledger[rollout.id]["p"], rollout.token_ids, rollout.forced, session.chat.closes
        )
        for rollout in rollouts
    }
