"""What the store holds of a run's traces. Nothing is drawn and nothing is judged here.

1. A *sampled* trace is a response to a prompt of the profile, by the model as it is.
2. From its sentence ends the model may have continued (``measure_csr``): S is the share of these
   continuations that end safe.
3. An *intervened* trace goes on after a text that took the place of a sentence. Its beginning tells
   from which trace it was made.
4. A *trained* model has answered the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from ipo_lib.chat import split_response
from ipo_lib.csr import find_turning_point
from ipo_lib.profiles.run import Run
from ipo_lib.records import (
    OWN,
    SAFE,
    UNSAFE,
    BadInput,
    CsrPoint,
    Prompt,
    Rollout,
    Rollouts,
    Sentence,
    Verdict,
    as_prompts,
    by_id,
)
from ipo_lib.stages import (
    FRESH,
    Prefix,
    Session,
    find_cues,
    stored_draws,
    stored_labels,
    trace_sentences,
)

SAMPLED, INTERVENED = "sampled", "intervened"
Continuation = tuple[str | None, str]  # label and text


@dataclass(frozen=True)
class StoredTrace:
    """One response with all that the store holds of it."""

    rollout: Rollout
    prompt: Prompt
    kind: str  # sampled, intervened, or the training that came before, such as "after stage 1"
    sentences: Sequence[Sentence]
    label: str | None  # of the trace, by the profile's judge; None: not judged
    second_label: str | None  # by its second judge
    answer: str  # empty where the response holds none
    points: Sequence[CsrPoint] = ()  # S at the cuts that were measured
    continuations: Mapping[int, Sequence[Continuation]] = field(default_factory=dict)  # by cut
    cue: int | None = None  # index of the sentence that the detector calls the first cue
    turn: int | None = None  # index of the sentence at which S turns for good
    origin: str = ""  # id of the trace that this one was made from, or is compared with
    changed: int | None = None  # the sentence of ``origin`` that was replaced

    @property
    def measured_share(self) -> float:
        """The share of its sentence ends at which S was measured, its start counted as one."""
        return len(self.points) / (1 + len(self.sentences))

    def text_of(self, sentence: Sentence) -> str:
        """The words of one of its sentences."""
        return self.rollout.text[sentence.char_start : sentence.char_end]


def read_traces(
    run: Run,
    sets: Sequence[str] = (),
    limit: int = 500,
    adapters: Mapping[str, Path] | None = None,
    own: Sequence[str] = (),
) -> list[StoredTrace]:
    """The traces of a run that are in its store.

    Args:
        run: the profile with its store.
        sets: names of prompt sets; none: all of the profile.
        limit: number of traces of each kind at most. Of the sampled ones, those with most of S
            measured come first, then those of which others were made.
        adapters: folders of trained adapters by what they are, such as ``after stage 1``, whose
            traces are shown, too.
        own: texts of prompts of one's own, whose traces come first.

    Raises:
        BadInput: the store holds no trace of these prompts.
    """
    reader = _Reader(run, sets or list(run.profile.prompts), own)
    traces = reader.sampled()
    if not traces:
        raise BadInput(
            f"view: {run.session.store.root} holds no trace of profile {run.profile.name!r}; run "
            f"ipo reproduce {run.profile.name} first, or name the store of a run"
        )
    others = list(islice(reader.intervened(traces), limit))
    for kind, adapter in (adapters or {}).items():
        others += islice(reader.trained(traces, kind, adapter), limit)
    origins = {trace.origin for trace in others}
    traces.sort(
        key=lambda trace: (
            trace.prompt.source != OWN,
            -trace.measured_share,
            trace.rollout.id not in origins,
        )
    )
    return [*traces[:limit], *others]


class _Reader:
    """Reads the traces of some prompt sets of a run."""

    def __init__(self, run: Run, sets: Sequence[str], own: Sequence[str]) -> None:
        self.run = run
        of_sets = chain.from_iterable(run.prompts(name) for name in sets)
        self.prompts = by_id([*as_prompts(own), *of_sets])

    def sampled(self) -> list[StoredTrace]:
        """The model's own traces, with their continuations and cues."""
        session = self.run.session
        draws = stored_draws(session, self.run.thinking, "continuations")
        labels = stored_labels(
            session, list(chain.from_iterable(draws.values())), self.run.profile.csr.part
        )
        traces = self._described(session, self._responses(session), SAMPLED)
        cues = self._cues(traces)
        return [
            replace(self._measured(trace, draws, labels), cue=cues.get(trace.rollout.id))
            for trace in traces
        ]

    def intervened(self, traces: Sequence[StoredTrace]) -> Iterator[StoredTrace]:
        """What became of these traces after another text had been put into them."""
        session = self.run.session
        stored = stored_draws(session, self.run.thinking, "interventions")
        results = [draw for draws in stored.values() for draw in draws]
        by_prompt: dict[str, list[StoredTrace]] = {}
        for trace in traces:
            by_prompt.setdefault(trace.prompt.id, []).append(trace)
        known = [result for result in results if result.prompt_id in by_prompt]
        for result in self._described(session, known, INTERVENED):
            origin, changed = find_origin(result, by_prompt[result.prompt.id])
            yield replace(result, origin=origin, changed=changed)

    def trained(
        self, traces: Sequence[StoredTrace], kind: str, adapter: Path
    ) -> Iterator[StoredTrace]:
        """The traces of a trained model on the same prompts, each with the trace of its draw.

        Args:
            traces: those of the model before training.
            kind: which training came before.
            adapter: folder of the trained adapter.
        """
        session = self.run.adapted(adapter)
        same_draw = {(trace.prompt.id, trace.rollout.draw): trace.rollout.id for trace in traces}
        for trace in self._described(session, self._responses(session), kind):
            origin = same_draw.get((trace.prompt.id, trace.rollout.draw), "")
            yield replace(trace, origin=origin)

    def _responses(self, session: Session) -> list[Rollout]:
        """The stored responses of a session's model, whole ones before traces alone."""
        starts = [Prefix(prompt).key for prompt in self.prompts.values()]
        responses: list[Rollout] = []
        for sampling in (self.run.profile.sampling, self.run.thinking):
            stored = stored_draws(session, sampling, "rollouts")
            for start in starts:
                responses += stored.get(start, [])
        return responses

    def _described(self, session: Session, rollouts: Rollouts, kind: str) -> list[StoredTrace]:
        """The rollouts with their sentences and labels."""
        labels = stored_labels(session, rollouts)
        second = self.run.with_second_judge(session)
        second_labels = stored_labels(second, rollouts) if second else {}
        traces = []
        for rollout in rollouts:
            span = split_response(rollout.text, session.chat.opened).answer
            trace = StoredTrace(
                rollout,
                self.prompts[rollout.prompt_id],
                kind,
                trace_sentences(session, rollout),
                labels.get(rollout.id),
                second_labels.get(rollout.id),
                rollout.text[slice(*span)].strip() if span else "",
            )
            traces.append(trace)
        return traces

    def _measured(
        self,
        trace: StoredTrace,
        draws: Mapping[str, Sequence[Rollout]],
        labels: Mapping[str, str | None],
    ) -> StoredTrace:
        """The trace with S, the continuations and the turn, as far as they are in the store.

        Args:
            trace: a sampled one.
            draws: all stored continuations, by the key of their prefix.
            labels: theirs, by id.
        """
        rollout, points, continuations = trace.rollout, [], {}
        ends = [0, *(sentence.token_end for sentence in trace.sentences)]
        for cut in ends:
            prefix = Prefix(trace.prompt, rollout.token_ids[:cut])
            # Those of a search chose its next cuts. An S from them would be biased.
            drawn = [draw for draw in draws.get(prefix.key, []) if draw.draw >= FRESH]
            if not drawn:
                continue
            found = [labels.get(draw.id) for draw in drawn]
            points.append(
                CsrPoint(rollout.id, cut, found.count(SAFE), found.count(UNSAFE), found.count(None))
            )
            texts = [self.run.session.chat.decode(draw.token_ids[cut:]) for draw in drawn]
            continuations[cut] = list(zip(found, texts, strict=True))
        turn = None
        if trace.label and len(points) == len(set(ends)):
            settings, length = self.run.profile.csr, ends[-1]
            found_turn = find_turning_point(
                points, trace.label, settings, trace.sentences, length, trace.label
            )
            turn = found_turn.sentence
        return replace(trace, points=points, continuations=continuations, turn=turn)

    def _cues(self, traces: Sequence[StoredTrace]) -> Mapping[str, int | None]:
        """The first cue of every labelled trace; none of a detector that costs money."""
        labelled = [trace for trace in traces if trace.label]
        rollouts = [trace.rollout for trace in labelled]
        verdicts = [
            Verdict(trace.rollout.id, "trace", "harm", trace.label, None, "", "stored")
            for trace in labelled
        ]
        if not {SAFE, UNSAFE} <= {trace.label for trace in labelled}:
            return {}
        detector = self.run.detector(rollouts, verdicts)
        if detector.stored:
            return {}
        return find_cues(self.run.session, self.prompts, rollouts, detector)


def find_origin(result: StoredTrace, traces: Sequence[StoredTrace]) -> tuple[str, int | None]:
    """From which trace an intervened one was made, and which of its sentences was replaced.

    The given prefix of the result is the beginning of that trace and the sentence that was put
    there, or the beginning alone where nothing was put. Traces with one beginning cannot be told
    apart; an unsafe one is taken before a safe one.

    Args:
        result: the intervened trace.
        traces: of the same prompt.

    Returns:
        The id of the trace and the index of the sentence; ("", None) where no trace begins so.
    """
    ids, given = result.rollout.token_ids, result.rollout.prefix_len
    kept = [sentence for sentence in result.sentences if sentence.token_end <= given]
    by_label = sorted(traces, key=lambda trace: trace.label != UNSAFE)
    if kept:
        start = kept[-1].token_start
        for trace in by_label:
            theirs = trace.rollout.token_ids
            if theirs[:start] == ids[:start] and theirs[:given] != ids[:given]:
                return trace.rollout.id, kept[-1].index
    for trace in by_label:
        if trace.rollout.token_ids[:given] == ids[:given]:
            return trace.rollout.id, len(kept)
    return "", None
