"""The verbs: sample, judge, measure CSR, intervene; here alone store meets model, and each computes what is missing. Each takes
the ``Doors`` first, returns records in a fixed order. Continuations and intervened traces have ``prefix_len > 0``."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ipo_lib import csr as csr_
from ipo_lib.chat import Chat, cut_off, part_text, split
from ipo_lib.csr import CsrSettings
from ipo_lib.cues import UNREAD, CueDetector
from ipo_lib.engines.scoring import certain_where_put
from ipo_lib.intervention import NO_CUE, cut_and_text, is_accepted
from ipo_lib.judging import Exchange, Judge
from ipo_lib.records import (
    CONTINUATION,
    SAFE,
    TRACE,
    UNSAFE,
    BadInput,
    Curves,
    Ids,
    Intervention,
    Labels,
    Prompt,
    Prompts,
    Rollout,
    Rollouts,
    Sentence,
    TurningPoint,
    Verdict,
    Verdicts,
    by_id,
    digest,
    from_json,
    to_json,
)
from ipo_lib.sampling import PausingSampler, Request, Sampler, Sampling, draw_seed
from ipo_lib.segmentation import sentences
from ipo_lib.stats import Interval, pooled_rate
from ipo_lib.store import Store
from ipo_lib.triggers import Trigger

SAMPLE_VERSION = JUDGE_VERSION = 1  # raised when the meaning of a verb changes
WRITE_EVERY = 64
FRESH = 1_000  # CSR's draws are numbered from here: the draws by which a trace or prompt was chosen are no part of its curve
Continuations = list[tuple[Rollout, Verdict]]


@dataclass(frozen=True)
class Session:
    """The effects a verb may have: the store, and the model and judge it asks for what the store lacks."""

    store: Store
    chat: Chat
    sampler: Sampler
    judge: Judge
    seed: int = 0


@dataclass(frozen=True)
class CorrectionSettings:
    """How traces are gathered and corrected (Algorithm 1). ``draws`` traces a prompt; ``rounds`` is N; ``accept``: ``no-cue``
    (the paper) or ``judged-safe``. With a lexicon learnt from the judge's own verdicts ``no-cue`` is the word of the judge's
    student, not of a second opinion; ``traces`` bounds how many traces get a CSR curve; ``pool``: the triggers in use; ``share``:
    all triggers are tried on one trace of a prompt (the paper: on a fresh one each), so that their pairs share a prefix."""

    draws: int = 8
    rounds: int = 1
    accept: str = "no-cue"
    traces: int = 16
    pool: int = 6
    share: bool = False


@dataclass(frozen=True)
class Prefix:
    """Where a draw begins: a prompt and the response ids given to it; ``ban``: the id that must not come first."""

    prompt: Prompt
    prefix_ids: Ids = ()
    ban: int | None = None

    @property
    def key(self) -> str:
        """Its name in the store."""
        return f"{self.prompt.id}/{digest([self.prompt.text, self.prefix_ids, *([] if self.ban is None else [self.ban])])}"


def sample(
    session: Session,
    starts: Sequence[Prefix],
    sampling: Sampling,
    draws: int,
    *,
    first: int = 0,
    stage: str = "rollouts",
) -> list[Rollout]:
    """Draws ``first`` to ``first + draws - 1`` from every start, start by start; missing ones are drawn and stored."""
    return draw_rollouts(
        session,
        [(start, at) for start in starts for at in range(first, first + draws)],
        sampling,
        stage,
    )


def draw_rollouts(
    session: Session, wanted: Sequence[tuple[Prefix, int]], sampling: Sampling, stage: str
) -> list[Rollout]:
    """Single draws, each named by its start and its number; missing ones are drawn together and stored."""
    found = draw_available(session, wanted, sampling, stage, all_of_them=True)
    return [rollout for rollout in found if rollout is not None]


def draw_available(
    session: Session,
    wanted: Sequence[tuple[Prefix, int]],
    sampling: Sampling,
    stage: str,
    all_of_them: bool = False,
) -> list[Rollout | None]:
    """Draws as ``draw`` makes them; None in place of those that still go on.

    Args:
        doors, sampling: what draws, and how.
        wanted: where each draw begins, and its number.
        stage: the kind of draw in the store.
        all_of_them: wait for the last one. Else a sampler that gains by it (``PausingSampler.pauses``) leaves
            the last few for the next call that asks for them.
    """
    engine, chat = session.sampler.fingerprint(), session.chat.fingerprint()
    spec = {"sampler": engine, "chat": chat, "sampling": to_json(sampling), "seed": session.seed}
    ledger, name = session.store.ledger(stage, SAMPLE_VERSION, spec), digest(spec)
    named = {start: start.key for start in dict.fromkeys(start for start, _ in wanted)}
    by_id(start.prompt for start in named)  # else nobody could tell whose rollouts these are
    keys = [f"{named[start]}/{at}" for start, at in wanted]
    keyed = dict(zip(keys, wanted, strict=True))
    missing = [(key, keyed[key][0]) for key in ledger.missing(keyed)]
    requests = [
        Request(
            key,
            session.chat.prompt_ids(start.prompt),
            start.prefix_ids,
            draw_seed(session.seed, key, name),
            start.ban,
        )
        for key, start in missing
    ]
    answer = session.sampler.sample
    if not all_of_them and isinstance(session.sampler, PausingSampler) and session.sampler.pauses:
        answer = session.sampler.sample_some

    def finished() -> Iterator[tuple[str, dict[str, object]]]:
        for done in answer(requests, sampling) if requests else ():
            start, at = keyed[done.key]
            ids, given = start.prefix_ids + done.token_ids, len(start.prefix_ids)
            text = session.chat.decode(ids)
            rollout = Rollout(
                digest([name, done.key]),
                start.prompt.id,
                given,
                ids,
                text,
                done.finish,
                at,
                name,
                done.forced,
            )
            yield done.key, to_json(rollout)

    ledger.collect(finished(), WRITE_EVERY)
    found = [from_json(Rollout, ledger[key]) if key in ledger else None for key in keys]
    made = [one for one in found if one is not None]
    session.store.drawn |= {one.id: len(one.token_ids) - one.prefix_len for one in made}
    own = [
        one for one in made if not one.prefix_len
    ]  # whole responses; a tag that was put is not the model's
    session.store.closed |= {
        one.id: one.forced is None and split(one.text, session.chat.opened).closed for one in own
    }
    return found


def probabilities(
    session: Session, prompts: Prompts, rollouts: Rollouts, sampling: Sampling
) -> dict[str, list[float]]:
    """For every rollout the probability that the sampler gives each of its own tokens, under ``sampling``.

    The tokens of a closing tag that was put (``Rollout.forced``) have the probability 1: nothing else could come.
    """
    spec = {
        "sampler": session.sampler.fingerprint(),
        "chat": session.chat.fingerprint(),
        "sampling": to_json(sampling),
    }
    ledger = session.store.ledger("probabilities", SAMPLE_VERSION, spec)
    named = by_id(rollouts)
    missing = [named[key] for key in ledger.missing(named)]
    asked = [
        Request(r.id, session.chat.prompt_ids(prompts[r.prompt_id]), r.token_ids, 0)
        for r in missing
    ]
    for rollout, found in zip(
        missing, session.sampler.score(asked, sampling) if asked else (), strict=True
    ):
        ledger.append({rollout.id: {"p": found}})
    ledger.finish()
    return {
        r.id: certain_where_put(ledger[r.id]["p"], r.token_ids, r.forced, session.chat.closes)
        for r in rollouts
    }


@dataclass(frozen=True)
class JudgedRollouts:
    """Rollouts of some prompts with the verdicts on their traces, in one order."""

    prompts: dict[str, Prompt]
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def labels(self) -> dict[str, str | None]:
        """The label of every rollout's trace."""
        return {verdict.rollout_id: verdict.label for verdict in self.verdicts}

    @property
    def coverage(self) -> float:
        """The share of traces that the judge could judge."""
        return sum(verdict.label is not None for verdict in self.verdicts) / max(
            len(self.verdicts), 1
        )

    def labelled(self, label: str) -> list[Rollout]:
        """The rollouts whose trace has this label."""
        return [
            rollout
            for rollout, verdict in zip(self.rollouts, self.verdicts, strict=True)
            if verdict.label == label
        ]


