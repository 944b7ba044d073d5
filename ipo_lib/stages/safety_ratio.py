"""CSR along real traces (Eq. 1), and where it turns (Eq. 2 and 3).

From each *cut*, a place in a trace, the model continues several times. CSR is the share of these
*continuations* that end safe. ``ipo_lib.csr`` does the counting; here the continuations are sampled
and judged. ``ipo_lib.turning_points`` finds the turn with far fewer of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ipo_lib import csr
from ipo_lib.csr import CsrSettings
from ipo_lib.records import (
    Curves,
    Labels,
    Prompts,
    Rollout,
    Rollouts,
    TurningPoint,
    as_rollouts,
    by_id,
    prompt_of,
)
from ipo_lib.sampling import Sampling
from ipo_lib.stages.drawing import Prefix, sample
from ipo_lib.stages.session import FRESH, Continuations, Session
from ipo_lib.stages.traces import trace_length, trace_sentences
from ipo_lib.stages.verdicts import judge


def measure_csr(
    session: Session,
    prompts: Prompts,
    rollouts: Rollout | Rollouts,
    settings: CsrSettings,
    sampling: Sampling,
) -> Curves:
    """CSR (Eq. 1) of every rollout at every cut that the settings ask for.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: one trace or several.
        settings: continuations per cut, and where the cuts are.
        sampling: of the continuations.

    Returns:
        By rollout id, one point per cut, from the start of the trace to its end.
    """
    curves = {}
    for key, by_cut in continuations(session, prompts, rollouts, settings, sampling).items():
        verdicts = {cut: [verdict for _, verdict in drawn] for cut, drawn in by_cut.items()}
        curves[key] = csr.count_continuations(verdicts, key)
    return curves


def continuations(
    session: Session,
    prompts: Prompts,
    rollouts: Rollout | Rollouts,
    settings: CsrSettings,
    sampling: Sampling,
) -> dict[str, dict[int, Continuations]]:
    """The draws behind CSR: by rollout id and cut, every continuation with its verdict.

    Args:
        session: store, model and judge.
        prompts: the rollouts' prompts, by id.
        rollouts: one trace or several.
        settings: continuations per cut, and where the cuts are.
        sampling: of the continuations.
    """
    places = []
    rollouts = as_rollouts(rollouts)
    for rollout in rollouts:
        spans = trace_sentences(session, rollout)
        places += [
            (rollout, cut) for cut in csr.cuts_to_measure(trace_length(spans), spans, settings)
        ]
    prefixes = [
        Prefix(prompt_of(rollout, prompts), rollout.token_ids[:cut]) for rollout, cut in places
    ]
    draws = settings.draws
    drawn = sample(session, prefixes, sampling, draws, first=FRESH, stage="continuations")
    judged = list(zip(drawn, judge(session, prompts, drawn, settings.part), strict=True))
    by_rollout: dict[str, dict[int, Continuations]] = {key: {} for key in by_id(rollouts)}
    for index, (rollout, cut) in enumerate(places):
        by_rollout[rollout.id][cut] = judged[index * draws : (index + 1) * draws]
    return by_rollout


def continuations_by_sentence(
    session: Session, rollout: Rollout, drawn: Mapping[int, Continuations]
) -> dict[int, list[tuple[str | None, str]]]:
    """Label and text of every continuation, by the index of the sentence that it follows."""
    by_sentence = {}
    for span in trace_sentences(session, rollout):
        if span.token_end in drawn:
            by_sentence[span.index] = [
                (verdict.label, session.chat.decode(draw.token_ids[draw.prefix_len :]))
                for draw, verdict in drawn[span.token_end]
            ]
    return by_sentence


def find_turning_points(
    session: Session,
    rollouts: Rollout | Rollouts,
    points: Curves,
    labels: Labels,
    kind: str,
    settings: CsrSettings,
) -> dict[str, TurningPoint]:
    """The turning point of every rollout, by rollout id (Eq. 2 or 3), from a CSR measured before.

    ``ipo_lib.turning_points.locate.find_turns`` finds it with fewer continuations.

    Args:
        session: store, model and judge.
        rollouts: one trace or several.
        points: CSR along them, as ``measure_csr`` returns it.
        labels: the traces' labels, which stand for S at their ends.
        kind: ``safe`` (Eq. 2) or ``unsafe`` (Eq. 3).
        settings: thresholds and window.
    """
    turns = {}
    for key, rollout in by_id(as_rollouts(rollouts)).items():
        spans = trace_sentences(session, rollout)
        length = trace_length(spans)
        turns[key] = csr.find_turning_point(points[key], kind, settings, spans, length, labels[key])
    return turns
