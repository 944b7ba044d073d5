"""What a profile needs is said before anything runs; a model can do without a profile."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from models import tiny_model

from ipo_lib import plots
from ipo_lib.cli import app, arguments, cost, doctor
from ipo_lib.cli.doctor import Check
from ipo_lib.engines import hub
from ipo_lib.profiles.claims import claim
from ipo_lib.profiles.reading import read_profile
from ipo_lib.profiles.run import FEW_CLOSED, build_component, open_run
from ipo_lib.profiles.settings import Component, Profile
from ipo_lib.records import BadInput, Prompt
from ipo_lib.sampling import Sampling
from ipo_lib.stages import Prefix, sample
from ipo_lib.stats import wilson

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no data folder, an empty hub cache."""
    for name in ("IPO_DATA", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "local_folder", lambda name, revision: None)
    monkeypatch.setattr(hub, "has_dataset", lambda pinned: False)


def needs(settings: Profile) -> list[Check]:
    """All checks of a profile whose notebooks have their default parameters."""
    parameters = {}
    for name in settings.notebooks:
        declared = arguments.read_parameters(CHECKOUT / "notebooks" / f"{name}.ipynb")
        parameters[name] = {parameter: default for parameter, (_, default) in declared.items()}
    return list(doctor.check_needs(settings, parameters))


def troubles(profile: str, **changes: object) -> dict[str, str]:
    checks = needs(read_profile(profile, changes))
    failed = [check for check in checks if check.hint]
    return {check.name: f"{check.found} -> {check.hint}" for check in failed}


def test_every_lack_of_the_paper_s_profile_is_one_line_with_its_remedy() -> None:
    found = troubles("ds-8b")
    assert "deepseek-ai/DeepSeek-R1-Distill-Llama-8B@6a6f4aa4 is not here" in found["model"]
    assert "export OPENAI_API_KEY=..." in found["judge"]
    assert "export OPENAI_API_KEY" in found["detector"]
    assert "Qwen/Qwen3Guard-Gen-0.6B" in found["second judge"]
    assert "train/star1.jsonl under $IPO_DATA" in found["prompts train_harmful"]
    assert (
        "accept the terms on huggingface.co/datasets/allenai/wildjailbreak"
        in found["prompts wildjailbreak"]
    )
    assert "on no hub" in found["prompts strongreject"]
    assert not any("\n" in one for one in found.values())


def test_a_judge_that_cannot_be_imported_is_a_lack() -> None:
    assert "my_judges" in troubles("tiny", **{"judge.use": "my_judges:MyJudge"})["judge"]


def test_what_is_there_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "m", template="r1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    monkeypatch.setattr(hub, "has_dataset", lambda pinned: True)
    changes = {
        "model.find": None,
        "model.folder": str(folder),
        "model.device": "cpu",
        "judge": {"use": "ipo_lib.judging:KeywordJudge"},
    }
    changes |= {
        "second_judge": None,
        "detector": None,
        "prompts.strongreject.known": "strongreject",
        "prompts.strongreject.templates": "",
    }
    changes |= {"prompts.strongreject.attacks": [], "notebooks": ["06_ipo_training"]}
    assert troubles("ds-8b", **changes) == {}
    assert "reads judge_val/harmbench" in troubles("ds-8b")["labelled sets"]
    checks = {check.name: check.found for check in needs(read_profile("ds-8b", changes))}
    assert str(folder) in checks["model"]


def test_a_server_that_is_down_and_a_folder_that_is_no_model(tmp_path: Path) -> None:
    server = {"urls": ["http://127.0.0.1:9/v1"], "model": "m", "attempts": 1}
    found = troubles(
        "ds-8b", **{"model.server": server, "model.find": None, "model.folder": str(tmp_path)}
    )
    assert "start it, or correct the url" in found["model server"]
    assert "no tokenizer.json" in found["model"]
    assert "--model DIR" in troubles("plain")["model"]


def test_a_dry_run_prints_plan_cost_and_lacks_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = {"store": str(tmp_path / "store"), "figures": str(tmp_path / "figures")}
    app.reproduce_profile("ds-8b", dry_run=True, **folders)
    said = capsys.readouterr().out
    assert "06_ipo_training" in said
    assert re.search(r"about \d+ hours on one H200 GPU \(measured with random weights", said)
    assert re.search(
        r"at most [\d,]+ generated tokens, \d+ hours, [\d,]+ verdicts and [\d,]+ dollars", said
    )
    assert re.search(
        r"speed +slow: in process 1,300 tokens/s .* behind vLLM, named as model.server, about \d+",
        said,
    )
    assert "dollars" in said
    assert "checks failed:" in said
    assert "export OPENAI_API_KEY=..." in said
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "figures").exists()


