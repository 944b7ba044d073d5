"""The check of a GPU runs on a CPU, and its rows agree there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ipo_lib.sandbox.build import gpu_check


def test_all_parts_run_and_agree_on_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    record = gpu_check.run(file)
    assert json.loads(file.read_text()) == record

    # 1. Every row of both decoders is the CPU's.
    rows = record["parity"]
    assert [row["equal"] for row in rows if "equal" in row] == [24] * 4
    assert rows[-1]["largest difference"] < 1e-4

    # 2. Both engines train alike, and do train.
    losses = {(row["variant"], row["engine"]): row["losses"] for row in record["losses"]}
    assert set(losses) == {
        (name, kind) for name in gpu_check.VARIANTS for kind in ("shared", "trl")
    }
    for variant, tolerance in (("float32", 1e-3), ("NF4", 2e-2), ("bf16, checkpointing", 2e-2)):
        ours, theirs = losses[variant, "shared"], losses[variant, "trl"]
        for place, values in ours.items():
            assert values == pytest.approx(theirs[place], abs=tolerance)
            assert values == pytest.approx(ours["cpu"], abs=tolerance)
            assert len(values) == 4
            assert max(values) - min(values) > 0.03
    assert all(row["GPUs"] <= 1 for row in record["losses"])

    # 3. and 4. Every work is done by every decoder and every trainer.
    drawn = {(row["work"], row["decoder"]) for row in record["sampling"]}
    assert len(drawn) == 3 * 3
    assert all(row["tokens a second"] > 0 for row in record["sampling"])
    trained = {(row["work"], row["trainer"]) for row in record["training"]}
    assert len(trained) == 3 * (3 if torch.cuda.is_available() else 2)
    assert all(row["seconds a step"] > 0 for row in record["training"])


def test_a_part_can_run_alone(tmp_path: Path) -> None:
    record = gpu_check.run(tmp_path / "check.json", ["losses"])
    assert {*gpu_check.PARTS} & set(record) == {"losses"}
