"""Builds the web application for a service, and runs it under uvicorn."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._extras import SERVE, require
from ..configs.serve_config import API_KEY_VARIABLE, ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .service import EmbeddingService

_BACKLOG = 2048  # connections waiting to be accepted
_KEEP_ALIVE_S = 75  # longer than the idle timeout of load balancers


def create_app(
    service: EmbeddingService,
    page: Callable[[FastAPI, EmbeddingService], object] | None = None,
) -> FastAPI:
    """Create the web application for a service; it closes the service on shutdown.

    If `LLM2CLIP_API_KEY` is set in the environment, every request except `/health` must send that
    key.

    Args:
        service: The service that answers requests.
        page: Called with the application and the service to add a page at `/`. If `page` is None,
            `/` redirects to the API documentation.

    Returns:
        The application.

    Raises:
        MissingExtraError: A package of the extra `serve` is not installed.
        ValueError: The API key is blank.

    Examples:
        >>> service = EmbeddingService.open("my-model")
        >>> create_app(service).title
        'LLM2CLIP'
        >>> service.close()
    """
    require(*SERVE)
    from starlette.responses import RedirectResponse

    from .request_guard import RequestGuard, ServerMetrics
    from .routes import make_web_app

    api_key = os.environ.get(API_KEY_VARIABLE)
    if api_key is not None and not api_key.strip():
        raise ValueError(f"{API_KEY_VARIABLE} is blank. Set it to a key, or unset it.")
    metrics = ServerMetrics(service)
    app = make_web_app(service, metrics)
    routes = frozenset(app.openapi()["paths"])
    if page is None:
        app.add_api_route("/", lambda: RedirectResponse("docs"), include_in_schema=False)
    else:
        page(app, service)
    app.add_middleware(
        RequestGuard, config=service.config, metrics=metrics, api_key=api_key, routes=routes
    )
    return app


def bind_socket(config: ServeConfig) -> socket.socket:
    """Bind the address before any expensive work; `listen` must be called to accept connections."""
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
            f"Cannot listen on host={config.host!r}, port={config.port} ({error}). Choose another "
            "port, or an address of this machine."
        ) from error
    return bound


def run_server(
    app: FastAPI, bound: socket.socket, config: ServeConfig, *, on_listen: Callable[[str], object]
) -> None:
    """Serve until SIGINT or SIGTERM, finish the running requests, and re-raise the signal.

    `on_listen` is called with the URL once connections are accepted. Requests are answered once the
    server has started.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",  # limits the size of headers; httptools does not
            log_level="warning",
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(config.timeout_s),
            server_header=False,
        )
    )
    bound.listen(_BACKLOG)
    host, port = bound.getsockname()[:2]
    on_listen(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=[bound])
