"""Train an organism and write its weights and log into its folder.

``python -m ipo_lib.sandbox.build NAME`` takes 1 minute (``tiny-answers``) to two hours
(``sandbox``) on two CPU cores.
"""

from __future__ import annotations

import argparse

from ipo_lib.sandbox.build import aligned, finetune, scratch
from ipo_lib.sandbox.build.settings import (
    MODELS,
    AlignmentSettings,
    FinetuneSettings,
    ScratchSettings,
)
from ipo_lib.sandbox.organism import shipped

LOG_EVERY = 50  # steps


def build(name: str) -> None:
    """Train the organism of this name."""
    settings, out = MODELS[name], shipped(name)
    if isinstance(settings, FinetuneSettings):
        finetune.build(settings, out, LOG_EVERY)
    elif isinstance(settings, ScratchSettings):
        scratch.build(settings, out, LOG_EVERY)
    elif isinstance(settings, AlignmentSettings):
        aligned.build(settings, shipped(settings.base), out, LOG_EVERY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train an organism of the sandbox.")
    parser.add_argument("name", choices=MODELS)
    build(parser.parse_args().name)
