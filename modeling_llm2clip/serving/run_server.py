"""Runs the web application in this process, until a signal ends it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ..configs.serve_config import ServeConfig

_BACKLOG = 2048  # connections that wait for being accepted
_KEEP_ALIVE_S = 75  # longer than load balancers keep theirs


def bind_socket(config: ServeConfig) -> socket.socket:
    """Bind the address before anything costly; connections are refused until the server listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(
            f"host={config.host!r}, port={config.port} cannot be listened on ({error}). Give "
            "another port, or an address of this machine."
        ) from error
    return bound


def run_server(
    app: Any, bound: socket.socket, config: ServeConfig, *, on_listen: Callable[[str], object]
) -> None:
    """Serve until SIGINT or SIGTERM, finish the requests in work, and raise the signal again.

    `on_listen` gets the URL, at which connections wait until the server has started.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(config.drain_s)),
            server_header=False,
        )
    )
    bound.listen(_BACKLOG)
    host, port = bound.getsockname()[:2]
    on_listen(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=[bound])
