"""Behind a server: what is known without one. The rest is tests/test_vllm.py, on a real server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import tiny_tokenizer

from ipo_lib.chat import Chat
from ipo_lib.engines.openai_api import Server, Unanswered
from ipo_lib.engines.vllm import ServerSampler, chance
from ipo_lib.records import BadInput
from ipo_lib.engines.nucleus import nucleus_mass
from ipo_lib.sampling import Request, Sampling


@pytest.mark.parametrize(
    "sampling", [Sampling(*one) for one in ((1.0, 1.0), (0.6, 0.95), (0.9, 0.5), (0.0, 1.0))]
)
@pytest.mark.parametrize("tops", [500, 60])
def test_a_chance_from_the_likeliest_tokens_is_the_sampler_s(sampling: Sampling, tops: int) -> None:
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    for _ in range(20):
        logits = torch.tensor(generator.normal(0, 4, 500))
        logs = logits.log_softmax(-1)
        order = logs.argsort(descending=True)[:tops].tolist()
        for own in (order[0], order[1], order[5], order[30], int(generator.integers(500))):
            known = {at: float(logs[at]) for at in {*order, own}}
            exact = float(
                nucleus_mass(
                    logits[None].float(),
                    torch.tensor([own]),
                    sampling.temperature,
                    sampling.top_p,
                    0.0,
                )[0]
            )
            assert chance(own, known, sampling, 0.0) == pytest.approx(exact, rel=0.02, abs=1e-4)


def test_a_token_at_the_edge_of_the_nucleus_counts_as_its_last() -> None:
    known = {0: math.log(0.6), 1: math.log(0.3), 2: math.log(0.1)}
    sampling = Sampling(temperature=1.0, top_p=0.895)
    assert chance(2, known, sampling, 0.0) == 0.0
    assert chance(2, known, sampling, 0.01) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"urls": ()}, "name a url and a model"),
        ({"model": ""}, "name a url and a model"),
        ({"attempts": 0}, "from 1"),
        ({"urls": ("localhost:8000",)}, "write a whole url"),
    ],
)
def test_bad_settings(given: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Server(**{"urls": ("http://x/v1",), "model": "m"} | given)  # type: ignore[arg-type]


def test_a_server_that_is_not_there_is_one_line(tmp_path: object) -> None:
    server = Server(("http://127.0.0.1:9/v1",), "m", attempts=2, pause=0.01)
    sampler = ServerSampler(server, Chat(tiny_tokenizer(tmp_path)))  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match=r"server http://127\.0\.0\.1:9/v1: .*; start it, or mend the url"
    ) as error:
        list(sampler.sample([Request("r", (1, 2), (), 0)], Sampling()))
    assert "\n" not in str(error.value)
    assert (
        sampler.fingerprint()
        == ServerSampler(Server(("http://other/v1",), "m"), sampler.chat).fingerprint()
    )
    with pytest.raises(BadInput, match="scored up to 1"):
        list(sampler.score([], Sampling(temperature=1.5)))


def test_what_was_answered_before_a_failure_is_handed_on_and_nothing_more_is_asked() -> None:
    asked: list[int] = []

    def ask(at: int) -> int:
        asked.append(at)
        if at == 5:
            raise Unanswered("gone")
        return at

    server, found = Server(("http://x/v1",), "m", in_flight=2), list[int]()
    with pytest.raises(Unanswered):
        found.extend(server.each(range(1000), ask))
    assert found[:5] == [0, 1, 2, 3, 4]
    assert sorted(found) == [at for at in sorted(asked) if at != 5]
    assert len(asked) < 30


def test_a_score_never_takes_another_s_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    server = Server(("http://x/v1",), "m")
    sampler = ServerSampler(server, Chat(tiny_tokenizer(tmp_path)))  # type: ignore[arg-type]

    def answer(prompt_ids: Sequence[int], body: Mapping[str, object]) -> object:
        own = body["prompt"][-1]  # type: ignore[index]
        if own == 3:
            raise Unanswered("gone")
        top = {str(own): {"logprob": -0.1 * own}}
        return SimpleNamespace(prompt_logprobs=[None, top])

    monkeypatch.setattr(Server, "context", lambda self: 100.0)
    monkeypatch.setattr(sampler, "_completion", answer)
    requests, found = [Request(f"r{at}", (1,), (at,), 0) for at in range(1, 8)], list[list[float]]()
    with pytest.raises(BadInput, match="run again when it is well"):
        found.extend(sampler.score(requests, Sampling(temperature=1.0, top_p=1.0)))
    assert [round(math.log(one[0]), 3) for one in found] == [-0.1, -0.2]  # not those of r4 to r7


def test_a_draw_that_was_broken_off_is_not_a_finished_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    sampler = ServerSampler(Server(("http://x/v1",), "m"), Chat(tiny_tokenizer(tmp_path)))  # type: ignore[arg-type]
    seen: list[Mapping[str, Any]] = []

    def answer(prompt_ids: Sequence[int], body: Mapping[str, Any]) -> object:
        seen.append(body)
        return SimpleNamespace(token_ids=[5, 6], finish_reason="abort")

    monkeypatch.setattr(Server, "context", lambda self: 100.0)
    monkeypatch.setattr(sampler, "_completion", answer)
    with pytest.raises(BadInput, match="a draw ended by 'abort'; what was drawn is kept"):
        list(sampler.sample([Request("r", (1,), (), 0)], Sampling()))
    assert (seen[0]["extra_body"]["top_k"], seen[0]["extra_body"]["repetition_penalty"]) == (
        0,
        1.0,
    )  # not the model's own settings
