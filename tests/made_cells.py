"""Cells of rows with planted rates."""

from __future__ import annotations

import numpy as np

from ipo_lib.experiments.study_cells import Cell

HARM, PROMPTS = "trace harm", 60


def made_cells(
    row: str, rate: float, seeds: int = 6, draws: int = 8, drift: float = 0.0
) -> list[Cell]:
    """Cells whose prompts are harmful at ``rate`` (a little apart from each other), in two sets."""
    cells = []
    for seed in range(seeds):
        random = np.random.default_rng([seed, *row.encode()])
        rates = np.clip(rate + drift * seed + random.normal(0, 0.1, PROMPTS), 0, 1)
        counts = [(int(random.binomial(draws, p)), draws) for p in rates]
        measured = {f"direct: {HARM}": tuple(counts[:30]), f"wrapped: {HARM}": tuple(counts[30:])}
        cells.append(
            Cell(
                row=row,
                seed=seed,
                pairs=10,
                tokens=1000 + seed,
                answer_tokens=80.0,
                seconds=1.0,
                adapter="a",
                counts={},
                measured=measured,
                learned={"traces with a cue": rate},
                steps=((10, 0.5), (20, 0.7)),
            )
        )
    return cells
