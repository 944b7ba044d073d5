"""Safety triggers: sentences that turn a trace to safety.

1. *Mine*: take the sentences at safe turning points (Eq. 2). ``cluster_sentences`` counts equal
   ones and puts similar ones into clusters. The result is the pool.
2. *Test*: put each sentence of the pool at compliance cues and count how often the trace ends safe.
   That is its one-shot rescue rate; the caller measures it.
3. *Choose*: from each of the largest clusters the sentence of the median rescue rate:
   ``choose_triggers``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ipo_lib.csr import START_LOCKED
from ipo_lib.cues import WORD, ngrams
from ipo_lib.records import SAFE, TurningPoint, by_id, digest


@dataclass(frozen=True)
class Trigger:
    """A sentence of the pool."""

    id: str
    text: str
    count: int  # how often it stands at a turning point
    cluster: int  # 0 is the largest
    # One-shot rescue: k of n judged interventions ended safe, on training prompts; None: not tried.
    rescue: tuple[int, int] | None = None


def triggers_from_sentences(sentences: Sequence[str]) -> list[Trigger]:
    """Triggers from sentences that a profile lists, for runs in which none can be mined."""
    triggers = []
    for index, sentence in enumerate(sentences):
        triggers.append(Trigger(digest(["written", sentence]), sentence, 0, index))
    return triggers


@dataclass
class _Cluster:
    """Similar sentences, the most frequent first, and the n-grams of that one."""

    leader_grams: set[str]
    members: list[str] = field(default_factory=list)

    def similarity(self, grams: set[str]) -> float:
        """Jaccard similarity to the most frequent member."""
        return len(grams & self.leader_grams) / len(grams | self.leader_grams)


def cluster_sentences(
    turns: Iterable[TurningPoint],
    texts: Mapping[str, Sequence[str]],
    kind: str = SAFE,
    similarity: float = 0.3,
) -> list[Trigger]:
    """The pool of sentences at turning points, the most frequent first.

    Args:
        turns: turning points; start-locked ones are left out.
        texts: the sentences of each trace, by rollout id.
        kind: ``safe`` mines triggers; ``unsafe`` mines cues (Eq. 3), for the reverse control.
        similarity: a sentence joins the most similar cluster if its Jaccard similarity of word 1-
            and 2-grams is at least this.
    """
    # 1. Sentences of the same words count together, whatever their case and punctuation.
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in turns:
        if turn.kind == kind and turn.sentence is not None and START_LOCKED not in turn.flags:
            text = texts[turn.rollout_id][turn.sentence].strip()
            spellings[" ".join(WORD.findall(text.casefold()))][text] += 1
    counts = {words: spelling.total() for words, spelling in spellings.items() if words}
    by_count = sorted(counts, key=lambda words: (-counts[words], words))

    # 2. Each joins the most similar cluster, or begins one.
    clusters: list[_Cluster] = []
    for words in by_count:
        grams = ngrams(words, 2)
        nearest = max(clusters, key=lambda cluster: cluster.similarity(grams), default=None)
        if nearest is None or nearest.similarity(grams) < similarity:
            nearest = _Cluster(grams)
            clusters.append(nearest)
        nearest.members.append(words)
    clusters.sort(key=lambda cluster: -sum(counts[words] for words in cluster.members))
    cluster_of: dict[str, int] = {}
    for index, cluster in enumerate(clusters):
        cluster_of |= dict.fromkeys(cluster.members, index)

    # 3. Of equal words, the most frequent spelling is the trigger's text.
    pool = []
    for words in by_count:
        spelling = spellings[words]
        text = min(spelling, key=lambda form: (-spelling[form], form))
        pool.append(Trigger(digest(words, 8), text, counts[words], cluster_of[words]))
    return pool


def choose_triggers(
    pool: Sequence[Trigger], rescues: Mapping[str, tuple[int, int]], n: int = 6
) -> list[Trigger]:
    """The median trigger of each of the ``n`` largest clusters, the largest cluster first.

    The median is taken over the rescue rates of a cluster's tried members; of an even number of
    members, it is the lower one of the two in the middle. The best of many tries would owe part of
    its rate to chance, and would make one replacement look stronger than it usually is.

    Args:
        pool: the triggers.
        rescues: the one-shot rescue (k, n) by trigger id. Members without a judged try are left
            out, and so is a cluster without a tried member.
        n: how many clusters.
    """
    members: dict[int, list[Trigger]] = defaultdict(list)
    for trigger in by_id(pool).values():
        rescue = rescues.get(trigger.id, (0, 0))
        if rescue[1]:
            members[trigger.cluster].append(dataclasses.replace(trigger, rescue=rescue))
    medians = []
    for cluster in sorted(members)[:n]:
        ranked = sorted(members[cluster], key=lambda trigger: (_rate(trigger), trigger.id))
        medians.append(ranked[(len(ranked) - 1) // 2])
    return medians


def _rate(trigger: Trigger) -> float:
    """The one-shot rescue rate of a tried trigger."""
    k, n = trigger.rescue or (0, 1)
    return k / n
