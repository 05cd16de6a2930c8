"""A served model and its checks, which the tests of `doctor --server` share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model

from modeling_llm2clip.model_folders.model_writing import save_model

INSTRUCTIONS = {"query": "Find an image: "}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an instruction, which no test may change."""
    folder = tmp_path_factory.mktemp("served") / "model"
    return save_model(*tiny_model(max_text_length=128), folder, instructions=INSTRUCTIONS)
