"""Retries failed requests if a retry can help, and fails immediately if it cannot.

Errors from storage clients are classified by HTTP status, or by the underlying Python or OS error,
because every fsspec protocol has its own exception classes.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
Failure = Literal["denied", "missing", "unreachable", "passing"]
# S3 answers expired credentials with 400.
_DENIED, _PASSING = (400, 401, 403, 407), (408, 409, 425, 429)
_UNREACHABLE = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)
# I/O failures, which say nothing about the content of a file.
READING_ERRORS = ("file missing, or its requests fail", "file may not be read", "file missing",
                  "file cannot be read: its disk fails")  # fmt: skip
# Failures of a single file, not of its disk.
_OF_ONE_FILE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_OF_ONE_NAME = (errno.ELOOP, errno.ENAMETOOLONG)
# A damaged file can contain an impossible offset.
INVALID_OFFSETS = (errno.EINVAL, errno.EOVERFLOW)
_BUGS = (TypeError, AttributeError, NameError, AssertionError, ImportError)


class AccessError(OSError):
    """No file of a source can be read: bad or expired credentials, or an unreachable host."""


class LostFileError(OSError):
    """One file cannot be read: it is missing, or every attempt failed."""


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts per request, and the seconds between attempts.

    The wait doubles after each attempt, up to `longest_wait`.

    Attributes:
        attempts: Total number of attempts; 0 counts as 1.
        first_wait: Seconds before the second attempt.
        longest_wait: Maximum seconds between two attempts.
    """

    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0


def try_request(
    url: str,
    request: Callable[[], T],
    policy: RetryPolicy,
    *,
    on_retry: Callable[[str, str], None] | None = None,
    is_first: bool = False,
) -> T:
    """Make a request; retry it after transient failures."""
    for attempt in range(max(policy.attempts, 1)):
        try:
            return request()
        except (*_BUGS, AccessError, LostFileError):
            raise
        except Exception as error:
            kind, reason = sort_failure(error), describe(error)
            is_last = attempt + 1 >= policy.attempts
            # Without credentials, clients send no request and raise their own errors.
            causes = list(_list_causes(error))
            is_sent = _list_statuses(causes) or any(isinstance(c, OSError) for c in causes)
            is_unsent = is_first and kind == "passing" and not is_sent
            if kind == "denied" or is_unsent:
                raise AccessError(
                    f"{url}: access denied ({reason}). Check the credentials and their "
                    "expiry, and that the file exists: some services deny access to missing files."
                ) from error
            if kind == "missing":
                raise LostFileError(f"{url}: no such file ({reason})") from error
            if kind == "unreachable" and (is_first or is_last):
                raise AccessError(
                    f"{url}: its host cannot be reached ({reason}). Check the host name, the "
                    "network and the proxy settings."
                ) from error
            if is_last:
                raise LostFileError(
                    f"{url}: {attempt + 1} attempts failed, the last with {reason}"
                ) from error
            if on_retry is not None:
                on_retry(url, reason)
            time.sleep(min(policy.first_wait * 2**attempt, policy.longest_wait))
    raise AssertionError("unreachable: the last attempt returns or raises")


def sort_failure(error: BaseException) -> Failure:
    """Classify an error by its chain of causes."""
    causes = list(_list_causes(error))
    statuses = _list_statuses(causes)
    if isinstance(error, PermissionError) or any(status in _DENIED for status in statuses):
        return "denied"
    if any(status >= 500 or status in _PASSING for status in statuses):
        return "passing"
    if any(status >= 400 for status in statuses):
        return "missing"
    if any(
        isinstance(cause, ConnectionRefusedError | socket.gaierror)
        or (isinstance(cause, OSError) and cause.errno in _UNREACHABLE)
        for cause in causes
    ):
        return "unreachable"
    # fsspec reports any failure to get a file's size as a missing file, with the real cause.
    return "missing" if isinstance(causes[-1], FileNotFoundError) else "passing"


def find_reading_failure(error: BaseException) -> OSError | None:
    """Return the I/O failure that caused an error; None if the content of the file is invalid.

    Decoders also report invalid content as an OSError, but without an errno.
    """
    for cause in _list_causes(error):
        if isinstance(cause, AccessError | LostFileError):
            return cause
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
    return None


def raise_disk_failure(error: BaseException, location: object) -> None:
    """Raise OSError if a disk or server failed, not if one file is missing, closed or broken."""
    failure = find_reading_failure(error)
    if failure is None or isinstance(failure, _OF_ONE_FILE):
        return
    if failure.errno in (*_OF_ONE_NAME, *INVALID_OFFSETS):
        return
    raise OSError(
        failure.errno,
        f"{failure.strerror or failure}: the disk or server failed. Run the same command again "
        "when it is available",
        str(location),
    ) from error


def name_reading_error(error: BaseException) -> str | None:
    """Return one of `READING_ERRORS` for an I/O failure; None for other errors."""
    failure = find_reading_failure(error)
    if failure is None:
        return None
    lost, denied, missing, failed = READING_ERRORS
    if isinstance(failure, LostFileError | AccessError):
        return lost
    if isinstance(failure, PermissionError):
        return denied
    return missing if isinstance(failure, FileNotFoundError) else failed


def describe(error: BaseException) -> str:
    """Describe an error in one line, using its innermost cause that has a message."""
    innermost = [error, *(cause for cause in _list_causes(error) if str(cause).strip())][-1]
    text = " ".join(str(innermost).split())
    return f"{type(innermost).__name__}: {text}" if text else type(innermost).__name__


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _list_statuses(causes: Sequence[BaseException]) -> list[int]:
    """List the HTTP statuses in errors of web, Hub and S3 clients."""
    statuses = []
    for error in causes:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            statuses.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        statuses += [getattr(error, "status", None), getattr(response, "status_code", None)]
    return [status for status in statuses if isinstance(status, int)]