def sample_and_judge(
    session: Session, prompts: Sequence[Prompt], sampling: Sampling, draws: int
) -> JudgedRollouts:
    """``draws`` rollouts of every prompt, their traces judged."""
    named = by_id(prompts)
    rollouts = sample(session, [Prefix(prompt) for prompt in prompts], sampling, draws)
    return JudgedRollouts(named, rollouts, judge(session, named, rollouts))


def judge(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    part: str = TRACE,
    question: str = "harm",
) -> list[Verdict]:
    """The verdict on one part of every rollout, in order; missing ones are asked for and stored.

    A part that was cut off gets the label None unless it is unsafe already: the rest of it is not known.
    The store keeps what the judge said of it.
    """
    spec = {
        "judge": session.judge.fingerprint(),
        "part": part,
        "question": question,
        "opened": session.chat.opened,
    }
    ledger = session.store.ledger("verdicts", JUDGE_VERSION, spec)
    wanted = by_id(rollouts)
    exchanges = []
    for rollout in (wanted[key] for key in ledger.missing(wanted)):
        offsets = session.chat.offsets(rollout.token_ids) if part == CONTINUATION else ()
        text = part_text(rollout, part, session.chat.opened, offsets)
        exchanges.append(
            Exchange(rollout.id, prompts[rollout.prompt_id].text, text, part, question)
        )
    chunks = (exchanges[at : at + WRITE_EVERY] for at in range(0, len(exchanges), WRITE_EVERY))
    ledger.collect(
        ((one.rollout_id, to_json(one)) for chunk in chunks for one in session.judge.judge(chunk)),
        WRITE_EVERY,
    )
    return [
        _of_whole(from_json(Verdict, ledger[rollout.id]), rollout, session) for rollout in rollouts
    ]


