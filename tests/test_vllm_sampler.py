"""The sampler behind servers, without a server; ``test_vllm.py`` tests it on a real one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import tiny_tokenizer
from scripted_server import failed, scripted_server

from ipo_lib.chat import Chat
from ipo_lib.engines import memory
from ipo_lib.engines.nucleus import nucleus_mass
from ipo_lib.engines.openai_api import Server, Unanswered
from ipo_lib.engines.vllm import ServerSampler, token_probability
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request, Sampling


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (0.9, 0.5), (0.0, 1.0)]
)
@pytest.mark.parametrize("count", [500, 60])
def test_a_probability_from_the_likeliest_tokens_is_the_sampler_s(
    temperature: float, top_p: float, count: int
) -> None:
    torch = pytest.importorskip("torch")
    sampling = Sampling(temperature, top_p)
    generator = np.random.default_rng(0)
    for _ in range(20):
        logits = torch.tensor(generator.normal(0, 4, 500))
        logprobs = logits.log_softmax(-1)
        order = logprobs.argsort(descending=True)[:count].tolist()
        for token in (order[0], order[1], order[5], order[30], int(generator.integers(500))):
            tops = {key: float(logprobs[key]) for key in {*order, token}}
            ids = torch.tensor([token])
            masses = nucleus_mass(logits[None].float(), ids, temperature, top_p, 0.0)
            probability = token_probability(token, tops, sampling, 0.0)
            assert probability == pytest.approx(float(masses[0]), rel=0.02, abs=1e-4)


def test_a_token_at_the_edge_of_the_nucleus_counts_as_its_last() -> None:
    tops = {0: math.log(0.6), 1: math.log(0.3), 2: math.log(0.1)}
    sampling = Sampling(temperature=1.0, top_p=0.895)
    assert token_probability(2, tops, sampling, 0.0) == 0.0
    assert token_probability(2, tops, sampling, 0.01) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ()}, "name a url and a model"),
        ({"model": ""}, "name a url and a model"),
        ({"attempts": 0}, "from 1"),
        ({"urls": ("localhost:8000",)}, "write a whole url"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Server(**{"urls": ("http://x/v1",), "model": "m"} | settings)  # type: ignore[arg-type]


def test_a_missing_server_is_one_line(tmp_path: Path) -> None:
    server = Server(("http://127.0.0.1:9/v1",), "m", attempts=2, pause=0.01)
    sampler = ServerSampler(server, Chat(tiny_tokenizer(tmp_path)))
    message = r"server http://127\.0\.0\.1:9/v1: .*; start it, or correct the url"
    with pytest.raises(BadInput, match=message) as error:
        list(sampler.sample([Request("r", (1, 2), (), 0)], Sampling()))
    assert "\n" not in str(error.value)
    elsewhere = ServerSampler(Server(("http://other/v1",), "m"), sampler.chat)
    assert sampler.fingerprint() == elsewhere.fingerprint()
    with pytest.raises(BadInput, match="scored up to 1"):
        list(sampler.score([], Sampling(temperature=1.5)))


def test_what_was_answered_before_a_failure_is_handed_on_and_nothing_more_is_asked() -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        if number == 5:
            raise Unanswered("gone")
        return number

    server = Server(("http://x/v1",), "m", in_flight=2)
    answers: list[int] = []
    with pytest.raises(Unanswered):
        answers.extend(server.each(range(1000), ask))
    assert answers[:5] == [0, 1, 2, 3, 4]
    assert sorted([*answers, 5]) == sorted(asked)
    assert len(asked) < 30


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ServerSampler:
    """A sampler whose server has a context of 100 tokens and is never asked for it."""
    monkeypatch.setattr(Server, "context", lambda self: 100.0)
    return ServerSampler(Server(("http://x/v1",), "m"), Chat(tiny_tokenizer(tmp_path)))


def test_a_score_never_takes_another_s_place(
    sampler: ServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request, body: Mapping[str, Any]) -> object:
        token = body["prompt"][-1]
        if token == 3:
            raise Unanswered("gone")
        top = {str(token): {"logprob": -0.1 * token}}
        return SimpleNamespace(prompt_logprobs=[None, top])

    monkeypatch.setattr(sampler, "_complete", answer)
    requests = [Request(f"r{token}", (1,), (token,), 0) for token in range(1, 8)]
    scores: list[list[float]] = []
    with pytest.raises(BadInput, match="run again when it is well"):
        scores.extend(sampler.score(requests, Sampling(temperature=1.0, top_p=1.0)))
    logprobs = [round(math.log(probability), 3) for (probability,) in scores]
    assert logprobs == [-0.1, -0.2]  # not those of r4 to r7


def test_a_draw_that_was_broken_off_is_not_a_finished_one(
    sampler: ServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[Mapping[str, Any]] = []

    def answer(request: Request, body: Mapping[str, Any]) -> object:
        bodies.append(body)
        return SimpleNamespace(token_ids=[5, 6], finish_reason="abort")

    monkeypatch.setattr(sampler, "_complete", answer)
    with pytest.raises(BadInput, match="a draw ended by 'abort'; what was drawn is kept"):
        list(sampler.sample([Request("r", (1,), (), 0)], Sampling()))
    extra = bodies[0]["extra_body"]  # not the model's own settings
    assert (extra["top_k"], extra["repetition_penalty"]) == (0, 1.0)


SLEEP, WAKE, DRAW = "/sleep?level=1", "/wake_up", "/v1/completions"


def test_a_server_on_the_same_gpu_sleeps_while_a_model_is_loaded_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_HOLDERS", [])
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": [7]}
    body = {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    chat = Chat(tiny_tokenizer(tmp_path))
    requests = [Request("a", (5, 6), (), 1)]
    with scripted_server((200, body)) as scripted:
        server = Server(urls=(scripted.url,), model="m", sleeps=True, attempts=1)
        sampler = ServerSampler(server, chat)
        # 1. Nobody knows how an earlier process left it. So a training puts it to sleep.
        assert memory.release_all("cuda") == 1
        assert scripted.paths == [SLEEP]
        # 2. A draw wakes it once.
        for _ in range(2):
            [*sampler.sample(requests, Sampling(max_tokens=3))]
        assert scripted.paths[1:] == [WAKE, DRAW, DRAW]
        # 3. Nothing is asked of a server that sleeps already.
        assert [memory.release_all("cuda"), memory.release_all("cuda")] == [1, 0]
        assert scripted.paths[4:] == [SLEEP]
        # 4. A model that was loaded meanwhile leaves the GPU before the server wakes.
        model = Holder(scripted.paths)
        memory.register(model)
        [*sampler.sample(requests, Sampling(max_tokens=3))]
        assert scripted.paths[5:] == ["model left", WAKE, DRAW]


class Holder:
    """A model in this process that notes when it leaves."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def release(self) -> None:
        self.notes.append("model left")


