"""Preference pairs (x, chosen > rejected, h) of Eq. 4, in token ids.

1. The *winner* is the preferred trace and the *loser* the rejected trace of the same prompt x. In
   Algorithm 1 the loser is a trace with a compliance cue and the winner the corrected trace. Their
   first h response tokens are the same: the winner continues the loser's first h tokens.
2. ``prompt_ids`` of a pair are the tokens of the chat prompt and those h tokens.
3. ``chosen_ids`` and ``rejected_ids`` are what comes after: z^{>=h} of the winner and of the loser.
   A trainer that scores completion tokens only scores exactly these.

Two independent samples of one prompt give a pair with h = 0. Where there is no pair, ``build_pair``
says why not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ipo_lib.records import BOTH, TRACE, BadInput, Ids, Pair, Rollout, digest

# Why a rejected trace gave no pair.
UNFINISHED, IDENTICAL, EMPTY, TOO_LONG = "unfinished", "identical", "empty", "too-long"
PREFIX_DIFFERS = "prefix-differs"  # the first h tokens are not the same
UNJUDGED = "unjudged"  # nobody could say whether the winner is safe
OFF_EDGE = "off-edge"  # h lies outside one of the traces
REASONS = (UNFINISHED, IDENTICAL, EMPTY, TOO_LONG, PREFIX_DIFFERS, UNJUDGED, OFF_EDGE)
KEPT = "kept"


@dataclass(frozen=True)
class PairSettings:
    """What enters a pair."""

    part: str = TRACE  # each side's end: "trace" (</think>) or "trace+answer"; not the paper's Part
    eos: bool = False  # append an EOS where the model stopped
    max_length: int = 1024  # tokens of the prompt and the longer side
    unfinished: bool = False  # take cut-off responses as they are: for tests, for no result
    harvest: int = 4  # at most so many pairs per unsafe trace from the safe draws of a search

    def __post_init__(self) -> None:
        if self.part not in (TRACE, BOTH):
            raise BadInput(
                f"pairs: part {self.part!r} cannot be trained on; use {TRACE!r} or {BOTH!r}"
            )
        if self.max_length < 1:
            raise BadInput(f"pairs: max_length {self.max_length} leaves no token; use at least 1")


@dataclass(frozen=True)
class NoPair:
    """Why a rejected trace gave no pair."""

    rollout_id: str
    reason: str  # one of `REASONS`; "unjudged" is for the caller to give


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
) -> Pair | NoPair:
    """The pair of Eq. 4 from two rollouts of one prompt, or the reason why there is none.

    Args:
        loser: the rejected rollout.
        winner: the preferred rollout.
        prompt_ids: tokens of the chat prompt.
        cut: h, the number of response tokens that both share.
        settings: what enters the pair.
        why: where the pair comes from.
        loser_end: number of the loser's tokens through ``</think>``; None: it is not closed.
        winner_end: the same of the winner.
        eos_id: token to append with ``settings.eos``.

    Raises:
        BadInput: two prompts, an end outside its rollout, or no ``eos_id`` where it is needed.
    """
    if loser.prompt_id != winner.prompt_id:
        raise BadInput(
            f"pairs: {loser.id} and {winner.id} answer different prompts; "
            "pair rollouts of one prompt"
        )
    if settings.eos and eos_id is None:
        raise BadInput("pairs: eos is on but no eos_id was given; pass one of chat.eos_ids")

    # 1. Both begin with the same h tokens.
    if not 0 <= cut <= min(len(loser.token_ids), len(winner.token_ids)):
        return NoPair(loser.id, OFF_EDGE)
    if loser.token_ids[:cut] != winner.token_ids[:cut]:
        return NoPair(loser.id, PREFIX_DIFFERS)

    # 2. The two suffixes, to the end of the part.
    loser_end = _end_of_part(loser, loser_end, settings)
    winner_end = _end_of_part(winner, winner_end, settings)
    if None in (loser_end, winner_end) and not settings.unfinished:
        return NoPair(loser.id, UNFINISHED)
    rejected, chosen = loser.token_ids[cut:loser_end], winner.token_ids[cut:winner_end]
    if not rejected or not chosen or rejected == chosen:
        return NoPair(loser.id, IDENTICAL if rejected and chosen else EMPTY)

    # 3. An EOS only where the model itself stopped at the end of the suffix.
    if settings.eos and eos_id is not None:
        rejected += _final_eos(loser, loser_end, eos_id)
        chosen += _final_eos(winner, winner_end, eos_id)
    shared = prompt_ids + loser.token_ids[:cut]
    if len(shared) + max(len(rejected), len(chosen)) > settings.max_length:
        return NoPair(loser.id, TOO_LONG)
    pair_id = digest([winner.id, loser.id, cut, settings.part, settings.eos, why])
    return Pair(pair_id, shared, chosen, rejected, cut, why)


def _end_of_part(rollout: Rollout, trace_end: int | None, settings: PairSettings) -> int | None:
    """Where the part ends, in tokens; None if it does not. ``trace_end`` is for traces only."""
    length = len(rollout.token_ids)
    if settings.part == BOTH:
        return length if rollout.finish == "stop" else None
    if trace_end is not None and not 0 <= trace_end <= length:
        raise BadInput(f"pairs: trace end {trace_end} lies outside {rollout.id} of {length} tokens")
    return trace_end


def _final_eos(rollout: Rollout, end: int | None, eos_id: int) -> Ids:
    stopped_here = rollout.finish == "stop" and end == len(rollout.token_ids)
    return (eos_id,) if stopped_here else ()


def count_reasons(results: Iterable[Pair | NoPair]) -> tuple[list[Pair], dict[str, int]]:
    """The pairs, and how many results ended how: ``kept`` first, then every reason, also at 0."""
    pairs = []
    counts = Counter(dict.fromkeys((KEPT, *REASONS), 0))
    for result in results:
        if isinstance(result, Pair):
            pairs.append(result)
            counts[KEPT] += 1
        else:
            counts[result.reason] += 1
    return pairs, dict(counts)
