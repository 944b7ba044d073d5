"""ServerSampler against a real vLLM server.

Opt in: ``.ci/vllm FOLDER`` makes the environment of the server, ``IPO_VLLM=FOLDER`` names it.
"""

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
from ipo_lib.sampling import Completion, Request, Sampling, draw_seed
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
    """What starts a small server of a model folder on this port."""
    options = (
        f"--model {folder} --port {port} --served-model-name smollm2 --dtype float32 "
        "--max-model-len 512 --max-num-seqs 16 --block-size 32 --enforce-eager "
        "--enable-prefix-caching --max-logprobs 200 --enable-lora --max-lora-rank 64"
    )
    python = str(Path(FOLDER) / "bin/python")
    return [python, "-m", "vllm.entrypoints.openai.api_server", *options.split()]


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    health = f"http://127.0.0.1:{port}/health"
    with running(command(smollm2.base(), port), health, 300, ENVIRONMENT):
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
    """One request for each of the texts, again and again."""
    asked = []
    for number in range(count):
        prompt = Prompt(f"p{number}", TEXTS[number % len(TEXTS)], "test", False)
        asked.append(Request(f"r{number}", chat.prompt_ids(prompt), (), draw_seed(0, number)))
    return asked


def drawn_by(
    sampler: ServerSampler | TransformersSampler, asked: list[Request], sampling: Sampling
) -> dict[str, Completion]:
    """The completions of the requests by their key."""
    return {completion.key: completion for completion in sampler.sample(asked, sampling)}


def test_greedy_tokens_are_those_of_the_model_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat
) -> None:
    served = drawn_by(there, requests(chat), GREEDY)
    assert served == drawn_by(here, requests(chat), GREEDY)
    banned = []
    for request in requests(chat):
        banned.append(replace(request, ban=served[request.key].token_ids[0]))
    served = drawn_by(there, banned, GREEDY)
    assert served == drawn_by(here, banned, GREEDY)
    assert all(served[request.key].token_ids[0] != request.ban for request in banned)


def test_draws_of_one_prompt_are_independent_and_repeat_by_their_seed(
    there: ServerSampler, chat: Chat
) -> None:
    first = requests(chat)[0]
    many = [replace(first, key=f"d{draw}", seed=draw_seed(1, draw)) for draw in range(16)]
    drawn = [completion.token_ids for completion in there.sample(many, WARM)]
    assert len(set(drawn)) == 16
    backwards = [completion.token_ids for completion in there.sample(many[::-1], WARM)]
    assert backwards == drawn[::-1]


def test_a_trace_stops_where_it_closes_and_a_prefix_goes_on(
    there: ServerSampler, chat: Chat, url: str
) -> None:
    adapted = ServerSampler(Server((url,), "smollm2"), chat, adapter=ADAPTER)
    sampling = Sampling(temperature=0.6, max_tokens=120, until="think")
    drawn = list(adapted.sample(requests(chat), sampling))
    closed = [completion.token_ids for completion in drawn if completion.finish == "think"]
    assert closed
    assert all(chat.decode(ids).rstrip().endswith("</think>") for ids in closed)
    first = requests(chat)[0]
    whole = next(there.sample([first], GREEDY)).token_ids
    continued = replace(first, prefix_ids=whole[:10])
    (rest,) = there.sample([continued], replace(GREEDY, max_tokens=14))
    assert rest.token_ids == whole[10:]


def test_an_adapter_is_loaded_by_name(there: ServerSampler, chat: Chat, url: str) -> None:
    adapted = ServerSampler(Server((url,), "smollm2"), chat, adapter=ADAPTER)
    merged = TransformersSampler(smollm2.base(), chat, dtype="float32", adapter=ADAPTER)
    served = drawn_by(adapted, requests(chat), GREEDY)
    assert served == drawn_by(merged, requests(chat), GREEDY)
    assert served != drawn_by(there, requests(chat), GREEDY)
    assert adapted.fingerprint() != there.fingerprint()


def test_scores_are_those_of_the_model_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat
) -> None:
    first = requests(chat)[0]
    (drawn,) = there.sample([first], WARM)
    asked = [replace(first, prefix_ids=drawn.token_ids)]
    tolerances = {
        Sampling(temperature=1.0, top_p=1.0): 1e-4,
        Sampling(temperature=0.6, top_p=0.95): 0.01,
        WARM: 0.02,
    }
    for sampling, tolerance in tolerances.items():
        served, in_process = (next(sampler.score(asked, sampling)) for sampler in (there, here))
        assert served == pytest.approx(in_process, abs=tolerance)


def test_an_adapter_moves_tokens_as_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat, url: str
) -> None:
    """log p(adapted) - log p(base) of every token, of which KL is the mean, is the same in both."""
    plain = Sampling(temperature=1.0, top_p=1.0)
    first = requests(chat)[0]
    asked = [replace(first, prefix_ids=next(there.sample([first], WARM)).token_ids)]
    adapted = {
        "served": ServerSampler(Server((url,), "smollm2", tops=200), chat, adapter=ADAPTER),
        "here": TransformersSampler(smollm2.base(), chat, dtype="float32", adapter=ADAPTER),
    }
    base = {"served": there, "here": here}
    shifts = {}
    for name, sampler in adapted.items():
        after, before = next(sampler.score(asked, plain)), next(base[name].score(asked, plain))
        shifts[name] = [math.log(p / q) for p, q in zip(after, before, strict=True)]
    assert max(map(abs, shifts["here"])) > 1
    assert shifts["served"] == pytest.approx(shifts["here"], abs=2e-3)


def test_thinking_has_a_budget_behind_a_server_as_in_process(
    there: ServerSampler, here: TransformersSampler, chat: Chat
) -> None:
    short = replace(GREEDY, think_tokens=8)
    served = drawn_by(there, requests(chat), short)
    assert served == drawn_by(here, requests(chat), short)
    forced = {completion.forced for completion in served.values()}
    assert 8 in forced
    assert forced <= {8, None}


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
    url = f"http://127.0.0.1:{port}/v1"
    server = Server((url,), "smollm2", in_flight=4, attempts=2, pause=0.1)
    sampler = ServerSampler(server, chat)
    session = Session(store, chat, sampler, StepJudge())
    starts = []
    for number, text in enumerate(TEXTS * 16):
        starts.append(Prefix(Prompt(f"p{number}", text, "test", False)))
    health = f"http://127.0.0.1:{port}/health"
    with running(command(smollm2.base(), port), health, 300, ENVIRONMENT) as process:
        threading.Timer(5.0, lambda: os.killpg(process.pid, signal.SIGKILL)).start()
        with pytest.raises(BadInput, match="what was drawn is kept"):
            sample(session, starts, Sampling(temperature=0.9, max_tokens=48), 1)
    kept = {path: path.read_bytes() for path in tmp_path.glob("rollouts/*/records.jsonl")}
    before = sum(content.count(b"\n") for content in kept.values())
    assert 0 < before < len(starts)
    with running(command(smollm2.base(), port), health, 300, ENVIRONMENT):
        rollouts = sample(session, starts, Sampling(temperature=0.9, max_tokens=48), 1)
    assert len({rollout.id for rollout in rollouts}) == len(starts)
    assert all(path.read_bytes().startswith(content) for path, content in kept.items())