def test_a_large_model_in_this_process_is_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (one,) = doctor.check_speed(read_profile("ds-8b"), 13_000 * 3600)
    assert one.hint == ""  # it is a choice, not a fault
    assert "1,300 tokens/s (one H200 GPU" in one.found
    assert "10 hours of sampling; behind vLLM, named as model.server, about 5" in one.found
    server = {"urls": ["http://127.0.0.1:9/v1"], "model": "m"}
    assert list(doctor.check_speed(read_profile("ds-8b", {"model.server": server}), 1e9)) == []
    assert list(doctor.check_speed(read_profile("r1-1.5b"), 1e9)) == []
    assert list(doctor.check_speed(read_profile("sandbox"), 1e9)) == []
    folder = tiny_model(tmp_path / "m", template="r1")
    here = read_profile("ds-8b", {"model.find": None, "model.folder": str(folder)})
    assert list(doctor.check_speed(here, 1e9)) == []  # its weights are here, and small
    monkeypatch.setattr(doctor, "LARGE_WEIGHTS", 1000)
    assert len(list(doctor.check_speed(here, 1e9))) == 1


def test_money_follows_price_and_rollouts() -> None:
    settings = replace(read_profile("ds-8b"), second_judge=None)
    draws = [
        cost.Draws(cost.RESPONSES, 1000, 1.0),
        cost.Draws(cost.TRACES, 600, 1.0),
        cost.Draws(cost.CONTINUATIONS, 500, 1.0),
    ]
    bill = cost.Bill(settings, tuple(draws), 0.0, at_most=False)
    verdicts = 2 * 1000 + 600 + 500
    assert f"{verdicts:,} verdicts" in str(bill)
    read = settings.expected.trace + 400
    judged = verdicts * (read * 2.5 + 100 * 10)
    searched = 600 * (read * 2.5 + 2 * 10)  # no cue is looked for in the draws of S
    assert bill.dollars() == pytest.approx((judged + searched) / 1e6)
    sandbox = cost.Bill(read_profile("sandbox"), tuple(draws), 0.0, at_most=False)
    assert sandbox.dollars() == 0
    assert "dollars" not in str(sandbox)


def test_a_check_is_one_line() -> None:
    assert str(Check("x", "found", "remedy")).split() == ["x", "found", "->", "remedy"]
    assert "->" not in str(Check("x", "found"))


def test_a_model_without_a_profile(tmp_path: Path) -> None:
    given = arguments.parse_pairs(arguments.model_settings("DIR", "jbb", "http://h:1/v1#gpt"))
    settings = read_profile("plain", given)
    assert (
        settings.model.folder,
        settings.prompts["train_harmful"].known,
        settings.prompts["train_harmful"].file,
    ) == ("DIR", "jbb", "")
    assert settings.judge.use == "ipo_lib.judges.rubric:rubric"
    assert settings.judge.arguments == {"server": {"urls": ["http://h:1/v1"], "model": "gpt"}}
    settings = read_profile(
        "plain",
        arguments.parse_pairs(arguments.model_settings("DIR", "a.csv#question", "wildguard")),
    )
    assert (settings.prompts["train_harmful"].file, settings.prompts["train_harmful"].text) == (
        "a.csv",
        "question",
    )
    assert settings.judge == Component(
        "ipo_lib.judges.guards:guard", {"name": "wildguard", "revision": "main"}
    )
    assert (
        read_profile(
            "plain", arguments.parse_pairs(arguments.model_settings("DIR", "", "keyword"))
        ).judge
        == read_profile("plain").judge
    )


@pytest.mark.parametrize(
    "text", ["no", "0", "null", "1e3", "a #b: c", "[x", "'q'", "~", "0x1F", ""]
)
def test_a_text_on_the_command_line_stays_what_was_written(text: str) -> None:
    pairs = [f"about={text}", f"prompts.mine.text={text}", f"prompts.mine.where.kind={text}"]
    given = arguments.parse_pairs([*pairs, f"prompt_set={text}"], {"prompt_set": "str"})
    assert {*given.values()} == {text}
    if text:
        model = arguments.model_settings("", f"a.csv#{text}", "")
        assert arguments.parse_pairs(model)["prompts.train_harmful.text"] == text


def test_other_values_have_the_type_that_they_set() -> None:
    pairs = ["csr.draws=16", "search.alpha=1e-1", "model.quantize=null", "reveal=true", "draws=8"]
    pairs += ["evaluation.harmful=[direct, no]", "mus=[0.8, 1]", "prompts.mine.where={kind: no}"]
    given = arguments.parse_pairs(pairs, {"draws": "int", "mus": "list"})
    assert list(given.values()) == [
        16,
        0.1,
        None,
        True,
        8,
        ["direct", "no"],
        [0.8, 1],
        {"kind": "no"},
    ]


