"""Parses and writes the JSON of requests and responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from ..data.sources.json_files import RepeatedFieldError, make_object
from .service_results import RequestError


class JsonRoute(APIRoute):
    """Parses JSON bodies without FastAPI, whose error messages do not name the problem."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            if says_json(request) and await request.body():
                request._json = parse_body(await request.body())  # so FastAPI skips parsing it
            return await handle(request)

        return read_and_handle if self.body_field else handle


def says_json(request: Request) -> bool:
    """Return whether a request declares a JSON body."""
    return "json" in request.headers.get("content-type", "").lower()


def parse_body(body: bytes) -> Any:
    """Parse a JSON body in UTF-8, UTF-16 or UTF-32; raise RequestError if it is invalid."""
    try:
        return json.loads(body, object_pairs_hook=make_object)
    except (ValueError, RecursionError, RepeatedFieldError) as error:
        raise RequestError(
            400, f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None


class JsonResponse(JSONResponse):
    """JSON in ASCII, so any string can be sent; NaN and infinity raise an error."""

    def render(self, content: Any) -> bytes:
        return dump_json(content).encode("ascii")


def dump_json(content: Any, depth: int = 3) -> str:
    """Serialize row by row, because other threads can run only between calls of `json.dumps`."""
    if depth and isinstance(content, dict):
        parts = (
            f"{json.dumps(name)}:{dump_json(part, depth - 1)}" for name, part in content.items()
        )
        return f"{{{','.join(parts)}}}"
    if depth and isinstance(content, list):
        return f"[{','.join(dump_json(part, depth - 1) for part in content)}]"
    return json.dumps(content, allow_nan=False, separators=(",", ":"), default=datetime.isoformat)
