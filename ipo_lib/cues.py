"""TODO: what ipo_lib.cues is."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ipo_lib.records import BadInput, Prompt, Rollout, digest, to_json

UNREAD = -1  # in place of a sentence index: the detector's answer could not be read
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+")
DECIMALS = 6  # of a learnt number: the same lexicon on every machine


class CueDetector(Protocol):
    """Finds compliance cues. It is never the judge (design law 6)."""

    def fingerprint(self) -> dict[str, Any]:
        """All that can change an answer, as JSON values."""

    def first(self, rollout: Rollout, prompt: Prompt, texts: Sequence[str]) -> int | None:
        """Index of the first cue among the sentences of the rollout's trace; None when there is none."""


@dataclass(frozen=True)
class KeywordCues:
    """A TOY that calls the first sentence with one of these phrases a cue, whatever the case; its finds mean nothing. For a model
    whose traces are too few, or all of one label, to learn a lexicon from."""

    phrases: Sequence[str]

    def fingerprint(self) -> dict[str, Any]:
        """The phrases, and that this is a toy."""
        return {"detector": "keyword", "toy": True, "phrases": list(self.phrases)}

    def first(self, rollout: Rollout, prompt: Prompt, texts: Sequence[str]) -> int | None:
        """The first sentence that holds a phrase."""
        folded = [phrase.casefold() for phrase in self.phrases]
        return next(
            (
                at
                for at, text in enumerate(texts)
                if any(phrase in text.casefold() for phrase in folded)
            ),
            None,
        )


@dataclass(frozen=True)
class LexiconCues:
    """Cues by their words: n-grams that tell unsafe traces from safe ones, learnt from judged rollouts alone. What tells them
    apart best is often the harm itself, after the cue; so each further layer learns from what stands *before* the finds so far.
    Whatever goes with the label is found, cause or not: measure it before you believe it. Settings: longest n-gram in words;
    Dirichlet ``prior`` in n-grams; prompts (or traces) an n-gram must occur in; score a sentence by the max of its z, not the
    mean; leave the first sentence out; the most layers, and the balanced accuracy that a further one must reach. Learnt, by
    layer: z of each n-gram (positive: unsafe), the score from which a sentence is a cue, the accuracy on these rows."""

    words: int = 3
    prior: float = 500.0
    min_groups: int = 5
    use_max: bool = False
    skip_first: bool = True
    layers: int = 2
    min_accuracy: float = 0.65
    weights: tuple[tuple[tuple[str, float], ...], ...] = ()
    thresholds: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """Names the lexicon."""
        return {"detector": "lexicon", "lexicon": digest(to_json(self))}

    def first(self, rollout: Rollout, prompt: Prompt, texts: Sequence[str]) -> int | None:
        """The first sentence that reaches a layer's threshold; BadInput before anything was learnt."""
        if not self.weights:
            raise BadInput("LexiconCues: nothing learnt yet; use what .learn(rows) returns")
        return self._first(texts)

    def learn(
        self, rows: Sequence[tuple[Sequence[str], bool]], groups: Sequence[str] | None = None
    ) -> LexiconCues:
        """From the sentences of traces and whether each was judged unsafe; ``groups``: the prompt of each trace."""
        left = [
            (*row, name)
            for row, name in zip(rows, groups or map(str, range(len(rows))), strict=True)
        ]
        learnt = dataclasses.replace(self, weights=(), thresholds=(), accuracies=())
        for layer in range(self.layers):
            if (more := learnt._with_layer(left)) is None or (
                layer and more.accuracies[-1] < self.min_accuracy
            ):
                break
            learnt, cuts = (
                more,
                [more._first(texts) if unsafe else None for texts, unsafe, _ in left],
            )
            left = [
                (t[:at], u, name)
                for at, (t, u, name) in zip(cuts, left, strict=True)
                if at != self.skip_first
            ]
        if not learnt.weights:
            raise BadInput(
                f"lexicon: {len(rows)} traces share no n-grams or lack a label; give more, of both labels"
            )
        return learnt

    def _score(self, text: str, z: Mapping[str, float]) -> float:
        known = [z[gram] for gram in sorted(ngrams(text, self.words)) if gram in z]
        pooled = max(known, default=0.0) if self.use_max else sum(known) / max(len(known), 1)
        return round(pooled, DECIMALS) if known else -math.inf

    def _first(self, texts: Sequence[str]) -> int | None:
        layers = list(zip(map(dict, self.weights), self.thresholds, strict=True))
        seen = (
            any(self._score(text, z) >= least for z, least in layers)
            for text in texts[self.skip_first :]
        )
        return next((at for at, cue in enumerate(seen, self.skip_first) if cue), None)

    def _with_layer(self, rows: Sequence[tuple[Sequence[str], bool, str]]) -> LexiconCues | None:
        """Sentence counts as weighted log-odds with an informative Dirichlet prior (Monroe et al. 2008)."""
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        holders: dict[str, set[str]] = defaultdict(set)
        for texts, unsafe, name in rows:
            for gram in (
                gram for text in texts[self.skip_first :] for gram in ngrams(text, self.words)
            ):
                counts[unsafe][gram] += 1
                holders[gram].add(name)
        kept = sorted(gram for gram, names in holders.items() if len(names) >= self.min_groups)
        if not kept or not all(counts.values()):
            return None
        y = np.array([[counts[side][gram] for gram in kept] for side in (True, False)], dtype=float)
        prior = self.prior * y.sum(0) / y.sum()
        odds = np.log((y + prior) / (y.sum(1, keepdims=True) + self.prior - y - prior))
        known = dict(
            zip(
                kept,
                ((odds[0] - odds[1]) / np.sqrt((1 / (y + prior)).sum(0))).round(DECIMALS).tolist(),
                strict=True,
            )
        )
        top = [
            max((self._score(t, known) for t in row[0][self.skip_first :]), default=-math.inf)
            for row in rows
        ]
        best = [
            sorted(score for score, row in zip(top, rows, strict=True) if row[1] is side)
            for side in (True, False)
        ]
        levels = sorted({*top} - {-math.inf})
        hits, alarms = (1 - np.searchsorted(side, levels) / len(side) for side in best)
        at = int((hits - alarms).argmax())  # the lowest threshold on ties: the earliest finds
        least, rate = (
            (levels[max(at - 1, 0)] + levels[at]) / 2,
            float(hits[at] + 1 - alarms[at]) / 2,
        )
        learnt = (
            (*self.weights, tuple(known.items())),
            (*self.thresholds, least),
            (*self.accuracies, rate),
        )
        return dataclasses.replace(
            self, weights=learnt[0], thresholds=learnt[1], accuracies=learnt[2]
        )


def ngrams(text: str, longest: int) -> set[str]:
    words = [
        "0" if word.isdigit() else word
        for word in WORD.findall(text.replace("\u2019", "'").casefold())
    ]
    return {
        " ".join(words[at : at + n])
        for n in range(1, longest + 1)
        for at in range(len(words) - n + 1)
    }
