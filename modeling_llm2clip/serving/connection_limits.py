"""Ends connections whose client is late or sends a long header: applications see neither."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Set
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_MOST_HEADER_BYTES = 2**16


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """HTTP that ends a connection whose header grows too long: httptools has no limit."""

    _num_bytes = 0  # of a header that is not complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._num_bytes = self._num_bytes + len(data) if _awaits_header(self) else 0
        if self._num_bytes > _MOST_HEADER_BYTES:
            self.transport.abort()


def make_late_ender(connections: Set[Any]) -> Callable[[], Awaitable[None]]:
    """Make a function that ends connections that wait for their client since its last call.

    A client may be late with its header, or to read. Between requests it may be silent for longer.
    """
    late: set[tuple[Any, Any]] = set()

    async def end_late() -> None:
        nonlocal late
        before = late
        late = {
            (connection, connection.cycle)
            for connection in connections
            if isinstance(connection, LimitedProtocol)
            and connection.timeout_keep_alive_task is None
            and (_awaits_header(connection) or connection.flow.write_paused)
        }
        for connection, _ in late & before:
            connection.transport.abort()

    return end_late


def _awaits_header(connection: Any) -> bool:
    return connection.cycle is None or connection.cycle.response_complete
