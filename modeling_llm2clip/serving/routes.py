"""Defines the FastAPI routes, which translate between HTTP and the service."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, TypeAlias

import numpy as np
from fastapi import APIRouter, Body, FastAPI, File, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from numpy.typing import NDArray
from pydantic import Json
from starlette.exceptions import HTTPException

from .._environment import list_versions
from .._suggestions import list_first
from ..search.search_results import SearchResult
from . import schemas
from .image_inputs import ImageInputs
from .json_bodies import JsonResponse, JsonRoute, dump_json, says_json
from .request_guard import METRICS_TYPE, ServerMetrics, respond
from .service import EmbeddingService, Input
from .service_results import RequestError, ServiceResult

_PIXEL = (  # a PNG of one red pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ"
    "/pLvAAAAAElFTkSuQmCC"
)
_EMBEDDING_EXAMPLES: dict[str, Any] = {
    "texts": {"value": {"input": ["a dog in the snow", "two red apples"]}},
    "text and data URL": {"value": {"input": ["a dog", _PIXEL]}},
    "texts and images": {"value": {"input": [{"text": "a dog"}, {"image": _PIXEL}]}},
    "chat message": {
        "value": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": _PIXEL}}],
                }
            ]
        }
    },
    "images": {"value": {"images": [_PIXEL], "encoding_format": "base64"}},
    "inputs": {
        "value": {
            "inputs": [
                {"content": [{"type": "text", "text": "a dog"}]},
                {"content": [{"type": "image_url", "image_url": {"url": _PIXEL}}]},
            ]
        }
    },
}
_COHERE_EXAMPLES: dict[str, Any] = {
    "texts": {"value": {"texts": ["a dog"], "input_type": "search_query"}},
    "images": {"value": {"images": [_PIXEL], "input_type": "image"}},
}
_OLLAMA_EXAMPLES: dict[str, Any] = {"text and image": {"value": {"input": ["a dog", _PIXEL]}}}
_CLASSIFY_EXAMPLES: dict[str, Any] = {
    "zero-shot": {
        "value": {
            "images": [_PIXEL],
            "candidate_labels": ["red", "green", "blue"],
            "templates": ["a photo of something {}"],
        }
    }
}
_SEARCH_EXAMPLES: dict[str, Any] = {
    "text": {"value": {"queries": ["a dog in the snow"], "top_k": 3}},
    "text and image": {"value": {"queries": ["a dog", {"image": _PIXEL}]}},
    "text and image combined": {"value": {"queries": [["at night", {"image": _PIXEL}]]}},
    "without": {"value": {"queries": ["a beach"], "negative": "people", "threshold": 0.1}},
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorResponse, "description": description}
    for status, description in {
        "4XX": "The request is refused.",  # otherwise FastAPI adds 422, which is never sent
        "400": "The request is invalid.",
        "401": "The API key is missing or wrong.",
        "404": "The model does not exist, or the server has no index.",
        "408": "The request did not arrive in time.",
        "413": "The request, an image, or the number of inputs is too large.",
        "429": "The queue is full; Retry-After says when to try again.",
        "500": "The model failed.",
        "503": "The server is stopping, or the index cannot be searched.",
        "504": "The request took too long.",
    }.items()
}
_SHOWN = 100  # characters of a name in an error
_PACKAGE = "modeling_llm2clip"
_Embeds: TypeAlias = "NDArray[np.float32]"


def make_web_app(service: EmbeddingService, metrics: ServerMetrics) -> FastAPI:
    """Create the application, without a route at `/`; it closes the service on shutdown."""

    @asynccontextmanager
    async def close_at_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="LLM2CLIP",
        version=list_versions((_PACKAGE,))[_PACKAGE],
        description=f"Embeddings, zero-shot classification and search by {service.model_name}.",
        lifespan=close_at_end,
        default_response_class=JsonResponse,
        docs_url=None,  # FastAPI's pages load scripts from another site
        redoc_url=None,
    )
    router = APIRouter(
        responses=_ERRORS, default_response_class=JsonResponse, route_class=JsonRoute
    )
    images = ImageInputs(service.config)
    _add_embeddings(router, service, images)
    _add_ollama(router, service, images)
    _add_immich(router, service, images)
    _add_uses(router, service, images)
    app.include_router(router)
    _add_monitoring(app, service, metrics)
    _add_error_handlers(app)
    return app


def _add_embeddings(router: APIRouter, service: EmbeddingService, images: ImageInputs) -> None:
    @router.post(
        "/v1/embeddings", tags=["OpenAI"], response_model=schemas.ListResponse[schemas.Embedding]
    )
    async def create_embeddings(
        body: Annotated[schemas.EmbeddingRequest, Body(openapi_examples=_EMBEDDING_EXAMPLES)],
    ) -> Response:
        """Embed texts and images, given in exactly one of the five input fields."""
        _require_model(service, body.model)
        result = await service.embed(
            await _read_inputs(body.list_items(), images),
            dimensions=body.dimensions,
            truncate=body.truncate,
            prompt_name=body.prompt_name,
        )
        form = body.encoding_format or "float"
        return await _answer(
            service,
            result,
            "embedding",
            lambda: [{"embedding": row} for row in _encode(result.embeds, form)],
        )

    @router.post("/v2/embed", tags=["Cohere"], response_model=schemas.CohereResponse)
    async def embed(
        body: Annotated[schemas.CohereRequest, Body(openapi_examples=_COHERE_EXAMPLES)],
    ) -> Response:
        """Embed texts and images as Cohere's API does."""
        _require_model(service, body.model)
        inputs = await _read_inputs(body.list_items(), images)
        result = await service.embed(
            inputs,
            dimensions=body.output_dimension,
            truncate=body.truncate == "END",
            prompt_name=body.prompt_name,
        )
        texts = [text for text in inputs if isinstance(text, str)]
        units = {"input_tokens": result.num_tokens, "images": len(inputs) - len(texts)}
        return await asyncio.to_thread(
            lambda: JsonResponse(
                {
                    "id": str(uuid.uuid4()),
                    "response_type": "embeddings_by_type",
                    "embeddings": {
                        form: _encode(result.embeds, form) for form in body.embedding_types
                    },
                    "texts": texts,
                    "meta": {"api_version": {"version": "2"}, "billed_units": units},
                }
            )
        )