def _of_whole(verdict: Verdict, rollout: Rollout, session: Session) -> Verdict:
    """The verdict as it counts: none on a part that was cut off, but for harm that stands there already."""
    if verdict.label in (None, UNSAFE) or not cut_off(rollout, verdict.part, session.chat.opened):
        return verdict
    return dataclasses.replace(
        verdict, label=None, p=None, raw=f"cut off; the judge said {verdict.label}"
    )


def trace_sentences(session: Session, rollout: Rollout) -> list[Sentence]:
    """The sentences of a rollout's trace with their spans; none when it has no trace."""
    span = split(rollout.text, session.chat.opened).reasoning
    return sentences(rollout.text, session.chat.offsets(rollout.token_ids), *span) if span else []


def trace_texts(session: Session, rollout: Rollout) -> list[str]:
    """The text of each sentence of the trace."""
    return [
        rollout.text[span.char_start : span.char_end] for span in trace_sentences(session, rollout)
    ]


def trace_end(session: Session, rollout: Rollout) -> int | None:
    """Number of response tokens through the one that completes ``</think>``; None when the trace is not closed."""
    return next(
        (
            end
            for end in range(1, len(rollout.token_ids) + 1)
            if session.chat.closes(rollout.token_ids[:end])
        ),
        None,
    )


def measure_csr(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    settings: CsrSettings,
    sampling: Sampling,
) -> Curves:
    """CSR (Eq. 1) of every rollout at every cut of the settings' grain: counts over ``settings.draws`` continuations."""
    found = continuations(session, prompts, rollouts, settings, sampling)
    judged = {
        key: {cut: [verdict for _, verdict in drawn] for cut, drawn in by_cut.items()}
        for key, by_cut in found.items()
    }
    return {key: csr_.count(by_cut, key) for key, by_cut in judged.items()}


def continuations(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    settings: CsrSettings,
    sampling: Sampling,
) -> dict[str, dict[int, Continuations]]:
    """The draws behind CSR: by rollout id and cut, every continuation with its verdict."""
    places = [
        (rollout, cut)
        for rollout in rollouts
        for cut in csr_.cuts(*_spans(session, rollout), settings)
    ]
    starts = [
        Prefix(prompts[rollout.prompt_id], rollout.token_ids[:cut]) for rollout, cut in places
    ]
    drawn = sample(session, starts, sampling, settings.draws, first=FRESH, stage="continuations")
    pairs = list(zip(drawn, judge(session, prompts, drawn, settings.part), strict=True))
    found: dict[str, dict[int, Continuations]] = {key: {} for key in by_id(rollouts)}
    for at, (rollout, cut) in enumerate(places):
        found[rollout.id][cut] = pairs[at * settings.draws : (at + 1) * settings.draws]
    return found


