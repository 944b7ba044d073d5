"""Profiles: data in, settings out.

A wrong name or type is answered by one line that names it and the nearest known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import tiny_tokenizer

from ipo_lib.chat import Chat
from ipo_lib.cli.arguments import parse_pairs
from ipo_lib.csr import CsrSettings
from ipo_lib.engines import lora
from ipo_lib.judging import KeywordJudge
from ipo_lib.profiles import reading, settings
from ipo_lib.profiles.reading import read_profile
from ipo_lib.profiles.run import open_run
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput, to_json
from ipo_lib.stats import Interval
from ipo_lib.turning_points.mining import LexiconCues

SMALL: dict[str, Any] = {
    "about": "A profile of the tests.",
    "model": {"folder": "nowhere"},
    "prompts": {
        "mine": {"count": 2, "function": "ipo_lib.sandbox.world:prompts", "name": "direct"}
    },
    "judge": {"use": "ipo_lib.judging:KeywordJudge"},
}


def write(folder: Path, data: Any = None, **more: Any) -> str:
    path = folder / "small.yml"
    path.write_text(yaml.safe_dump({**SMALL, **more} if data is None else data))
    return str(path)


def one_line(profile: str, overrides: dict[str, Any], *says: str, call: Any = read_profile) -> None:
    with pytest.raises(BadInput) as error:
        call(profile, overrides)
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("name", reading.profile_names())
def test_shipped_profiles_read(name: str) -> None:
    settings = read_profile(name)
    assert settings.name == name
    assert settings.about.rstrip().endswith(".")
    assert settings.notebooks
    for book in settings.notebooks:
        assert (reading.checkout() / "notebooks" / f"{book}.ipynb").is_file()
    named = (
        *settings.evaluation.harmful,
        *settings.evaluation.benign,
        *settings.evaluation.capability,
    )
    assert set(named) <= set(settings.prompts)


def test_a_file_is_a_profile_with_the_defaults_of_the_records(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path))
    assert profile == Profile(
        "small",
        SMALL["about"],
        settings.Model("nowhere"),
        profile.prompts,
        settings.Component(SMALL["judge"]["use"]),
    )
    assert profile.csr == CsrSettings()
    assert profile.prompts["mine"].count == 2


def test_overrides_reach_any_depth_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, csr={"draws": 5, "mu": 0.8})
    changed = read_profile(
        path,
        {
            "csr.draws": 7,
            "prompts.mine.count": 9,
            "seed": 3,
            "detector.use": "a:b",
            "detector.arguments.name": "x",
            "evaluation.harmful": ["mine"],
            "stage1.beta": 1,
            "prompts.mine.where.kind": "q",
            "name": "other",
        },
    )
    assert (changed.csr.draws, changed.csr.mu) == (7, 0.8)
    assert changed.prompts["mine"].count == 9
    assert changed.prompts["mine"].where == {"kind": "q"}
    assert (changed.seed, changed.name) == (3, "other")
    assert changed.detector == settings.Component("a:b", {"name": "x"})
    assert changed.evaluation.harmful == ("mine",)
    assert changed.stage1.beta == 1.0
    assert isinstance(changed.stage1.beta, float)
    assert read_profile(path).csr.draws == 5


def test_numbers_may_be_written_with_an_exponent_alone(tmp_path: Path) -> None:
    (tmp_path / "small.yml").write_text(
        yaml.safe_dump(SMALL) + "stage1: {learning_rate: 2e-4, beta: 1E-1}\n"
    )
    settings = read_profile(
        str(tmp_path / "small.yml"), parse_pairs(["stage2.learning_rate=5e-5", "stage2.ratio=3e-1"])
    ).stage2
    assert (settings.learning_rate, settings.ratio) == (5e-5, 0.3)
    settings = read_profile(str(tmp_path / "small.yml")).stage1
    assert (settings.learning_rate, settings.beta) == (2e-4, 0.1)
    one_line(
        str(tmp_path / "small.yml"), parse_pairs(["csr.draws=1e1"]), "'csr.draws'", "int", "10.0"
    )


def test_whole_settings_can_be_replaced(tmp_path: Path) -> None:
    changed = read_profile(write(tmp_path, csr={"draws": 5, "mu": 0.8}), {"csr": {"draws": 2}})
    assert (changed.csr.draws, changed.csr.mu) == (2, CsrSettings().mu)
    assert (
        read_profile(write(tmp_path, detector={"use": "a:b"}), {"detector": None}).detector is None
    )


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("csr.drawz", 3, ["'csr.drawz' is unknown", "'csr.draws'"]),
        ("cs.draws", 3, ["'cs' is unknown", "'csr'"]),
        ("prompts.mine.cuont", 3, ["'prompts.mine.cuont' is unknown", "'prompts.mine.count'"]),
        ("model.find.us", "a:b", ["'model.find.us' is unknown", "'model.find.use'"]),
        ("csr.", 3, ["'csr.' is unknown"]),
        ("qqqqqq", 3, ["'qqqqqq' is unknown", "known: name, about, model"]),
        ("csr.draws", "three", ["'csr.draws'", "int", "'three'"]),
        ("csr.draws", 3.5, ["'csr.draws'", "int", "3.5"]),
        ("csr.draws", True, ["'csr.draws'", "int", "True"]),
        ("csr.draws", None, ["'csr.draws'", "int", "None"]),
        ("reveal", "yes", ["'reveal'", "bool", "'yes'"]),
        ("stage1.beta", "high", ["'stage1.beta'", "float", "'high'"]),
        ("evaluation.harmful", "mine", ["'evaluation.harmful'", "'mine'"]),
        ("evaluation.harmful", [1], ["'evaluation.harmful'", "1"]),
        ("csr", 3, ["'csr'", "settings", "3"]),
        ("prompts", ["a"], ["'prompts'", "mapping"]),
        ("prompts.mine", None, ["'prompts.mine'"]),
        ("seed.deep", 3, ["'seed.deep'"]),
        ("model", None, ["'model'"]),
        ("csr.grain", "word", ["grain", "'word'"]),
        ("sampling.temperature", -1, ["temperature"]),
        ("prompts.new", {"file": "x"}, ["'prompts.new.count' is missing"]),
    ],
)
def test_a_wrong_parameter_is_named(tmp_path: Path, name: str, value: Any, says: list[str]) -> None:
    one_line(write(tmp_path, seed=1), {name: value}, *says)


def test_wrong_profiles_are_named(tmp_path: Path) -> None:
    one_line("tinny", {}, "'tinny' is unknown", "tiny", ".yml")
    one_line(str(tmp_path / "no.yml"), {}, "no.yml")
    one_line("../profiles/tinny", {}, "unknown")
    for data in ("just text", [1, 2], 3):
        one_line(write(tmp_path, data), {}, "small.yml", "no settings")
    (tmp_path / "small.yml").write_text("a: [1,\nb: }")
    one_line(str(tmp_path / "small.yml"), {}, "small.yml", "not YAML")
    (tmp_path / "small.yml").write_text("")
    one_line(str(tmp_path / "small.yml"), {}, "no settings")
    one_line(
        write(tmp_path, {key: value for key, value in SMALL.items() if key != "judge"}),
        {},
        "'judge' is missing",
    )


def test_outside_a_checkout_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reading, "__file__", str(tmp_path / "site-packages" / "ipo_lib" / "profiles" / "reading.py")
    )
    monkeypatch.chdir(tmp_path)
    for call in (reading.checkout, reading.profile_names):
        with pytest.raises(BadInput, match=r"checkout.*pip install -e"):
            call()
    (tmp_path / "clone" / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "clone" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "clone" / "deep")
    assert reading.checkout() == tmp_path / "clone"


# open_run


def folder(path: Path, **tokenizer: Any) -> Path:
    """A model folder whose weights nobody loads."""
    tiny_tokenizer(path, **tokenizer)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"none")
    return path


def test_an_open_run_has_what_the_profile_names(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model={"folder": str(folder(tmp_path / "model", template="qwen3")), "prefill": "<think>\n"},
    )
    run = open_run(path, {"seed": 5}, str(tmp_path / "store"), str(tmp_path / "figures"))
    assert isinstance(run.session.chat, Chat)
    assert run.session.chat.opened
    assert isinstance(run.session.judge, KeywordJudge)
    assert (run.session.seed, run.session.store.root) == (5, tmp_path / "store")
    assert (run.folder, run.figures) == (tmp_path / "model", tmp_path / "figures")
    assert not (tmp_path / "store").exists()  # looking writes nothing
    assert [p.id for p in run.prompts("mine")] == [p.id for p in run.prompts("mine")]
    assert len(run.prompts("mine")) == 2
    assert (run.thinking.until, run.profile.sampling.until) == ("think", "eos")
    with pytest.raises(BadInput, match=r"'yours'.*known: mine"):
        run.prompts("yours")
    with pytest.raises(BadInput, match="run notebook 06_ipo_training first"):
        run.trained_adapters()


def test_figures_of_the_checkout_change_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, model={"folder": str(folder(tmp_path / "model"))})
    monkeypatch.chdir(tmp_path)
    assert open_run(path).figures == tmp_path / "my-figures" / "small"


def test_adapters_are_those_of_this_run_or_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, model={"folder": str(folder(tmp_path / "model"))})
    run = open_run(path, store=str(tmp_path / "store"), figures=str(tmp_path / "own"))
    monkeypatch.setattr("ipo_lib.profiles.run.checkout", lambda: tmp_path)
    for name, adapter in (("figures/small", "theirs"), ("own", "ours")):
        artifacts = {"stage 1": adapter, "stage 2": "none"}
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "06-training.json").write_text(json.dumps({"artifacts": artifacts}))
        with pytest.raises(BadInput, match="names an adapter that is not in"):
            open_run(path, store=str(tmp_path / "empty")).trained_adapters()
    for adapter in ("theirs", "ours"):
        files = tmp_path / "store" / "adapters" / adapter / "files"
        files.mkdir(parents=True)
        (files / "adapter_config.json").touch()
        assert run.trained_adapters() == {"after stage 1": files}


def test_the_detector_is_made_or_learnt(tmp_path: Path) -> None:
    model = {"folder": str(folder(tmp_path / "model"))}
    given = open_run(
        write(tmp_path, model=model, detector={"use": "ipo_lib.sandbox.judge:GrammarCues"})
    )
    assert type(given.detector([], [])).__name__ == "GrammarCues"
    learnt = open_run(write(tmp_path, model=model))
    with pytest.raises(BadInput, match="lexicon"):
        learnt.detector([], [])
    assert LexiconCues


def test_a_world_has_a_narrow_and_a_wide_truth_about_cues(tmp_path: Path) -> None:
    model = {"folder": str(folder(tmp_path / "model"))}
    plain = open_run(write(tmp_path, model=model))
    assert plain.truth() is plain.wide_truth() is None
    for name in ("sandbox", "tiny", "tiny-null"):
        own = read_profile(name)
        named = {truth: to_json(own.extras[truth]) for truth in ("truth", "wide_truth")}
        opened = open_run(write(tmp_path, model=model, extras=named))
        assert (opened.truth().wide, opened.wide_truth().wide) == (False, True)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model.folder": "/no/such/model"}, ["/no/such/model", "model.folder"]),
        ({"model.folder": ""}, ["model.folder"]),
        (
            {
                "model.find": {
                    "use": "ipo_lib.sandbox.organism:folder",
                    "arguments": {"name": "huge"},
                }
            },
            ["huge"],
        ),
        ({"judge.use": "KeywordJudge"}, ["'KeywordJudge'", "module:name"]),
        ({"judge.use": "ipo_lib.judging:Nobody"}, ["ipo_lib.judging:Nobody", "module:name"]),
        ({"judge.arguments": {"strict": 1}}, ["KeywordJudge", "strict"]),
        ({"model.batch_size": 0}, ["batch_size"]),
        ({"model.dtype": "int3"}, ["int3"]),
    ],
)
def test_a_bench_that_cannot_open_is_one_line(
    tmp_path: Path, overrides: dict[str, Any], says: list[str]
) -> None:
    path = write(tmp_path, model={"folder": str(folder(tmp_path / "model"))})
    one_line(path, overrides, *says, call=open_run)


def test_a_model_without_a_chat_template_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, model={"folder": str(folder(tmp_path / "model", template=None))})
    one_line(path, {}, "no chat template", str(tmp_path / "model"), call=open_run)


def test_a_model_is_trained_on_the_weights_that_are_sampled(tmp_path: Path) -> None:
    path = write(tmp_path)
    for own in (None, "nf4"):
        settings = read_profile(path, {"model.quantize": own})
        assert [lora.quantization(stage) for stage in (settings.stage1, settings.stage2)] == [
            own,
            own,
        ]
    one_line(
        path,
        {"stage1.quantize": "nf4"},
        "stage1.quantize is 'nf4', the model is sampled with None",
        "set model.quantize",
    )
    one_line(
        path,
        {"stage2.quantize": None, "model.quantize": "nf4"},
        "stage2.quantize is None",
        "or stage2.quantize to auto",
    )
    server = {"urls": ["http://localhost:1/v1"], "model": "m"}
    one_line(
        path, {"model.quantize": "nf4", "model.server": server}, "a server samples whole weights"
    )


def test_four_bits_are_for_the_small_card_only() -> None:
    found = {name: read_profile(name).model.quantize for name in reading.profile_names()}
    assert {name for name, how in found.items() if how} == {"ds-8b-24gb"}
    assert all(lora.quantization(read_profile(name).stage1) == how for name, how in found.items())


def test_stage_two_keeps_the_paper_s_weight_of_the_sft_term() -> None:
    assert {read_profile(name).stage2.sft_weight for name in reading.profile_names()} == {0.2}


def test_in_a_world_without_causes_a_cause_is_refuted_by_no_difference() -> None:
    worlds = {name: open_run(name) for name in ("tiny", "tiny-null")}
    small, wide, far = (
        Interval(value, value - half, value + half, 60, "t")
        for value, half in ((0.0, 0.05), (0.1, 0.3), (0.4, 0.1))
    )
    for value, said in (
        (small, ("undecided", "holds")),
        (wide, ("undecided", "undecided")),
        (far, ("holds", "the other way round")),
    ):
        claims = [
            run.cause("A trigger does more; {}", value, "one-shot rescue")
            for run in worlds.values()
        ]
        assert tuple(claim["verdict"] for claim in claims) == said
    assert (
        "nothing causes anything here, so: no difference of more than 10 points"
        in claims[1]["claim"]
    )
