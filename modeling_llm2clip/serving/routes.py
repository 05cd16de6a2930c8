"""The routes of the API: requests into inputs of the service, and its results into responses."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, TypeAlias

import numpy as np
from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray

from ..search.search_results import SearchResult
from . import schemas
from .errors import RequestError
from .image_inputs import ImageInputs
from .json_bodies import JsonRoute
from .service import EmbeddingService, Input
from .service_results import EmbeddedInputs, ServiceResult

_PIXEL = (  # a PNG of one red pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ"
    "/pLvAAAAAElFTkSuQmCC"
)
_EMBEDDING_EXAMPLES: dict[str, Any] = {
    "texts": {"value": {"input": ["a dog in the snow", "two red apples"]}},
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
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorResponse, "description": description}
    for status, description in {
        400: "The request is not valid.",
        401: "The API key is missing or wrong.",
        404: "There is no such model, or no index.",
        408: "The request did not arrive in time.",
        413: "The request, an image, or the number of inputs is too large.",
        429: "The queue is full; Retry-After says when to try again.",
        500: "The model failed.",
        503: "The server is stopping, or the index cannot be searched.",
        504: "The request took too long.",
    }.items()
}
_Embeds: TypeAlias = "NDArray[np.float32]"


class JsonResponse(JSONResponse):
    """JSON with escapes in place of what is not ASCII, so that any string can be sent."""

    def render(self, content: Any) -> bytes:
        """Return the body.

        Args:
            content: What `json` can write; no NaN and no infinity.
        """
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def make_router(service: EmbeddingService, images: ImageInputs) -> APIRouter:
    """Make the routes of a service.

    Args:
        service: What answers.
        images: Reads the images of requests.
    """
    router = APIRouter(
        responses=_ERRORS, default_response_class=JsonResponse, route_class=JsonRoute
    )
    _add_embeddings(router, service, images)
    _add_uses(router, service, images)

    @router.get("/v1/models", tags=["OpenAI"], response_model=schemas.ModelList)
    async def list_models() -> Response:
        """List the served model."""
        card = {"id": service.model_name, "object": "model", "owned_by": "llm2clip", "created": 0}
        return JsonResponse({"object": "list", "data": [card]})

    return router


def _add_embeddings(router: APIRouter, service: EmbeddingService, images: ImageInputs) -> None:
    @router.post("/v1/embeddings", tags=["OpenAI"], response_model=schemas.EmbeddingResponse)
    async def create_embeddings(
        body: Annotated[schemas.EmbeddingRequest, Body(openapi_examples=_EMBEDDING_EXAMPLES)],
    ) -> Response:
        """Embed texts and images; a body has exactly one of the five fields for them."""
        _require_model(service, body.model)
        inputs = await _read_inputs(_list_items(body), images)
        found = await service.embed(inputs, dimensions=body.dimensions, truncate=body.truncate)
        rows = _encode(found.embeds, body.encoding_format or "float")
        data = [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ]
        return JsonResponse(_make_list(service, data, found))

    @router.post("/v2/embed", tags=["Cohere"], response_model=schemas.CohereResponse)
    async def embed(
        body: Annotated[schemas.CohereRequest, Body(openapi_examples=_COHERE_EXAMPLES)],
    ) -> Response:
        """Embed texts and images as Cohere's API does."""
        _require_model(service, body.model)
        inputs = await _read_inputs(_list_items(body), images)
        found = await service.embed(
            inputs, dimensions=body.output_dimension, truncate=body.truncate == "END"
        )
        return JsonResponse(_make_cohere_response(inputs, found, body.embedding_types))