def _add_ollama(router: APIRouter, service: EmbeddingService, images: ImageInputs) -> None:
    @router.post("/api/embed", tags=["Ollama"], response_model=schemas.OllamaResponse)
    async def embed_for_ollama(
        body: Annotated[schemas.OllamaRequest, Body(openapi_examples=_OLLAMA_EXAMPLES)],
    ) -> Response:
        """Embed texts and images as Ollama's API does; images are data URLs."""
        _require_model(service, body.model)
        result = await service.embed(
            await _read_inputs(body.list_items(), images),
            dimensions=body.dimensions,
            truncate=body.truncate is not False,
            prompt_name=body.prompt_name,
        )
        return await asyncio.to_thread(
            lambda: JsonResponse(
                {
                    "model": service.model_name,
                    "embeddings": _encode(result.embeds, "float"),
                    "prompt_eval_count": result.num_tokens,
                }
            )
        )


def _add_immich(router: APIRouter, service: EmbeddingService, images: ImageInputs) -> None:
    @router.get("/ping", tags=["immich"], response_class=PlainTextResponse)
    async def ping() -> Response:
        """Report to immich that the server is running."""
        return PlainTextResponse("pong", 200 if service.is_alive else 503)

    @router.post("/predict", tags=["immich"], response_model=schemas.ImmichResponse)
    async def embed_for_immich(
        entries: Annotated[Json[dict[str, dict[str, Any]]], Form()],
        text: Annotated[schemas.Text | None, Form()] = None,
        image: Annotated[bytes | None, File()] = None,
    ) -> Response:
        """Embed a text or an image as immich's machine-learning service does.

        `entries` is `{"clip": {"textual": {}}}` for `text`, or `{"clip": {"visual": {}}}` for
        `image`. The names of models in it have no effect, and other tasks are refused.
        """
        sent = {("clip", "textual"): text, ("clip", "visual"): image}
        asked = [(task, kind) for task, kinds in entries.items() for kind in kinds]
        if len(asked) != 1 or asked[0] not in sent:
            raise RequestError(
                404,
                "This server has the tasks clip/textual and clip/visual, one per request, not "
                f"{json.dumps(entries)[:_SHOWN]}.",
                param="entries",
                code="task_not_found",
            )
        value = sent[asked[0]]
        if value is None:
            raise RequestError(400, "Send `text` for clip/textual, and `image` for clip/visual.")
        if isinstance(value, bytes):
            images.require_size(value)
        result = await service.embed([value])

        return await asyncio.to_thread(
            lambda: JsonResponse(
                {
                    "clip": dump_json(_encode(result.embeds, "float")[0]),
                    **(images.measure(value) if isinstance(value, bytes) else {}),
                }
            )
        )


