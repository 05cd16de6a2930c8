"""Errors of requests, with their HTTP status.

Their JSON has the shape of OpenAI's, `{"error": {"message", "type", "param", "code"}}`, from which
its client takes the message.
"""

from __future__ import annotations

import json
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: The error and its remedy, for the client.
        param: Field of the request; None for the request as a whole.
        code: A short name for programs.
        retry_after_s: Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response, without those of the body."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            # A browser asks for Basic, and for nothing if it is not alone; programs send a bearer
            # token unasked.
            headers["WWW-Authenticate"] = 'Basic realm="llm2clip"'
        return headers

    def to_bytes(self) -> bytes:
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error: dict[str, Any] = {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }  # fmt: skip
        # ASCII, since a message may quote an unpaired surrogate.
        return json.dumps({"error": error}).encode("ascii")