def continuations_by_sentence(
    session: Session, rollout: Rollout, drawn: Mapping[int, Continuations]
) -> dict[int, list[tuple[str | None, str]]]:
    """What a reader unfolds: by sentence index, the (label, text) of every continuation from that sentence's end."""
    at = {
        cut: [(v.label, session.chat.decode(r.token_ids[r.prefix_len :])) for r, v in rows]
        for cut, rows in drawn.items()
    }
    return {
        span.index: at[span.token_end]
        for span in trace_sentences(session, rollout)
        if span.token_end in at
    }


def turning_points(
    session: Session,
    rollouts: Rollouts,
    points: Curves,
    labels: Labels,
    kind: str,
    settings: CsrSettings,
) -> dict[str, TurningPoint]:
    """The ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3) turning point of every rollout; ``labels`` are the traces' own verdicts."""
    measured = [(key, *_spans(session, rollout)) for key, rollout in by_id(rollouts).items()]
    return {
        key: csr_.turning_point(points[key], kind, settings, spans, length, labels[key])
        for key, length, spans in measured
    }


def _spans(session: Session, rollout: Rollout) -> tuple[int, list[Sentence]]:
    """The trace's length in tokens and its sentences."""
    spans = trace_sentences(session, rollout)
    return spans[-1].token_end if spans else 0, spans


@dataclass(frozen=True)
class Replacement:
    """One replacement to try: in ``rollout`` the sentence at index ``sentence`` gives way to ``text`` (empty: nothing)."""

    rollout: Rollout
    sentence: int
    trigger_id: str
    text: str
    round: int = 1


def intervene(
    session: Session,
    prompts: Prompts,
    cases: Sequence[Replacement],
    sampling: Sampling,
    draws: int = 1,
    first: int = 0,
) -> list[tuple[Intervention, Rollout]]:
    """Cut each case before its sentence, put the text there and let the model continue; ``draws`` results a case."""
    starts, cuts = [], []
    for case in cases:
        spans = trace_sentences(session, case.rollout)
        cut, text = cut_and_text(
            case.rollout, spans[case.sentence], case.text, last=case.sentence == len(spans) - 1
        )
        starts.append(
            Prefix(
                prompts[case.rollout.prompt_id],
                case.rollout.token_ids[:cut] + session.chat.encode(text),
            )
        )
        cuts += [(case, cut)] * draws
    drawn = zip(
        cuts,
        sample(session, starts, sampling, draws, first=first, stage="interventions"),
        strict=True,
    )
    return [
        (Intervention(c.rollout.id, cut, c.trigger_id, result.id, c.round), result)
        for (c, cut), result in drawn
    ]


def find_cues(
    session: Session, prompts: Prompts, rollouts: Rollouts, detector: CueDetector
) -> dict[str, int | None]:
    """The sentence index of every rollout's first compliance cue; None where the detector finds none."""
    if ask := getattr(
        detector, "sentences", None
    ):  # it asks a server, which costs money: its finds are kept
        ledger = session.store.ledger(
            "cues",
            JUDGE_VERSION,
            {"detector": detector.fingerprint(), "opened": session.chat.opened},
        )
        texts = {key: trace_texts(session, rollout) for key, rollout in by_id(rollouts).items()}
        found = ask({key: texts[key] for key in ledger.missing(texts)})
        ledger.collect(((key, {"sentence": at}) for key, at in found), WRITE_EVERY)
        unread = {key for key in texts if ledger[key]["sentence"] == UNREAD}
        session.store.unread = (
            session.store.unread - texts.keys()
        ) | unread  # of this detector, not of one before
        return {key: None if key in unread else ledger[key]["sentence"] for key in texts}
    if many := getattr(detector, "many", None):  # it asks a model
        return dict(many(prompts, [*by_id(rollouts).values()]))
    named = by_id(rollouts).items()
    return {
        key: detector.first(one, prompts[one.prompt_id], trace_texts(session, one))
        for key, one in named
    }


@dataclass(frozen=True)
class Correction:
    """One loser of Algorithm 1 with its last intervention and the trace it ended in."""

    loser: Rollout
    intervention: Intervention
    result: Rollout
    cut: int


