"""Reads files that are not on this machine: in ranges where a server can, else from the front.

A file is a local path, a URL that fsspec opens (`https://`, `s3://`, `gs://`, `hf://datasets/…`),
or `pipe:` and a shell command whose output is the file.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ..._extras import WEB_SERVERS, MissingExtraError, require
from .remote_access import AccessError, RetryPolicy, try_request

PIPE = "pipe:"
_BLOCK_BYTES = 2**23
_SKIPPED_AT_ONCE = 2**20
_SILENT_SECONDS = 60.0
_HTTP = ("http://", "https://")
# Of web servers, S3 and Google, the Hub, and other services of fsspec.
_TAGS = ("ETag", "etag", "Last-Modified", "LastModified", "Content-MD5", "blob_id", "mtime",
         "updated", "last_modified")  # fmt: skip


class NoRangesError(Exception):
    """The server sends files from their beginning only."""


class ByteStream(Protocol):
    """What a file is read from, front to back."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer only at the end."""

    def close(self) -> None:
        """Release what is open."""


def is_remote(source: str) -> bool:
    """Whether a source is a URL or a command, not a local path."""
    return source.startswith(PIPE) or "://" in source


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    import fsspec  # type: ignore[import-untyped]

    try:
        options = _limit_silence() if url.startswith(_HTTP) else {}
        if url.startswith("file://"):
            options = {"auto_mkdir": True}  # object storage has no folders to make
        found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    except MissingExtraError:
        raise
    except ImportError as error:
        raise AccessError(
            f'{url}: {error}. For S3 run: pip install "modeling_llm2clip[s3]"; '
            "other services have packages of their own, such as gcsfs."
        ) from error
    except ValueError as error:
        raise AccessError(f"{url}: {error}. Give a path, or a URL that fsspec knows.") from error
    return found


def _limit_silence() -> dict[str, Any]:
    """Let a web server be silent for a while, but send as long as it likes.

    By default a response has to end within minutes, however fast it is read here.
    """
    require(WEB_SERVERS)
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS
    )
    return {"client_kwargs": {"timeout": timeout}}


