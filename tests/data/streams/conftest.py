"""Fixtures for the tests of streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_server import ShardServer
from streamed_shards import write_tars

from modeling_llm2clip.data.remote import remote_files


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read shards of kilobytes in several requests, like large ones."""
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 5000)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "tars")


@pytest.fixture
def served(tars: Path) -> Iterator[ShardServer]:
    with ShardServer(tars) as server:
        yield server
