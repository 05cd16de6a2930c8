"""Errors of requests, with their HTTP status."""

from __future__ import annotations


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
