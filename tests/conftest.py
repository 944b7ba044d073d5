"""Fixtures that several test modules share."""

from __future__ import annotations

import pytest
from scripted import r1_chat

from ipo_lib.chat import Chat


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """The chat of a small tokenizer whose template opens ``<think>``."""
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))