def _add_uses(router: APIRouter, service: EmbeddingService, images: ImageInputs) -> None:
    @router.post(
        "/v1/classify", tags=["LLM2CLIP"], response_model=schemas.ListResponse[schemas.ImageLabels]
    )
    async def classify(
        body: Annotated[schemas.ClassifyRequest, Body(openapi_examples=_CLASSIFY_EXAMPLES)],
    ) -> Response:
        """Classify images by any labels (zero-shot)."""
        _require_model(service, body.model)
        result = await service.classify(
            await images.read(body.images),
            body.candidate_labels,
            templates=body.templates,
            top_k=body.top_k,
        )
        return await _answer(
            service,
            result,
            "classification",
            lambda: [{"labels": list(map(asdict, tags))} for tags in result.tags],
        )

    @router.post(
        "/v1/search", tags=["LLM2CLIP"], response_model=schemas.ListResponse[schemas.QueryHits]
    )
    async def search(
        body: Annotated[schemas.SearchRequest, Body(openapi_examples=_SEARCH_EXAMPLES)],
    ) -> Response:
        """Find the images in the index that best match texts and images.

        A nested list in `queries` is a single query, whose embeddings are averaged.
        """
        _require_model(service, body.model)
        sent = [*body.queries, body.negative]
        lists = [query if isinstance(query, list) else [query] for query in sent]
        inputs = iter(await _read_inputs([item for items in lists for item in items], images))
        *queries, negative = [[next(inputs) for _ in items] for items in lists]
        result = await service.search(
            queries,
            negative=negative,
            top_k=body.top_k,
            threshold=body.threshold,
            where=body.where,
            prompt_name=body.prompt_name,
        )
        return await _answer(
            service, result, "search_result", lambda: [*map(_describe_hits, result.results)]
        )

    @router.get("/v1/models", tags=["OpenAI"], response_model=dict[str, Any])
    async def list_models() -> Response:
        """List the served model."""
        card = {"id": service.model_name, "object": "model", "owned_by": "llm2clip", "created": 0}
        return JsonResponse({"object": "list", "data": [card]})


def _describe_hits(result: SearchResult) -> dict[str, Any]:
    """Return the columns of each hit; paths are relative to the index's image folder."""
    ranked = zip(result.hits, result.columns, strict=True)
    hits = [{"cosine": cosine, **columns} for (_, cosine), columns in ranked]
    return {"hits": hits, "best_cosine": result.best_cosine}


def _require_model(service: EmbeddingService, name: str | None) -> None:
    if name is not None and name != service.model_name:
        raise RequestError(
            404,
            f"There is no model {name[:_SHOWN]!r}; this server has {service.model_name!r}.",
            param="model",
            code="model_not_found",
        )


async def _read_inputs(items: Sequence[Any], images: ImageInputs) -> list[Input]:
    """Return texts unchanged and images as bytes."""
    addresses = [getattr(item, "image", None) for item in items]
    contents = iter(await images.read([address for address in addresses if address is not None]))
    return [
        getattr(item, "text", item) if address is None else next(contents)
        for item, address in zip(items, addresses, strict=True)
    ]


def _encode(embeds: _Embeds, form: str) -> list[Any]:
    if form == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in embeds]
    return list(embeds.tolist())


