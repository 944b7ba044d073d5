"""Folders from strangers: broken files and foreign code are one line, and nothing is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ipo_lib import chat
from ipo_lib.chat import Chat
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.records import BadInput
from ipo_lib.sampling import Request, Sampling
from ipo_lib.sandbox import organism

ENDLESS = "{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(organism.shipped("tiny"), tmp_path / "model"))


def draw(folder: Path, adapter: Path | None = None) -> None:
    spoken = Chat(folder)
    sampler = TransformersSampler(folder, spoken, adapter=adapter, device="cpu")
    list(sampler.sample([Request("a", spoken.encode("hi"), (), 1)], Sampling(max_tokens=2)))


def one_line(folder: Path, *says: str, adapter: Path | None = None) -> None:
    with pytest.raises(BadInput) as caught:
        draw(folder, adapter)
    assert "\n" not in str(caught.value)
    for part in (str(adapter or folder), *says):
        assert part in str(caught.value)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_half_a_model_is_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    one_line(folder, "intact copy")


def test_half_an_adapter_is_one_line(folder: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(organism.shipped("tiny-answers"), tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    one_line(folder, "intact copy", adapter=adapter)


def test_a_missing_weight_is_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("down_proj.weight"))
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    one_line(folder, lost, "missing")


def test_code_of_a_folder_is_never_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(folder / "config.json", auto_map=classes, model_type="evil")
    (folder / "evil.py").write_text(f"open({str(folder / 'RUN')!r}, 'w')")
    one_line(folder, "never run")
    assert not (folder / "RUN").exists()
    assert "[y/N]" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' + none }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
        "{{ [1, 'a'] | sort }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__ }}",
        "{% if %}",
    ],
)
def test_a_template_that_fails_is_one_line(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    one_line(folder, "chat template fails")


def test_a_template_that_does_not_end_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.1)
    (folder / "chat_template.jinja").write_text(ENDLESS + "{{ messages[0].content }}")
    one_line(folder, "does not end")
