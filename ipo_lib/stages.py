"""The verbs: sample, judge, measure CSR, intervene. The only place where store meets model; each computes what is missing.

Every verb takes the ``Doors`` first and returns plain records in a fixed order. Continuations (Eq. 1) and intervened
traces are rollouts with ``prefix_len > 0``, so one verb draws them all.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ipo_lib import csr as csr_
from ipo_lib.chat import Chat, part_text, split
from ipo_lib.csr import CsrSettings
from ipo_lib.intervention import CueDetector, Trigger, accepted, replace
from ipo_lib.judging import Exchange, Judge
from ipo_lib.records import (
    CONTINUATION, SAFE, TRACE, UNSAFE, BadInput, CsrPoint, Ids, Intervention, Prompt, Rollout, Sentence, TurningPoint, Verdict, digest,
    from_json, to_json,
)  # fmt: skip
from ipo_lib.sampling import Request, Sampler, Sampling, draw_seed
from ipo_lib.segmentation import sentences
from ipo_lib.stats import Interval, pooled_rate
from ipo_lib.store import Store

SAMPLE_VERSION = JUDGE_VERSION = 1  # raised when the meaning of a verb changes
WRITE_EVERY = 64


@dataclass(frozen=True)
class Doors:
    """The effects a verb may have: the store, and the model and judge it asks for what the store lacks."""

    store: Store
    chat: Chat
    sampler: Sampler
    judge: Judge
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """How traces are gathered and corrected (Algorithm 1).

    ``draws`` traces a prompt; ``rounds`` is N; ``accept`` is ``no-cue`` (the paper) or ``judged-safe``; ``traces`` bounds
    how many traces get a CSR curve; ``pool`` is the number of triggers in use.
    """

    draws: int = 8
    rounds: int = 1
    accept: str = "no-cue"
    traces: int = 16
    pool: int = 6


@dataclass(frozen=True)
class Start:
    """Where a draw begins: a prompt and the response ids given to it."""

    prompt: Prompt
    prefix_ids: Ids = ()


def sample(
    doors: Doors, starts: Sequence[Start], sampling: Sampling, draws: int, *, first: int = 0, stage: str = "rollouts"
) -> list[Rollout]:
    """Draws ``first`` to ``first + draws - 1`` from every start, start by start; missing ones are drawn and stored."""
    spec = {"sampler": doors.sampler.fingerprint(), "chat": doors.chat.fingerprint(), "sampling": to_json(sampling), "seed": doors.seed}
    ledger = doors.store.ledger(stage, SAMPLE_VERSION, spec)
    name = digest(spec)
    keyed: dict[str, tuple[Start, int]] = {}
    order = []
    for start in starts:
        place = f"{start.prompt.id}/{digest([start.prompt.text, start.prefix_ids])}"
        for draw in range(first, first + draws):
            order.append(f"{place}/{draw}")
            keyed[order[-1]] = (start, draw)
    missing = ledger.missing(list(keyed))
    if missing:
        requests = [
            Request(key, doors.chat.prompt_ids(keyed[key][0].prompt), keyed[key][0].prefix_ids, draw_seed(doors.seed, key, name))
            for key in missing
        ]
        batch: list[tuple[str, dict[str, object]]] = []
        for done in doors.sampler.sample(requests, sampling):
            start, draw = keyed[done.key]
            ids = start.prefix_ids + done.token_ids
            rollout = Rollout(digest([name, done.key]), start.prompt.id, len(start.prefix_ids), ids, doors.chat.decode(ids),
                              done.finish, draw, name)  # fmt: skip
            batch.append((done.key, to_json(rollout)))
            if len(batch) == WRITE_EVERY:
                ledger.append(batch)
                batch = []
        ledger.append(batch)
        ledger.finish()
    return [from_json(Rollout, ledger.get(key)) for key in order]


def judge(
    doors: Doors, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout], part: str = TRACE, question: str = "harm"
) -> list[Verdict]:
    """The verdict on one part of every rollout, in order; missing ones are asked for and stored."""
    spec = {"judge": doors.judge.fingerprint(), "part": part, "question": question, "opened": doors.chat.opened}
    ledger = doors.store.ledger("verdicts", JUDGE_VERSION, spec)
    wanted = {rollout.id: rollout for rollout in rollouts}
    missing = ledger.missing(list(wanted))
    for at in range(0, len(missing), WRITE_EVERY):
        exchanges = [exchange(doors, prompts, wanted[key], part, question) for key in missing[at : at + WRITE_EVERY]]
        ledger.append([(verdict.rollout_id, to_json(verdict)) for verdict in doors.judge.judge(exchanges)])
    if missing:
        ledger.finish()
    return [from_json(Verdict, ledger.get(rollout.id)) for rollout in rollouts]


def exchange(doors: Doors, prompts: Mapping[str, Prompt], rollout: Rollout, part: str, question: str) -> Exchange:
    """What the judge sees of a rollout."""
    start = len(doors.chat.decode(rollout.token_ids[: rollout.prefix_len])) if part == CONTINUATION else 0
    return Exchange(rollout.id, prompts[rollout.prompt_id].text, part_text(rollout, part, doors.chat.opened, start), part, question)


def trace_sentences(doors: Doors, rollout: Rollout) -> list[Sentence]:
    """The sentences of a rollout's trace with their spans; none when it has no trace."""
    span = split(rollout.text, doors.chat.opened).reasoning
    return sentences(rollout.text, doors.chat.offsets(rollout.token_ids), *span) if span else []


