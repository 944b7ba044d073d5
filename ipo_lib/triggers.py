"""TODO: what ipo_lib.triggers is."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ipo_lib.csr import START_LOCKED
from ipo_lib.cues import WORD, ngrams
from ipo_lib.records import SAFE, TurningPoint, by_id, digest
from ipo_lib.stats import wilson


@dataclass(frozen=True)
class Trigger:
    """A sentence of the pool, its ``count`` at turning points, its cluster (0 is the largest), and its one-shot
    ``rescue``: k safe of n judged interventions on training prompts, None before it was tried."""

    id: str
    text: str
    count: int
    cluster: int
    rescue: tuple[int, int] | None = None


def triggers_from_sentences(sentences: Sequence[str]) -> list[Trigger]:
    """Sentences written in a profile as triggers, for a run in which none can be mined."""
    return [Trigger(digest(["written", one]), one, 0, at) for at, one in enumerate(sentences)]


def cluster_sentences(
    turns: Iterable[TurningPoint],
    texts: Mapping[str, Sequence[str]],
    kind: str = SAFE,
    similarity: float = 0.3,
) -> list[Trigger]:
    """The pool: the sentences (``texts`` by rollout id) at safe turning points, not start-locked, most frequent first.
    Same words count together. A sentence joins the cluster whose most frequent member it resembles most, from
    ``similarity`` on (Jaccard of word 1- and 2-grams). ``kind`` unsafe mines cues (Eq. 3), for the reverse control."""
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in turns:
        if turn.kind == kind and turn.sentence is not None and START_LOCKED not in turn.flags:
            text = texts[turn.rollout_id][turn.sentence].strip()
            forms[" ".join(WORD.findall(text.casefold()))][text] += 1
    clusters: list[tuple[set[str], list[str]]] = []  # the leader's n-grams, the members' words
    for words in sorted(forms.keys() - {""}, key=lambda words: (-forms[words].total(), words)):
        grams = ngrams(words, 2)
        likeness = [len(grams & leader) / len(grams | leader) for leader, _ in clusters]
        if likeness and max(likeness) >= similarity:
            clusters[likeness.index(max(likeness))][1].append(words)
        else:
            clusters.append((grams, [words]))
    clusters.sort(key=lambda cluster: -sum(forms[words].total() for words in cluster[1]))
    pool = [
        (words, forms[words], at) for at, (_, members) in enumerate(clusters) for words in members
    ]
    pool.sort(key=lambda entry: (-entry[1].total(), entry[0]))
    return [
        Trigger(digest(w, 8), min(seen, key=lambda f: (-seen[f], f)), seen.total(), at)
        for w, seen, at in pool
    ]


def choose_triggers(
    pool: Sequence[Trigger], rescues: Mapping[str, tuple[int, int]], n: int = 6
) -> list[Trigger]:
    """The triggers in use: of each of the ``n`` largest clusters with a tried member, the one of best one-shot rescue.
    ``rescues``: (k, n) by trigger id. Best: the highest Wilson lower bound (at equal n: k / n), ties by count."""
    tried = [
        dataclasses.replace(t, rescue=rescues[t.id])
        for t in by_id(pool).values()
        if rescues.get(t.id, (0, 0))[1]
    ]
    ranked = sorted(tried, key=lambda t: (-wilson(*rescues[t.id]).low, -t.count, t.id))
    best = {trigger.cluster: trigger for trigger in reversed(ranked)}
    return [
        trigger
        for trigger in ranked
        if best[trigger.cluster] is trigger and trigger.cluster in sorted(best)[:n]
    ]
