"""A probe reads planted safety from states, and the first sentence that lowers it is the cue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_model
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    PROOF,
    STEP,
    TRIGGER,
    Phrase,
    named,
    rollout,
    saying,
    session,
)

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.experiments import states
from ipo_lib.records import BadInput, Rollout
from ipo_lib.sampling import Request
from ipo_lib.stages import JudgedRollouts, Session

EFFECTS = {CUE: -3.0, STEP: -3.0, TRIGGER: 3.0, PROOF: 3.0}


class Planted:
    """States of eight entries: the log-odds that the text so far plants, and noise."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def fingerprint(self) -> dict[str, Any]:
        return {"states": "planted"}

    def states(self, requests: Sequence[Request]) -> Iterator[Any]:
        for request in requests:
            noise = np.random.default_rng(len(request.key)).normal(0, 0.3, (8, 1))
            rows = []
            for end in range(len(request.prefix_ids)):
                text = self.chat.decode(request.prefix_ids[:end])
                planted = sum(effect * (said in text) for said, effect in EFFECTS.items())
                rows.append([planted, *np.resize(noise, 7)])
            yield np.array(rows)


@pytest.fixture
def seen(chat: Chat, tmp_path: Path) -> tuple[Session, JudgedRollouts]:
    """Traces of all prompts: a cue and a step, or a trigger and a refusal, after an aside."""
    opened = session(tmp_path, chat, Planted(chat))  # type: ignore[arg-type]
    rollouts: list[Rollout] = []
    for number in range(32):
        middle, end = ((CUE, STEP), (TRIGGER, PROOF))[number % 2]
        extra = f"{ASIDE}\n" * (number % 3)
        text = f"{ASIDE}\n{extra}{middle}\n{end}\n{CLOSE}"
        rollouts.append(rollout(chat, text, id_=f"r{number}", prompt=f"p{number % 8}"))
    return opened, JudgedRollouts(named(), rollouts, stages.judge(opened, named(), rollouts))


def test_the_reader_finds_the_sentence_that_lowers_planted_safety(
    seen: tuple[Session, JudgedRollouts],
) -> None:
    opened, judged = seen
    detector = states.learn_state_cues(opened, judged)
    assert detector.threshold > 0
    found = stages.find_cues(opened, named(), judged.rollouts, detector)
    truth = stages.find_cues(opened, named(), judged.rollouts, Phrase())
    assert any(index is not None for index in truth.values())
    assert found == truth
    # Safety is read from the entry in which it was planted.
    assert int(np.argmax(np.abs(detector.probe.weights))) == 0
    assert detector.probe.weights[0] > 0


def test_states_are_those_before_each_sentence_and_after_the_last(
    seen: tuple[Session, JudgedRollouts],
) -> None:
    opened, judged = seen
    of_trace = states.states_by_sentence(opened, named(), judged.rollouts)["r0"]
    assert of_trace[:, 0].tolist() == [0.0, 0.0, -3.0, -6.0]
    falls = states.falls(states.Probe((1.0, *[0.0] * 7), 5.0), of_trace)
    assert falls.tolist() == [0.0, 3.0, 3.0]


def test_a_probe_needs_both_labels_of_several_prompts(seen: tuple[Session, JudgedRollouts]) -> None:
    opened, judged = seen
    of_all = states.states_by_sentence(opened, named(), judged.rollouts)
    unsafe = [rollout for rollout in judged.rollouts if judged.labels[rollout.id] == "unsafe"]
    one_sided = JudgedRollouts(named(), unsafe, [v for v in judged.verdicts if v.label == "unsafe"])
    with pytest.raises(BadInput, match="give traces of both labels"):
        states.learn_probe(of_all, one_sided)


def test_a_sampler_without_states_is_refused(chat: Chat, tmp_path: Path) -> None:
    opened = session(tmp_path, chat, saying(chat, lambda _: ASIDE))
    with pytest.raises(BadInput, match="ScriptedSampler shows no hidden states; load the model"):
        states.states_by_sentence(opened, named(), [])


def test_the_state_at_a_token_draws_it(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, spread=0.3)
    chat = Chat(folder)
    sampler = TransformersSampler(folder, chat, dtype="float32")
    prompt, text = chat.encode("The ships"), chat.encode("carry lamps. Then I wait.")
    (shown,) = sampler.states([Request("a", prompt, text, 0)])
    model = sampler._model
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        again = model.get_output_embeddings()(torch.tensor(shown))
    assert shown.shape[0] == len(text)
    assert torch.allclose(again, logits, atol=1e-4)