def test_profiles_that_are_like_another(tmp_path: Path) -> None:
    seven, eight = read_profile("ds-7b"), read_profile("ds-8b")
    assert seven.prompts == eight.prompts
    assert seven.stage1 == eight.stage1
    assert seven.model.find != eight.model.find
    (tmp_path / "mine.yml").write_text("like: other\nabout: x.\n")
    with pytest.raises(BadInput, match=r"it is like 'other', which is not beside it"):
        read_profile(str(tmp_path / "mine.yml"))


@pytest.mark.parametrize(("closed", "held"), [(0.4, True), (0.6, False)])
def test_a_model_that_seldom_closes_its_trace_claims_nothing_of_traces(
    tmp_path: Path, closed: float, held: bool
) -> None:
    folder = tiny_model(tmp_path / "m", template="r1")
    changes = {
        "model.folder": str(folder),
        "prompts.train_harmful": {"count": 1, "function": "ipo_lib.sandbox.world:prompts"},
    }
    run = open_run(
        "plain", {**changes, "model.prefill": ""}, str(tmp_path / "s"), str(tmp_path / "f")
    )
    run.session.usage.closed.update({str(at): at < 10 * closed for at in range(10)})
    claims = [
        claim(f"Profile plain: {what} {{}}.", wilson(3, 9), origin="emergent", about=about)
        for what, about in (("harmful traces", "traces"), ("answers refused", "answers"))
    ]
    run.save(plots.figure()[0], "07-x", claims, {})
    text = (tmp_path / "f" / "07-x.json").read_text()
    assert ("harmful traces" not in text) == held
    assert ("Under half: 1 claims about traces are withheld" in text) == held
    assert "answers refused" in text
    assert ("Only 40% of the traces were closed" in text) == held


def test_the_verbs_note_which_traces_were_closed(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", template="r1")
    changes = {
        "model.folder": str(folder),
        "model.prefill": "",
        "prompts.train_harmful": {"count": 1, "function": "ipo_lib.sandbox.world:prompts"},
    }
    run = open_run("plain", changes, str(tmp_path / "s"), str(tmp_path / "f"))
    found = sample(
        run.session, [Prefix(Prompt("p", "Bread?", "test", False))], Sampling(max_tokens=5), 3
    )
    assert run.session.usage.closed == {one.id: "</think>" in one.text for one in found}
    assert os.environ.get("IPO_DATA") is None
    assert FEW_CLOSED == 0.5


def test_overlapping_prompts_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "How tall?"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "how tall"}\n{"prompt": "How wide?"}\n')
    sets = {
        "train_harmful": {"count": 1, "file": str(tmp_path / "a.jsonl")},
        "test": {"count": 2, "file": str(tmp_path / "b.jsonl")},
    }
    changes = {"model.folder": str(tiny_model(tmp_path / "m", template="r1")), "model.prefill": ""}
    kept = []
    for apart in ((), ("train_harmful",)):
        own = {
            name: {**one, "id": "", "known": "", "text": "prompt", "category": ""}
            for name, one in sets.items()
        }
        own["test"]["apart"] = apart
        run = open_run(
            "plain",
            {**changes, **{f"prompts.{name}": one for name, one in own.items()}},
            str(tmp_path / "s"),
            str(tmp_path / "f"),
        )
        kept.append([one.text for one in run.prompts("test")])
    assert kept == [["how tall", "How wide?"], ["How wide?"]]


def test_judges_inside_judges_are_made_priced_and_looked_at() -> None:
    keyword, phrases = (
        {"use": "ipo_lib.judging:KeywordJudge"},
        {"use": "ipo_lib.judges.phrases:RefusalJudge"},
    )
    guard = {
        "use": "ipo_lib.judges.guards:guard",
        "arguments": {"name": "wildguard", "revision": "main"},
    }
    split = build_component(
        Component("ipo_lib.profiles.run:by_question", {"harm": keyword, "refusal": phrases})
    )
    assert sorted(split.judges) == ["harm", "refusal"]
    nested = {
        "use": "ipo_lib.profiles.run:by_question",
        "arguments": {"harm": guard, "refusal": {**phrases, "arguments": {"dollars_in": 3.0}}},
    }
    changed = read_profile("r1-1.5b", {"judge": nested})
    assert [one.use for one in changed.judge.with_inner()] == [
        "ipo_lib.profiles.run:by_question",
        guard["use"],
        phrases["use"],
    ]
    assert changed.online
    assert any("allenai/wildguard" in check.found for check in needs(changed))
    draws = (cost.Draws(cost.TRACES, 1, 1.0),)
    assert cost.Bill(changed, draws, 0.0, at_most=False).dollars() > 0
