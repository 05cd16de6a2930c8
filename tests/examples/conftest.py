"""What tests of the LLaVA scripts share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tower, LLM, captions and instructions of `llava_parts`, which no test may change."""
    from llava_parts import save_parts  # here, since most tests need none

    return save_parts(tmp_path_factory.mktemp("parts"))
