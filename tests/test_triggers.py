"""The pool of triggers: mined at turning points, counted, clustered, chosen by median rescue."""

from __future__ import annotations

import json
import random

import pytest
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


def test_choose_takes_the_median_rescue_of_each_cluster() -> None:
    made = [
        Trigger(id_, id_, count, cluster)
        for id_, count, cluster in [
            ("a", 9, 0),
            ("b", 5, 0),
            ("c", 4, 0),
            ("d", 3, 1),
            ("e", 3, 1),
            ("f", 2, 2),
            ("g", 1, 3),
        ]
    ]
    rescues = {
        "a": (3, 10),
        "b": (8, 10),
        "c": (5, 10),
        "d": (6, 10),
        "e": (9, 10),
        "f": (9, 10),
        "g": (0, 0),
    }
    chosen = choose_triggers(made, rescues)
    assert [t.id for t in chosen] == ["c", "d", "f"]  # largest cluster first; g was never tried
    assert [t.rescue for t in chosen] == [(5, 10), (6, 10), (9, 10)]
    assert [t.id for t in choose_triggers(made, rescues, 2)] == ["c", "d"]
    # Rates are compared, not counts: the median of 30/32, 1/1 and 2/4 is the first.
    assert [t.id for t in choose_triggers(made, {"a": (30, 32), "b": (1, 1), "c": (2, 4)})] == ["a"]
    assert choose_triggers(made, {}) == []
    again = from_json(Trigger, json.loads(canonical(to_json(chosen[0]))))
    assert again == chosen[0]


def test_the_chosen_trigger_does_not_profit_from_luck() -> None:
    """Members that are all alike: the mean measured rate of the chosen one is their true rate."""
    rng = random.Random(0)
    rates = []
    for _ in range(2000):
        made = [Trigger(str(i), str(i), 1, 0) for i in range(5)]
        rescues = {t.id: (sum(rng.random() < 0.4 for _ in range(20)), 20) for t in made}
        k, n = choose_triggers(made, rescues)[0].rescue or (0, 1)
        rates.append(k / n)
    assert sum(rates) / len(rates) == pytest.approx(0.4, abs=0.01)
