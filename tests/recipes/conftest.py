"""Fixtures for the tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import prepare_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers and data of tiny recipes, which no test may change."""
    return prepare_sources(tmp_path_factory.mktemp("sources"))
