"""The pool of triggers: mined at turning points, counted, clustered, chosen by rescue rate."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ipo_lib.records import SAFE, UNSAFE, TurningPoint, canonical, from_json, to_json
from ipo_lib.triggers import Trigger, choose_triggers, cluster_sentences


def turned(id_: str, sentence: int | None, kind: str = SAFE, *flags: str) -> TurningPoint:
    token = None if sentence is None and "none" in flags else 5
    return TurningPoint(id_, kind, token, sentence, None, flags)


POOL_TEXTS = {
    "a": ["x", " But that is against the rules.\n"],
    "b": ["x", "But that is against the rules!"],
    "c": ["But that is against our rules.", "y"],
    "d": ["x", "Someone could get hurt by this."],
    "e": ["x", "But that is against the rules."],
    "f": ["Locked from the start.", "y"],
    "g": ["x", "..."],
    "h": ["x", "Sure, let me begin."],
}


def pool() -> list[Trigger]:
    turns = [turned(id_, 1) for id_ in "abdeg"] + [
        turned("c", 0),
        turned("f", 0, SAFE, "start-locked"),
    ]
    return cluster_sentences(
        [*turns, turned("f", None, SAFE, "none"), turned("h", 1, UNSAFE)], POOL_TEXTS
    )


def test_pool_is_mined_counted_and_clustered() -> None:
    found = pool()
    assert [(t.text, t.count, t.cluster) for t in found] == [
        ("But that is against the rules.", 3, 0),  # the most frequent form of equal words
        ("But that is against our rules.", 1, 0),
        ("Someone could get hurt by this.", 1, 1),
    ]
    assert len({t.id for t in found}) == 3
    assert all(t.rescue is None for t in found)
    assert [
        t.cluster
        for t in cluster_sentences([turned(i, 1) for i in "abde"], POOL_TEXTS, similarity=1.0)
    ] == [0, 1]
    assert [t.text for t in cluster_sentences([turned("h", 1, UNSAFE)], POOL_TEXTS, UNSAFE)] == [
        "Sure, let me begin."
    ]
    assert [from_json(Trigger, json.loads(canonical(to_json(t)))) for t in found] == found
    assert cluster_sentences([], {}) == []


@given(st.permutations(sorted("abdeg")))
def test_pool_does_not_depend_on_order(ids: list[str]) -> None:
    assert cluster_sentences([turned(id_, 1) for id_ in ids], POOL_TEXTS) == cluster_sentences(
        [turned(id_, 1) for id_ in "abdeg"], POOL_TEXTS
    )


def test_choose_takes_the_best_rescue_of_each_cluster() -> None:
    made = [
        Trigger(id_, id_, count, cluster)
        for id_, count, cluster in [
            ("a", 9, 0),
            ("b", 5, 0),
            ("c", 4, 1),
            ("d", 3, 1),
            ("e", 2, 2),
            ("f", 1, 3),
        ]
    ]
    rescues = {"a": (3, 10), "b": (8, 10), "c": (5, 10), "d": (5, 10), "e": (9, 10), "f": (0, 0)}
    chosen = choose_triggers(made, rescues)
    assert [t.id for t in chosen] == ["e", "b", "c"]  # c before d by count; f was never tried
    assert [t.rescue for t in chosen] == [(9, 10), (8, 10), (5, 10)]
    assert [t.id for t in choose_triggers(made, rescues, 2)] == [
        "b",
        "c",
    ]  # the two largest clusters
    assert [t.id for t in choose_triggers(made, {"a": (29, 32), "b": (1, 1)})] == [
        "a"
    ]  # one lucky draw is not the best
    assert choose_triggers(made, {}) == []
    again = from_json(Trigger, json.loads(canonical(to_json(chosen[0]))))
    assert again == chosen[0]
