"""ServerSampler against a real vLLM server. Opt in: .ci/vllm FOLDER makes its environment, IPO_VLLM=FOLDER names it."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults import free_port, running
from scripted import StepJudge

from ipo_lib.chat import Chat
from ipo_lib.engines.openai_api import Server
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.engines.vllm import ServerSampler
from ipo_lib.records import BadInput, Prompt
from ipo_lib.sampling import Request, Sampling, draw_seed
from ipo_lib.sandbox import organism, smollm2
from ipo_lib.stages import Prefix, Session, sample
from ipo_lib.store import Store

FOLDER = os.environ.get("IPO_VLLM", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not FOLDER, reason="needs a vLLM environment: .ci/vllm FOLDER, then IPO_VLLM=FOLDER"
    ),
]
TEXTS = ("How tall is a lighthouse?", "Name three birds.", "What is 12 + 7?", "Tell me about rain.")
GREEDY, WARM = Sampling(temperature=0.0, max_tokens=24), Sampling(temperature=0.9, max_tokens=16)
ADAPTER = Path(organism.__file__).parent / "sandbox"


def command(folder: Path, port: int) -> list[str]:
    serve = [
        str(Path(FOLDER) / "bin/python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--port",
        str(port),
    ]
    small = [
        "--served-model-name",
        "smollm2",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "16",
        "--block-size",
        "32",
    ]
    return [
        *serve,
        *small,
        "--enforce-eager",
        "--enable-prefix-caching",
        "--max-logprobs",
        "200",
        "--enable-lora",
        "--max-lora-rank",
        "64",
    ]


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    with running(
        command(smollm2.base(), port), f"http://127.0.0.1:{port}/health", 300, ENVIRONMENT
    ):
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(smollm2.base(), prefill="<think>\n")


@pytest.fixture(scope="module")
def there(url: str, chat: Chat) -> ServerSampler:
    return ServerSampler(Server((url,), "smollm2", tops=200), chat)


@pytest.fixture(scope="module")
def here(chat: Chat) -> TransformersSampler:
    return TransformersSampler(smollm2.base(), chat, dtype="float32")


def requests(chat: Chat, count: int = len(TEXTS)) -> list[Request]:
    prompts = [Prompt(f"p{at}", TEXTS[at % len(TEXTS)], "test", False) for at in range(count)]
    return [
        Request(f"r{at}", chat.prompt_ids(prompt), (), draw_seed(0, at))
        for at, prompt in enumerate(prompts)
    ]


def test_greedy_tokens_are_those_of_the_model_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat
) -> None:
    left, right = (
        {one.key: one for one in sampler.sample(requests(chat), GREEDY)}
        for sampler in (there, here)
    )
    assert left == right
    barred = [replace(one, ban=left[one.key].token_ids[0]) for one in requests(chat)]
    left, right = (
        {one.key: one for one in sampler.sample(barred, GREEDY)} for sampler in (there, here)
    )
    assert left == right
    assert all(left[one.key].token_ids[0] != one.ban for one in barred)


def test_draws_of_one_prompt_are_independent_and_repeat_by_their_seed(
    there: ServerSampler, chat: Chat
) -> None:
    first = requests(chat)[0]
    many = [replace(first, key=f"d{at}", seed=draw_seed(1, at)) for at in range(16)]
    drawn = [one.token_ids for one in there.sample(many, WARM)]
    assert len(set(drawn)) == 16
    assert [one.token_ids for one in there.sample(many[::-1], WARM)] == drawn[::-1]


def test_a_trace_stops_where_it_closes_and_a_prefix_goes_on(
    there: ServerSampler, chat: Chat, url: str
) -> None:
    adapted = ServerSampler(Server((url,), "smollm2"), chat, adapter=ADAPTER)
    drawn = list(
        adapted.sample(requests(chat), Sampling(temperature=0.6, max_tokens=120, until="think"))
    )
    closed = [one for one in drawn if one.finish == "think"]
    assert closed
    assert all(chat.decode(one.token_ids).rstrip().endswith("</think>") for one in closed)
    first = requests(chat)[0]
    whole = next(there.sample([first], GREEDY)).token_ids
    rest = next(
        there.sample([replace(first, prefix_ids=whole[:10])], replace(GREEDY, max_tokens=14))
    ).token_ids
    assert rest == whole[10:]


def test_an_adapter_is_loaded_by_name(there: ServerSampler, chat: Chat, url: str) -> None:
    adapted = ServerSampler(Server((url,), "smollm2"), chat, adapter=ADAPTER)
    merged = TransformersSampler(smollm2.base(), chat, dtype="float32", adapter=ADAPTER)
    left, right, plain = (
        {one.key: one for one in sampler.sample(requests(chat), GREEDY)}
        for sampler in (adapted, merged, there)
    )
    assert left == right != plain
    assert adapted.fingerprint() != there.fingerprint()


def test_scores_are_those_of_the_model_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat
) -> None:
    first = requests(chat)[0]
    asked = [replace(first, prefix_ids=one.token_ids) for one in there.sample([first], WARM)]
    for sampling, close in (
        (Sampling(temperature=1.0, top_p=1.0), 1e-4),
        (Sampling(temperature=0.6, top_p=0.95), 0.01),
        (WARM, 0.02),
    ):
        left, right = (next(sampler.score(asked, sampling)) for sampler in (there, here))
        assert left == pytest.approx(right, abs=close)


def test_an_adapter_moves_tokens_as_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat, url: str
) -> None:
    """log p(adapted) - log p(base) of every token, which KL is the mean of: one model, served or in process."""
    plain = Sampling(temperature=1.0, top_p=1.0)
    first = requests(chat)[0]
    asked = [replace(first, prefix_ids=next(there.sample([first], WARM)).token_ids)]
    adapted = {
        "served": ServerSampler(Server((url,), "smollm2", tops=200), chat, adapter=ADAPTER),
        "here": TransformersSampler(smollm2.base(), chat, dtype="float32", adapter=ADAPTER),
    }
    base = {"served": there, "here": here}
    moved = {}
    for name, sampler in adapted.items():
        after, before = (next(one.score(asked, plain)) for one in (sampler, base[name]))
        moved[name] = [math.log(a / b) for a, b in zip(after, before, strict=True)]
    assert max(map(abs, moved["here"])) > 1
    assert moved["served"] == pytest.approx(moved["here"], abs=2e-3)


def test_thinking_has_a_budget_behind_a_server_as_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat
) -> None:
    short = replace(GREEDY, think_tokens=8)
    left, right = (
        {one.key: one for one in sampler.sample(requests(chat), short)} for sampler in (there, here)
    )
    assert left == right
    assert {one.forced for one in left.values()} <= {8, None}
    assert any(one.forced == 8 for one in left.values())


def test_another_model_and_a_full_context_are_one_line(
    url: str, chat: Chat, there: ServerSampler
) -> None:
    with pytest.raises(BadInput, match=r"serves smollm2.*, not 'other'"):
        list(ServerSampler(Server((url,), "other"), chat).sample(requests(chat), GREEDY))
    long = [replace(requests(chat)[0], prefix_ids=(1,) * 600)]
    with pytest.raises(BadInput, match="context 512; shorten it"):
        list(there.sample(long, GREEDY))


def test_a_server_killed_in_the_middle_loses_nothing(chat: Chat, tmp_path: Path) -> None:
    port, store = free_port(), Store(tmp_path)
    sampler = ServerSampler(
        Server((f"http://127.0.0.1:{port}/v1",), "smollm2", in_flight=4, attempts=2, pause=0.1),
        chat,
    )
    session = Session(store, chat, sampler, StepJudge())
    starts = [Prefix(Prompt(f"p{at}", text, "test", False)) for at, text in enumerate(TEXTS * 16)]
    health = f"http://127.0.0.1:{port}/health"
    with running(command(smollm2.base(), port), health, 300, ENVIRONMENT) as process:
        threading.Timer(5.0, lambda: os.killpg(process.pid, signal.SIGKILL)).start()
        with pytest.raises(BadInput, match="what was drawn is kept"):
            sample(session, starts, Sampling(temperature=0.9, max_tokens=48), 1)
    kept = {path: path.read_bytes() for path in tmp_path.glob("rollouts/*/records.jsonl")}
    before = sum(content.count(b"\n") for content in kept.values())
    assert 0 < before < len(starts)
    with running(command(smollm2.base(), port), health, 300, ENVIRONMENT):
        found = sample(session, starts, Sampling(temperature=0.9, max_tokens=48), 1)
    assert len({one.id for one in found}) == len(starts)
    assert all(path.read_bytes().startswith(content) for path, content in kept.items())
