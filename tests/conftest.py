"""Fixtures that several test modules share."""

from __future__ import annotations

import os

# Several processes share the cores; with several threads in each they would wait for each other.
# Torch reads the variable when it is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import replace
from pathlib import Path

import pytest
from preferences import PLAIN, make_pairs, write_small_llama
from scripted import r1_chat

from ipo_lib import training
from ipo_lib.chat import Chat


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """The chat of a small tokenizer whose template opens ``<think>``."""
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random Llama."""
    return write_small_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def stage1(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    """The folder of an adapter that stage 1 trained on ``model``, and its rows of metrics."""
    folder = tmp_path_factory.mktemp("stage1")
    return folder, training.train(make_pairs(8), model, replace(PLAIN, epochs=4), folder)
