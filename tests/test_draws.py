"""Budget forcing: a trace that thinks for too long is closed, and recorded as closed so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from models import tiny_model
from sampling_kit import TEXTS, answers, make_requests

from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.sampling import Sampling

FREE = Sampling(temperature=1.0, top_p=1.0, max_tokens=20)
FORCED = replace(FREE, think_tokens=9)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that opens its trace by template and hardly ever closes it."""
    return tiny_model(tmp_path_factory.mktemp("thinker"), spread=0.3, template="r1")


@pytest.mark.parametrize("until", ["think", "eos"])
def test_thinking_that_is_too_long_is_closed_and_recorded(thinker: Path, until: str) -> None:
    chat, sampling = Chat(thinker), replace(FORCED, until=until)
    sampler = TransformersSampler(thinker, chat, batch_size=3)
    completions = answers(sampler, make_requests(chat), sampling).values()
    forced = [completion for completion in completions if completion.forced is not None]
    assert len(forced) > len(TEXTS) // 2
    for completion in forced:
        assert completion.forced == 9
        assert chat.decode(completion.token_ids).count("</think>") >= 1
        assert chat.decode(completion.token_ids[9:]).startswith("\n</think>")
        if until == "think":
            assert completion.finish == "think"
        else:
            assert len(completion.token_ids) > 12


def test_forcing_changes_no_token_before_it_and_no_draw_of_others(thinker: Path) -> None:
    chat = Chat(thinker)
    requests = make_requests(chat)
    sampler = TransformersSampler(thinker, chat, batch_size=4)
    free, forced = (answers(sampler, requests, sampling) for sampling in (FREE, FORCED))
    for key, completion in forced.items():
        length = len(completion.token_ids) if completion.forced is None else completion.forced
        assert free[key].token_ids[:length] == completion.token_ids[:length]
    one_by_one = TransformersSampler(thinker, chat, batch_size=1)
    assert answers(one_by_one, requests, FORCED) == forced


def test_a_trace_that_was_given_closed_is_not_closed_again(thinker: Path) -> None:
    chat, sampling = Chat(thinker), replace(FREE, max_tokens=12, think_tokens=5)
    requests = make_requests(chat, "The salt.</think>")
    completions = answers(TransformersSampler(thinker, chat), requests, sampling).values()
    assert {completion.forced for completion in completions} == {None}
