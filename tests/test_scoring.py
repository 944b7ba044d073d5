"""The probabilities of given texts are those with which the sampler would draw them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from models import tiny_model
from sampling_kit import TEXTS, many_draws, prompt_ids

from ipo_lib.chat import Chat
from ipo_lib.engines import scoring
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import Ids
from ipo_lib.sampling import Request, Sampling


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), spread=0.3)


def score_text(
    sampler: TransformersSampler, prompt: Ids, text: Ids, sampling: Sampling
) -> list[float]:
    (score,) = sampler.score([Request("a", prompt, text, 0)], sampling)
    return score


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_that_share_a_prompt_are_those_of_separate_passes(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_model(tmp_path, family=family)
    chat, sampling = Chat(folder), Sampling(temperature=0.8, top_p=1.0)
    texts = ["a", "The ships", "", "Bread needs flour, water.", "b", "Wait. " * 40, "hot oven"]
    requests = []
    for prompt in TEXTS[:3]:
        for number, text in enumerate(texts):
            requests.append(Request(str(number), chat.encode(prompt), chat.encode(text), 0))
    assert max(len(request.prefix_ids) for request in requests) > scoring.SHARED
    sampler = TransformersSampler(folder, chat, dtype="float32")
    separate = [next(sampler.score([request], sampling)) for request in requests]
    shared = list(sampler.score(requests, sampling))
    assert [len(score) for score in shared] == [len(request.prefix_ids) for request in requests]
    few = TransformersSampler(folder, chat, dtype="float32", batch_size=2)
    for scores in (shared, few.score(requests, sampling)):
        for score, expected in zip(scores, separate, strict=True):
            assert score == pytest.approx(expected, abs=1e-5, rel=1e-3)


def test_a_score_reads_each_prompt_once_unless_what_follows_is_long(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(llama)
    sampler = TransformersSampler(llama, chat)
    short, long = chat.encode("ab"), chat.encode("lighthouse " * 80)
    prompts = [chat.encode(text) for text in TEXTS[:2]]
    decoder = sampler._model.get_decoder()
    shapes: list[tuple[int, ...]] = []
    forward = decoder.forward

    def watched(**inputs: object) -> object:
        shapes.append(tuple(inputs["input_ids"].shape))  # type: ignore[attr-defined]
        return forward(**inputs)

    monkeypatch.setattr(decoder, "forward", watched)
    requests = []
    for prompt in prompts:
        requests += [Request(str(number), prompt, short, 0) for number in range(5)]
    list(sampler.score(requests, Sampling()))
    assert shapes == [
        (1, len(prompts[0])),
        (5, len(short) - 1),
        (1, len(prompts[1])),
        (5, len(short) - 1),
    ]
    shapes.clear()
    requests = [Request(str(number), prompts[0], long, 0) for number in range(2)]
    list(sampler.score(requests, Sampling()))
    assert shapes == [(1, len(prompts[0]) + len(long))] * 2


def test_scores_are_the_frequencies_of_draws(llama: Path) -> None:
    """``score`` says how often ``sample`` draws a token, and 0 for one outside the nucleus."""
    chat, sampling = Chat(llama), Sampling(temperature=0.8, top_p=0.9, max_tokens=1)
    sampler = TransformersSampler(llama, chat, dtype="float32")
    prompt = prompt_ids(chat, TEXTS[1])
    draws = sampler.sample(many_draws(prompt, 3000, base=1), sampling)
    counts = Counter(draw.token_ids for draw in draws)
    common, times = next(item for item in counts.most_common() if item[0])
    trace = common + chat.encode("salt")
    requests = [Request("a", prompt, trace, 0), Request("b", prompt, trace[:1], 0)]
    score, first_score = sampler.score(requests, sampling)
    assert len(score) == len(trace)
    assert first_score == pytest.approx(score[:1], rel=1e-4)
    error = (score[0] * (1 - score[0]) / 3000) ** 0.5
    assert abs(score[0] - times / 3000) < 4 * error
    ordinary = range(chat.eos_ids[0] + 1, 200)
    unlikely = next(token for token in ordinary if (token,) not in counts)
    assert score_text(sampler, prompt, (unlikely,), sampling) == [0.0]
    greedy = Sampling(temperature=0, max_tokens=6)
    (drawn,) = sampler.sample([Request("d", prompt, (), 0)], greedy)
    assert set(score_text(sampler, prompt, drawn.token_ids, greedy)) <= {1.0}


@pytest.mark.parametrize(("dtype", "tolerant"), [("float32", False), ("bfloat16", True)])
def test_a_few_tokens_that_16_bit_logits_put_outside_the_nucleus_do_not_make_a_trace_foreign(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tolerant: bool
) -> None:
    """The batch that drew a token had other logits in the last bits.

    A trace of another model has many tokens outside the nucleus.
    """
    chat, sampling = Chat(llama), Sampling(temperature=0.8, top_p=0.9, max_tokens=24)
    prompt = prompt_ids(chat, TEXTS[1])
    sampler = TransformersSampler(llama, chat, dtype=dtype)
    requests = [Request(str(number), prompt, (), number) for number in range(20)]
    draws = [draw.token_ids for draw in sampler.sample(requests, sampling)]
    trace = next(ids for ids in draws if len(ids) > 8)
    assert min(score_text(sampler, prompt, trace, sampling)) > 0
    # Other tokens in the last place.
    last_scores = []
    for token in range(chat.eos_ids[0] + 1, 120):
        last_scores.append(score_text(sampler, prompt, (*trace[:-1], token), sampling)[-1])
    assert any(0 < score < 0.05 for score in last_scores)
    assert any(score == 0 for score in last_scores) is not tolerant
    # A trace of another model.
    foreign = tuple(range(chat.eos_ids[0] + 1, chat.eos_ids[0] + 20))
    zeros = score_text(sampler, prompt, foreign, sampling).count(0)
    assert zeros > 2
    # The share is one of the response, not of what is in memory at once.
    monkeypatch.setattr("ipo_lib.engines.transformers_sampler.SCORED", 1)
    assert score_text(sampler, prompt, foreign, sampling).count(0) == zeros
