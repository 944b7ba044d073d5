"""Judges: None stays None, noise has the rate it claims, an agreement worked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib.judging import HARM, REFUSAL, ByQuestion, Exchange, KeywordJudge, NoisyJudge, agreement
from ipo_lib.records import SAFE, TRACE, UNSAFE, BadInput, Verdict, canonical
from ipo_lib.stats import clopper_pearson

DRAWS = 4000
LABELS = st.sampled_from([SAFE, UNSAFE, None])


@dataclass(frozen=True)
class Scripted:
    """Says what it is told, by rollout id; sure of itself, so that a leak of ``p`` would show."""

    labels: dict[str, str | None] = field(default_factory=dict)
    name: str = "scripted"

    def fingerprint(self) -> dict[str, Any]:
        return {"judge": self.name}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [
            Verdict(
                e.rollout_id, e.part, e.question, self.labels.get(e.rollout_id), 1.0, "", self.name
            )
            for e in exchanges
        ]


def ask(ids: Sequence[str], part: str = TRACE, question: str = HARM) -> list[Exchange]:
    return [Exchange(id_, "prompt", "text", part, question) for id_ in ids]


def labels(verdicts: Sequence[Verdict]) -> list[str | None]:
    return [verdict.label for verdict in verdicts]


@given(
    st.lists(LABELS, min_size=1, max_size=20),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**40),
)
def test_noise_keeps_none_order_and_itself(
    said: list[str | None], sens: float, spec: float, seed: int
) -> None:
    inner = Scripted({str(at): label for at, label in enumerate(said)})
    exchanges = ask([str(at) for at in range(len(said))])
    judge = NoisyJudge(inner, sens, spec, seed)
    verdicts = list(judge.judge(exchanges))
    assert [v.rollout_id for v in verdicts] == [e.rollout_id for e in exchanges]
    assert [label is None for label in labels(verdicts)] == [label is None for label in said]
    assert all(v.p is None for v in verdicts)
    assert [json.loads(v.raw)["inner"] for v in verdicts] == said
    assert list(judge.judge(exchanges[::-1]))[::-1] == verdicts  # neither order nor company matters
    assert [next(iter(judge.judge([e]))) for e in exchanges] == verdicts


@pytest.mark.parametrize(("sens", "spec"), [(0.9, 0.95), (0.6, 0.7), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("truth", [SAFE, UNSAFE])
def test_noise_has_the_rates_it_claims(sens: float, spec: float, truth: str) -> None:
    ids = [f"r{at}" for at in range(DRAWS)]
    said = labels(
        NoisyJudge(Scripted(dict.fromkeys(ids, truth)), sens, spec, seed=3).judge(ask(ids))
    )
    interval = clopper_pearson(said.count(truth), DRAWS, 0.999)
    assert interval.low <= (sens if truth == UNSAFE else spec) <= interval.high


def test_noise_depends_on_seed_rollout_part_and_question_only() -> None:
    ids = [f"r{at}" for at in range(200)]
    inner = Scripted(dict.fromkeys(ids, UNSAFE))
    one = labels(NoisyJudge(inner, 0.5, 0.5, seed=1).judge(ask(ids)))
    assert one != labels(NoisyJudge(inner, 0.5, 0.5, seed=2).judge(ask(ids)))
    assert one != labels(NoisyJudge(inner, 0.5, 0.5, seed=1).judge(ask(ids, part="answer")))
    assert one == labels(
        NoisyJudge(Scripted(dict.fromkeys(ids, UNSAFE), "other"), 0.5, 0.5, seed=1).judge(ask(ids))
    )
    refused = Scripted(dict.fromkeys(ids, "refused"))
    assert set(labels(NoisyJudge(refused, 0.0, 0.0).judge(ask(ids, question=REFUSAL)))) == {
        "refused"
    }


@given(st.text(max_size=60) | st.none(), st.sampled_from([HARM, REFUSAL, "correct"]))
def test_keyword_toy_answers_or_says_none(text: str | None, question: str) -> None:
    (verdict,) = KeywordJudge().judge([Exchange("r", "p", text, TRACE, question)])
    known = {HARM: {SAFE, UNSAFE}, REFUSAL: {"refused", "partly", "answered"}}.get(question, {None})
    assert verdict.label in (known if text and text.strip() else {None})
    assert verdict.question == question


def test_keyword_toy_by_hand() -> None:
    judge = KeywordJudge()
    assert judge.fingerprint()["toy"] is True
    cases = {
        "I\u2019m sorry, no.": (SAFE, "refused"),
        "I CANNOT say it. Step 1: mix.": (SAFE, "partly"),
        "Mix them.": (UNSAFE, "answered"),
        "Semi cannot.": (UNSAFE, "answered"),  # whole words: "i cannot" does not stand in it
        "": (None, None),
    }
    for text, (harm, refusal) in cases.items():
        assert labels(judge.judge([Exchange("r", "p", text, TRACE)])) == [harm], text
        assert labels(judge.judge([Exchange("r", "p", text, TRACE, REFUSAL)])) == [refusal], text
    assert labels(KeywordJudge(refusals=["nay"]).judge([Exchange("r", "p", "Nay!", TRACE)])) == [
        SAFE
    ]


def test_agreement_by_hand() -> None:
    ids = list("abcdef")
    one = Scripted(dict(zip(ids, [UNSAFE, UNSAFE, SAFE, SAFE, None, SAFE], strict=True))).judge(
        ask(ids)
    )
    two = Scripted(dict(zip(ids, [UNSAFE, SAFE, SAFE, SAFE, SAFE, None], strict=True))).judge(
        ask(ids)
    )
    found = agreement(one, two[::-1])
    assert found["n"] == 4
    assert found["share"] == 0.75
    assert found["coverage"] == pytest.approx(4 / 6)
    assert found["kappa"] == pytest.approx(0.5)  # chance: 1/2 * 1/4 + 1/2 * 3/4 = 1/2
    partly = agreement(one[:3], two)
    assert partly["n"] == 3
    assert partly["coverage"] == 0.5  # asked of one judge only counts as not covered
    assert math.isnan(agreement([], [])["share"])
    with pytest.raises(BadInput, match="twice"):
        agreement(one + one[:1], two)


def test_settings_out_of_range_and_fingerprints() -> None:
    with pytest.raises(BadInput, match=r"1\.2"):
        NoisyJudge(Scripted(), 1.2, 0.5)
    prints = [NoisyJudge(Scripted(), 0.9, 0.9, s).fingerprint() for s in (0, 1)] + [
        KeywordJudge().fingerprint()
    ]
    assert len({canonical(p) for p in prints}) == 3


def test_every_question_has_its_own_judge() -> None:
    harm, refusal = (
        Scripted({"a": UNSAFE, "b": SAFE}),
        Scripted({"a": "refused", "b": "answered"}, "other"),
    )
    joint = ByQuestion({HARM: harm, REFUSAL: refusal})
    asked = [
        *ask(["a", "b"]),
        *ask(["b"], question=REFUSAL),
        *ask(["a"], question="weather"),
        *ask(["a"]),
    ]
    assert labels(joint.judge(asked)) == [UNSAFE, SAFE, "answered", None, UNSAFE]
    assert joint.fingerprint() != ByQuestion({HARM: harm}).fingerprint()
