"""Preference pairs of Eq. 4: two suffixes after one prefix, in token ids, or a refusal that says why there is none. A
pair is (x, chosen > rejected, h): ``prompt_ids`` are the chat prompt and the ``h`` response tokens both sides share, so
a trainer that scores completion tokens only scores exactly z^{>=h}. Natural pairs are the case ``h = 0``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ipo_lib.records import BOTH, TRACE, BadInput, Ids, Pair, Rollout, digest

UNFINISHED, IDENTICAL, EMPTY, TOO_LONG = "unfinished", "identical", "empty", "too-long"
PREFIX_DIFFERS, UNJUDGED, OFF_EDGE = "prefix-differs", "unjudged", "off-edge"
KEPT, REASONS = "kept", (UNFINISHED, IDENTICAL, EMPTY, TOO_LONG, PREFIX_DIFFERS, UNJUDGED, OFF_EDGE)


@dataclass(frozen=True)
class PairSettings:
    """What enters a pair: the trace (through ``</think>``) or everything; an EOS; prompt + longest side in tokens. ``harvest``:
    most pairs that the safe draws of a search give for one unsafe trace. ``unfinished`` lets truncated responses in as they are:
    for models that seldom finish, and for no result."""

    part: str = TRACE
    eos: bool = False
    max_length: int = 1024
    unfinished: bool = False
    harvest: int = 4

    def __post_init__(self) -> None:
        if self.part not in (TRACE, BOTH):
            raise BadInput(
                f"pairs: part {self.part!r} cannot be trained on; use {TRACE!r} or {BOTH!r}"
            )
        if self.max_length < 1:
            raise BadInput(f"pairs: max_length {self.max_length} leaves no token; use at least 1")


@dataclass(frozen=True)
class Refusal:
    """Why a loser gave no pair; ``reason`` is one of ``REASONS``, of which ``unjudged`` is the caller's to give."""

    rollout_id: str
    reason: str


def build_pair(
    loser: Rollout,
    winner: Rollout,
    prompt_ids: Ids,
    cut: int,
    settings: PairSettings,
    why: str,
    *,
    loser_end: int | None,
    winner_end: int | None,
    eos_id: int | None = None,
) -> Pair | Refusal:
    """The pair (x, winner > loser, h = ``cut``) of Eq. 4, or the reason there is none. ``loser_end`` and ``winner_end`` (part
    ``trace``) count the tokens through the one that completes ``</think>``; None: not closed. An EOS is appended only where the
    suffix ends as the model itself stopped. BadInput: two prompts, an end outside its rollout, no ``eos_id``."""
    if loser.prompt_id != winner.prompt_id:
        raise BadInput(
            f"pairs: {loser.id} and {winner.id} answer different prompts; pair rollouts of one prompt"
        )
    if settings.eos and eos_id is None:
        raise BadInput("pairs: eos is on but no eos_id was given; pass one of chat.eos_ids")
    if not 0 <= cut <= min(len(loser.token_ids), len(winner.token_ids)):
        return Refusal(loser.id, OFF_EDGE)
    if loser.token_ids[:cut] != winner.token_ids[:cut]:
        return Refusal(loser.id, PREFIX_DIFFERS)
    sides, ends = (loser, winner), [loser_end, winner_end]
    if settings.part == BOTH:
        ends = [len(one.token_ids) if one.finish == "stop" else None for one in sides]
    for one, end in zip(sides, ends, strict=True):
        if end is not None and not 0 <= end <= len(one.token_ids):
            raise BadInput(
                f"pairs: trace end {end} lies outside {one.id} of {len(one.token_ids)} tokens"
            )
    if None in ends and not settings.unfinished:
        return Refusal(loser.id, UNFINISHED)
    rejected, chosen = (one.token_ids[cut:end] for one, end in zip(sides, ends, strict=True))
    if not rejected or not chosen or rejected == chosen:
        return Refusal(loser.id, IDENTICAL if rejected and chosen else EMPTY)
    if settings.eos and eos_id is not None:
        rejected, chosen = (
            ids + (eos_id,) * (one.finish == "stop" and end == len(one.token_ids))
            for ids, one, end in zip((rejected, chosen), sides, ends, strict=True)
        )
    shared = prompt_ids + loser.token_ids[:cut]
    if len(shared) + max(len(rejected), len(chosen)) > settings.max_length:
        return Refusal(loser.id, TOO_LONG)
    return Pair(
        digest([winner.id, loser.id, cut, settings.part, settings.eos, why]),
        shared,
        chosen,
        rejected,
        cut,
        why,
    )


def count_reasons(results: Iterable[Pair | Refusal]) -> tuple[list[Pair], dict[str, int]]:
    """The pairs, and how many results ended how: ``kept`` first, then every reason (also at 0)."""
    ended = list(results)
    counts = Counter(KEPT if isinstance(one, Pair) else one.reason for one in ended)
    return [one for one in ended if isinstance(one, Pair)], {
        **dict.fromkeys((KEPT, *REASONS), 0),
        **counts,
    }
