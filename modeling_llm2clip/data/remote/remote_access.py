"""Tries requests again where that can help, and says at once where it cannot.

What a storage service or its client raises is sorted by the status of its reply, and by the error
of Python or the operating system that caused it: every protocol of fsspec has classes of its own.
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
# S3 answers expired credentials by 400.
_DENIED, _PASSING = (400, 401, 403, 407), (408, 409, 425, 429)
_UNREACHABLE = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)
# Errors of reading a file; they say nothing about its content.
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
    """Make a request; repeat it after failures that may pass."""
    for attempt in range(max(policy.attempts, 1)):
        try:
            return request()
        except (*_BUGS, AccessError, LostFileError):
            raise
        except Exception as error:
            kind, reason = sort_failure(error), describe(error)
            is_last = attempt + 1 >= policy.attempts
            # Clients without credentials make no request, and raise errors of their own.
            causes = list(_list_causes(error))
            is_sent = _list_statuses(causes) or any(isinstance(c, OSError) for c in causes)
            is_unsent = is_first and kind == "passing" and not is_sent
            if kind == "denied" or is_unsent:
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
    # fsspec reports whatever went wrong with a file's size as a missing file, and names the cause.
    return "missing" if isinstance(causes[-1], FileNotFoundError) else "passing"


def find_reading_failure(error: BaseException) -> OSError | None:
    """Return the error by which a file could not be read, so that nothing is known of its content.

    None if the content is what is wrong, which decoders also report as an OSError, but without a
    number."""
    for cause in _list_causes(error):
        if isinstance(cause, AccessError | LostFileError):
            return cause
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
    return None


def raise_disk_failure(error: BaseException, location: object) -> None:
    """Raise if a disk or server failed; not if a single file is missing, closed or broken."""
    failure = find_reading_failure(error)
    if failure is None or isinstance(failure, _OF_ONE_FILE):
        return
    if failure.errno in (*_OF_ONE_NAME, *INVALID_OFFSETS):
        return
    raise OSError(
        failure.errno,
        f"{failure.strerror or failure}: the disk or server failed. Run the same command again "
        "once it can be read",
        str(location),
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
    said = [cause for cause in _list_causes(error) if str(cause).strip()]
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


def _list_statuses(causes: Sequence[BaseException]) -> list[int]:
    """List the statuses of replies, as clients of web servers, the Hub and S3 have them."""
    statuses = []
    for error in causes:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            statuses.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        statuses += [getattr(error, "status", None), getattr(response, "status_code", None)]
    return [status for status in statuses if isinstance(status, int)]