class RemoteFile:
    """One file of a source.

    Args:
        url: path, URL or command.
        policy: how often and how patiently requests are tried.
        on_retry: called with the URL and the reason before each further attempt.
        is_first: whether nothing came from this source before, so that an unreachable host is not
            waited for.
    """

    def __init__(
        self,
        url: str,
        policy: RetryPolicy,
        *,
        on_retry: Callable[[str, str], None] | None = None,
        is_first: bool = False,
    ) -> None:
        self.url = url
        self._policy = policy
        self._on_retry = on_retry
        self._is_first = is_first
        self._opened: Any = None
        self._info: dict[str, Any] | None = None

    def try_(self, request: Callable[[], Any]) -> Any:
        """Make a request of this file, by its policy."""
        return try_request(
            self.url, request, self._policy, on_retry=self._on_retry, is_first=self._is_first
        )

    def require_access(self) -> None:
        """Check that the file can be opened."""
        if self.url.startswith(PIPE):
            return
        if is_remote(self.url):
            self.find_size()
        else:
            self.open_stream().close()

    def beside(self, url: str) -> RemoteFile:
        """Return another file that is read in the same way."""
        return RemoteFile(url, self._policy, on_retry=self._on_retry)

    def find_size(self) -> int | None:
        """Return the size in bytes; None if the server does not say."""
        size = self._describe().get("size")
        return None if size is None else int(size)

    def find_tag(self) -> str | None:
        """Return what changes when the file does; None if the server has nothing of the kind."""
        found = self._describe()
        tags = [f"{name}={found[name]}" for name in _TAGS if found.get(name)]
        return " ".join(tags) or None

    def _describe(self) -> dict[str, Any]:
        """Ask the service once; empty for a command."""

        def ask() -> dict[str, Any]:
            filesystem, path = open_filesystem(self.url)
            filesystem.invalidate_cache()
            return dict(filesystem.info(path))

        if self._info is None:
            self._info = {} if self.url.startswith(PIPE) else self.try_(ask)
        return self._info

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes from the middle of the file."""
        size = self.find_size()
        if size is None:
            raise NoRangesError

        def read() -> bytes | None:
            try:
                if self._opened is None:
                    filesystem, path = open_filesystem(self.url)
                    options = {"size": size} if self.url.startswith(_HTTP) else {}
                    self._opened = filesystem.open(path, "rb", cache_type="none", **options)
                self._opened.seek(start)
                content: bytes = self._opened.read(stop - start)
            except BaseException as error:
                self._opened = None
                if isinstance(error, ValueError) and "range" in str(error):
                    return None
                raise
            if len(content) != stop - start:
                self._opened = None
                raise OSError(f"{len(content)} of {stop - start} bytes came")
            return content

        found: bytes | None = self.try_(read)
        if found is None:
            raise NoRangesError
        return found

    def open_stream(self) -> ByteStream:
        """Open the file to be read once, from its beginning to its end."""
        if not is_remote(self.url):
            return self.try_(lambda: Path(self.url).open("rb"))  # type: ignore[no-any-return]
        if self.url.startswith(PIPE) or self.find_size() is None:
            return RestartedStream(self)
        return RangedStream(self)

    def open_seekable(self) -> Any:
        """Open the file to be read in any order; copied to a temporary one where it has to be."""
        if not is_remote(self.url):
            return self.try_(lambda: Path(self.url).open("rb"))
        size = None if self.url.startswith(PIPE) else self.find_size()
        try:
            if size is None:
                raise NoRangesError
            if size > 1:
                self.read_range(size - 1, size)
            return SeekableFile(self, size)
        except NoRangesError:
            copy = tempfile.TemporaryFile()
            stream = RestartedStream(self)
            while part := stream.read(_SKIPPED_AT_ONCE):
                copy.write(part)
            stream.close()
            copy.seek(0)
            return copy

    def start_again(self) -> ByteStream:
        """Open the file for one try at reading it from its beginning."""
        if self.url.startswith(PIPE):
            return CommandStream(self.url.removeprefix(PIPE))
        filesystem, path = open_filesystem(self.url)
        # Of a web server, block_size=0 opens one response, which cannot seek.
        options: dict[str, Any] = {"block_size": 0, "size": 1} if self.url.startswith(_HTTP) else {}
        return filesystem.open(path, "rb", **options)  # type: ignore[no-any-return]


class RangedStream:
    """Reads a file block by block; the next one comes while the last one is used.

    Args:
        file: to read.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._size = file.find_size() or 0
        self._pool = ThreadPoolExecutor(1)
        self._block = memoryview(b"")
        self._position = 0  # behind the block
        self._coming: Future[bytes] | None = None
        self._rest: RestartedStream | None = None
        self._request()

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer only at the end."""
        if self._rest is not None:
            return self._rest.read(size)
        parts: list[bytes | memoryview] = []
        while size:
            if not self._block and not self._fill():
                break
            part = self._block[:size]
            self._block = self._block[len(part) :]
            parts.append(part)
            size -= len(part)
        if self._rest is not None and size:
            parts.append(self._rest.read(size))
        return b"".join(parts)

    def _request(self) -> None:
        stop = min(self._position + _BLOCK_BYTES, self._size)
        self._coming = None
        if stop > self._position:
            self._coming = self._pool.submit(self._file.read_range, self._position, stop)

    def _fill(self) -> bool:
        """Take the block that was requested; whether there is one."""
        if self._coming is None:
            return False
        try:
            block = self._coming.result()
        except NoRangesError:
            self._coming = None
            self._rest = RestartedStream(self._file, start=self._position)
            return False
        self._position += len(block)
        self._block = memoryview(block)
        self._request()
        return True

    def close(self) -> None:
        """Stop requesting."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._rest is not None:
            self._rest.close()


class RestartedStream:
    """Reads a file that comes from its beginning only; what came before a failure is skipped.

    Args:
        file: to read.
        start: bytes to skip.
    """

    def __init__(self, file: RemoteFile, *, start: int = 0) -> None:
        self._file = file
        self._position = start
        self._opened: ByteStream | None = None

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer only at the end."""
        content: bytes = self._file.try_(lambda: self._read(size))
        self._position += len(content)
        return content

    def _read(self, size: int) -> bytes:
        try:
            if self._opened is None:
                self._opened = self._file.start_again()
                _skip(self._opened, self._position)
            return _read_fully(self._opened, size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the response."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class CommandStream:
    """Output of a shell command, which has to end well.

    Args:
        command: as a shell takes it.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        # The command is the user's own, as in webdataset's sources.
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        if len(content) < size and (code := self._process.wait()):
            raise OSError(f"the command ended with code {code}")
        return content

    def close(self) -> None:
        """End the command."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()


class SeekableFile(io.RawIOBase):
    """Reads a file in ranges, as Python's files are read.

    Args:
        file: to read.
        size: of the file.
    """

    def __init__(self, file: RemoteFile, size: int) -> None:
        super().__init__()
        self._file = file
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to an offset."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer."""
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        # In blocks, so that what came before a lost connection need not come again.
        first = self._position
        while self._position < stop:
            end = min(self._position + _BLOCK_BYTES, stop)
            content = self._file.read_range(self._position, end)
            buffer[self._position - first : end - first] = content
            self._position = end
        return stop - first


def _read_fully(stream: ByteStream, size: int) -> bytes:
    parts = []
    while size and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _skip(stream: ByteStream, size: int) -> None:
    while size:
        part = stream.read(min(size, _SKIPPED_AT_ONCE))
        if not part:
            raise OSError("the file is shorter than before")
        size -= len(part)
