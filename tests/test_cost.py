"""The bill before a run: it bounds what the run then asks for, and holds the default profile to its budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipo_lib.cli import cost
from ipo_lib.cli.arguments import declared, for_notebook
from ipo_lib.engines.openai_api import Server
from ipo_lib.profiles import reading, settings
from ipo_lib.records import BadInput

HOUSE = Path(__file__).parents[1]
BUDGET = 450_000  # generated tokens of the default profile
RUN = ("sandbox", "tiny", "tiny-null")  # profiles with committed figures


def bill(settings: settings.Profile) -> list[cost.Cost]:
    return cost.plan(settings, parameters(settings))


def parameters(settings: settings.Profile) -> dict[str, dict[str, Any]]:
    """Every notebook's own, with the profile's in place of its defaults."""
    found = {}
    for name in settings.notebooks:
        known = declared(HOUSE / "notebooks" / f"{name}.ipynb")
        chosen = for_notebook(settings.parameters, name)
        found[name] = {key: chosen.get(key, value) for key, (_, value) in known.items()}
    return found


def test_the_default_profile_keeps_its_budget() -> None:
    assert cost.paid(bill(reading.read_profile("sandbox"))) <= BUDGET


@pytest.mark.parametrize("name", RUN)
def test_what_a_run_asked_for_was_in_the_bill(name: str) -> None:
    """Counts are upper bounds and lengths are means, so a notebook may take less, and little more for its longer traces."""
    settings = reading.read_profile(name)
    planned, found = bill(settings), cost.measured(HOUSE / "figures" / name)
    costly = {
        book: tokens
        for book in settings.notebooks
        if (tokens := cost.paid(one for one in planned if one.notebook == book))
    }
    assert {book[:2] for book in costly} <= set(found) <= {book[:2] for book in settings.notebooks}
    assert len(costly) >= len(settings.notebooks) - 1  # 08 reads a full run and draws nothing
    for book, tokens in costly.items():
        assert 0.5 * tokens <= found[book[:2]] <= 1.1 * tokens


def test_every_notebook_has_a_bill_and_every_line_grows_with_its_setting() -> None:
    settings = reading.read_profile("sandbox")
    assert set(settings.notebooks) <= set(cost.NOTEBOOKS)
    once = {(one.notebook, one.what): one.rollouts for one in bill(settings)}
    twice = bill(replace(settings, csr=replace(settings.csr, draws=2 * settings.csr.draws)))
    changed = {
        (one.notebook, one.what) for one in twice if one.rollouts != once[one.notebook, one.what]
    }
    assert {what for _, what in changed} == {
        "CSR of two traces",
        "whole curves",
        "every sentence end",
    }
    longer = replace(
        settings, expected=replace(settings.expected, trace=2 * settings.expected.trace)
    )
    assert cost.minutes(bill(longer), longer) > cost.minutes(bill(settings), settings)


def test_draws_that_notebooks_share_are_paid_for_once() -> None:
    lines = [
        cost.Cost("a", "x", 1, 10.0, pool="p"),
        cost.Cost("b", "y", 2, 25.0, pool="p"),
        cost.Cost("b", "z", 1, 5.0, pool="q"),
    ]
    assert cost.paid(lines) == 30
    settings = reading.read_profile("sandbox")
    with_02 = bill(settings)
    without = bill(
        replace(
            settings,
            notebooks=tuple(book for book in settings.notebooks if book != "02_rollout_diversity"),
        )
    )
    assert cost.paid(with_02) == cost.paid(
        without
    )  # its groups are the responses of 01 and the traces of 03


def test_measured_reads_the_largest_sidecar_of_a_notebook(tmp_path: Path) -> None:
    for name, tokens in (("06-a", 5), ("06-b", 7), ("07-c", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens": tokens}))
    assert cost.measured(tmp_path) == {"06": 7, "07": 2}
    settings = reading.read_profile("sandbox")
    said = cost.table(bill(settings), settings, cost.measured(tmp_path))
    assert "last run 7" in said
    assert f"about {cost.minutes(bill(settings), settings):.0f} minutes" in said.splitlines()[-1]
    settings = reading.read_profile("tiny")
    assert cost.table(bill(settings), settings, {}).count("at most") == 0


def test_the_speed_that_is_billed_is_that_of_the_place_where_the_model_runs() -> None:
    here = reading.read_profile("ds-8b")
    there = replace(here, model=replace(here.model, server=Server(("http://h/v1",), "m")))
    assert (cost.speed(here), cost.speed(there)) == (1300, 2500)
    lines = [cost.Cost("a", "x", 1, 1300.0 * 3600)]
    extra = here.expected.seconds_per_notebook * len(here.notebooks) / 60
    assert cost.minutes(lines, here) == pytest.approx(60 + extra)
    assert cost.minutes(lines, there) == pytest.approx(60 * 1300 / 2500 + extra)


def test_groups_of_training_prompts_are_billed_as_they_are_drawn() -> None:
    settings = reading.read_profile("ds-8b")
    assert settings.plan.draws == 2
    (group,) = {
        one.rollouts
        for one in bill(settings)
        if (one.notebook, one.what) == ("02_rollout_diversity", "traces")
    }
    assert group == 8 * 1000


def test_a_notebook_on_another_prompt_set_is_billed_for_that_set() -> None:
    settings = reading.read_profile("ds-8b")
    own = {(one.notebook[:2], one.what): one for one in bill(settings)}
    for book in ("03", "04", "05"):
        assert (own[book, "traces"].rollouts, own[book, "traces"].pool) == (2 * 100, "traces/jbb")
    plain = replace(settings, parameters={})
    before = {(one.notebook[:2], one.what): one for one in bill(plain)}
    assert own["05", "later rounds"].rollouts == before["05", "later rounds"].rollouts / 10
    assert cost.paid(bill(settings)) < cost.paid(bill(plain))
    with pytest.raises(
        BadInput, match="harmful_set 'moon' is not in profile 'ds-8b'; known: train_harmful"
    ):
        cost.plan(settings, parameters(settings) | {"03_safety_triggers": {"harmful_set": "moon"}})


def test_no_draw_is_billed_beyond_its_limit() -> None:
    settings = reading.read_profile(
        "ds-8b", {"sampling.max_tokens": 600, "expected.response": {"jbb": 5000}}
    )
    for one in bill(settings):
        assert one.tokens <= 600 * one.rollouts, one


@pytest.mark.parametrize("name", ["sandbox", "tiny", "ds-8b", "r1-1.5b"])
def test_at_most_is_a_bound_on_what_is_expected(name: str) -> None:
    settings = reading.read_profile(name)
    expected, (most, longest) = bill(settings), cost.at_most(settings, parameters(settings))
    cap = settings.sampling.max_tokens
    assert [(one.notebook, one.what) for one in most] == [
        (one.notebook, one.what) for one in expected
    ]
    for one, limit in zip(expected, most, strict=True):
        assert limit.tokens == cap * limit.rollouts
        assert limit.rollouts >= one.rollouts
    assert cost.paid(most) > cost.paid(expected)
    assert cost.minutes(most, longest) > cost.minutes(expected, settings)
    said = cost.table(expected, settings, {}, (most, longest))
    assert f"at most {cost.paid(most):,.0f} generated tokens" in said
    assert f"about {cost.paid(expected):,.0f} generated tokens" in said


def test_a_search_is_bounded_by_its_budget() -> None:
    settings = reading.read_profile("ds-8b")
    most, _ = cost.at_most(settings, parameters(settings))
    (line,) = [
        one for one in most if one.what == "safe turns of safe traces" and one.notebook[:2] == "03"
    ]
    search = settings.search
    assert line.rollouts == 30 * (search.budget + search.batch + 2 * search.confirm)
    short = replace(settings, search=replace(search, budget=10))
    most, _ = cost.at_most(short, parameters(short))
    (line,) = [
        one for one in most if one.what == "safe turns of safe traces" and one.notebook[:2] == "03"
    ]
    assert (
        line.rollouts == 30 * settings.expected.search["safe"]
    )  # never less than what is expected


def test_dollars_at_most_are_never_more_than_the_budgets_and_never_less_than_a_text_at_its_limit() -> (
    None
):
    settings = replace(reading.read_profile("ds-8b"), detector=None, second_judge=None)
    _, longest = cost.at_most(settings, parameters(settings))
    few, many = ([cost.Cost("a", "x", count, parts=1)] for count in (1, 1_000_000))
    per_text = ((8192 + cost.LONG_RUBRIC) * 2.5 + cost.LONG_VERDICT * 10) / 1e6
    assert cost.money(few, longest, most=True) == pytest.approx(per_text)
    assert cost.money(many, longest, most=True) == settings.judge.arguments["budget"]
    assert (
        cost.money(many, settings) > settings.judge.arguments["budget"]
    )  # what is expected is said as it is


def test_guards_in_this_process_take_time_and_those_behind_a_server_do_not() -> None:
    settings = reading.read_profile("r1-1.5b")
    lines = [
        cost.Cost("06_ipo_training", "x", 800, pool="x", parts=1),
        cost.Cost("07_evaluation", "y", 400, pool="y", parts=2),
    ]
    assert settings.expected.verdicts_per_second == 8
    assert (
        cost.guarded(lines, settings) == (800 + 2 * 400) / 8 + 2 * 400 / 8
    )  # the second judge reads what 07 asks for
    behind = {"name": "qwen3guard-4b", "server": {"urls": ["http://h/v1"], "model": "m"}}
    served = replace(settings, second_judge=replace(settings.second_judge, arguments=behind))
    assert cost.guarded(lines, served) == (800 + 2 * 400) / 8
    assert cost.guarded(lines, reading.read_profile("sandbox")) == 0
    assert cost.minutes(lines, settings) - cost.minutes([], settings) == pytest.approx(
        cost.guarded(lines, settings) / 60
    )