def test_a_server_without_sleep_mode_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_HOLDERS", [])
    with scripted_server(failed(404, "Not Found")) as scripted:
        server = Server(urls=(scripted.url,), model="m", sleeps=True, attempts=1)
        sampler = ServerSampler(server, Chat(tiny_tokenizer(tmp_path)))
        with pytest.raises(BadInput, match=r"wake_up .*--enable-sleep-mode .*sleeps to") as error:
            [*sampler.sample([Request("a", (5, 6), (), 1)], Sampling(max_tokens=3))]
        assert "\n" not in str(error.value)


def test_a_server_that_is_down_is_taken_for_asleep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "_HOLDERS", [])
    server = Server(("http://127.0.0.1:9/v1",), "m", sleeps=True, attempts=2, pause=0.01)
    sampler = ServerSampler(server, Chat(tiny_tokenizer(tmp_path)))
    assert memory.release_all("cuda") == 1
    assert "taken for asleep" in caplog.text
    with pytest.raises(BadInput, match="start it again"):
        [*sampler.sample([Request("a", (5, 6), (), 1)], Sampling(max_tokens=3))]


def test_of_two_equal_servers_each_is_put_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HOLDERS", [])
    with scripted_server((200, {})) as scripted:
        servers = [Server((scripted.url,), "m", sleeps=True, attempts=1) for _ in range(2)]
        assert servers[0] == servers[1]
        for server in servers:
            memory.register(server)
        assert memory.release_all("cuda") == 2
        assert scripted.paths == [SLEEP, SLEEP]
