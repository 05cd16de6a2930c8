"""The web application around one service, for any ASGI server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._extras import SERVE, require
from ..configs.serve_config import ServeConfig
from .service import EmbeddingService

if TYPE_CHECKING:
    from fastapi import FastAPI

API_KEY_VARIABLE = "LLM2CLIP_API_KEY"


def create_app(
    service: EmbeddingService,
    config: ServeConfig | None = None,
    page: Callable[[FastAPI, EmbeddingService], object] | None = None,
) -> FastAPI:
    """Make the web application of a service, which it closes at its end.

    With `LLM2CLIP_API_KEY` in the environment, every request but those for `/health` must bring
    that key.

    Args:
        service: The service that answers requests.
        config: Limits; those of the service by default.
        page: Called with the application, to which it adds what is shown at `/`, and the service.
            Without it `/` leads to the documentation of the API.

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

    from .metrics import ServerMetrics
    from .request_guard import RequestGuard
    from .routes import make_web_app

    config = config or service.config
    api_key = os.environ.get(API_KEY_VARIABLE)
    if api_key is not None and not api_key.strip():
        raise ValueError(f"{API_KEY_VARIABLE} is blank. Give a key, or unset it.")
    metrics = ServerMetrics(service)
    app = make_web_app(service, config, metrics)
    routes = frozenset(app.openapi()["paths"])
    if page is None:
        app.add_api_route("/", lambda: RedirectResponse("docs"), include_in_schema=False)
    else:
        page(app, service)
    app.add_middleware(RequestGuard, config=config, metrics=metrics, api_key=api_key, routes=routes)
    return app
