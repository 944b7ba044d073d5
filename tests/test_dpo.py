"""Eq. 4: settings, losses by hand, and the loss of a training step against plain forwards."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import LOG2, PLAIN, make_pairs, preference_loss, side_mean, suffix_logps

from ipo_lib import dpo, training
from ipo_lib.dpo import Stage2Settings
from ipo_lib.records import BadInput


def test_preference_loss_by_hand() -> None:
    assert preference_loss([(-3.0, -5.0)], [(-3.0, -5.0)], 0.1) == pytest.approx(LOG2)
    # margin = 0.5 * ((-1 - -4) - (-2 - -3)) = 1
    assert preference_loss([(-1.0, -4.0)], [(-2.0, -3.0)], 0.5) == pytest.approx(
        -math.log(1 / (1 + math.exp(-1)))
    )


@pytest.mark.parametrize(
    ("changes", "margin"),
    [
        ({}, (-4 + 5) - (-6 + 5.5)),
        ({"scope": "whole"}, (-4 + 5) - (-6 + 5.5)),
        ({"loss": "sigmoid_norm"}, 1 / 4 + 0.5 / 3),
        ({"loss": "sigmoid_norm", "scope": "whole"}, (-5 + 7) / 6 - (-7 + 7.5) / 5),
        ({"loss": "simpo"}, -4 / 4 + 6 / 3 - 0.5),
        ({"loss": "literal"}, -4 - 2 * -6 + -5.5),
        ({"loss": "literal", "scope": "whole"}, -5 - 2 * -7 + -7.5),
    ],
)
def test_every_loss_by_hand(changes: dict[str, Any], margin: float) -> None:
    policy = torch.tensor([[-4.0, -6.0, -1.0]])
    reference = torch.tensor([[-5.0, -5.5, -2.0]])
    counts = torch.tensor([[4.0, 3.0, 2.0]])
    settings = replace(PLAIN, beta=1.0, **changes)
    preference, _ = dpo.losses(policy, reference, counts, torch.ones(1), settings)
    assert float(preference) == pytest.approx(math.log1p(math.exp(-margin)))


def test_first_step_is_log_two_and_the_planted_preference_is_learnt(stage1: Any) -> None:
    rows = stage1[1]
    assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert rows[0]["margin"] == 0
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["margin"] > 1
    assert rows[-1]["loss"] < 0.4
    assert rows[-1]["grad_norm"] > 0
    assert rows[-1]["rewards/chosen"] > 0 > rows[-1]["rewards/rejected"]


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_loss_after_the_weights_moved_equals_the_oracle(
    model: Path, stage1: Any, tmp_path: Path, loss: str
) -> None:
    """One batch from trained weights, padded, LM head on the suffix alone, against Eq. 4."""
    adapter, pairs = stage1[0], make_pairs(5, seed=7)
    settings = replace(PLAIN, batch_size=5, loss=loss, beta=0.3)
    row = training.train(pairs, model, settings, tmp_path, adapter=adapter)[0]
    policy, reference = suffix_logps(model, adapter, pairs), suffix_logps(model, None, pairs)
    if loss == "sigmoid":
        assert row["loss"] == pytest.approx(preference_loss(policy, reference, 0.3), abs=1e-4)
    else:
        means = []
        for scores in (policy, reference):
            by_pair = zip(scores, pairs, strict=True)
            means.append(
                [(c / len(p.chosen_ids), r / len(p.rejected_ids)) for (c, r), p in by_pair]
            )
        assert row["loss"] == pytest.approx(preference_loss(*means, 0.3), abs=1e-4)
    assert abs(row["loss"] - LOG2) > 1e-3  # ten times what is allowed above
    assert row["logps/chosen"] == pytest.approx(side_mean(policy, 0), abs=1e-3)
    assert row["logps/rejected"] == pytest.approx(side_mean(policy, 1), abs=1e-3)


def test_sft_term_is_the_weighted_token_mean(model: Path, stage1: Any, tmp_path: Path) -> None:
    adapter, pairs = stage1[0], make_pairs(4, seed=3)
    settings = replace(PLAIN, sft_weight=0.2)
    row = training.train(pairs, model, settings, tmp_path, adapter=adapter)[0]
    policy, reference = suffix_logps(model, adapter, pairs), suffix_logps(model, None, pairs)
    nll = -sum(chosen for chosen, _ in policy) / sum(len(pair.chosen_ids) for pair in pairs)
    expected = preference_loss(policy, reference, 0.1) + 0.2 * nll
    assert row["loss"] == pytest.approx(expected, abs=1e-4)


def test_accumulated_batches_log_the_loss_of_the_whole(
    model: Path, stage1: Any, tmp_path: Path
) -> None:
    pairs = make_pairs(8, seed=5)
    steps = []
    for forwards in (1, 4):
        settings = replace(PLAIN, batch_size=8 // forwards, accumulation=forwards)
        rows = training.train(pairs, model, settings, tmp_path, adapter=stage1[0])
        assert len(rows) == 1
        steps += rows
    for name in ("loss", "margin", "grad_norm", "ref_logps/chosen"):
        assert steps[0][name] == pytest.approx(steps[1][name], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "squared"},
        {"dtype": "float16"},
        {"quantize": "int3"},
        {"epochs": 0},
        {"beta": 0.0},
        {"warmup": -0.1},
        {"sft_weight": -1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_bad_settings_are_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(changes))) as error:
        replace(PLAIN, **changes)
    assert "\n" not in str(error.value)


def test_bad_stage_two_settings_are_named() -> None:
    with pytest.raises(BadInput, match="ratio"):
        Stage2Settings(ratio=0)


def test_import_loads_no_torch() -> None:
    code = (
        "import sys, ipo_lib.dpo, ipo_lib.pairs\n"
        "print({'torch', 'trl', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_other_ipo_is_never_passed() -> None:
    """No string "ipo" in dpo.py, and no ``loss`` or ``loss_type`` of that value in the package."""
    with pytest.raises(BadInput):
        replace(PLAIN, loss="ipo")
    for path in Path(dpo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "dpo.py" and isinstance(node, ast.Constant):
                assert node.value != "ipo"
            if isinstance(node, ast.keyword) and node.arg in ("loss", "loss_type"):
                for leaf in ast.walk(node.value):
                    assert not (isinstance(leaf, ast.Constant) and leaf.value == "ipo")
