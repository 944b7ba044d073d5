"""The bill before a run bounds what the run then asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipo_lib.cli import cost
from ipo_lib.cli.arguments import plan_run, profile_family
from ipo_lib.cli.cost import CONTINUATIONS, CORRECTIONS, RESPONSES, SEARCHES, TRACES, Bill, Draws
from ipo_lib.engines.openai_api import Server
from ipo_lib.profiles.reading import read_profile
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import BadInput

CHECKOUT = Path(__file__).parents[1]
BUDGET = 750_000  # generated tokens of the default profile, at most: about 27 minutes
WITH_FIGURES = ("sandbox", "tiny", "tiny-null")  # profiles whose last run is committed
KINDS = (RESPONSES, TRACES, CORRECTIONS, CONTINUATIONS, SEARCHES)


def read(name: str, *pairs: str) -> tuple[Profile, dict[str, dict[str, Any]]]:
    """A profile, and every notebook's parameters."""
    plan = plan_run(name, list(pairs), "", "")
    return plan.settings, plan.parameters()


def bill(name: str, *pairs: str) -> Bill:
    return cost.bill(*read(name, *pairs))


def bill_of(settings: Profile, draws: Sequence[Draws], at_most: bool = False) -> Bill:
    return Bill(settings, tuple(draws), 0.0, at_most)


def test_the_default_profile_keeps_its_budget() -> None:
    assert bill("sandbox").tokens() <= BUDGET


@pytest.mark.parametrize("name", WITH_FIGURES)
def test_what_a_run_asked_for_was_in_the_bill(name: str) -> None:
    """Counts are upper bounds and lengths are means: a notebook may take a little more.

    Notebooks that a profile does not run by itself may have figures, too.
    """
    measured = cost.last_run(CHECKOUT / "figures" / name)
    usual = read(name)[0].notebooks
    found = [path.stem for path in sorted((CHECKOUT / "notebooks").glob("[01]*.ipynb"))]
    further = [book for book in found if book[:2] in measured and book not in usual]
    settings, notebooks = read(name, f"notebooks={json.dumps([*usual, *further])}")
    costly = {}
    for notebook, parameters in notebooks.items():
        tokens = cost.bill(settings, {notebook: parameters}).tokens()
        if tokens:
            costly[notebook[:2]] = tokens
    assert set(costly) <= set(measured) <= {notebook[:2] for notebook in notebooks}
    assert len(costly) >= len(notebooks) - 1  # 08 reads a full run and draws nothing
    for number, tokens in costly.items():
        assert 0.5 * tokens <= measured[number] <= 1.1 * tokens, number


def test_the_bill_grows_with_the_settings() -> None:
    settings, notebooks = read("tiny")  # in sandbox notebooks have numbers of draws of their own
    once = cost.bill(settings, notebooks)
    more_draws = replace(settings, csr=replace(settings.csr, draws=2 * settings.csr.draws))
    twice = cost.bill(more_draws, notebooks)
    changed = {kind for kind in KINDS if twice.rollouts(kind) != once.rollouts(kind)}
    assert changed == {CONTINUATIONS}
    trace = 2 * settings.expected.trace
    longer = replace(settings, expected=replace(settings.expected, trace=trace))
    assert cost.bill(longer, notebooks).minutes() > once.minutes()
    assert all(once.rollouts(kind) for kind in KINDS)


def test_a_full_run_is_billed_for_every_cell() -> None:
    plain, full = bill("sandbox"), bill("sandbox", "full=true")
    settings = plain.settings
    cells = cost.Bounds(settings, {"any": {"full": True}}).cells()
    assert cells > 10
    prompts = sum(settings.prompts[name].size for name in settings.evaluation.sets)
    evaluated = cells * prompts * settings.evaluation.draws
    assert full.rollouts(RESPONSES) - plain.rollouts(RESPONSES) == evaluated
    assert full.rollouts(CORRECTIONS) > cells * plain.settings.prompts["train_harmful"].size
    assert full.pairs > cells * plain.pairs / 4


def test_draws_that_notebooks_share_are_paid_for_once() -> None:
    settings, notebooks = read("sandbox")
    whole = cost.bill(settings, notebooks).tokens()
    alone = [cost.bill(settings, {name: own}).tokens() for name, own in notebooks.items()]
    assert whole < sum(alone)
    del notebooks["02_rollout_diversity"]  # its groups are the responses of 01, the traces of 03
    assert cost.bill(settings, notebooks).tokens() == whole


