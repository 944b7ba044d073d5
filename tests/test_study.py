"""A full run in small, on the organism that comes along: rows of the tables made, evaluated, stored and read again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipo_lib.experiments import recipes, results, study
from ipo_lib.profiles import reading, settings
from ipo_lib.profiles.run import Run, open_run
from ipo_lib.profiles.settings import Recipe
from ipo_lib.records import BadInput, Pair

SETS = (
    "train_harmful",
    "train_benign",
    "direct",
    "wrapped",
    "adversarial",
    "lookalike",
    "benign",
    "sums",
)
SMALL: dict[str, Any] = {
    **{f"prompts.{name}.count": 4 for name in SETS},
    "evaluation.draws": 1,
    "plan.draws": 4,
    "plan.pool": 2,
    "stage1.epochs": 1,
    "stage1.keep": 0,
    "stage2.min_refusals": 1,
    "stage1.warmup": 0.0,
    "stage1.batch_size": 4,
    "sampling.max_tokens": 128,
    "grpo.batch_size": 8,
    "grpo.accumulation": 1,
    "grpo.budget": 900,
    "csr.draws": 4,
    "search.cap": 16,
    "studies": {"table2": {"seeds": 1, "rows": ["base", "DPO on Part"]}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("study")
    return open_run("tiny", SMALL, str(root / "store"), str(root / "figures"))


@pytest.mark.parametrize("table", study.tables())
def test_every_row_is_a_profile_and_no_two_rows_of_a_table_are_the_same(table: str) -> None:
    rows = study.tables()[table]
    found = {row: repr(reading.read_profile("tiny", change)) for row, change in rows.items()}
    assert len(set(found.values())) == len(rows)
    assert all(
        text != repr(reading.read_profile("tiny")) for row, text in found.items() if rows[row]
    )


@pytest.mark.parametrize(
    "row",
    [
        "intervention at inference",
        "SFT, intervened",
        "SFT, stronger source",
        "DPO, natural pairs",
        "DPO on Part, weighted by change of S",
        "DPO on Part, then stage 2",
        "benign pairs mixed into stage 1",
        "DPO on Full",
        "DPO on Part, then GRPO, I[z]",
    ],
)
def test_rows_of_table_2(run: Run, row: str) -> None:
    found = study.cell(run, row, study.tables()["table2"][row], 0)
    assert found.row == row
    assert not found.failed or (
        row.endswith("stage 2") and found.failed.startswith("stage 2 skipped")
    )
    assert {len(pairs) for pairs in found.measured.values()} == {4}
    assert sum(n for _, n in found.measured["direct: trace harm"]) > 0
    assert found.answer_tokens > 20
    assert bool(found.adapter) is (row != "intervention at inference")
    assert found.tokens > 0 or row in ("intervention at inference", "SFT, stronger source")
    assert bool(found.steps) is ("GRPO" in row)
    assert 0 <= found.learned["traces with a trigger"] <= 1


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
    made = recipes.seeded(run.changed(study.tables()["detectors"][row]), 0)
    finder = recipes.detector(made, made.profile.recipe.detector, made.prompts("train_harmful"))
    assert (
        finder.fingerprint()
        == recipes.detector(
            made, made.profile.recipe.detector, made.prompts("train_harmful")
        ).fingerprint()
    )
    pairs, counts = recipes.gather(made, made.prompts("train_harmful"))
    assert counts["kept"] == len(pairs)
    assert counts["no-cue"] + counts["not-accepted"] + counts["kept"] <= 8


def test_a_full_run_writes_what_a_later_one_reads(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, date = study.table(run, "table2", full=True)
    assert [(one.row, one.seed) for one in found] == [("base", 0), ("DPO on Part", 0)]
    assert found[1].pairs > 0
    assert found[1].tokens > found[0].tokens == 0
    path = run.figures / "full-table2.json"
    written = json.loads(path.read_bytes())
    assert written["date"] == date
    assert written["changes"] == {"base": {"recipe.data": "none"}, "DPO on Part": {}}
    again = study.table(run, "table2", full=True)[0]
    assert again == found  # from the store, seconds included
    monkeypatch.setattr(study, "checkout", lambda: run.figures.parents[0])
    (run.figures.parents[0] / "figures").mkdir(exist_ok=True)
    (run.figures.parents[0] / "figures" / "tiny").symlink_to(run.figures, target_is_directory=True)
    assert study.committed("tiny", "table2", study.Cell) == (found, date)
    assert study.committed("tiny", "table1", study.Cell) == ([], "never")
    assert study.repeated(found, found[1]) == "DPO on Part, seed 0: the same in every measure"
    other = replace(
        found[1],
        measured={**found[1].measured, "direct: trace harm": ((0, 1), (1, 1), (1, 1), (1, 1))},
    )
    moved = replace(
        found[1],
        measured={**found[1].measured, "direct: trace harm": ((0, 1), (0, 1), (0, 1), (1, 1))},
    )
    assert (
        study.repeated([other], moved)
        == "DPO on Part, seed 0: most unlike in direct: trace harm: 75.0 then, 25.0 now"
    )


def test_a_seed_changes_what_is_drawn_and_trained_and_seed_0_is_the_notebooks(run: Run) -> None:
    zero, one = recipes.seeded(run, 0), recipes.seeded(run, 1)
    assert (zero.profile, zero.session.seed) == (run.profile, run.session.seed)
    assert (
        {getattr(one.profile, name).seed for name in ("stage1", "stage2", "grpo")}
        == {one.profile.seed}
        == {one.session.seed}
        == {1}
    )
    pairs = [recipes.gather(each, each.prompts("train_harmful"))[0] for each in (zero, one)]
    assert pairs[0] != pairs[1]


def test_pairs_without_a_shared_prefix_are_the_same_traces_anew() -> None:
    made = [
        Pair(str(at), (1, 2, 30 + at, 4), (50 + at,), (60 + at,), 2, "x") for at in range(3)
    ] + [Pair("z", (9, 9), (5,), (6,), 0, "x")]
    found = recipes.unshared(made)
    assert [(one.prompt_ids, one.h) for one in found] == [
        ((1, 2), 0)
    ] * 3  # the prompt with one trace gives none
    assert [one.rejected_ids for one in found] == [(30, 4, 60), (31, 4, 61), (32, 4, 62)]
    assert [one.chosen_ids for one in found] == [(31, 4, 51), (32, 4, 52), (30, 4, 50)]


def test_weights_are_the_change_of_s_at_the_cue_with_mean_1(run: Run) -> None:
    own = recipes.seeded(run.changed({"recipe.weigh": True}), 0)
    pairs, _ = recipes.gather(own, own.prompts("train_harmful"))
    assert sum(one.weight for one in pairs) / len(pairs) == pytest.approx(1)
    assert len({one.weight for one in pairs}) > 1


def test_triggers_of_a_recipe(run: Run) -> None:
    def texts(**changes: Any) -> list[str]:
        own = recipes.seeded(
            run.changed(
                {f"recipe.{k}" if k == "triggers" else f"plan.{k}": v for k, v in changes.items()}
            ),
            0,
        )
        return [one.text for one in recipes.triggers(own, [], run.detector([], []))]

    six, twelve = texts(pool=6), texts(pool=12)
    assert len(set(six)) == 6
    assert len(set(twelve)) == 12
    assert twelve[:6] == six
    assert texts(pool=1) == six[:1]
    assert set(texts(triggers="paraphrases", pool=6)) <= set(run.paraphrases())
    assert set(texts(triggers="neutral", pool=6)) == set(run.profile.neutral)
    assert six != texts(triggers="random", pool=6) != texts(triggers="pool", pool=6)


def test_one_trace_for_all_triggers_shares_prefixes_and_costs_less(run: Run) -> None:
    def gathered(share: bool) -> tuple[list[Pair], int]:
        own = recipes.seeded(run.changed({"plan.share": share, "plan.pool": 4}), 0)
        return recipes.gather(own, own.prompts("train_harmful"))[0], sum(
            own.session.store.drawn.values()
        )

    (fresh, dear), (shared, cheap) = gathered(False), gathered(True)
    assert len({(one.prompt_ids, one.rejected_ids) for one in shared}) < len(shared)
    assert len({(one.prompt_ids, one.rejected_ids) for one in fresh}) > len(
        {(one.prompt_ids, one.rejected_ids) for one in shared}
    )
    assert cheap < dear
    assert all(one.given > 0 for one in fresh)


def test_what_cannot_be_run_is_one_line(run: Run) -> None:
    def make(change: dict[str, Any]) -> None:
        own = recipes.seeded(run.changed(change), 0)
        recipes.run_recipe(own, own.prompts("train_harmful"), own.prompts("train_benign"))

    for change, said in [
        ({"recipe.data": "magic"}, "data 'magic' is unknown"),
        ({"recipe.detector": "psychic"}, "detector 'psychic' is unknown"),
        ({"recipe.data": "teacher", "teacher": None, "stage1.loss": "sft"}, "names no teacher"),
        ({"recipe.detector": "truth", "truth": None}, "knows no truth"),
        ({"pairs.max_length": 8}, r"no pairs \(.*too-long"),
        ({"grpo.reward": "I[x]"}, "reward 'I\\[x\\]' is unknown"),
        ({"grpo.group": 7}, "do not make groups of 7"),
    ]:
        with pytest.raises(BadInput, match=said) as caught:
            make(change)
        assert "\n" not in str(caught.value)
    found = study.cell(run, "x", {"pairs.max_length": 8}, 0)
    assert (found.pairs, found.adapter) == (0, "")
    assert found.failed.startswith("training: no pairs (")
    assert found.measured == study.cell(run, "base", {"recipe.data": "none"}, 0).measured
    with pytest.raises(BadInput, match="table 'table9' is unknown"):
        study.rows(run, "table9")
    assert study.rows(run, "table1") == {}  # a table that the profile does not run
    assert study.table(run, "table1", full=True)[0] == []
    with pytest.raises(BadInput, match="no second judge"):
        make({"second_judge": None, "recipe.judge": "second"})
    with pytest.raises(BadInput, match="names table 'table9'"):
        study.rows(run.changed({"studies": {"table9": {}}}), "table2")
    with pytest.raises(BadInput, match="has no row 'DPO'"):
        study.rows(run.changed({"studies": {"table2": {"rows": ["DPO"]}}}), "table2")
    assert Recipe().data == settings.INTERVENED


def test_kl_of_a_full_run_is_of_every_trained_row_and_nothing_is_written_without_one(
    run: Run,
) -> None:
    found, date = study.kl(run, True, 1, "train_harmful", "train_benign", 3)
    assert [(one.row, one.seed) for one in found] == [("DPO on Part", 0)]  # base has no adapter
    assert study.kl(run, False, 0, "train_harmful", "", 0) == (found, date)
    other = run.changed({"studies": {}})
    assert study.kl(other, True, 1, "train_harmful", "train_benign", 3) == ([], "never")


def test_two_processes_make_the_cells_that_one_makes(run: Run, tmp_path: Path) -> None:
    """One thread each: sums, and so draws, may differ with the number of threads."""
    small = {
        **SMALL,
        "studies": {"table2": {"seeds": 2, "rows": ["base", "DPO on Part"], "workers": 2}},
    }
    both = open_run("tiny", small, str(tmp_path / "store"), str(tmp_path / "figures"))
    wanted = [
        ("base", {}, 0),
        ("an unknown setting", {"recipe.data": "nothing"}, 0),
        ("DPO on Part", {}, 1),
    ]
    study._ahead(both, "table2", wanted, 2)  # what is refused there is refused again here
    with pytest.raises(BadInput, match="nothing"):
        study.cell(both, "", {"recipe.data": "nothing"}, 0)
    made = both.session.store.drawn
    found = study.cell(both, "DPO on Part", {}, 1)
    assert both.session.store.drawn == made == {}
    alone = study.cell(run, "DPO on Part", {}, 1)
    assert (found.pairs, found.tokens, found.measured, found.steps) == (
        alone.pairs,
        alone.tokens,
        alone.measured,
        alone.steps,
    )


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_bring", _killed)
    with pytest.raises(
        BadInput, match=r"killed; if memory ran out, run again with -p studies\.table2\.workers=1"
    ):
        study._ahead(run, "table2", [("base", {}, 0)], 2)


def test_grpo_gets_a_multiple_of_what_algorithm_1_generates(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of GRPO beside a whole training of IPO say little: the budget can be three or eight times as large."""
    budgets: list[int] = []

    def train(
        session: Any,
        prompts: Any,
        model: Any,
        lora: Any,
        settings: Any,
        sampling: Any,
        out: Path,
        *,
        adapter: Any,
    ) -> None:
        budgets.append(settings.budget)
        (out / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "tokens": settings.budget}) + "\n"
        )

    monkeypatch.setattr(recipes.grpo, "train", train)
    prompts = run.prompts("train_harmful")
    for times in (1.0, 3.0, 8.0):
        own = recipes.seeded(run.changed({"grpo.budget": 0, "grpo.multiple": times}), 5)
        recipes._rewarded(own, prompts, None)
    spent = recipes.seeded(run, 5)
    recipes.gather(spent, prompts)
    asked = sum(spent.session.store.drawn.values())
    assert budgets == [asked, 3 * asked, 8 * asked]


def test_the_token_curve_reads_the_budgets_that_were_run() -> None:
    cells = [
        study.Cell(row, 0, 1, tokens, 1.0, 1.0, "", {}, {"direct: trace harm": ((1, 2), (2, 2))})
        for row, tokens in (("GRPO, I[z], 8x", 800), ("GRPO, I[z], 1x", 100), ("DPO on Part", 100))
    ]
    points = results.against_tokens(
        cells, ["GRPO, I[z], 1x", "GRPO, I[z], 3x", "GRPO, I[z], 8x"], "trace harm"
    )
    assert [(x, rate.value) for x, rate in points] == [(100, 0.75), (800, 0.75)]
    assert {"GRPO, I[z], 1x", "GRPO, I[z], 3x", "GRPO, I[z], 8x"} <= study.tables()[
        "grpo_budget"
    ].keys()
    claims = study.read_studies()["claims"]
    assert not any(
        "GRPO at the same generated tokens" in name and "first few steps" not in name
        for name in claims
    )
