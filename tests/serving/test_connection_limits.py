"""Headers without end, and requests that a server abandons as it stops."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from served_apps import HeldEncoder, open_service, wait_until

uvicorn: Any = pytest.importorskip("uvicorn")

from modeling_llm2clip.configs.serve_config import ServeConfig  # noqa: E402
from modeling_llm2clip.serving.app import bind_socket, create_app  # noqa: E402

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b'Content-Length: 14\r\n\r\n{"input": "a"}'


@contextmanager
def run_limited(encoder: Any = None) -> Iterator[tuple[Any, Callable[[], socket.socket]]]:
    """Serve as `run_server` does; yields the server and a function that connects to it."""
    with open_service(encoder) as service, bind_socket(ServeConfig(port=0)) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of all connections
        options = {"http": "h11", "log_level": "critical"}
        server = uvicorn.Server(uvicorn.Config(create_app(service), **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield server, lambda: socket.create_connection(bound.getsockname(), timeout=20)
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize("piece", [b"a" * 2**16, b"X-Header: a\r\n" * 5000])
def test_a_header_without_end_is_not_read(piece: bytes) -> None:
    with run_limited() as (_, connect):
        with connect() as client, pytest.raises(ConnectionError):
            client.sendall(HEAD + b"X-Header: ")
            for _ in range(1000):
                client.sendall(piece)
        with connect() as client:
            client.sendall(HEAD + b"X-Header: " + b"a" * 50_000 + b"\r\n" + WHOLE[len(HEAD) :])
            assert client.recv(2**16).startswith(b"HTTP/1.1 200")


def test_a_request_that_a_stopping_server_abandons_gets_503() -> None:
    encoder = HeldEncoder()
    with run_limited(encoder) as (server, connect), connect() as client:
        client.sendall(WHOLE)
        assert encoder.begun.wait(20)
        [connection], [task] = server.server_state.connections, server.server_state.tasks
        connection.loop.call_soon_threadsafe(task.cancel)  # as uvicorn does after `timeout_s`
        head, _, content = client.recv(2**16).partition(b"\r\n\r\n")
        encoder.go.set()
    assert head.startswith(b"HTTP/1.1 503")
    assert "stopping" in json.loads(content)["error"]["message"]


@pytest.mark.slow
def test_an_answer_that_a_stopping_server_abandons_is_no_error_in_its_log() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    with run_limited() as (server, connect), connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        connections, tasks = server.server_state.connections, server.server_state.tasks
        wait_until(
            lambda: (
                any(c.flow and c.flow.write_paused for c in list(connections)) and len(tasks) == 1
            )  # those of answers before are removed a moment later
        )
        logger = logging.getLogger("uvicorn.error")
        logger.setLevel(logging.ERROR)
        logger.addHandler(handler)
        try:
            [connection], [task] = connections, tasks
            connection.loop.call_soon_threadsafe(task.cancel)
            wait_until(lambda: records)
        finally:
            logger.removeHandler(handler)
        while client.recv(2**16):  # up to the end of the connection
            pass
    assert [record.exc_info for record in records] == [None]
