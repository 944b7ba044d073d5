"""Pairs: the shared prefix is exact, suffixes end where the part ends, reasons are given."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib.pairs import KEPT, REASONS, NoPair, PairSettings, build_pair, count_reasons
from ipo_lib.records import ANSWER, BOTH, BadInput, Pair, Rollout

CLOSE, EOS, PROMPT = 9, 1, (100, 101, 102)


def rollout(
    ids: tuple[int, ...], name: str = "r", finish: str = "stop", prompt: str = "p"
) -> Rollout:
    return Rollout(name, prompt, 0, ids, "", finish, 0, "scripted")


LOSER = rollout((10, 11, 20, 21, CLOSE, 30), "loser")
WINNER = rollout((10, 11, 40, CLOSE, 31, 32), "winner")


def pair(
    loser: Rollout = LOSER, winner: Rollout = WINNER, cut: int = 2, **changes: object
) -> Pair | NoPair:
    ends = {"loser_end": 5, "winner_end": 4, "eos_id": None}
    options = {key: changes.pop(key, value) for key, value in ends.items()}
    settings = PairSettings(**changes)  # type: ignore[arg-type]
    return build_pair(loser, winner, PROMPT, cut, settings, "trigger-1", **options)  # type: ignore[arg-type]


def test_trace_suffixes_run_from_the_cut_through_the_closing_tag() -> None:
    made = pair()
    assert isinstance(made, Pair)
    assert made.prompt_ids == (*PROMPT, 10, 11)
    assert made.h == 2
    assert made.why == "trigger-1"
    assert made.chosen_ids == (40, CLOSE)
    assert made.rejected_ids == (20, 21, CLOSE)


def test_both_takes_everything_and_needs_a_stop() -> None:
    made = pair(part=BOTH, loser_end=None, winner_end=None)
    assert isinstance(made, Pair)
    assert made.chosen_ids == (40, CLOSE, 31, 32)
    assert made.rejected_ids[-1] == 30
    for finish in ("length", "think"):
        cut_off = dataclasses.replace(WINNER, finish=finish)
        assert pair(winner=cut_off, part=BOTH) == NoPair("loser", "unfinished")


def test_a_closed_trace_counts_although_the_answer_was_cut() -> None:
    assert isinstance(pair(winner=dataclasses.replace(WINNER, finish="length")), Pair)


def test_eos_only_where_the_model_itself_stopped() -> None:
    made = pair(part=BOTH, eos=True, eos_id=EOS)
    assert isinstance(made, Pair)
    assert made.chosen_ids[-1] == made.rejected_ids[-1] == EOS
    assert made.chosen_ids.count(EOS) == 1
    trace = pair(eos=True, eos_id=EOS)  # both traces were followed by an answer: no EOS came there
    assert isinstance(trace, Pair)
    assert EOS not in trace.chosen_ids + trace.rejected_ids
    bare = rollout((10, 11, 40, CLOSE), "bare")  # the model stopped right after its trace
    mixed = pair(winner=bare, eos=True, eos_id=EOS)
    assert isinstance(mixed, Pair)
    assert mixed.chosen_ids[-1] == EOS
    assert mixed.rejected_ids[-1] == CLOSE
    asked = pair(winner=dataclasses.replace(bare, finish="think"), eos=True, eos_id=EOS)
    assert isinstance(asked, Pair)
    assert asked.chosen_ids[-1] == CLOSE


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("unfinished", {"loser_end": None}),
        ("unfinished", {"winner_end": None}),
        ("identical", {"winner": dataclasses.replace(LOSER, id="twin"), "winner_end": 5}),
        ("empty", {"cut": 4, "winner": rollout((10, 11, 20, 21, 50, CLOSE), "w"), "winner_end": 4}),
        ("too-long", {"max_length": 7}),
        ("prefix-differs", {"cut": 3}),
        ("off-edge", {"cut": 7}),
        ("off-edge", {"cut": -1}),
    ],
)
def test_reasons_why_there_is_no_pair(reason: str, changes: dict[str, object]) -> None:
    assert pair(**changes) == NoPair("loser", reason)  # type: ignore[arg-type]


def test_longest_side_decides_the_length() -> None:
    assert isinstance(pair(max_length=8), Pair)  # 3 + 2 + max(2, 3)


def test_natural_pairs_share_nothing() -> None:
    other = rollout((50, 51, CLOSE, 52), "natural")
    made = pair(winner=other, cut=0, winner_end=3)
    assert isinstance(made, Pair)
    assert made.prompt_ids == PROMPT
    assert made.h == 0
    assert made.chosen_ids == (50, 51, CLOSE)
    assert made.rejected_ids == LOSER.token_ids[:5]


def test_bad_input_is_one_line() -> None:
    for call in (
        lambda: pair(winner=dataclasses.replace(WINNER, prompt_id="q")),
        lambda: pair(eos=True),
        lambda: pair(loser_end=7),
        lambda: PairSettings(part=ANSWER),
        lambda: PairSettings(max_length=0),
    ):
        with pytest.raises(BadInput) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_every_reason_is_counted() -> None:
    made, counts = count_reasons(
        [pair(), pair(loser_end=None), pair(cut=3), pair(cut=3), NoPair("r", "unjudged")]
    )
    assert len(made) == 1
    assert list(counts) == [KEPT, *REASONS]
    assert counts | {KEPT: 1, "unfinished": 1, "prefix-differs": 2, "unjudged": 1} == counts
    assert sum(counts.values()) == 5


def test_ids_tell_pairs_apart() -> None:
    variants = [
        pair(),
        pair(cut=1),
        pair(cut=0),
        pair(part=BOTH),
        pair(part=BOTH, eos=True, eos_id=EOS),
    ]
    assert len({made.id for made in variants if isinstance(made, Pair)}) == len(variants)
    assert pair() == pair()


@given(st.integers(0, 2**32), st.sampled_from(["trace", BOTH]), st.booleans())
def test_prefix_plus_suffix_is_the_rollout(seed: int, part: str, eos: bool) -> None:
    draw = random.Random(seed)
    shared = tuple(draw.choices(range(10, 13), k=draw.randint(0, 4)))
    sides = [
        rollout(
            shared + tuple(draw.choices(range(10, 13), k=draw.randint(0, 4))),
            name,
            draw.choice(["stop", "length"]),
        )
        for name in "lw"
    ]
    ends = [draw.choice([None, *range(len(side.token_ids) + 1)]) for side in sides]
    cut, settings = draw.randint(0, 6), PairSettings(part=part, eos=eos, max_length=10)
    made = build_pair(
        *sides, PROMPT, cut, settings, "x", loser_end=ends[0], winner_end=ends[1], eos_id=EOS
    )
    if isinstance(made, NoPair):
        return
    assert len(made.prompt_ids) + max(len(made.chosen_ids), len(made.rejected_ids)) <= 10
    for side, end, suffix in zip(sides, ends, (made.rejected_ids, made.chosen_ids), strict=True):
        whole = made.prompt_ids[len(PROMPT) :] + suffix
        assert (
            whole[: len(whole) - suffix.count(EOS)]
            == side.token_ids[: end if part == "trace" else None]
        )
        assert suffix
        assert EOS not in suffix or (eos and side.finish == "stop")
