"""What the tests of an embedding store share."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import make_embeddings, write_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", make_embeddings())
