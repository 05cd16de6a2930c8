"""Tries requests again where that can help, and says at once where it cannot.

What a storage service or its client raises is sorted by status and class name, since every protocol
of fsspec has clients of its own, and later versions have others.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
Failure = Literal["denied", "missing", "unreachable", "passing"]
_DENIED, _MISSING, _PASSING = (401, 403), (404, 410), (408, 409, 425, 429)
_UNREACHABLE = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)
# Of aiohttp, httpx, botocore; each wraps the operating system's error in its own way.
_UNREACHABLE_NAMES = frozenset(
    ("ClientConnectorError", "ClientConnectorDNSError", "ConnectError", "EndpointConnectionError")
)
_DENIED_NAMES = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "GatedRepoError",
     "UnauthorizedSSOTokenError", "RefreshError", "DefaultCredentialsError")
)  # fmt: skip
_EXPIRED = ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken")
# Kinds of errors of files that could not be read, which say nothing of their content.
READING_ERRORS = ("file missing, or its requests fail", "file may not be read", "file missing",
                  "file cannot be read: its disk fails")  # fmt: skip
# Errors of one file and not of its disk.
_OF_ONE_FILE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_OF_ONE_NAME = (errno.ELOOP, errno.ENAMETOOLONG)
# A damaged file can name an offset in itself that no file has.
INVALID_OFFSETS = (errno.EINVAL, errno.EOVERFLOW)
_BUGS = (TypeError, AttributeError, NameError, AssertionError, ImportError)


class AccessError(OSError):
    """No file of a source can be read: wrong or expired credentials, or an unreachable host."""


class LostFileError(OSError):
    """One file cannot be read: it is missing, or every attempt failed."""


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts of a request in all, and the seconds between them.

    A wait is doubled before each later attempt, up to the longest.
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
    """Make a request, again and again if it fails in a way that may pass."""
    for attempt in range(max(policy.attempts, 1)):
        try:
            return request()
        except (*_BUGS, AccessError, LostFileError):
            raise
        except Exception as error:
            kind, reason = sort_failure(error), describe(error)
            is_last = attempt + 1 >= policy.attempts
            if kind == "denied":
                raise AccessError(
                    f"{url}: access denied ({reason}). Check the credentials, whether they have "
                    "expired, and whether the file is there: some services deny what is missing."
                ) from error
            if kind == "missing":
                raise LostFileError(f"{url}: no such file ({reason})") from error
            if kind == "unreachable" and (is_first or is_last):
                raise AccessError(
                    f"{url}: its host cannot be reached ({reason}). Check the name, the network "
                    "and a proxy's settings."
                ) from error
            if is_last:
                raise LostFileError(
                    f"{url}: {policy.attempts} attempts failed, the last with {reason}"
                ) from error
            if on_retry is not None:
                on_retry(url, reason)
            time.sleep(min(policy.first_wait * 2**attempt, policy.longest_wait))
    raise AssertionError("unreachable: the last attempt returns or raises")


def sort_failure(error: BaseException) -> Failure:
    """Sort an error and its causes into a kind of failure."""
    chain = list(_list_causes(error))
    statuses = [status for one in chain if (status := _find_status(one)) is not None]
    for status in statuses:
        if status in _DENIED:
            return "denied"
        if status in _MISSING:
            return "missing"
        if status >= 500 or status in _PASSING:
            return "passing"
    if any(type(one).__name__ in _DENIED_NAMES for one in chain) or any(
        word in str(one) for one in chain for word in _EXPIRED
    ):
        return "denied"
    if any(_is_unreachable(one) for one in chain):
        return "unreachable"
    if isinstance(error, PermissionError):
        return "denied"
    # fsspec reports whatever went wrong with a file's size as a missing file, and names the cause.
    if isinstance(chain[-1], FileNotFoundError) or any(400 <= status < 500 for status in statuses):
        return "missing"
    return "passing"


def find_reading_failure(error: BaseException) -> OSError | None:
    """Return the error by which a file could not be read, so that nothing is known of its content.

    None if the content is what is wrong, which decoders also report as an OSError, but without a
    number."""
    for one in _list_causes(error):
        if isinstance(one, AccessError | LostFileError):
            return one
        if isinstance(one, OSError) and one.errno is not None:
            return one
    return None


def raise_disk_failure(error: BaseException, place: object) -> None:
    """Raise where a disk or server failed, and not one file is missing, closed or broken."""
    failure = find_reading_failure(error)
    if failure is None or isinstance(failure, _OF_ONE_FILE):
        return
    if failure.errno in (*_OF_ONE_NAME, *INVALID_OFFSETS):
        return
    raise OSError(
        failure.errno,
        f"{failure.strerror or failure}: the disk or server failed. Run the same command again "
        "once it can be read",
        str(place),
    ) from error


def name_reading_error(error: BaseException) -> str | None:
    """Name one of `READING_ERRORS` for a file that could not be read; None if it was read."""
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
    """Describe an error in one line, by the cause that says most."""
    said = [one for one in _list_causes(error) if str(one).strip()]
    innermost = said[-1] if said else error
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


def _find_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return response if isinstance(response, int) else None
    for status in (getattr(error, "status", None), getattr(response, "status_code", None)):
        if isinstance(status, int):
            return status
    return None


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno in _UNREACHABLE:
        return True
    return type(error).__name__ in _UNREACHABLE_NAMES
