"""The FastAPI application: routes, health, metrics and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

from .._environment import list_versions
from ..configs.serve_config import ServeConfig
from . import schemas
from .errors import RequestError
from .image_inputs import ImageInputs
from .metrics import CONTENT_TYPE, ServerMetrics
from .request_guard import respond
from .routes import JsonResponse, make_router
from .service import EmbeddingService

_PACKAGE = "modeling_llm2clip"
_SHOWN_ERRORS = 3


def make_web_app(service: EmbeddingService, config: ServeConfig, metrics: ServerMetrics) -> FastAPI:
    """Make the application, with nothing at `/` yet; it closes the service when it ends."""

    @asynccontextmanager
    async def close_at_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = _App(
        title="LLM2CLIP",
        version=list_versions((_PACKAGE,))[_PACKAGE],
        description=f"Embeddings, zero-shot classification and search by {service.model_name}.",
        lifespan=close_at_end,
        default_response_class=JsonResponse,
    )
    app.include_router(make_router(service, ImageInputs(config)))
    _add_monitoring(app, service, metrics)
    _add_error_handlers(app)
    return app


def add_redirect(app: FastAPI) -> None:
    """Redirect `/` to the documentation of the API."""

    @app.get("/", include_in_schema=False)
    async def show_documentation() -> Response:
        return RedirectResponse("docs")


def _add_monitoring(app: FastAPI, service: EmbeddingService, metrics: ServerMetrics) -> None:
    """Add the routes for load balancers and Prometheus."""

    @app.head("/health", include_in_schema=False)
    @app.get(
        "/health", tags=["Operation"], response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "No model is running."}},
    )  # fmt: skip
    async def health() -> Response:
        """Say whether the server can answer, and which routes work."""
        encoder = service.encoder
        num_images, index_error = await service.find_index_error()
        status = "ok" if index_error is None else "degraded"
        state = {
            "status": status if service.is_alive else "failed",
            "working_routes": _list_working_routes(service, num_images),
            "model": service.model_name,
            "modalities": list(encoder.modalities),
            "embedding_dim": encoder.embedding_dim,
            "max_text_length": encoder.max_text_length,
            "num_pending": service.num_pending,
            "num_images": num_images,
            "index_error": index_error,
            "far_images": service.describe_far_images() is not None,
        }
        return JsonResponse(state, status_code=200 if service.is_alive else 503)

    @app.get(
        "/metrics", tags=["Operation"], response_class=Response,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}},
    )  # fmt: skip
    def show_metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def _list_working_routes(service: EmbeddingService, num_images: int | None) -> list[str]:
    if not service.is_alive:
        return []
    routes = ["/v1/embeddings", "/v2/embed"]
    if service.encoder.logit_rule is not None:
        routes.append("/v1/classify")
    if num_images is not None:
        routes.append("/v1/search")
    return routes


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error the shape of OpenAI's."""

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            return respond(
                RequestError(400, "The body is read as JSON; send Content-Type: application/json.")
            )
        found = error.errors()
        described = "; ".join(map(_describe, found[:_SHOWN_ERRORS]))
        more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
        param = _name_field(found[0]) or None
        return respond(RequestError(400, described + more, param=param, code="invalid_request"))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        response = respond(
            RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def report_bug(_: Request, error: Exception) -> Response:
        # The server logs its traceback; the client gets none.
        return respond(
            RequestError(500, f"The server failed ({type(error).__name__}); its log has more.")
        )


def _describe(error: dict[str, Any]) -> str:
    field = _name_field(error)
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _name_field(error: dict[str, Any]) -> str:
    """Return the path of a field, without `body` and the tags of unions."""
    place = [str(part) for part in error["loc"] if part != "body"]
    place = [part for part in place if not part.startswith("[")]
    before = [None, *place]
    return ".".join(n for n, last in zip(place, before, strict=False) if n != last or n.isdigit())


class _App(FastAPI):
    """Omits status 422 from its OpenAPI, because invalid requests get 400, as at OpenAI."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema
