"""Planted rates come back with their intervals; unknown and truncated responses are shown."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from scripted import ASIDE, CLOSE, HELP, PROOF, REFUSAL, STEP, r1_chat, saying, session

from ipo_lib import evaluation
from ipo_lib.chat import Chat
from ipo_lib.evaluation import (
    ANSWER_HARM,
    ANSWERED,
    CORRECT,
    PARTLY,
    REFUSED,
    TRACE_HARM,
    EvaluationSettings,
    MeasuredRate,
)
from ipo_lib.records import Prompt
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stats import format_interval

SAMPLING = Sampling(max_tokens=400)
SETS = {
    name: [
        Prompt(f"{name}-{at}", f"{name} {at}?", "scripted", name == "harmful")
        for at in range(count)
    ]
    for name, count in (("harmful", 40), ("benign", 10), ("sums", 10), ("unused", 3))
}
SETTINGS = EvaluationSettings(("harmful",), ("benign",), ("sums",), draws=8)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))


def measure(
    root: Path,
    chat: Chat,
    *,
    harm: float,
    leak: float = 0.5,
    unknown: float = 0.0,
    cut: float = 0.0,
    name: str = "model",
) -> dict[tuple[str, str], MeasuredRate]:
    """Harmful traces at rate ``harm``, of which ``leak`` answer harmfully.

    Some are unreadable (``unknown``), some are never closed (``cut``).
    """
    asked = {chat.prompt_ids(p): p for prompts in SETS.values() for p in prompts}

    def script(request: Request, sampling: Sampling) -> Completion:
        rng, prompt = random.Random(request.seed), asked[request.prompt_ids]
        bad = prompt.harm and rng.random() < harm
        answer = (
            (HELP if rng.random() < leak else REFUSAL)
            if bad
            else REFUSAL
            if prompt.harm
            else "It is 42."
        )
        trace = "?!" if rng.random() < unknown else STEP if bad else PROOF
        if rng.random() < cut:
            return Completion(request.key, chat.encode(f"{ASIDE}\n{trace}"), "length")
        return Completion(request.key, chat.encode(f"{ASIDE}\n{trace}\n{CLOSE}{answer}"), "stop")

    sampler = saying(chat, lambda _: "", name=name)
    sampler.script = script
    found = evaluation.evaluate(session(root, chat, sampler), SETS, SETTINGS, SAMPLING)
    return {(one.set, one.measure): one for one in found}


def test_planted_rates_come_back(tmp_path: Path, chat: Chat) -> None:
    found = measure(tmp_path, chat, harm=0.6, leak=0.5)
    assert list(found) == [
        ("harmful", TRACE_HARM),
        ("harmful", ANSWER_HARM),
        ("benign", REFUSED),
        ("benign", PARTLY),
        ("benign", ANSWERED),
        ("sums", CORRECT),
    ]
    for measure_, planted in ((TRACE_HARM, 0.6), (ANSWER_HARM, 0.3)):
        one = found["harmful", measure_]
        assert one.rate.low <= planted <= one.rate.high
        assert abs(one.rate.value - planted) < 0.1
        assert one.rate.n == 40
        assert one.total == 320
        assert one.bounds == pytest.approx((one.rate.value, one.rate.value))
    assert found["benign", REFUSED].rate.value == 0
    assert found["benign", REFUSED].rate.high > 0  # 0 of 10 prompts is no proof
    assert found["benign", ANSWERED].rate.value == found["sums", CORRECT].rate.value == 1
    assert all(one.unknown == one.truncated == 0 for one in found.values())


def test_unknown_stays_out_of_the_rate_and_in_the_bounds(tmp_path: Path, chat: Chat) -> None:
    one = measure(tmp_path, chat, harm=0.6, unknown=0.25)["harmful", TRACE_HARM]
    k, n = (sum(pair[at] for pair in one.counts.values()) for at in (0, 1))
    assert one.unknown == one.total - n > 0
    assert one.bounds == (k / one.total, (k + one.unknown) / one.total)
    assert one.bounds[0] < k / n < one.bounds[1]
    assert one.rate.low <= 0.6 <= one.rate.high
    assert one.coverage == pytest.approx(n / one.total)
    (row,) = evaluation.side_by_side({"model": [one]}).to_dict("records")
    low, high = one.bounds
    assert row["model"].endswith(f"] ({100 * low:.1f}-{100 * high:.1f})")
    assert row["n"] == one.rate.n
    assert row["not judged"] == f"{1 - n / one.total:.0%}"
    assert one.total == 320


def test_truncated_is_a_column_of_its_own(tmp_path: Path, chat: Chat) -> None:
    found = measure(tmp_path, chat, harm=0.5, cut=0.25)
    trace, answer = found["harmful", TRACE_HARM], found["harmful", ANSWER_HARM]
    assert trace.truncated == answer.truncated
    assert 40 < trace.truncated < 120
    assert (
        0 < trace.unknown < trace.truncated
    )  # unless it holds harm already, nobody knows how it would have ended
    assert answer.unknown == answer.truncated  # it has no answer
    assert trace.bounds[0] < 0.5 < trace.bounds[1]
    assert trace.bounds[1] - trace.bounds[0] == pytest.approx(trace.unknown / trace.total)
    (row,) = evaluation.side_by_side({"model": [trace]}).to_dict("records")
    assert row["cut off"] == f"{trace.truncated / 320:.0%}"


def test_nobody_judged_is_unknown_not_zero(tmp_path: Path, chat: Chat) -> None:
    one = measure(tmp_path, chat, harm=0.5, unknown=1.0)["harmful", TRACE_HARM]
    assert one.unknown == one.total
    assert one.bounds == (0.0, 1.0)
    assert math.isnan(one.rate.value)
    assert (one.rate.low, one.rate.high, one.rate.n) == (0.0, 1.0, 0)
    (row,) = evaluation.side_by_side({"model": [one]}).to_dict("records")
    assert row["not judged"] == "100%"
    assert row["model"].startswith("unknown")


def test_the_paired_difference_is_after_minus_before(tmp_path: Path, chat: Chat) -> None:
    before = measure(tmp_path, chat, harm=0.7, name="before")
    after = measure(tmp_path, chat, harm=0.2, name="after")
    models = {"before": [*before.values()], "after": [*after.values()]}
    table = evaluation.side_by_side(models).set_index("measure")
    pair = [before["harmful", TRACE_HARM]], [after["harmful", TRACE_HARM]]
    change = evaluation.difference(*pair)
    assert change.low <= -0.5 <= change.high < 0
    assert change.n == 40
    assert format_interval(change).replace(" %", "") == f"{table['change'][TRACE_HARM]}, n=40"
    rate = format_interval(pair[0][0].rate).replace(" %", "")
    assert rate == f"{table['before'][TRACE_HARM]}, n={table['n'][TRACE_HARM]}"
    assert evaluation.difference(*reversed(pair)).value == pytest.approx(-change.value)
    same = evaluation.difference(pair[0], pair[0])
    assert same.low <= same.value == 0 <= same.high


def test_pairs_are_prompts_judged_on_both_sides() -> None:
    old = MeasuredRate("s", TRACE_HARM, {"a": (4, 4), "b": (0, 4), "c": (4, 4)}, 0, 0, 12)
    new = MeasuredRate(
        "s", TRACE_HARM, {"c": (0, 0), "b": (2, 4), "a": (0, 4)}, 4, 0, 12
    )  # any order, c unjudged
    change = evaluation.difference([old], [new])
    assert change.n == 2
    assert change.value == pytest.approx((-1 + 0.5) / 2)
    assert evaluation.difference([old, old], [new, new]).n == 4
    assert evaluation.pooled([old, new]).n == 5
    assert evaluation.pick([old, new], TRACE_HARM) == [old, new]
    assert evaluation.pick([old], CORRECT) == []


def test_extending_the_draws_pays_the_difference(tmp_path: Path, chat: Chat) -> None:
    sampler = saying(chat, lambda _: f"{PROOF}{CLOSE}{REFUSAL}")
    run = session(tmp_path, chat, sampler)
    for draws, paid in ((2, 120), (4, 240), (4, 240)):
        evaluation.evaluate(
            run, SETS, EvaluationSettings(("harmful",), ("benign",), ("sums",), draws), SAMPLING
        )
        assert len(sampler.answered) == paid
    assert not any("unused" in request.key for request in sampler.answered)


def test_bounds_of_several_sets_count_every_response(tmp_path: Path, chat: Chat) -> None:
    one = measure(tmp_path, chat, harm=0.5, cut=0.25)["harmful", TRACE_HARM]
    two = measure(tmp_path, chat, harm=0.5, unknown=0.5, name="other")["harmful", TRACE_HARM]
    low, high = evaluation.bounds([one, two])
    assert low == pytest.approx((one.bounds[0] + two.bounds[0]) / 2)
    assert high == pytest.approx((one.bounds[1] + two.bounds[1]) / 2)
    assert evaluation.bounds([]) == (0.0, 1.0)
