"""Runs that are stopped or refused, files that find no room, and the bytes that are left."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_llm2clip.embedding import shard_computation
from modeling_llm2clip.embedding.sharded_writer import ShardedWriter
from modeling_llm2clip.scheduling.graceful_stop import StopRequest


class StopAfter(StopRequest):
    """Requests a stop as soon as a count increases."""

    def __init__(self, count: Callable[[], int]) -> None:
        self.count = count
        self.before = count()

    @property
    def signal(self) -> signal.Signals | None:
        return signal.SIGTERM if self.count() > self.before else None


def stop_after_one(monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]) -> None:
    """Stop runs of `extract` and `embed` as soon as a count increases."""
    stopping = lambda: nullcontext(StopAfter(count))  # noqa: E731
    monkeypatch.setattr(shard_computation, "stop_on_signals", stopping)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make the kernel refuse longer files, like a full disk or quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def count_written_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the row count of every shard written from here on."""
    rows: list[int] = []
    write = ShardedWriter.write

    def count(self: ShardedWriter[Any], shard: int, embeds: torch.Tensor, *others: int) -> None:
        rows.append(len(embeds))
        write(self, shard, embeds, *others)

    monkeypatch.setattr(ShardedWriter, "write", count)
    return rows


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@contextmanager
def refusing_for(*entries: str, folder: Path, content: dict[str, bytes]) -> Iterator[None]:
    """Require that a run is refused for its differences from a folder, which stays unchanged.

    Args:
        *entries: what differs; nothing else is named.
        folder: the output of another run.
        content: its files, as `read_bytes` gives them.
    """
    with pytest.raises(ValueError, match="holds a different output") as raised:
        yield
    for entry in entries:
        assert f"{entry}: " in str(raised.value), entry
    assert str(raised.value).count(" in the store, ") == len(entries)
    assert read_bytes(folder) == content
