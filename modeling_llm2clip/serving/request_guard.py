"""Guards and counts requests: API key, size limits, deadline, disconnects, metrics.

This is plain ASGI middleware, so a body that is too large is refused while it is still arriving,
and work for a client that has disconnected is cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from ..configs.serve_config import ServeConfig
from .service_results import RequestError

if TYPE_CHECKING:
    from .service import EmbeddingService

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = ("/health",)  # for load balancers, which have no key
API_PREFIXES = ("/v1/", "/v2/", "/api/", "/predict")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CLIENT_LEFT = 499  # nginx's status for a client that disconnects; only metrics show it
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServerMetrics:
    """Prometheus metrics of one service, in their own registry."""

    def __init__(self, service: EmbeddingService) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "llm2clip_requests", "Requests by route and status.", ("route", "status"),
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "llm2clip_request_seconds", "Seconds from first byte to response.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._inputs = Counter(
            "llm2clip_inputs", "Texts and images embedded.", ("modality",),
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter("llm2clip_tokens", "Text tokens encoded.", registry=registry)
        self._batch_size = Histogram(
            "llm2clip_batch_size", "Inputs per batch.", ("modality",), buckets=_SIZES,
            registry=registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "llm2clip_batch_seconds", "Seconds per batch.", ("modality",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        pending = Gauge(
            "llm2clip_pending_inputs", "Texts and images in progress or queued.", registry=registry
        )
        pending.set_function(lambda: service.num_pending)
        service.on_batch = self._count_batch

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _count_batch(self, modality: str, count: int, cost: int, seconds: float) -> None:
        self._inputs.labels(modality).inc(count)
        self._batch_size.labels(modality).observe(count)
        self._batch_seconds.labels(modality).observe(seconds)
        if modality == "text":
            self._tokens.inc(cost)


class RequestGuard:
    """ASGI middleware that enforces the limits on requests and counts requests to `routes`."""

    def __init__(
        self,
        app: App,
        *,
        config: ServeConfig,
        metrics: ServerMetrics,
        api_key: str | None,
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._api_key = None if api_key is None else api_key.encode()
        self._routes = routes
        self._max_body = int(config.max_request_mb * 1e6)
        self._max_pending = int(config.max_pending_mb * 1e6)
        self._num_bytes = 0  # of all bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        started = time.monotonic()
        path = scope["path"]
        try:
            self._require_key(scope)
            if scope["type"] == "http" and path.startswith(API_PREFIXES):
                await self._handle(scope, receive, answer)
            else:
                self._require_size(scope)
                await self._app(scope, self._limit(receive), answer.send)
        except RequestError as error:
            await _refuse(scope, receive, answer, error)
        except asyncio.CancelledError:  # the server is stopping; re-raising would log a traceback
            if not answer.has_started:
                await _refuse(scope, receive, answer, RequestError(503, "The server is stopping."))
        finally:
            if path in self._routes:
                self._metrics.requests.labels(path, answer.status).inc()
                self._metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _require_key(self, scope: Scope) -> None:
        if self._api_key is None or scope["path"] in _OPEN_PATHS:
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(_find_key(authorization), self._api_key):
            raise RequestError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Read the body, and run the application until a response, a timeout or a disconnect."""
        deadline = time.monotonic() + self._config.timeout_s
        body = bytearray()
        try:
            reading = self._read(scope, receive, body)
            try:
                is_whole = await asyncio.wait_for(reading, self._config.timeout_s)
            except (asyncio.TimeoutError, TimeoutError):
                raise RequestError(
                    408, f"The body did not arrive within {self._config.timeout_s:g} seconds."
                ) from None
            if is_whole:
                await self._run(scope, receive, answer, bytes(body), deadline)
            else:
                answer.status = _CLIENT_LEFT
        finally:
            self._num_bytes -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Read the body within the limits; return False if the client disconnects."""
        self._require_size(scope)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            body += chunk
            self._num_bytes += len(chunk)
            if len(body) > self._max_body:
                raise self._refuse_size()
            if self._num_bytes > self._max_pending:
                raise RequestError(
                    429,
                    f"The bodies of all requests in progress exceed "
                    f"{self._config.max_pending_mb:g} MB. Try again later.",
                    code="queue_full",
                    retry_after_s=1,
                )
            if not message.get("more_body", False):
                return True

    def _require_size(self, scope: Scope) -> None:
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._max_body:
            raise self._refuse_size()

    def _limit(self, receive: Receive) -> Receive:
        """Forward a request's body; if the body is too large, simulate a disconnect."""
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            return message if num_bytes <= self._max_body else {"type": "http.disconnect"}

        return receive_limited

    def _refuse_size(self) -> RequestError:
        return RequestError(
            413,
            f"The request is larger than {self._config.max_request_mb:g} MB "
            "(--max-request-mb). Send fewer or smaller images per request.",
            code="request_too_large",
        )

    async def _run(
        self, scope: Scope, receive: Receive, answer: _Answer, body: bytes, deadline: float
    ) -> None:
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:  # a second call waits for a disconnect
                await asyncio.Event().wait()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self._app(scope, replay, answer.send))
        hang_up = asyncio.ensure_future(_wait_for_hang_up(receive))
        try:
            await asyncio.wait(
                (work, hang_up),
                timeout=max(deadline - time.monotonic(), 0),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if work.done() or answer.is_complete:
                await work  # re-raises an exception from a bug
            elif hang_up.done():
                answer.status = _CLIENT_LEFT
            elif not answer.has_started:
                raise RequestError(
                    504,
                    f"The request took more than {self._config.timeout_s:g} seconds. Send fewer "
                    "inputs per request, or try again later.",
                    code="timeout",
                )
        finally:
            for task in (work, hang_up):
                task.cancel()
            await asyncio.gather(work, hang_up, return_exceptions=True)


class _Answer:
    """Forwards a response and records its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 500  # if the application ends without a response
        self.has_started = False
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            self.status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True


def _find_key(authorization: bytes) -> bytes:
    """Return the key in an Authorization header: the bearer token or the Basic password."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


async def _wait_for_hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


def respond(error: RequestError) -> Response:
    """Build a response in OpenAI's error format, so that OpenAI's client shows the message."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        # Browsers prompt for a password only if Basic is the only scheme; programs send a bearer
        # token without being asked.
        headers["WWW-Authenticate"] = 'Basic realm="llm2clip"'
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {
        "message": error.message, "type": _TYPES.get(error.status, kind), "param": error.param,
        "code": error.code,
    }  # fmt: skip
    # ASCII, because a message may quote an unpaired surrogate.
    body = json.dumps({"error": content}).encode("ascii")
    return Response(body, error.status, headers, media_type="application/json")


async def _refuse(scope: Scope, receive: Receive, answer: _Answer, error: RequestError) -> None:
    if scope["type"] == "websocket":
        await answer.send({"type": "websocket.close", "code": 1008, "reason": error.message})
        return
    response = respond(error)
    # The rest of the body is left unread, so the connection cannot be reused.
    response.headers["connection"] = "close"
    await response(scope, receive, answer.send)
