"""Draws come from the model's own nucleus, with its probabilities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from models import tiny_model
from sampling_kit import make_requests
from scipy import stats
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.engines.nucleus import nucleus_draw
from ipo_lib.records import BadInput


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Of the first token that a model writes."""
    folder = tiny_model(tmp_path_factory.mktemp("model"), spread=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = make_requests(Chat(folder))[1].prompt_ids
    return model(torch.tensor([prompt])).logits[0, -1].detach()


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("head", [4, 64])
def test_frequencies_are_the_models_own_nucleus(
    logits: torch.Tensor, top_p: float, head: int
) -> None:
    probabilities = (logits / 0.7).double().softmax(-1)
    values, ids = probabilities.sort(descending=True)
    size = int((values.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(values)
    shares = values[:size] / values[:size].sum()
    nucleus = dict(zip(ids[:size].tolist(), shares.tolist(), strict=True))
    n = 20_000
    uniforms = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).random(n))
    rows = logits.expand(n, -1).clone()
    drawn = Counter(nucleus_draw(rows, uniforms, 0.7, top_p, head).tolist())
    assert set(drawn) <= set(nucleus)
    # A test of the counts, with the rare tokens in one cell.
    common = [token for token, share in nucleus.items() if share * n >= 5]
    counts = [drawn[token] for token in common]
    expected = [nucleus[token] * n for token in common]
    rare = 1 - sum(nucleus[token] for token in common)
    if rare * n >= 5:
        counts.append(n - sum(counts))
        expected.append(rare * n)
    if len(counts) > 1:
        scale = sum(counts) / sum(expected)
        scaled = [count * scale for count in expected]
        assert stats.chisquare(counts, scaled).pvalue > 1e-3


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BadInput, match="not finite"):
        nucleus_draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]).double(), 1.0, 0.9)


def test_a_banned_token_that_is_the_whole_nucleus_gives_way_to_the_others_by_their_weight() -> None:
    # At top-p 0.95 the nucleus is token 0 alone.
    logits = torch.tensor([[12.0, 2.0, 1.0, 0.0]]).expand(4000, 4)
    uniforms = torch.arange(4000, dtype=torch.float64) / 4000
    first_token = torch.zeros(4000, dtype=torch.long)
    drawn = nucleus_draw(logits, uniforms, 1.0, 0.95, banned=first_token)
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(-1)
    shares = torch.bincount(drawn, minlength=4)[1:] / 4000
    assert 0 not in drawn
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    no_token = torch.full((4000,), -1)
    assert set(nucleus_draw(logits, uniforms, 1.0, 0.95, banned=no_token).tolist()) == {0}
