"""Graceful stopping: SIGINT (Ctrl-C) and SIGTERM take effect after a checkpoint or batch."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)


class StageInterrupt(KeyboardInterrupt):
    """A signal stopped a stage after a checkpoint or batch; the message says how to continue.

    Args:
        stopped: Sentence that says what was stopped and where the files are. If empty, as in all
            processes except the main one, the message is also empty.
        signal: The signal.
        resume: Whether the next call needs `--resume` to continue.
    """

    def __init__(self, stopped: str, signal: signal.Signals, *, resume: bool) -> None:
        how = " and --resume ('resume=True' in Python)" if resume else ""
        super().__init__(f"{stopped} Continue with the same call{how}." if stopped else "")
        self.stopped = stopped
        self.signal = signal


class StopRequest:
    """Records the first signal.

    Attributes:
        signal: First signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def raise_interrupt(self, stopped: str, *, resume: bool, is_main_process: bool) -> None:
        """Raise `StageInterrupt` if a signal was received."""
        if self.signal is not None:
            raise StageInterrupt(stopped if is_main_process else "", self.signal, resume=resume)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM without ending the process; a second signal ends it.

    Outside the main thread, where Python cannot install handlers, nothing changes.
    """
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, _: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()
        _log.warning("%s: stopping after the current step or batch.", request.signal.name)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None means a handler that Python did not install and cannot restore.
            before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield request
    finally:
        restore()
