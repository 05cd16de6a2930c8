"""Runs that are asked to stop, and files that find no room."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modeling_llm2clip.scheduling.graceful_stop import StopRequest


class StopAfter(StopRequest):
    """Asks for a stop as soon as there is one more of something."""

    def __init__(self, count: Callable[[], int]) -> None:
        self.count = count
        self.before = count()

    @property
    def signal(self) -> signal.Signals | None:
        return signal.SIGTERM if self.count() > self.before else None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse longer files, as a full disk and a full quota do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