async def _answer(
    service: EmbeddingService,
    result: ServiceResult,
    kind: str,
    list_fields: Callable[[], list[dict[str, Any]]],
) -> Response:
    """Respond with a list of numbered objects of type `kind`, each with its other fields.

    The response is serialized in a thread, because thousands of rows would block all other routes.
    """

    def write() -> Response:
        content = {
            "object": "list",
            "data": [
                {"object": kind, "index": index, **fields}
                for index, fields in enumerate(list_fields())
            ],
            "model": service.model_name,
            "usage": {"prompt_tokens": result.num_tokens, "total_tokens": result.num_tokens},
            "truncated": result.truncated,
        }
        return JsonResponse(content)

    return await asyncio.to_thread(write)


def _add_monitoring(app: FastAPI, service: EmbeddingService, metrics: ServerMetrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get(
        "/health", tags=["Operation"], response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "No model is running."}},
    )  # fmt: skip
    async def health() -> Response:
        """Report whether the server is healthy and which routes work."""
        encoder = service.encoder
        num_images, index_error = await service.find_index_error()
        status = "ok" if index_error is None else "degraded"
        routes = ["/v1/embeddings", "/v2/embed", "/api/embed", "/predict"]
        routes += ["/v1/classify"] if encoder.logit_rule is not None else []
        routes += ["/v1/search"] if num_images is not None else []
        state = {
            "status": status if service.is_alive else "failed",
            "working_routes": routes if service.is_alive else [],
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

    @app.get("/docs", include_in_schema=False)
    def show_docs() -> Response:
        """Describe every route on a page without scripts."""
        return Response(_describe_api(app.openapi()), media_type="text/html")

    @app.get(
        "/metrics", tags=["Operation"], response_class=Response,
        responses={200: {"content": {METRICS_TYPE: {"schema": {"type": "string"}}}}},
    )  # fmt: skip
    def show_metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(metrics.render(), headers={"Content-Type": METRICS_TYPE})


def _describe_api(schema: dict[str, Any]) -> str:
    """Render the routes of an OpenAPI schema as HTML, with curl commands as examples."""
    parts = [f"<h1>{html.escape(schema['info']['description'])}</h1>"]
    parts.append('<p>All request fields: <a href="openapi.json">OpenAPI</a>.</p>')
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2>")
            parts.append(f"<p>{html.escape(route['description'])}</p>")
            body = route.get("requestBody", {"content": {}})["content"].get("application/json", {})
            for name, example in body.get("examples", {}).items():
                command = (
                    f"curl http://HOST:PORT{path} -H 'Content-Type: application/json' \\\n  "
                    f"-d '{json.dumps(example['value'])}'"
                )
                parts.append(f"<h3>{html.escape(name)}</h3><pre>{html.escape(command)}</pre>")
    style = "body{font-family:sans-serif;max-width:60rem;margin:auto}pre{overflow:auto}"
    return f"<!doctype html><title>LLM2CLIP</title><style>{style}</style>{''.join(parts)}"


def _add_error_handlers(app: FastAPI) -> None:
    """Convert every error to OpenAI's format."""

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        param = _name_field(errors[0]) or None
        if param is None and not says_json(request):
            return respond(
                RequestError(400, "The body must be JSON. Send Content-Type: application/json.")
            )
        described = list_first(map(_describe, errors), "; ")
        return respond(RequestError(400, described, param=param, code="invalid_request"))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        response = respond(
            RequestError(
                error.status_code,
                # Starlette ends only some of its messages with a full stop.
                f"{request.method} {request.url.path}: {error.detail.rstrip('.')}.",
            )
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def report_bug(_: Request, error: Exception) -> Response:
        # The traceback is logged by the server and not sent to the client.
        return respond(
            RequestError(500, f"The server failed ({type(error).__name__}). See its log.")
        )


def _describe(error: dict[str, Any]) -> str:
    field = _name_field(error)
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _name_field(error: dict[str, Any]) -> str:
    """Return the dotted path of a field, without `body` and union tags."""
    place = [str(part) for part in error["loc"] if part != "body"]
    place = [part for part in place if not part.startswith("[")]
    before = [None, *place]
    return ".".join(n for n, last in zip(place, before, strict=False) if n != last or n.isdigit())
