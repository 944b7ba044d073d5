"""What recipes gather: seeds, detectors, triggers, pairs, GRPO's budget, and what cannot be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_study import open_small_run

from ipo_lib.experiments import pair_sources, recipes, study
from ipo_lib.experiments.detectors import make_detector
from ipo_lib.profiles import settings
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import Recipe
from ipo_lib.records import BadInput, Pair


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_small_run(tmp_path_factory.mktemp("recipes"))


def with_changes(run: Run, seed: int = 0, **changes: Any) -> Run:
    """The run with settings changed; ``plan__pool=6`` sets ``plan.pool``."""
    by_name = {name.replace("__", "."): value for name, value in changes.items()}
    return recipes.with_seed(run.changed(by_name), seed)


@pytest.mark.parametrize(
    "row",
    [
        "Eq. 3 by search",
        "the model itself, few-shot",
        "truth, one sentence early",
        "random sentence",
    ],
)
def test_detectors_of_table_3(run: Run, row: str) -> None:
    changed = recipes.with_seed(run.changed(study.read_tables()["detectors"][row]), 0)
    prompts, word = changed.prompts("train_harmful"), changed.profile.recipe.detector
    fingerprints = [make_detector(changed, word, prompts).fingerprint() for _ in range(2)]
    assert fingerprints[0] == fingerprints[1]
    pairs, counts = recipes.gather_pairs(changed, prompts)
    assert counts["kept"] == len(pairs)
    tried = counts["no-cue"] + counts["not-accepted"] + counts["kept"]
    assert tried <= 24  # six prompts, four triggers


def test_a_seed_changes_what_is_drawn_and_trained_and_seed_0_is_the_notebooks(run: Run) -> None:
    zero, one = recipes.with_seed(run, 0), recipes.with_seed(run, 1)
    assert (zero.profile, zero.session.seed) == (run.profile, run.session.seed)
    assert one.profile.seed == one.session.seed == 1
    for name in ("stage1", "stage2", "grpo"):
        assert getattr(one.profile, name).seed == 1
    prompts = run.prompts("train_harmful")
    pairs, _ = recipes.gather_pairs(zero, prompts)
    other_pairs, _ = recipes.gather_pairs(one, prompts)
    assert pairs != other_pairs


def test_pairs_without_a_shared_prefix_are_the_same_traces_anew() -> None:
    pairs = []
    for number in range(3):
        prompt_ids = (1, 2, 30 + number, 4)
        pairs.append(Pair(str(number), prompt_ids, (50 + number,), (60 + number,), 2, "x"))
    pairs.append(Pair("z", (9, 9), (5,), (6,), 0, "x"))  # a prompt with one trace gives none
    unshared = pair_sources.unshared_pairs(pairs)
    assert [(pair.prompt_ids, pair.h) for pair in unshared] == [((1, 2), 0)] * 3
    assert [pair.rejected_ids for pair in unshared] == [(30, 4, 60), (31, 4, 61), (32, 4, 62)]
    assert [pair.chosen_ids for pair in unshared] == [(31, 4, 51), (32, 4, 52), (30, 4, 50)]


def test_weights_are_the_change_of_s_at_the_cue_with_mean_1(run: Run) -> None:
    weighed = with_changes(run, recipe__weigh=True)
    pairs, _ = recipes.gather_pairs(weighed, weighed.prompts("train_harmful"))
    weights = [pair.weight for pair in pairs]
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert len(set(weights)) > 1


def test_triggers_of_a_recipe(run: Run) -> None:
    def texts(pool: int, triggers: str = "pool") -> list[str]:
        changed = with_changes(run, plan__pool=pool, recipe__triggers=triggers)
        chosen = recipes.choose_triggers(changed, [], run.detector([], []))
        return [trigger.text for trigger in chosen]

    six, twelve = texts(6), texts(12)
    assert len(set(six)) == 6
    assert len(set(twelve)) == 12
    assert twelve[:6] == six
    assert texts(1) == six[:1]
    assert set(texts(6, "paraphrases")) <= set(run.paraphrases())
    assert set(texts(6, "neutral")) == set(run.profile.neutral)
    assert six != texts(6, "random") != texts(6, "pool")


def test_one_trace_for_all_triggers_shares_prefixes_and_costs_less(run: Run) -> None:
    def gather(share: bool) -> tuple[list[Pair], int]:
        changed = with_changes(run, plan__share=share, plan__pool=4)
        pairs, _ = recipes.gather_pairs(changed, changed.prompts("train_harmful"))
        return pairs, changed.session.usage.total_tokens

    def losers(pairs: list[Pair]) -> int:
        return len({(pair.prompt_ids, pair.rejected_ids) for pair in pairs})

    (fresh, tokens_fresh), (shared, tokens_shared) = gather(False), gather(True)
    assert losers(shared) < len(shared)
    assert losers(fresh) > losers(shared)
    assert tokens_shared < tokens_fresh
    assert all(pair.given > 0 for pair in fresh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe.data": "magic"}, "data 'magic' is unknown"),
        ({"recipe.detector": "psychic"}, "detector 'psychic' is unknown"),
        (
            {"recipe.data": "teacher", "extras.teacher": None, "stage1.loss": "sft"},
            "names no teacher",
        ),
        ({"recipe.detector": "truth", "extras.truth": None}, "knows no truth"),
        ({"pairs.max_length": 8}, r"no pairs \(.*too-long"),
        ({"grpo.reward": "I[x]"}, "reward 'I\\[x\\]' is unknown"),
        ({"grpo.group": 7}, "do not make groups of 7"),
        ({"second_judge": None, "recipe.judge": "second"}, "no second judge"),
    ],
)
def test_what_cannot_be_run_is_one_line(run: Run, changes: dict[str, Any], message: str) -> None:
    def make() -> None:
        changed = recipes.with_seed(run.changed(changes), 0)
        prompts = changed.prompts("train_harmful")
        recipes.run_recipe(changed, prompts, changed.prompts("train_benign"))

    with pytest.raises(BadInput, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_recipe_is_the_papers_by_default() -> None:
    assert Recipe().data == settings.INTERVENED


def test_grpo_gets_a_multiple_of_what_algorithm_1_generates(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of GRPO beside a whole training of IPO say little: its budget can be larger."""
    budgets: list[int] = []

    def train(*arguments: Any, adapter: Any) -> None:
        *_, grpo_settings, _, folder = arguments
        budgets.append(grpo_settings.budget)
        line = json.dumps({"step": 1, "tokens": grpo_settings.budget})
        (Path(folder) / "metrics.jsonl").write_text(line + "\n")

    monkeypatch.setattr(recipes.grpo, "train", train)
    prompts = run.prompts("train_harmful")
    for multiple in (1.0, 3.0, 8.0):
        changed = with_changes(run, 5, grpo__budget=0, grpo__multiple=multiple)
        recipes.train_grpo(changed, prompts, None)
    algorithm_1 = recipes.with_seed(run, 5)
    recipes.gather_pairs(algorithm_1, prompts)
    spent = algorithm_1.session.usage.total_tokens
    assert budgets == [spent, 3 * spent, 8 * spent]
