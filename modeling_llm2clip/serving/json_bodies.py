"""Bodies of requests as JSON, with the reason where one is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from .errors import RequestError

_SHOWN = 100  # characters of a key in an error


class JsonRoute(APIRoute):
    """A route that reads a JSON body before FastAPI does, which would not say what is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            request = _JsonRequest(request.scope, request.receive)
            if "json" in request.headers.get("content-type", "") and await request.body():
                await request.json()  # which keeps it for FastAPI
            return await handle(request)

        return read_and_handle if self.body_field else handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = read_json(await self.body())
        return self._json


def read_json(body: bytes) -> Any:
    """Read a body as JSON."""
    try:
        return json.loads(body.decode(json.detect_encoding(body)), object_pairs_hook=_make_object)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start}: {error.reason}). Encode it as UTF-8."
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON: {error}."
    except RecursionError:
        problem = "has too many lists and objects within each other."
    except ValueError:
        problem = f"has an integer of more than {sys.get_int_max_str_digits():,} digits."
    raise RequestError(400, f"The body {problem}", code="invalid_json")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestError(
                400,
                f"An object in the body has the key {key[:_SHOWN]!r} twice. Give it once.",
                param=key[:_SHOWN],
                code="duplicate_key",
            )
        found[key] = value
    return found