def _add_uses(router: APIRouter, service: EmbeddingService, images: ImageInputs) -> None:
    """Add what is done with embeddings: classification and search."""

    @router.post("/v1/classify", tags=["LLM2CLIP"], response_model=schemas.ClassifyResponse)
    async def classify(
        body: Annotated[schemas.ClassifyRequest, Body(openapi_examples=_CLASSIFY_EXAMPLES)],
    ) -> Response:
        """Classify images by labels that the model was not trained for."""
        _require_model(service, body.model)
        found = await service.classify(
            await images.read(body.images),
            body.candidate_labels,
            templates=body.templates,
            top_k=body.top_k,
        )
        data = [
            {"object": "classification", "index": index, "labels": list(map(asdict, tags))}
            for index, tags in enumerate(found.tags)
        ]
        return JsonResponse(_make_list(service, data, found))

    @router.post("/v1/search", tags=["LLM2CLIP"], response_model=schemas.SearchResponse)
    async def search(
        body: Annotated[schemas.SearchRequest, Body(openapi_examples=_SEARCH_EXAMPLES)],
    ) -> Response:
        """Find the images of the index that fit texts and images best.

        A list in `queries` is one query of several texts and images, by the mean of their
        embeddings.
        """
        _require_model(service, body.model)
        lists = [query if isinstance(query, list) else [query] for query in body.queries]
        inputs = iter(await _read_inputs([item for items in lists for item in items], images))
        queries = [[next(inputs) for _ in items] for items in lists]
        found = await service.search(queries, top_k=body.top_k, where=body.where)
        data = [
            {"object": "search_result", "index": index, "hits": _list_hits(result)}
            for index, result in enumerate(found.results)
        ]
        return JsonResponse(_make_list(service, data, found))


def _require_model(service: EmbeddingService, name: str | None) -> None:
    if name is not None and name != service.model_name:
        raise RequestError(
            404,
            f"There is no model {name[:100]!r}; this server has {service.model_name!r}.",
            param="model",
            code="model_not_found",
        )


def _list_items(body: Any) -> list[Any]:
    """Return the texts and images of a request of any form, in their order."""
    match body:
        case schemas.InputRequest():
            return body.input if isinstance(body.input, list) else [body.input]
        case schemas.MessagesRequest():
            content = body.messages[0].content
            return [content] if isinstance(content, str) else list(content)
        case schemas.TextsRequest() | schemas.CohereTextsRequest():
            return list(body.texts)
        case schemas.ImagesRequest() | schemas.CohereImagesRequest():
            return [schemas.ImageInput.model_construct(image=image) for image in body.images]
        case schemas.InputsRequest() | schemas.CohereInputsRequest():
            return [part for content in body.inputs for part in content.content]
    raise TypeError(f"{type(body).__name__} is not a request for embeddings.")


async def _read_inputs(items: Sequence[Any], images: ImageInputs) -> list[Input]:
    """Return texts as they are, and the bytes of images."""
    found: list[Any] = []
    sources: dict[int, str] = {}  # of images, by their places
    for item in items:
        match item:
            case schemas.ImageInput():
                sources[len(found)] = item.image
            case schemas.ImagePart():
                sources[len(found)] = item.image_url.url
        found.append(getattr(item, "text", item))
    if sources:
        contents = await images.read(list(sources.values()))
        for place, content in zip(sources, contents, strict=True):
            found[place] = content
    return found


def _encode(embeds: _Embeds, form: str) -> list[Any]:
    if form == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in embeds]
    rows: list[Any] = embeds.tolist()
    return rows


def _make_list(service: EmbeddingService, data: list[Any], found: ServiceResult) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "model": service.model_name,
        "usage": {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens},
        "truncated": found.truncated,
    }


def _list_hits(result: SearchResult) -> list[dict[str, Any]]:
    """Return cosine and columns of each image; its path is below the folder of the index."""
    return [
        {"cosine": cosine, **{name: _to_plain(value) for name, value in columns.items()}}
        for (_, cosine), columns in zip(result.hits, result.columns, strict=True)
    ]


def _to_plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _make_cohere_response(
    inputs: Sequence[Input], found: EmbeddedInputs, forms: Sequence[str]
) -> dict[str, Any]:
    num_images = sum(not isinstance(one, str) for one in inputs)
    return {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type",
        "embeddings": {form: _encode(found.embeds, form) for form in forms},
        "texts": [one for one in inputs if isinstance(one, str)],
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": found.num_tokens, "images": num_images},
        },
    }
