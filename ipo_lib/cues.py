"""Compliance cues: the sentences at which an unsafe trace turns to complying.

A *cue detector* reads the sentences of a trace and returns the index of the first cue. The paper
asks a language model for it (``ipo_lib.judges.rubric``). Here are two detectors that need no model:

- ``KeywordCues`` looks for phrases. It is a toy.
- ``LexiconCues`` learns words from judged traces:

  1. *Weights*: an n-gram weighs more, the more frequent it is in sentences of unsafe
     traces than in those of safe ones.
  2. *Threshold*: the score of a sentence, pooled from its n-grams, that best separates the two.
  3. What separates them best is often the harm itself, after the cue. So a second *layer* learns
     from what comes before the finds of the first.

A lexicon finds whatever goes along with the verdict, cause or not: measure the effect of a cue
(``ipo_lib.intervention``) before you believe in it.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import regex

from ipo_lib.records import BadInput, Prompt, Prompts, Rollout, Rollouts, digest, to_json

UNREAD = -1  # in the place of a sentence index: the detector's answer could not be read
# A mark, such as an Indic vowel sign, is a part of its word.
WORD = regex.compile(r"[\p{L}\p{M}]+(?:'[\p{L}\p{M}]+)*|\p{Nd}+")
DECIMALS = 6  # of learnt numbers, so that a lexicon is the same on every machine
Weights = Mapping[str, float]  # by n-gram; positive: unsafe
Texts = Mapping[str, Sequence[str]]  # sentences of a trace, by rollout id
Answers = Iterable[tuple[str, int | None]]  # rollout id, index of the first cue


class CueDetector(Protocol):
    """Finds compliance cues. It is never the judge: a judge must not confirm its own finds."""

    @property
    def stored(self) -> bool:
        """Whether its answers are kept in the store, as those of a server that costs money."""

    def fingerprint(self) -> dict[str, Any]:
        """All that can change an answer, as JSON values."""

    def first_cues(self, prompts: Prompts, rollouts: Rollouts, texts: Texts) -> Answers:
        """Rollout id and index of the first cue, one rollout after the other.

        Args:
            prompts: the rollouts' prompts, by id.
            rollouts: traces.
            texts: the sentences of each trace, by rollout id.

        Returns:
            The index is None where there is no cue, UNREAD where the answer could not be read.
        """


class TraceReader(ABC):
    """A detector that reads one trace at a time and asks nobody."""

    stored = False

    @abstractmethod
    def first(self, rollout: Rollout, prompt: Prompt, texts: Sequence[str]) -> int | None:
        """Index of the first cue among the sentences of a trace; None if there is none."""

    def first_cues(self, prompts: Prompts, rollouts: Rollouts, texts: Texts) -> Answers:
        """Rollout id and index of the first cue, as ``first`` says."""
        for rollout in rollouts:
            prompt = prompts[rollout.prompt_id]
            yield rollout.id, self.first(rollout, prompt, texts[rollout.id])


@dataclass(frozen=True)
class KeywordCues(TraceReader):
    """A TOY: the first sentence that holds one of some phrases. Its finds mean nothing.

    It serves a model whose traces are too few, or all of one label, to learn a lexicon from.
    """

    phrases: Sequence[str]

    def fingerprint(self) -> dict[str, Any]:
        """The phrases, and that this is a toy."""
        return {"detector": "keyword", "toy": True, "phrases": list(self.phrases)}

    def first(self, rollout: Rollout, prompt: Prompt, texts: Sequence[str]) -> int | None:
        """Index of the first sentence with a phrase, in upper or lower case."""
        for index, text in enumerate(texts):
            if any(phrase.casefold() in text.casefold() for phrase in self.phrases):
                return index
        return None


@dataclass(frozen=True)
class TraceRow:
    """The sentences of one trace, the verdict on it, and its group: the prompt."""

    texts: Sequence[str]
    unsafe: bool
    group: str


@dataclass(frozen=True)
class LexiconCues(TraceReader):
    """Cues by n-grams that separate unsafe from safe traces, learnt from judged rollouts alone."""

    words: int = 3  # longest n-gram
    prior: float = 500.0  # strength of the Dirichlet prior, in n-grams
    min_groups: int = 5  # an n-gram must occur in traces of so many prompts
    use_max: bool = False  # score of a sentence: the largest of its weights, not their mean
    skip_first: bool = True  # the first sentence is never a cue
    layers: int = 2  # at most
    min_accuracy: float = 0.65  # balanced accuracy that a further layer must reach
    # Learnt, one entry per layer:
    weights: tuple[tuple[tuple[str, float], ...], ...] = ()  # z of each n-gram; positive: unsafe
    thresholds: tuple[float, ...] = ()  # a sentence of this score is a cue
    accuracies: tuple[float, ...] = ()  # balanced accuracy on the traces learnt from

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the lexicon."""
        return {"detector": "lexicon", "lexicon": digest(to_json(self))}

    def first(self, rollout: Rollout, prompt: Prompt, texts: Sequence[str]) -> int | None:
        """Index of the first sentence that reaches the threshold of a layer."""
        if not self.weights:
            raise BadInput("LexiconCues: nothing learnt yet; use what .learn(rows) returns")
        return self._first_cue(texts)

    def learn(
        self, rows: Sequence[tuple[Sequence[str], bool]], groups: Sequence[str] | None = None
    ) -> LexiconCues:
        """A detector with these settings, learnt anew.

        Args:
            rows: the sentences of each trace, and whether it was judged unsafe.
            groups: the prompt of each trace; None: all traces are of different prompts.

        Raises:
            BadInput: the traces share no n-grams, or lack a label.
        """
        groups = groups or [str(index) for index in range(len(rows))]
        traces = []
        for (texts, unsafe), group in zip(rows, groups, strict=True):
            traces.append(TraceRow(texts, unsafe, group))
        learnt = dataclasses.replace(self, weights=(), thresholds=(), accuracies=())
        for layer in range(self.layers):
            larger = learnt._with_layer(traces)
            if larger is None or (layer and larger.accuracies[-1] < self.min_accuracy):
                break
            learnt = larger
            traces = learnt._before_cues(traces)
        if not learnt.weights:
            raise BadInput(
                f"lexicon: {len(rows)} traces share no n-grams or lack a label; "
                "give more, of both labels"
            )
        return learnt

    def _first_cue(self, texts: Sequence[str]) -> int | None:
        layers = list(zip(map(dict, self.weights), self.thresholds, strict=True))
        for index in range(int(self.skip_first), len(texts)):
            for weights, threshold in layers:
                if self._score(texts[index], weights) >= threshold:
                    return index
        return None

    def _before_cues(self, traces: Sequence[TraceRow]) -> list[TraceRow]:
        """The traces, of unsafe ones only what comes before their first cue."""
        earlier = []
        for trace in traces:
            cue = self._first_cue(trace.texts) if trace.unsafe else None
            if cue != int(self.skip_first):  # else nothing is left to learn from
                earlier.append(dataclasses.replace(trace, texts=trace.texts[:cue]))
        return earlier

    def _with_layer(self, traces: Sequence[TraceRow]) -> LexiconCues | None:
        """The detector with one more layer; None if these traces give no weights."""
        weights = self._learn_weights(traces)
        if weights is None:
            return None
        threshold, accuracy = self._learn_threshold(traces, weights)
        return dataclasses.replace(
            self,
            weights=(*self.weights, tuple(weights.items())),
            thresholds=(*self.thresholds, threshold),
            accuracies=(*self.accuracies, accuracy),
        )

    def _learn_weights(self, traces: Sequence[TraceRow]) -> dict[str, float] | None:
        """Weighted log-odds z with an informative Dirichlet prior (Monroe et al. 2008)."""
        # 1. In how many sentences of each label an n-gram occurs, and in which groups.
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        groups: dict[str, set[str]] = defaultdict(set)
        for trace in traces:
            for text in trace.texts[int(self.skip_first) :]:
                for gram in ngrams(text, self.words):
                    counts[trace.unsafe][gram] += 1
                    groups[gram].add(trace.group)
        grams = sorted(gram for gram, names in groups.items() if len(names) >= self.min_groups)
        if not grams or not all(counts.values()):
            return None

        # 2. Log-odds of each n-gram among the unsafe (row 0) and the safe (row 1) sentences.
        table = [[counts[unsafe][gram] for gram in grams] for unsafe in (True, False)]
        y = np.array(table, dtype=float)
        prior = self.prior * y.sum(0) / y.sum()
        log_odds = np.log((y + prior) / (y.sum(1, keepdims=True) + self.prior - y - prior))

        # 3. Their difference over its standard error.
        error = np.sqrt((1 / (y + prior)).sum(0))
        z = ((log_odds[0] - log_odds[1]) / error).round(DECIMALS)
        return dict(zip(grams, z.tolist(), strict=True))

    def _learn_threshold(self, traces: Sequence[TraceRow], weights: Weights) -> tuple[float, float]:
        """The threshold of best balanced accuracy, and that accuracy."""
        top_scores: dict[bool, list[float]] = {True: [], False: []}  # one score per trace
        for trace in traces:
            scores = [self._score(text, weights) for text in trace.texts[int(self.skip_first) :]]
            top_scores[trace.unsafe].append(max(scores, default=-math.inf))
        levels = sorted({*top_scores[True], *top_scores[False]} - {-math.inf})
        hits = _share_from(levels, top_scores[True])
        false_alarms = _share_from(levels, top_scores[False])
        best = int((hits - false_alarms).argmax())  # the lowest of equals: the earliest cues
        threshold = (levels[max(best - 1, 0)] + levels[best]) / 2
        return threshold, float(hits[best] + 1 - false_alarms[best]) / 2

    def _score(self, text: str, weights: Weights) -> float:
        """The mean or the largest weight of a sentence's n-grams; -inf without a known one."""
        found = [weights[gram] for gram in sorted(ngrams(text, self.words)) if gram in weights]
        if not found:
            return -math.inf
        return round(max(found) if self.use_max else sum(found) / len(found), DECIMALS)


def _share_from(levels: Sequence[float], scores: Sequence[float]) -> Any:
    """For each level, the share of scores at or above it."""
    return 1 - np.searchsorted(sorted(scores), levels) / len(scores)


def _folded(text: str) -> str:
    """Text in one form of letters, case and apostrophes."""
    return unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()


def ngrams(text: str, longest: int) -> set[str]:
    """The word n-grams of a text, up to ``longest`` words; all numbers count as one word."""
    words = []
    for word in WORD.findall(_folded(text)):
        words.append("0" if word.isdigit() else word)
    grams = set()
    for size in range(1, longest + 1):
        for start in range(len(words) - size + 1):
            grams.add(" ".join(words[start : start + size]))
    return grams
