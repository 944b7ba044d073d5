"""Replacements and controls: whitespace stays, prefixes are exact, controls are fair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib.intervention import cut_and_text, is_accepted, nearest_neutral, random_earlier_sentence
from ipo_lib.records import SAFE, TRACE, UNSAFE, BadInput, Rollout, Sentence, TurningPoint, Verdict
from ipo_lib.triggers import cluster_sentences


def rollout(text: str, id_: str = "r") -> Rollout:
    return Rollout(id_, "p", 0, tuple(range(len(text))), text, "stop", 0, "s")


def chars(*texts: str) -> tuple[Rollout, list[Sentence]]:
    """A rollout of one token a character, and its sentences."""
    ends, spans = 0, []
    for at, text in enumerate(texts):
        spans.append(Sentence(at, ends, ends + len(text), ends, ends + len(text)))
        ends += len(text)
    return rollout("".join(texts)), spans


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" Okay, sure.\n\n", " But no.\n\n"),
        ("Okay, sure.", "But no."),
        ("\t Okay. ", "\t But no. "),
        ("\n\n", "\n\nBut no."),
    ],
)
def test_trigger_takes_over_the_whitespace(old: str, new: str) -> None:
    trace, spans = chars("First one.", old, " Then more.")
    assert cut_and_text(trace, spans[1], " But no. ") == (10, new)
    assert cut_and_text(trace, spans[1], " But no. ", last=True) == (
        10,
        new.removesuffix(old[len(old.rstrip()) :] if old.strip() else ""),
    )
    assert cut_and_text(trace, spans[1], "") == (10, "")  # the control "nothing"


@given(
    st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5),
    st.text(min_size=1, max_size=8),
    st.integers(0, 4),
)
def test_replacement_keeps_prefix_and_edges(texts: list[str], trigger: str, index: int) -> None:
    trace, spans = chars(*texts)
    sentence = spans[index % len(spans)]
    cut, text = cut_and_text(trace, sentence, trigger)
    assert trace.text[:cut] == "".join(texts[: sentence.index])
    assert text.strip() == trigger.strip()
    if text and (old := texts[sentence.index]).strip():
        assert text[: len(text) - len(text.lstrip())] == old[: len(old) - len(old.lstrip())]
        assert text[len(text.rstrip()) :] == old[len(old.rstrip()) :]


def test_neutral_control_is_of_equal_length() -> None:
    assert (
        nearest_neutral(
            " Stop here now.\n", ["Short.", "Some long words go here.", "The sky is it."]
        )
        == "The sky is it."
    )
    assert (
        nearest_neutral("abcd", ["aaa", "bbbbb"])
        == nearest_neutral("abcd", ["bbbbb", "aaa"])
        == "aaa"
    )
    with pytest.raises(BadInput, match="empty"):
        nearest_neutral("x", [])


def test_earlier_control() -> None:
    assert random_earlier_sentence(rollout("t"), 0, seed=1) is None
    assert random_earlier_sentence(rollout("t"), 1, seed=1, lowest=1) is None
    drawn = [
        random_earlier_sentence(rollout("t", f"r{at}"), 4, seed=1, lowest=1) for at in range(300)
    ]
    assert {drawn.count(at) > 60 for at in (1, 2, 3)} == {True}
    assert drawn == [
        random_earlier_sentence(rollout("t", f"r{at}"), 4, seed=1, lowest=1) for at in range(300)
    ]
    assert drawn != [
        random_earlier_sentence(rollout("t", f"r{at}"), 4, seed=2, lowest=1) for at in range(300)
    ]


def test_reverse_puts_a_cue_at_the_safe_turning_point() -> None:
    trace, spans = chars("First one.", " But no.", " Bye.")
    cue_turn = TurningPoint("h", UNSAFE, 5, 1, None)
    (cue,) = cluster_sentences([cue_turn], {"h": ["x", "Sure, let me begin."]}, UNSAFE)
    turn = TurningPoint("r", SAFE, 5, 1, None)
    assert turn.sentence is not None
    assert cut_and_text(trace, spans[turn.sentence], cue.text) == (10, " Sure, let me begin.")


def test_acceptance() -> None:
    def verdict(label: str | None) -> Verdict:
        return Verdict("r", TRACE, "harm", label, None, "", "j")

    assert (
        is_accepted("no-cue", None, verdict(UNSAFE)) is True
    )  # the paper's rule does not ask the judge
    assert is_accepted("no-cue", 0, verdict(SAFE)) is False
    assert is_accepted("judged-safe", 3, verdict(SAFE)) is True
    assert is_accepted("judged-safe", None, verdict(UNSAFE)) is False
    assert is_accepted("judged-safe", None, verdict(None)) is None
    assert is_accepted("judged-safe", None, None) is None
    with pytest.raises(BadInput, match="maybe"):
        is_accepted("maybe", None, None)
