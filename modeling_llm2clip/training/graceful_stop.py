"""A wish to stop, kept until the work in hand is whole: SIGINT (Ctrl-C) and SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)


class StopRequest:
    """What has been asked so far.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one does as it always did.

    Outside the main thread, where Python takes no handlers, nothing is changed.
    """
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, _: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()
        _log.warning("%s: stopping when the work in hand is whole.", request.signal.name)

    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGINT, signal.SIGTERM):
            # None stands for a handler that was not installed from Python: it cannot be put back.
            before[wanted] = signal.signal(wanted, note) or signal.SIG_DFL
    try:
        yield request
    finally:
        restore()