def correct(
    session: Session,
    prompts: Prompts,
    rollouts: Rollouts,
    trigger: Trigger,
    detector: CueDetector,
    plan: CorrectionSettings,
    sampling: Sampling,
) -> list[Correction]:
    """Algorithm 1 for one trigger: up to ``plan.rounds`` replacements of the first cue, until the result is accepted. Rollouts
    without a cue are skipped. The loser stays the original trace and ``cut`` its first cue, whatever the round (with N > 1 the
    paper's reading would store the last failed trace; N = 1 in the paper, where both agree)."""
    cue = find_cues(session, prompts, rollouts, detector)
    active = [(rollout, rollout) for rollout in rollouts if cue[rollout.id] is not None]
    found: dict[str, Correction] = {}
    for round_ in range(1, plan.rounds + 1):
        cases = [
            Replacement(current, cue[current.id] or 0, trigger.id, trigger.text, round_)
            for _, current in active
        ]
        results = intervene(session, prompts, cases, sampling)
        verdicts = judge(session, prompts, [result for _, result in results])
        if (
            plan.accept == NO_CUE or round_ < plan.rounds
        ):  # else nobody reads them, and a detector may have to draw for them
            cue |= find_cues(session, prompts, [result for _, result in results], detector)
        for (loser, _), (intervention, result), verdict in zip(
            active, results, verdicts, strict=True
        ):
            open_ended = cue.get(result.id) is None and cut_off(result, TRACE, session.chat.opened)
            blind = plan.accept == NO_CUE and (result.id in session.store.unread or open_ended)
            kept = None if blind else is_accepted(plan.accept, cue.get(result.id), verdict)
            done, before = dataclasses.replace(intervention, accepted=kept), found.get(loser.id)
            found[loser.id] = Correction(
                loser, done, result, before.cut if before else intervention.cut
            )
        last = [found[loser.id] for loser, _ in active]
        active = [
            (one.loser, one.result)
            for one in last
            if not one.intervention.accepted and cue.get(one.result.id) is not None
        ]
    return [found[rollout.id] for rollout in rollouts if rollout.id in found]


def by_prompt(
    rollouts: Rollouts, verdicts: Verdicts, label: str = UNSAFE
) -> dict[str, tuple[int, int]]:
    """(k, n) per prompt: how many judged rollouts carry ``label``; prompts with none judged stay in with n = 0."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        counts[rollout.prompt_id][0] += verdict.label == label
        counts[rollout.prompt_id][1] += verdict.label is not None
    return {prompt: (k, n) for prompt, (k, n) in counts.items()}


def mixed_prompts(rollouts: Rollouts, verdicts: Verdicts) -> list[str]:
    """The prompts whose rollouts are safe and unsafe both, as the paper chose its CSR prompts."""
    return [prompt for prompt, (k, n) in by_prompt(rollouts, verdicts).items() if 0 < k < n]


def first_of_each_prompt(rollouts: Rollouts) -> list[Rollout]:
    """The first rollout of every prompt."""
    return list({rollout.prompt_id: rollout for rollout in reversed(rollouts)}.values())[::-1]


def acceptance_rate(tried: Sequence[Correction]) -> Interval:
    """The share of corrected losers whose last replacement was accepted, over prompts."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in tried:
        counts[one.loser.prompt_id][0] += one.intervention.accepted is True
        counts[one.loser.prompt_id][1] += one.intervention.accepted is not None
    return pooled_rate([(k, n) for k, n in counts.values()])


def count_label(verdicts: Verdicts, label: str = UNSAFE) -> tuple[int, int]:
    """(k, n): how many judged verdicts carry ``label``."""
    return sum(v.label == label for v in verdicts), sum(v.label is not None for v in verdicts)


def example_pair(
    rollouts: Rollouts, labels: Labels, cue: Mapping[str, int | None]
) -> dict[str, Rollout]:
    """One unsafe rollout with a cue and one safe rollout, of one prompt where there is one: something to look at."""
    unsafe = [
        rollout
        for rollout in rollouts
        if labels[rollout.id] == UNSAFE and cue[rollout.id] is not None
    ]
    found = [(one, other) for one in unsafe for other in rollouts if labels[other.id] == SAFE]
    if not found:
        raise BadInput(
            f"no example among {len(rollouts)} rollouts: no unsafe trace with a cue beside a safe one; raise draws"
        )
    bad, good = min(found, key=lambda pair: pair[0].prompt_id != pair[1].prompt_id)
    return {UNSAFE: bad, SAFE: good}


def random_subset(items: Rollouts, count: int, seed: int) -> list[Rollout]:
    """``count`` rollouts at random, in their order."""
    return [
        items[at]
        for at in sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))
    ]
