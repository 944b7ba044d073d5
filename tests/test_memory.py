"""Models make room for each other where a GPU's memory is short, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import tiny_model
from sampling_kit import prompt_ids

from ipo_lib.chat import Chat
from ipo_lib.dpo import DpoSettings
from ipo_lib.engines import lora, memory
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request, Sampling

GIB = 2**30


class Model:
    """A model of so many bytes on a pretended card."""

    def __init__(self, size: int, card: dict[str, int]) -> None:
        self.size, self.card, self.loaded = size, card, False

    def load(self) -> None:
        memory.make_room("cuda:0", self.size)
        self.card["free"] -= self.size
        self.loaded = True
        memory.register(self)

    def release(self) -> None:
        self.card["free"] += self.size
        self.loaded = False


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """An empty card of 36 GiB."""
    state = {"free": 36 * GIB}
    monkeypatch.setattr(memory, "_HOLDERS", [])
    monkeypatch.setattr(memory, "free_bytes", lambda _: state["free"])
    return state


def test_the_model_loaded_longest_ago_goes_first(card: dict[str, int]) -> None:
    base, guard, adapted = (Model(size * GIB, card) for size in (15, 2, 15))
    base.load()
    guard.load()
    assert (base.loaded, guard.loaded) == (True, True)  # both fit
    adapted.load()
    assert (base.loaded, guard.loaded, adapted.loaded) == (False, True, True)
    base.load()
    assert (guard.loaded, adapted.loaded, base.loaded) == (False, False, True)
    assert card["free"] == 21 * GIB


def test_training_has_the_card_for_itself(card: dict[str, int]) -> None:
    base, guard = Model(15 * GIB, card), Model(2 * GIB, card)
    base.load()
    guard.load()
    assert memory.release_all("cpu") == 0
    assert memory.release_all("cuda") == 2
    assert card["free"] == 36 * GIB


def test_a_holder_that_cannot_leave_is_asked_again(card: dict[str, int]) -> None:
    class Stuck(Model):
        def release(self) -> None:
            raise BadInput("not now")

    stuck = Stuck(15 * GIB, card)
    stuck.load()
    for _ in range(2):
        with pytest.raises(BadInput, match="not now"):
            memory.release_all("cuda")


def test_a_sampler_that_let_its_model_go_draws_the_same_again(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", spread=0.3)
    chat = Chat(folder)
    sampler = TransformersSampler(folder, chat)
    requests = [Request("a", prompt_ids(chat, "Bread"), (), 1)]
    first = list(sampler.sample(requests, Sampling(max_tokens=5)))
    assert "_model" in vars(sampler)
    sampler.release()
    sampler.release()  # twice does no harm
    assert "_model" not in vars(sampler)
    assert list(sampler.sample(requests, Sampling(max_tokens=5))) == first


def test_loading_a_model_to_train_asks_the_others_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    monkeypatch.setattr(memory, "release_all", lambda device: devices.append(device) or 0)
    lora.load_base(tiny_model(tmp_path / "model"), DpoSettings(), "cpu")
    assert devices == ["cpu"]