def texts(rollout: Rollout, spans: Sequence[Sentence]) -> list[str]:
    """The text of each sentence."""
    return [rollout.text[span.char_start : span.char_end] for span in spans]


def trace_end(doors: Doors, rollout: Rollout) -> int | None:
    """Number of response tokens through the one that completes ``</think>``; None when the trace is not closed."""
    return next((end for end in range(1, len(rollout.token_ids) + 1) if doors.chat.closes(rollout.token_ids[:end])), None)


def measure_csr(
    doors: Doors, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout], settings: CsrSettings, sampling: Sampling
) -> dict[str, list[CsrPoint]]:
    """CSR (Eq. 1) of every rollout at every cut of the settings' grain: counts over ``settings.draws`` continuations."""
    starts: dict[str, Start] = {}
    places: dict[str, list[tuple[int, str]]] = {}
    for rollout in rollouts:
        spans = trace_sentences(doors, rollout)
        length = spans[-1].token_end if spans else 0
        places[rollout.id] = []
        for cut in csr_.cuts(length, spans, settings):
            start = Start(prompts[rollout.prompt_id], rollout.token_ids[:cut])
            key = digest([start.prompt.id, start.prefix_ids])
            starts[key] = start
            places[rollout.id].append((cut, key))
    drawn = sample(doors, list(starts.values()), sampling, settings.draws, stage="continuations")
    verdicts = judge(doors, prompts, drawn, settings.part)
    by_start = {key: verdicts[at * settings.draws : (at + 1) * settings.draws] for at, key in enumerate(starts)}
    return {rollout.id: csr_.count({cut: by_start[key] for cut, key in places[rollout.id]}, rollout.id) for rollout in rollouts}


def turning_points(
    doors: Doors, rollouts: Sequence[Rollout], points: Mapping[str, list[CsrPoint]], labels: Mapping[str, str | None], kind: str,
    settings: CsrSettings,
) -> dict[str, TurningPoint]:  # fmt: skip
    """The ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3) turning point of every rollout; ``labels`` are the traces' own verdicts."""
    found = {}
    for rollout in rollouts:
        spans = trace_sentences(doors, rollout)
        length = spans[-1].token_end if spans else 0
        found[rollout.id] = csr_.turning_point(points[rollout.id], kind, settings, spans, length, labels[rollout.id])
    return found


@dataclass(frozen=True)
class Case:
    """One replacement to try: in ``rollout`` the sentence at index ``sentence`` gives way to ``text`` (empty: nothing)."""

    rollout: Rollout
    sentence: int
    trigger_id: str
    text: str
    round: int = 1


def intervene(
    doors: Doors, prompts: Mapping[str, Prompt], cases: Sequence[Case], sampling: Sampling, draws: int = 1
) -> list[tuple[Intervention, Rollout]]:
    """Cut each case before its sentence, put the text there and let the model continue; ``draws`` results a case."""
    starts, cuts = [], []
    for case in cases:
        span = trace_sentences(doors, case.rollout)[case.sentence]
        cut, text = replace(case.rollout, span, case.text)
        starts.append(Start(prompts[case.rollout.prompt_id], case.rollout.token_ids[:cut] + doors.chat.encode(text)))
        cuts.append(cut)
    drawn = sample(doors, starts, sampling, draws, stage="interventions")
    return [
        (Intervention(case.rollout.id, cut, case.trigger_id, drawn[at * draws + k].id, case.round), drawn[at * draws + k])
        for at, (case, cut) in enumerate(zip(cases, cuts, strict=True))
        for k in range(draws)
    ]