def test_the_last_run_is_read_from_the_largest_sidecar_of_a_notebook(tmp_path: Path) -> None:
    for name, tokens in (("06-a", 5), ("06-b", 7), ("07-c", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens": tokens}))
    measured = cost.last_run(tmp_path)
    assert measured == {"06": 7, "07": 2}
    settings, notebooks = read("sandbox")
    text = cost.cost_table(settings, notebooks, measured)
    assert "(committed figures: 7)" in text
    minutes = cost.bill(settings, notebooks).minutes()
    assert f"about {minutes:.0f} minutes" in text.splitlines()[-2]
    assert "last run" not in cost.cost_table(settings, notebooks, {})


def test_a_profile_s_family_is_those_it_is_like(tmp_path: Path) -> None:
    assert profile_family("ds-7b") == ["ds-7b", "ds-8b"]
    assert profile_family("tiny") == ["tiny"]
    (tmp_path / "b.yml").write_text("like: a\n")
    (tmp_path / "a.yml").write_text("about: x.\n")
    assert profile_family(str(tmp_path / "b.yml")) == ["b", "a"]


def test_the_speed_that_is_billed_is_that_of_the_place_where_the_model_runs() -> None:
    here = read_profile("ds-8b", {"second_judge": None})
    there = replace(here, model=replace(here.model, server=Server(("http://h/v1",), "m")))
    lines = [Draws(TRACES, 1, 1300.0 * 3600)]
    extra = here.expected.seconds_per_notebook * len(here.notebooks) / 60
    assert bill_of(here, lines).minutes() == pytest.approx(60 + extra)
    assert bill_of(there, lines).minutes() == pytest.approx(60 * 1300 / 2500 + extra)


@pytest.mark.parametrize("page", ["README.md", "notebooks/profiles/README.md"])
def test_pages_say_what_the_bill_says(page: str) -> None:
    text = (CHECKOUT / page).read_text("utf-8")
    due = bill("ds-8b")
    (line,) = [line for line in text.splitlines() if "`ds-8b`" in line and "dollars" in line]
    numbers = {int(number) for number in re.findall(r"\d+", line)}
    assert {round(due.minutes() / 60), round(due.dollars())} <= numbers


def test_groups_of_training_prompts_are_billed_as_they_are_drawn() -> None:
    settings, notebooks = read("ds-8b")
    assert settings.plan.draws == 2
    alone = {"02_rollout_diversity": notebooks["02_rollout_diversity"]}
    assert cost.bill(settings, alone).rollouts(TRACES) == 8 * 1000


def test_a_notebook_on_another_prompt_set_is_billed_for_that_set() -> None:
    settings, notebooks = read("ds-8b")
    name = "05_corrective_intervention"
    assert notebooks[name]["harmful_set"] == "jbb"

    def intervened(prompt_set: str) -> tuple[float, float]:
        parameters = {**notebooks[name], "harmful_set": prompt_set}
        alone = cost.bill(settings, {name: parameters})
        in_safe_traces = cost.bill(settings, {name: {**parameters, "rounds": 0}})
        rounds = alone.rollouts(CORRECTIONS) - in_safe_traces.rollouts(CORRECTIONS)
        return alone.rollouts(TRACES), rounds

    ten_times = tuple(10 * count for count in intervened("jbb"))
    assert intervened("train_harmful") == ten_times
    with pytest.raises(
        BadInput, match="harmful_set 'moon' is not in profile 'ds-8b'; known: train_harmful"
    ):
        intervened("moon")


def test_no_draw_is_billed_beyond_its_limit() -> None:
    short = bill("ds-8b", "sampling.max_tokens=600", "expected.response={jbb: 5000}")
    assert max(draws.length for draws in short.draws) == 600


@pytest.mark.parametrize("name", ["sandbox", "tiny", "ds-8b", "r1-1.5b"])
def test_at_most_is_a_bound_on_what_is_expected(name: str) -> None:
    settings, notebooks = read(name)
    expected, most = cost.bill(settings, notebooks), cost.bill(settings, notebooks, at_most=True)
    for draws, limit in zip(expected.draws, most.draws, strict=True):
        assert limit.kind == draws.kind
        assert limit.length == settings.sampling.max_tokens
        assert limit.rollouts >= draws.rollouts
    assert most.tokens() > expected.tokens()
    assert most.minutes() > expected.minutes()
    text = cost.cost_table(settings, notebooks, {})
    assert f"at most {most.tokens():,.0f} generated tokens" in text
    assert f"about {expected.tokens():,.0f} generated tokens" in text


def test_a_search_is_bounded_by_its_budget() -> None:
    settings = read_profile("ds-8b")
    search, only_safe = settings.search, {"any": {"safe_traces": 30}}
    most = cost.bill(settings, only_safe, at_most=True)
    assert most.rollouts(SEARCHES) == 30 * (search.budget + search.batch + 2 * search.confirm)
    short = replace(settings, search=replace(search, budget=10))
    most = cost.bill(short, only_safe, at_most=True)
    # Never less than what is expected.
    assert most.rollouts(SEARCHES) == 30 * settings.expected.search["safe"]


def test_dollars_at_most_stay_within_budgets_and_pay_for_texts_at_their_limit() -> None:
    settings = replace(read_profile("ds-8b"), detector=None, second_judge=None)
    longest = cost.longest(settings)
    few, many = ([Draws(TRACES, count, 1.0)] for count in (1, 1_000_000))
    per_text = ((8192 + 2000) * 2.5 + 400 * 10) / 1e6
    assert bill_of(longest, few, at_most=True).dollars() == pytest.approx(per_text)
    budget = settings.judge.arguments["budget"]
    assert bill_of(longest, many, at_most=True).dollars() == budget
    assert bill_of(settings, many).dollars() > budget  # what is expected is said as it is


def test_guards_in_this_process_take_time_and_those_behind_a_server_do_not() -> None:
    settings = read_profile("r1-1.5b")
    assert settings.expected.verdicts_per_second == 8
    lines = [Draws(TRACES, 800, 0.0), Draws(RESPONSES, 400, 0.0)]

    def guard_seconds(settings: Profile) -> float:
        minutes = bill_of(settings, lines).minutes() - bill_of(settings, []).minutes()
        return 60 * minutes

    # The second judge reads whole responses only.
    judged, judged_twice = (800 + 2 * 400) / 8, 2 * 400 / 8
    assert guard_seconds(settings) == pytest.approx(judged + judged_twice)
    behind = {"name": "qwen3guard-4b", "server": {"urls": ["http://h/v1"], "model": "m"}}
    served = replace(settings, second_judge=replace(settings.second_judge, arguments=behind))
    assert guard_seconds(served) == pytest.approx(judged)
    assert guard_seconds(read_profile("sandbox")) == 0
