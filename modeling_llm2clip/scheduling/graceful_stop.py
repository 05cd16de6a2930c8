"""Stopping in good order: SIGINT (Ctrl-C) and SIGTERM wait for the next checkpoint or batch."""

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
    """A signal stopped a stage after its checkpoint or batch; the message says how to continue.

    Args:
        stopped: Sentence that says what was stopped, and where its files are; empty in all
            processes of a launcher but the main one, whose message is empty too.
        signal: The signal.
        resume: Whether the call continues with `--resume`, or as it is.
    """

    def __init__(self, stopped: str, signal: signal.Signals, *, resume: bool) -> None:
        how = " and --resume ('resume=True' in Python)" if resume else ""
        super().__init__(f"{stopped} Continue with the same call{how}." if stopped else "")
        self.stopped = stopped
        self.signal = signal


class StopRequest:
    """Notes the first signal that comes.

    Attributes:
        signal: The first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def raise_interrupt(self, stopped: str, *, resume: bool, is_main_process: bool) -> None:
        """Raise `StageInterrupt` if a signal came."""
        if self.signal is not None:
            raise StageInterrupt(stopped if is_main_process else "", self.signal, resume=resume)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first SIGINT or SIGTERM instead of ending; a second one ends the process as usual.

    Outside the main thread, where Python installs no handlers, nothing changes.
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
            # None means a handler that was not installed by Python and cannot be restored.
            before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield request
    finally:
        restore()