def cues(doors: Doors, prompts: Mapping[str, Prompt], rollouts: Iterable[Rollout], detector: CueDetector) -> dict[str, int | None]:
    """The sentence index of every rollout's first compliance cue; None where the detector finds none."""
    return {r.id: detector.first(r, prompts[r.prompt_id], texts(r, trace_sentences(doors, r))) for r in rollouts}


@dataclass(frozen=True)
class Corrected:
    """One loser of Algorithm 1 with its last intervention and the trace it ended in."""

    loser: Rollout
    intervention: Intervention
    result: Rollout
    cut: int


def correct(
    doors: Doors, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout], trigger: Trigger, detector: CueDetector, plan: Plan,
    sampling: Sampling,
) -> list[Corrected]:  # fmt: skip
    """Algorithm 1 for one trigger: up to ``plan.rounds`` replacements of the first cue, until the result is accepted.

    Rollouts without a cue are skipped. The loser stays the original trace and ``cut`` its first cue, whatever the round
    (with N > 1 the paper's reading would store the last failed trace; N = 1 in the paper, where both agree).
    """
    current = {rollout.id: rollout for rollout in rollouts}
    original = dict(current)
    found: dict[str, Corrected] = {}
    cue = cues(doors, prompts, rollouts, detector)
    active = [rollout.id for rollout in rollouts if cue[rollout.id] is not None]
    for round_ in range(1, plan.rounds + 1):
        cases = [Case(current[key], cue[current[key].id] or 0, trigger.id, trigger.text, round_) for key in active]
        results = intervene(doors, prompts, cases, sampling)
        verdicts = judge(doors, prompts, [result for _, result in results])
        cue |= cues(doors, prompts, [result for _, result in results], detector)
        still = []
        for key, (intervention, result), verdict in zip(active, results, verdicts, strict=True):
            done = accepted(plan.accept, cue[result.id], verdict)
            cut = found[key].cut if key in found else intervention.cut
            record = Intervention(intervention.rollout_id, intervention.cut, trigger.id, result.id, round_, done)
            found[key] = Corrected(original[key], record, result, cut)
            if not done and cue[result.id] is not None:
                current[key] = result
                still.append(key)
        active = still
    return [found[rollout.id] for rollout in rollouts if rollout.id in found]


def by_prompt(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], label: str = UNSAFE) -> dict[str, tuple[int, int]]:
    """(k, n) per prompt: how many judged rollouts carry ``label``; prompts with none judged stay in with n = 0."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        counts[rollout.prompt_id][0] += verdict.label == label
        counts[rollout.prompt_id][1] += verdict.label is not None
    return {prompt: (k, n) for prompt, (k, n) in counts.items()}


def mixed(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> list[str]:
    """The prompts whose rollouts are safe and unsafe both, as the paper chose its CSR prompts."""
    labels: dict[str, set[str | None]] = defaultdict(set)
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        labels[rollout.prompt_id].add(verdict.label)
    return [prompt for prompt, seen in labels.items() if {SAFE, UNSAFE} <= seen]


def one_a_prompt(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The first rollout of every prompt."""
    return list({rollout.prompt_id: rollout for rollout in reversed(rollouts)}.values())[::-1]


def success(tried: Sequence[Corrected]) -> Interval:
    """The share of corrected losers whose last replacement was accepted, over prompts."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in tried:
        counts[one.loser.prompt_id][0] += one.intervention.accepted is True
        counts[one.loser.prompt_id][1] += one.intervention.accepted is not None
    return pooled_rate([(k, n) for k, n in counts.values()])


def tally(verdicts: Sequence[Verdict], label: str = UNSAFE) -> tuple[int, int]:
    """(k, n): how many judged verdicts carry ``label``."""
    return sum(v.label == label for v in verdicts), sum(v.label is not None for v in verdicts)


def example(rollouts: Sequence[Rollout], labels: Mapping[str, str | None], cue: Mapping[str, int | None]) -> dict[str, Rollout]:
    """One unsafe rollout with a cue and one safe rollout, of one prompt where there is one: something to look at."""
    for same in (True, False):
        for unsafe in rollouts:
            if labels[unsafe.id] != UNSAFE or cue[unsafe.id] is None:
                continue
            for safe in rollouts:
                if labels[safe.id] == SAFE and (safe.prompt_id == unsafe.prompt_id or not same):
                    return {UNSAFE: unsafe, SAFE: safe}
    raise BadInput(f"no example: {len(rollouts)} rollouts hold no unsafe trace with a cue beside a safe one; raise draws or candidates")


def some(items: Sequence[Rollout], count: int, seed: int) -> list[Rollout]:
    """``count`` rollouts at random, in their order."""
    chosen = sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))
    return [items[index] for index in chosen]
