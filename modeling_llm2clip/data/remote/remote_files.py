"""Reads ranges of remote files.

A file is a local path, a URL that fsspec opens (`https://`, `s3://`, `gs://`, `hf://datasets/…`),
or `pipe:` followed by a shell command whose output is the file.

The size and tag of a file are requested once. Size and tag are compared whenever the file is opened
and, for web servers, with every reply; a change is an error. The tag is a strong ETag, or else a
time. A change is missed if the service reports neither size nor tag, or if both stay the same, as
with two writes within one second when the tag is a time.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..._extras import WEB_SERVERS, MissingExtraError, require
from .remote_access import AccessError, LostFileError, RetryPolicy, try_request

PIPE = "pipe:"
_BLOCK_BYTES = 2**22
_END_BYTES = 2**16  # hashed for a local file, because copying changes its time
_SILENT_SECONDS = 60.0
_HTTP = ("http://", "https://")
# For web servers, S3 and Google, the Hub, and other fsspec services; the first match is used.
_TAGS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "last_modified", "updated",
         "mtime", "created")  # fmt: skip


class ChangedFileError(LostFileError):
    """A file has changed since its state was recorded."""

    def __init__(self, location: object, known: object, now: object) -> None:
        remedy = "Load the data again"
        if is_remote(str(location)):
            remedy += "; if its server changes the tag with every reply, copy the file first"
        super().__init__(
            f"{location}: the file changed while it was in use (was {known}, is {now}). {remedy}"
        )
        self._arguments = location, known, now

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class FileInfo(NamedTuple):
    """Size of a file in bytes, and a tag that changes with the file; None if not reported.

    The tag of a local file is a hash of its first and last bytes.
    """

    size: int | None
    tag: str | None


def is_remote(source: str) -> bool:
    """Return whether a source is a URL or a command, not a local path."""
    return source.startswith(PIPE) or "://" in source


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    import fsspec  # type: ignore[import-untyped]

    options: dict[str, Any] = {}
    if url.startswith("file://"):
        options = {"auto_mkdir": True}  # object storage has no folders to create
    try:
        if url.startswith(_HTTP):
            require(WEB_SERVERS)
            import aiohttp

            # By default, a response must end within minutes, even if we read it slowly.
            limit = aiohttp.ClientTimeout(
                total=None, sock_connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS
            )
            # Compressed in transit, a file's length differs from the one reported.
            headers = {"Accept-Encoding": "identity"}
            options = {"client_kwargs": {"timeout": limit, "headers": headers}}
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except MissingExtraError:
        raise
    except ImportError as error:
        raise AccessError(
            f'{url}: {error}. For S3 run: pip install "modeling_llm2clip[s3]"; '
            "other services need their own packages, such as gcsfs."
        ) from error
    except ValueError as error:
        raise AccessError(f"{url}: {error}. Use a path, or a URL that fsspec supports.") from error
    return filesystem, path


@dataclass(eq=False)
class RemoteFile:
    """One file of a source: a path, URL or command.

    Attributes:
        url: Path, URL, or `pipe:` followed by a command.
        policy: How failed requests are retried.
        on_retry: Called with the URL and the reason before each retry.
        is_first: Whether the source has not been accessed before; an unreachable host is then an
            error without retries.
        info: The expected state of the file. Default: its state at the first access.
    """

    url: str
    policy: RetryPolicy
    _: KW_ONLY
    on_retry: Callable[[str, str], None] | None = None
    is_first: bool = False
    info: FileInfo | None = None
    _opened: Any = field(default=None, init=False)
    _reading: Any = field(default_factory=Lock, init=False)

    def try_(self, request: Callable[[], Any]) -> Any:
        return try_request(
            self.url, request, self.policy, on_retry=self.on_retry, is_first=self.is_first
        )

    def describe(self) -> FileInfo:
        """Return the state of the file, which is requested only once; empty for a command."""
        if self.info is None:
            is_command = self.url.startswith(PIPE)
            self.info = FileInfo(None, None) if is_command else self.try_(self._ask)
        return self.info

    def _ask(self) -> FileInfo:
        if not is_remote(self.url):
            with Path(self.url).open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                ends = opened.read(_END_BYTES)
                opened.seek(max(0, size - _END_BYTES))
                digest = hashlib.sha256(ends + opened.read(_END_BYTES)).hexdigest()
            return FileInfo(size, f"ends={digest[:16]}")
        filesystem, path = open_filesystem(self.url)
        filesystem.invalidate_cache()
        facts = filesystem.info(path)
        return FileInfo(facts.get("size"), _find_tag(facts))

    def _open(self) -> Any:
        """Open the remote file; raise if its state has changed."""
        known, options = self.describe(), {}
        filesystem, path = open_filesystem(self.url)
        if self.url.startswith(_HTTP):
            options = {"size": known.size or 1, "raise_for_status": self._check_reply}
        else:
            require_same_state(self.url, known, self._ask())
        return filesystem.open(
            path,
            "rb",
            block_size=_BLOCK_BYTES,
            cache_type="blockcache",  # "background" can deadlock
            cache_options={"maxblocks": 3},
            **options,
        )

    async def _check_reply(self, reply: Any) -> None:
        """Raise if a reply shows a changed file; fsspec itself raises server errors."""
        if reply.status not in (200, 206):
            return
        name = "Content-Range" if reply.status == 206 else "Content-Length"
        size = reply.headers.get(name, "").rpartition("/")[2]
        now = FileInfo(int(size) if size.isdigit() else None, _find_tag(reply.headers))
        try:
            if "Content-Encoding" in reply.headers:  # compressed, so ranges do not apply
                raise self.explain_no_ranges()
            asked = reply.request_info.headers.get("Range", "").replace("=", " ")
            sent = reply.headers.get("Content-Range", asked)
            if sent.partition("-")[0] != asked.partition("-")[0]:
                raise AccessError(
                    f"{self.url}: its server sent {sent} when {asked} was requested. Copy the "
                    "file to this machine."
                )
            require_same_state(self.url, self.describe(), now)
        except (AccessError, ChangedFileError):
            reply.close()
            raise

    def explain_no_ranges(self) -> AccessError:
        """Return the error for a server that does not support range requests."""
        return AccessError(
            f"{self.url}: its server does not support range requests. Copy the files to this "
            f"machine, or stream tar shards (as align does) with {PIPE}curl -sf {self.url}."
        )

    def read_range(self, start: int, stop: int) -> bytes:
        """Read the bytes from `start` to `stop`."""

        def read() -> bytes:
            with self._reading:  # threads share the position of an open file
                try:
                    if self._opened is None:
                        self._opened = self._open()
                    self._opened.seek(start)
                    content: bytes = self._opened.read(stop - start)
                    if len(content) != stop - start:
                        raise OSError(f"received {len(content)} of {stop - start} bytes")
                except BaseException as error:
                    self._opened = None
                    if isinstance(error, ValueError) and "range" in str(error):
                        raise self.explain_no_ranges() from error
                    raise
                return content

        return self.try_(read)  # type: ignore[no-any-return]

    def open_stream(self) -> io.BufferedReader:
        """Open the file for one sequential read."""
        if self.url.startswith(PIPE):
            return io.BufferedReader(_CommandOutput(self.url))
        return self.open_seekable()  # type: ignore[no-any-return]

    def open_seekable(self) -> Any:
        """Open the file for random access."""
        if is_remote(self.url):
            return io.BufferedReader(SeekableFile(self), _BLOCK_BYTES // 4)
        return self.try_(lambda: Path(self.url).open("rb"))


def require_same_state(location: object, known: FileInfo, now: FileInfo) -> None:
    """Raise ChangedFileError if the sizes differ, or if tags of the same kind differ."""
    has_size = known.size is not None and now.size is not None
    names = {(tag or "").partition("=")[0] for tag in (known.tag, now.tag)}
    has_tag = len(names) == 1 and names != {""}
    if (has_size and known.size != now.size) or (has_tag and known.tag != now.tag):
        raise ChangedFileError(location, tuple(known), tuple(now))


def _find_tag(facts: Mapping[str, Any]) -> str | None:
    """Find the tag in a service's metadata, except weak ETags: bytes may change without them."""
    for name in _TAGS:
        value = facts.get(name)
        if value and not str(value).startswith("W/"):
            return f"{name}={value}"
    return None


class _CommandOutput(io.RawIOBase):
    """Reads the output of a shell command; raises if the command fails."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        # The command comes from the user, as in webdataset.
        self._process = subprocess.Popen(
            url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, bufsize=0
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        assert self._process.stdout is not None
        size = self._process.stdout.readinto(buffer)  # type: ignore[attr-defined]
        if not size and (code := self._process.wait()):
            raise LostFileError(f"{self._url}: the command ended with code {code}")
        return int(size)

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()  # ends every command of a pipeline, not only its shell
        self._process.terminate()
        self._process.wait()
        super().close()


class SeekableFile(io.RawIOBase):
    """Presents a remote file as a seekable Python file that is read in ranges."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        size = file.describe().size
        if size is None:
            raise file.explain_no_ranges()
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")
        first, stop = self._position, min(self._position + len(target), self._size)
        while self._position < stop:
            # In parts, so a lost connection costs only the last one.
            end = min(self._position + _BLOCK_BYTES // 4, stop)
            part = self._file.read_range(self._position, end)
            target[self._position - first : end - first] = part
            self._position = end
        return max(0, stop - first)
