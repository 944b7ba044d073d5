"""Records: JSON both ways without loss; a wrong field is one line with its dotted name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib import dpo, records
from ipo_lib.csr import CsrSettings
from ipo_lib.cues import LexiconCues
from ipo_lib.pairs import PairSettings
from ipo_lib.profiles.reading import Yaml
from ipo_lib.profiles.settings import Component, Model, Profile
from ipo_lib.prompts import PromptSet
from ipo_lib.records import BadInput, canonical, digest, from_json, to_json
from ipo_lib.sampling import Sampling
from ipo_lib.stages import CorrectionSettings
from ipo_lib.triggers import Trigger

PLAIN = (
    records.Prompt,
    records.Rollout,
    records.Sentence,
    records.Verdict,
    records.CsrPoint,
    records.TurningPoint,
    records.Intervention,
    records.Pair,
)
SETTINGS = (
    CsrSettings(draws=3),
    Sampling(),
    CorrectionSettings(pool=2),
    PairSettings(eos=True),
    dpo.DpoSettings(),
    dpo.Stage2Settings(),
    PromptSet(2, where={"a": "b"}, arguments={"deep": [1, {"x": None}]}),
)
ROLLOUT = records.Rollout("r", "p", 1, (5, 6, 7), "abc", "stop", 0, "s")


@pytest.mark.parametrize("kind", PLAIN)
def test_every_record_goes_to_json_and_back(kind: type[Any]) -> None:
    @given(st.builds(kind, **{"p": st.none() | st.floats(0, 1)} if kind is records.Verdict else {}))
    def both_ways(record: Any) -> None:
        text = json.dumps(to_json(record))
        again = from_json(kind, json.loads(text))
        assert again == record
        assert type(again) is kind
        assert canonical(to_json(again)) == canonical(to_json(record))

    both_ways()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: type(one).__name__)
def test_settings_go_to_json_and_back(settings: Any) -> None:
    assert from_json(type(settings), json.loads(json.dumps(to_json(settings)))) == settings


def test_nested_tuples_come_back_as_tuples() -> None:
    lexicon = LexiconCues(
        weights=((("a b", 1.5), ("c", -2.0)), (("d", 0.25),)),
        thresholds=(0.5, 1.0),
        accuracies=(0.75, 0.7),
    )
    assert from_json(LexiconCues, json.loads(canonical(to_json(lexicon)))) == lexicon
    trigger = Trigger("t", "Wait.", 3, 0, (2, 5))
    assert from_json(Trigger, json.loads(canonical(to_json(trigger)))) == trigger


def test_a_whole_profile_goes_to_json_and_back() -> None:
    profile = Profile(
        "mine",
        "A profile of the tests.",
        Model(find=Component("a:b", {"name": "x"})),
        {"one": PromptSet(2), "two": PromptSet(3)},
        Component("c:d"),
        neutral=("Rain fell.",),
        csr=CsrSettings(draws=2),
        stage2=dpo.Stage2Settings(ratio=0.3),
    )
    again = from_json(Profile, json.loads(json.dumps(dataclasses.asdict(profile))))
    assert again == profile
    assert isinstance(again.model.find, Component)
    assert isinstance(again.prompts["two"], PromptSet)
    assert again.detector is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drawz": 1}, ["Rollout", "'drawz' is unknown", "did you mean 'draw'?"]),
        ({"qqqqqq": 1}, ["Rollout", "'qqqqqq' is unknown", "known: id, prompt_id"]),
        ({"": 1}, ["Rollout", "'' is unknown"]),
        ({"draw": "0"}, ["Rollout", "int", "'draw'", "'0'"]),
        ({"draw": True}, ["Rollout", "int", "'draw'", "True"]),
        ({"draw": 1.0}, ["Rollout", "int", "'draw'", "1.0"]),
        ({"text": None}, ["Rollout", "str", "'text'", "None"]),
        ({"token_ids": [1, "2"]}, ["Rollout", "int", "'token_ids'", "'2'"]),
        ({"token_ids": "12"}, ["Rollout", "a list, such as [a, b], for ", "'token_ids'", "'12'"]),
        ({"text": ["long"] * 999}, ["Rollout", "str", "'text'"]),
    ],
)
def test_a_wrong_field_is_one_clear_line(change: dict[str, Any], says: list[str]) -> None:
    wrong(records.Rollout, {**to_json(ROLLOUT), **change}, *says)


def wrong(kind: type[Any], data: Any, *says: str) -> None:
    with pytest.raises(BadInput) as error:
        from_json(kind, data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250
    for part in says:
        assert part in str(error.value), str(error.value)


def test_a_missing_field_and_what_is_no_record_are_one_clear_line() -> None:
    for name in to_json(ROLLOUT):
        rest = {key: value for key, value in to_json(ROLLOUT).items() if key != name}
        wrong(records.Rollout, rest, "Rollout", f"'{name}' is missing")
    for data in (None, 3, "text", [1], [["id", "r"]]):
        wrong(records.Rollout, data, "Rollout", "expected settings", repr(data))
    point: Mapping[str, Any] = {
        "rollout_id": "r",
        "kind": "safe",
        "token": 3,
        "sentence": 1,
        "interval": [1, 2, 3],
    }
    wrong(records.TurningPoint, point, "'interval'", "tuple[int, int]")
    assert from_json(records.TurningPoint, {**point, "interval": None}).flags == ()


def test_nested_settings_are_named_by_their_dotted_name() -> None:
    data = {
        "name": "x",
        "about": "y",
        "model": {},
        "prompts": {"mine": {"count": 1}},
        "judge": {"use": "a:b"},
    }
    assert from_json(Profile, data).prompts["mine"].count == 1
    wrong(
        Profile,
        {**data, "csr": {"drawz": 1}},
        "CsrSettings",
        "'csr.drawz' is unknown",
        "'csr.draws'",
    )
    wrong(Profile, {**data, "csr": {"draws": "1"}}, "CsrSettings", "int", "'csr.draws'")
    wrong(Profile, {**data, "csr": None}, "CsrSettings", "'csr'", "None")
    wrong(
        Profile,
        {**data, "model": {"find": {"us": 1}}},
        "Component",
        "'model.find.us' is unknown",
        "'model.find.use'",
    )
    wrong(
        Profile, {**data, "prompts": {"mine": {}}}, "PromptSet", "'prompts.mine.count' is missing"
    )
    wrong(Profile, {**data, "prompts": [1]}, "Profile", "a mapping", "'prompts'")
    wrong(
        Profile,
        {**data, "prompts": {"mine": {"count": 1, "where": {"a": 2}}}},
        "str",
        "'prompts.mine.where.a'",
        "2",
    )
    with pytest.raises(
        BadInput, match=r"'here.csr.drawz' is unknown; did you mean 'here.csr.draws'"
    ):
        from_json(Profile, {**data, "csr": {"drawz": 1}}, "here")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E6", 1e6),
        ("-3e2", -300.0),
        ("5.e-1", 0.5),
        ("2.0e-4", 2e-4),
        ("7", 7),
        ("e4", "e4"),
        ("'2e-4'", "2e-4"),
        ("2e", "2e"),
        ("a2e-4", "a2e-4"),
        ("0.5", 0.5),
        ("[1e-2]", [0.01]),
    ],
)
def test_yaml_reads_numbers_as_people_write_them(text: str, value: Any) -> None:
    found = yaml.load(text, Yaml)
    assert found == value
    assert type(found) is type(value)


def test_the_digest_is_of_the_value_not_of_its_writing() -> None:
    assert digest({"b": (1, 2), "a": "é"}) == digest({"a": "é", "b": [1, 2]})
    assert digest({"a": 1}) != digest({"a": "1"}) != digest({"a": 1.5})
    assert len(digest(1)) == 16
    assert digest(1, 64).startswith(digest(1))
    # On disk everywhere: a change here loses every store.
    assert (
        canonical({"b": [1, 2.5, None, True], "a": "é\n"}) == '{"a":"é\\n","b":[1,2.5,null,true]}'
    )
    assert digest(to_json(ROLLOUT)) == "5883749617ad2287"
    with pytest.raises(ValueError, match="JSON"):
        digest(math.nan)


def test_a_mistake_is_one_line_whatever_it_names() -> None:
    assert (
        str(BadInput("no column 'a\nb\r\nc\u2028d'; name one")) == "no column 'a b c d'; name one"
    )
