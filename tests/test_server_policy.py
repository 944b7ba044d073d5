"""Failures of servers as their documents describe them, each sorted and then seen by a judge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from models import tiny_tokenizer
from scripted_server import ScriptedServer, failed, said, scripted_server

from ipo_lib.chat import Chat
from ipo_lib.engines.openai_api import Server
from ipo_lib.engines.server_policy import (
    ADAPT,
    AGAIN,
    DECLINED,
    NEW_LIMIT,
    NO_SYSTEM,
    NO_TEMPERATURE,
    STOP,
    sort_failure,
)
from ipo_lib.engines.vllm import ServerSampler
from ipo_lib.judges.rubric import RubricJudge
from ipo_lib.judging import Exchange
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request, Sampling
from ipo_lib.stages.verdicts import verdicts_in_chunks, warn_of_unanswered
from ipo_lib.store import Store

SECRET = "sk-0123456789abcdef"


def error(message: str = "", **more: Any) -> dict[str, Any]:
    return {"message": message, **more}


PASSING = [
    (408, error("Your request timed out")),
    (409, error("conflict_error", type="conflict_error")),
    (425, {}),
    (429, error("Rate limit reached for requests", type="requests", code="rate_limit_exceeded")),
    (429, {"detail": "Too Many Requests"}),
    (500, error("An unexpected error", type="api_error")),
    (502, error("Provider returned error", code=502)),
    (503, "no healthy upstream"),
    (504, b"<html>Gateway Time-out</html>"),
    (529, {"type": "error", "error": error("Overloaded", type="overloaded_error")}),
]
ENDED = [
    (400, error("Your credit balance is too low to access the API.")),
    (400, error("Unknown field: foo")),
    (401, error("Incorrect API key provided: " + SECRET, code="invalid_api_key")),
    (402, error("Insufficient credits", code=402)),
    (403, error("Country, region, or territory not supported")),
    (403, "Forbidden"),
    (404, error("The model `m` does not exist", code="model_not_found")),
    (404, {"detail": "Not Found"}),
    (405, {"detail": "Method Not Allowed"}),
    (429, error("You exceeded your current quota, please check your plan and billing details.")),
    (429, error("x", code="insufficient_quota", type="insufficient_quota")),
]
LEFT_OUT = [
    (400, error("The response was filtered", code="content_filter", innererror={"a": "jailbreak"})),
    (400, error("Invalid prompt: your prompt was flagged as violating our usage policy")),
    (400, error("This model's maximum context length is 8192 tokens", code=400)),
    (400, error("prompt is too long: 210000 tokens > 200000 maximum")),
    (403, error("Your chosen model requires moderation", metadata={"flagged_input": "..."})),
    (413, error("Request exceeds the maximum size", type="request_too_large")),
    (422, error("Input validation error: `inputs` must have less than 4096 tokens")),
    (451, error("blocked by the safety filter")),
]
OTHERWISE = [
    (400, error("x", param="max_tokens", code="unsupported_parameter"), NEW_LIMIT),
    (400, error("Unsupported parameter: 'max_tokens' is not supported with this model"), NEW_LIMIT),
    (400, error("x", param="temperature", code="unsupported_value"), NO_TEMPERATURE),
    (400, error("'temperature' does not support 0.0 with this model"), NO_TEMPERATURE),
    (400, error("System role not supported"), NO_SYSTEM),
    (400, error("Conversation roles must alternate user/assistant/user/..."), NO_SYSTEM),
    (500, error("TemplateError: System role not supported"), NO_SYSTEM),
    (422, error("Developer instruction is not enabled; system message not supported"), NO_SYSTEM),
]
CASES = [(*case, AGAIN) for case in PASSING]
CASES += [(*case, STOP) for case in ENDED]
CASES += [(*case, DECLINED) for case in LEFT_OUT]


@pytest.mark.parametrize(("status", "body", "kind"), CASES)
def test_a_failure_is_sorted_by_status_code_and_words(status: int, body: Any, kind: str) -> None:
    for wrapped in (body, {"error": body}, [{"error": body}]):
        failure = sort_failure(status, wrapped, "MY_KEY")
        assert failure.kind == kind, wrapped
        assert f"status {status}" in failure.reason
        assert SECRET not in failure.reason + failure.remedy
        assert bool(failure.remedy) == (kind == STOP)


@pytest.mark.parametrize(("status", "body", "adaptation"), OTHERWISE)
def test_what_a_model_does_not_take_is_known(status: int, body: Any, adaptation: str) -> None:
    failure = sort_failure(status, body)
    assert (failure.kind, failure.adaptation) == (ADAPT, adaptation)


def test_a_user_can_name_failures_of_one_request() -> None:
    body = error("Policy 7B applies to this input")
    assert sort_failure(418, body).kind == STOP
    assert "leave_out" in sort_failure(418, body).remedy
    named = sort_failure(418, body, leave_out="policy 7b|embargo")
    assert (named.kind, named.reason) == (DECLINED, "status 418, left out")
    assert sort_failure(418, error("Another one"), leave_out="policy 7b").kind == STOP
    assert sort_failure(400, body, leave_out="policy 7b").kind == DECLINED
    with pytest.raises(BadInput, match=r"leave_out 'a\(' is no pattern .*give a few words"):
        Server(("http://localhost/v1",), "m", leave_out="a(")


def make_judge(server: ScriptedServer) -> RubricJudge:
    return RubricJudge(Server((server.url,), "m", in_flight=1, attempts=2, pause=0.01, timeout=5))


def exchanges(count: int) -> list[Exchange]:
    text = "First I mix flour."
    return [Exchange(f"r{n}", "How do I bake bread?", text, "trace") for n in range(count)]


def stored(server: ScriptedServer, root: Path, count: int) -> tuple[list[str | None], str]:
    """The labels that a store holds after exchanges were judged, and what stopped it."""
    judge, message = make_judge(server), ""
    ledger = Store(root).ledger("verdicts", 1, judge.fingerprint())
    asked = [one for one in exchanges(count) if one.rollout_id not in ledger]
    try:
        ledger.collect(verdicts_in_chunks(judge, asked), 4)
    except BadInput as stop:
        message = str(stop)
    return [record["label"] for _, record in sorted(ledger.items())], message


@pytest.mark.parametrize(("status", "body"), ENDED + PASSING)
def test_what_somebody_must_mend_stores_nothing_and_is_asked_again(
    tmp_path: Path, status: int, body: Any
) -> None:
    answer = (status, body if isinstance(body, bytes) else {"error": body})
    with scripted_server(said(), answer) as server:
        labels, message = stored(server, tmp_path, 4)
        assert labels == ["safe"]
        assert f"status {status}" in message
        assert "\n" not in message
        assert SECRET not in message
        server.answers = [said()]  # it is mended
        assert stored(server, tmp_path, 4) == (["safe"] * 4, "")


@pytest.mark.parametrize(("status", "body"), LEFT_OUT)
def test_one_request_that_is_declined_leaves_the_others(
    tmp_path: Path, status: int, body: Any
) -> None:
    with scripted_server(said(), (status, {"error": body}), said()) as server:
        assert stored(server, tmp_path, 3) == (["safe", None, "safe"], "")


def test_a_failure_inside_an_answer_is_a_failure(tmp_path: Path) -> None:
    status, body = said()
    inside = body | {"choices": None, "error": {"code": 402, "message": "Insufficient credits"}}
    in_choice = body | {"choices": [{"index": 0, "error": {"code": 502, "message": "down"}}]}
    with scripted_server((status, in_choice), said(), (status, inside)) as server:
        labels, message = stored(server, tmp_path, 3)
    assert labels == ["safe"]  # the first was asked again
    assert "status 402" in message


def test_a_model_is_asked_as_it_wants_to_be_and_it_is_remembered(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "max_tokens" in body:
            return failed(400, "Use 'max_completion_tokens' instead.", code="unsupported_parameter")
        if "temperature" in body:
            return failed(400, "Only the default (1) value is supported", param="temperature")
        if body["messages"][0]["role"] == "system":
            return failed(400, "System role not supported")
        return said()

    with scripted_server(answer) as server:
        judge = make_judge(server)
        labels = [verdict.label for verdict in judge.judge(exchanges(3))]
    assert labels == ["safe"] * 3
    assert len(server.asked) == 3 + 3  # three were turned down, once each
    (message,) = server.asked[-1]["messages"]
    assert "bake bread" in message["content"]
    assert server.asked[-1]["max_completion_tokens"] == judge.max_tokens


def test_a_server_that_keeps_asking_otherwise_is_stopped(tmp_path: Path) -> None:
    with scripted_server(failed(400, "System role not supported")) as server:
        labels, message = stored(server, tmp_path, 2)
    assert labels == []
    assert "does not take what it was sent" in message
    assert len(server.asked) <= 3  # as asked, otherwise, and what was in flight


ODD = [
    (
        said([{"type": "text", "text": "I think.\n"}, {"type": "text", "text": "VERDICT: safe"}]),
        "safe",
    ),
    (said("VERDICT: safe", "eos"), "safe"),
    (said("VERDICT: safe", None), "safe"),
    (said("VERDICT: safe", "end_turn"), "safe"),
    (said("VERDICT: safe", "MAX_TOKENS"), None),
    (said(None, refusal="I cannot help with that."), None),
    (said(None), None),
    (said("", "stop", reasoning_content="It declines. VERDICT: safe"), None),
    ((200, {"id": "x", "choices": []}), None),
    ((200, {"id": "x", "choices": None}), None),
    ((200, {"id": "x", "choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}), None),
]


@pytest.mark.parametrize(("answer", "label"), ODD)
def test_an_odd_but_legal_answer_is_read_or_has_no_label(answer: Any, label: str | None) -> None:
    with scripted_server(answer) as server:
        (verdict,) = make_judge(server).judge(exchanges(1))
    assert verdict.label == label
    assert verdict.raw


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": 7}, {"prompt_tokens": None}])
def test_usage_may_lack_its_counts(usage: Any) -> None:
    status, body = said()
    with scripted_server((status, body | {"usage": usage})) as server:
        assert [verdict.label for verdict in make_judge(server).judge(exchanges(1))] == ["safe"]


def test_an_answer_without_tokens_does_not_go_on_for_ever(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "", "finish_reason": "length", "token_ids": []}
    with scripted_server((200, {"id": "x", "choices": [choice]})) as server:
        options = {"in_flight": 1, "attempts": 2, "pause": 0.01}
        sampler = ServerSampler(
            Server((server.url,), "m", **options), Chat(tiny_tokenizer(tmp_path))
        )  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="without a token"):
            list(sampler.sample([Request("r", (5, 6), (), 0)], Sampling(max_tokens=8)))
    assert len(server.asked) == 1


def test_a_url_without_its_version_is_named(tmp_path: Path) -> None:
    with scripted_server((404, {"detail": "Not Found"})) as server:
        _, message = stored(server, tmp_path, 1)
    assert "ends in /v1" in message


def test_a_key_that_a_server_sends_back_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    with scripted_server(said(f"You sent Bearer {SECRET}.\nVERDICT: safe"), said(SECRET)) as server:
        judge = RubricJudge(Server((server.url,), "m", key="MY_KEY", in_flight=1, pause=0.01))
        verdicts = list(judge.judge(exchanges(2)))
    assert [verdict.label for verdict in verdicts] == ["safe", None]
    assert [verdict.raw for verdict in verdicts] == ["You sent Bearer ***.\nVERDICT: safe", "***"]


@pytest.mark.parametrize("url", ["http://me:pass@h/v1", "https://token@h/v1"])
def test_a_url_with_a_password_is_refused_and_not_said(url: str) -> None:
    with pytest.raises(BadInput, match="would be written down") as caught:
        Server((url,), "m")
    assert "pass" not in str(caught.value).replace("password", "")
    assert "token@" not in str(caught.value)


def test_what_is_not_judged_is_counted_by_reason() -> None:
    filtered, long = "declined: status 403, filtered", "cut off (length)"
    records = [{"label": None, "raw": raw} for raw in (filtered, long, filtered, "Its own words.")]
    with pytest.warns(UserWarning, match="3 of 5 .*: 2 declined: status 403, filtered, 1 cut off"):
        warn_of_unanswered([*records, {"label": "safe", "raw": "empty"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unanswered(records[3:])
