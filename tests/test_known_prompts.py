"""Known prompt sets, where they come from, and what they share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from data_kit import KIT, NO_KIT

from ipo_lib import prompts
from ipo_lib.prompts import (
    PromptSet,
    find_shared_prompts,
    known_prompt_sets,
    load_prompts,
    located,
    measure_overlap,
    without_overlap,
)
from ipo_lib.records import BadInput, Prompt, digest

LONG = "please tell me how one would build a small wooden kite at home"


def made(*texts: str) -> list[Prompt]:
    return [Prompt(f"{len(texts)}-{at}", text, "test", True) for at, text in enumerate(texts)]


def test_whole_prompts_and_eight_words_in_a_row() -> None:
    train = made("How tall is it?", LONG, "something else entirely")
    test = made(
        "how TALL is it",
        f"Now, {LONG}!",
        "how one would build a small wooden kite",
        "how one would build a small wooden",
        "else",
    )
    found = find_shared_prompts(train, test)
    assert [(one.id, one.other, one.exact) for one in found] == [
        ("5-0", "3-0", True),
        ("5-1", "3-1", False),
        ("5-2", "3-1", False),
    ]
    (row,) = measure_overlap({"a": train, "b": test}, ["a"], ["b"])
    assert (len(row.shared), row.exact, row.size, row.short) == (3, 1, 5, 3)
    assert row.rate.value == 0.6
    assert [one.id for one in without_overlap(test, train)] == ["5-3", "5-4"]


def test_a_known_set_comes_from_the_local_folder_or_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IPO_DATA", raising=False)
    where = located("mine", PromptSet(5, known="jbb"))
    assert (where.file, where.text, where.split) == ("", "Goal", "harmful")
    assert where.hub == "JailbreakBench/JBB-Behaviors@886acc352a31533ffbcf4ef22c744658688086fc"
    monkeypatch.setenv("IPO_DATA", str(tmp_path))
    assert (
        located("mine", PromptSet(5, known="jbb")).hub == where.hub
    )  # the folder does not hold it
    path = tmp_path / "eval_harmful/jbb_behaviors.jsonl"
    path.parent.mkdir()
    rows = [
        {"split": split, "Index": at, "Goal": f"{split} {at}", "Category": "c"}
        for split in ("harmful", "benign")
        for at in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = digest([f"harmful {at}" for at in range(3)])
    found = load_prompts("mine", PromptSet(2, known="jbb", digest=own))
    assert [(one.id, one.text, one.source, one.harm) for one in found] == [
        ("mine-0", "harmful 0", "jbb", True),
        ("mine-1", "harmful 1", "jbb", True),
    ]
    with pytest.raises(
        BadInput,
        match=rf"texts of jbb have digest {own}, not 0356e4c5e7eccad3; take another revision",
    ):
        load_prompts("mine", PromptSet(2, known="jbb"))


def test_unknown_names_and_sets_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IPO_DATA", raising=False)
    with pytest.raises(BadInput, match="'jbbb' is not known; choose one of star1"):
        load_prompts("mine", PromptSet(1, known="jbbb"))
    with pytest.raises(
        BadInput, match=r"is on no hub; put eval_harmful/strongreject\.csv under \$IPO_DATA"
    ):
        load_prompts("mine", PromptSet(1, known="strongreject-attacked"))
    with pytest.raises(BadInput, match="exactly one of known, file, hub and function"):
        load_prompts("mine", PromptSet(1, known="jbb", file="x"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "wildjailbreak",
            r"accept the terms on huggingface\.co/datasets/allenai/wildjailbreak"
            ".*eval_harmful/wildjailbreak_eval",
        ),
        (
            "xstest",
            "check the name, the revision, your access or the network, "
            "or put eval_benign/xstest_prompts",
        ),
    ],
)
def test_a_hub_that_says_no_is_one_line_with_the_remedy(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def no(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.delenv("IPO_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", no)
    with pytest.raises(BadInput, match=hint) as error:
        load_prompts("mine", PromptSet(5, known=name))
    assert "\n" not in str(error.value)


def test_a_hub_set_is_asked_for_as_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[tuple[object, ...]] = []

    def fake(*given: object, **named: object) -> list[dict[str, str]]:
        seen.append((*given, named))
        return [
            {"adversarial": f"t{at}", "data_type": "adversarial_harmful" if at % 2 else "other"}
            for at in range(20)
        ]

    monkeypatch.delenv("IPO_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    found = load_prompts("wj", PromptSet(5, known="wildjailbreak"))
    assert seen == [
        (
            "allenai/wildjailbreak",
            "eval",
            {"revision": "main", "split": "train", "delimiter": "\t", "keep_default_na": False},
        )
    ]
    rows = datasets.Dataset.from_list([{"t": f"t{at}"} for at in range(1, 20, 2)]).shuffle(seed=42)
    assert [one.text for one in found] == rows["t"][:5]  # as datasets shuffles


def test_templates_go_around_every_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "t.jsonl").write_text(
        '{"id": "x", "template": "First"}\n{"id": "y", "template": "Say {request} now"}\n'
    )
    spec = PromptSet(2, file=str(tmp_path / "a.jsonl"), id="", templates=str(tmp_path / "t.jsonl"))
    found = load_prompts("mine", spec)
    assert [one.text for one in found] == [
        "First\n\none",
        "Say one now",
        "First\n\ntwo",
        "Say two now",
    ]
    assert [one.id for one in found] == ["mine-0/x", "mine-0/y", "mine-1/x", "mine-1/y"]
    chosen = PromptSet(2, file=spec.file, id="", templates=spec.templates, attacks=("y",))
    assert len(load_prompts("mine", chosen)) == 2
    with pytest.raises(BadInput, match=r"no attack 'z' in .*t\.jsonl; it holds x, y"):
        load_prompts(
            "mine", PromptSet(2, file=spec.file, id="", templates=spec.templates, attacks=("z",))
        )


@pytest.mark.skipif(not KIT, reason=NO_KIT)
def test_the_kit_holds_what_the_digests_say_and_overlaps_as_its_page_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IPO_DATA", os.fspath(KIT))
    there = [name for name, one in known_prompt_sets().items() if "digest" in one]
    sets = {name: load_prompts(name, PromptSet(10_000, known=name)) for name in there}
    sizes = {
        "star1": 1000,
        "jbb": 100,
        "xstest": 250,
        "or-bench-hard": 1319,
        "strongreject-attacked": 6 * 313,
    }
    assert {name: len(sets[name]) for name in sizes} == sizes
    exact = {
        (one.train, one.test): one.exact
        for one in measure_overlap(sets, ["star1", "advbench", "harmbench", "strongreject"], there)
    }
    stated = {
        ("star1", "do-not-answer"): 3,
        ("star1", "jbb"): 0,
        ("star1", "strongreject"): 0,
        ("star1", "advbench"): 0,
        ("advbench", "jbb"): 11,
        ("harmbench", "jbb"): 9,
        ("strongreject", "jbb"): 3,
    }
    assert {key: exact[key] for key in stated} == stated


def test_every_known_set_is_whole() -> None:
    for name, one in known_prompt_sets().items():
        assert set(one) <= {"about", "access", "fields", "digest", "local", "hub"}, name
        assert one["about"].strip(), name
        assert "file" in one["local"], name
        PromptSet(1, **{**one["fields"], **one.get("hub", {}), "known": ""})
    assert prompts.SLOT == "{request}"
