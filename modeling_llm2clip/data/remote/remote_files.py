"""Reads files that are not on this machine: in ranges where a server can, else from the front.

A file is a local path, a URL that fsspec opens (`https://`, `s3://`, `gs://`, `hf://datasets/…`),
or `pipe:` and a shell command whose output is the file.

Size and tag of a file are asked for once, and compared at each open and, of a web server, with
each reply; a change is an error. The tag is a strong ETag, or else a time. A service that gives
neither, and a change that keeps both, such as one within a second under a time alone, go unseen.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..._extras import WEB_SERVERS, MissingExtraError, require
from .remote_access import AccessError, LostFileError, RetryPolicy, try_request

PIPE = "pipe:"
_BLOCK_BYTES = 2**22
_READ_AT_ONCE = 2**20
_SILENT_SECONDS = 60.0
_HTTP = ("http://", "https://")
# Of web servers, S3 and Google, the Hub, and other services of fsspec; the first one counts.
_TAGS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "last_modified", "updated",
         "mtime", "created")  # fmt: skip


class NoRangesError(AccessError):
    """The server sends files from their beginning only."""


class ChangedFileError(LostFileError):
    """A file is in another state than it was described in."""

    def __init__(self, place: object, known: object, now: object) -> None:
        remedy = "Load the data again"
        if is_remote(str(place)):
            remedy += "; copy files here whose server gives each reply another tag"
        super().__init__(
            f"{place}: the file has changed while it was used (was {known}, is {now}). {remedy}"
        )
        self._arguments = place, known, now

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class FileInfo(NamedTuple):
    """Size in bytes and tag of a file, which changes with it; None where a server does not say."""

    size: int | None
    tag: str | None


def is_remote(source: str) -> bool:
    """Tell whether a source is a URL or a command, not a local path."""
    return source.startswith(PIPE) or "://" in source


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    import fsspec  # type: ignore[import-untyped]

    options: dict[str, Any] = {}
    if url.startswith("file://"):
        options = {"auto_mkdir": True}  # object storage has no folders to make
    try:
        if url.startswith(_HTTP):
            require(WEB_SERVERS)
            import aiohttp

            # By default a response has to end within minutes, however fast it is read here.
            limit = aiohttp.ClientTimeout(
                total=None, sock_connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS
            )
            # Packed on the way, a file has another length than the server says.
            headers = {"Accept-Encoding": "identity"}
            options = {"client_kwargs": {"timeout": limit, "headers": headers}}
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except MissingExtraError:
        raise
    except ImportError as error:
        raise AccessError(
            f'{url}: {error}. For S3 run: pip install "modeling_llm2clip[s3]"; '
            "other services have packages of their own, such as gcsfs."
        ) from error
    except ValueError as error:
        raise AccessError(f"{url}: {error}. Give a path, or a URL that fsspec knows.") from error
    return filesystem, path


@dataclass(eq=False)
class RemoteFile:
    """One file of a source: a path, URL or command.

    Attributes:
        on_retry: Called with the URL and the reason before each further attempt.
        is_first: Whether nothing came from this source before, so that an unreachable host is not
            waited for.
        info: The state that the file is read in. Default: the one that it has at the first access.
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
        """Make a request of this file, by its policy."""
        return try_request(
            self.url, request, self.policy, on_retry=self.on_retry, is_first=self.is_first
        )

    def require_access(self) -> None:
        """Check that the file can be opened."""
        if self.url.startswith(PIPE):
            return
        if is_remote(self.url):
            self.describe()
        else:
            self.open_stream().close()

    def describe(self) -> FileInfo:
        """Return the state of the file, which is asked for once; a command has none."""
        if self.info is None:
            is_command = self.url.startswith(PIPE)
            self.info = FileInfo(None, None) if is_command else self.try_(self._ask)
        return self.info

    def _ask(self) -> FileInfo:
        filesystem, path = open_filesystem(self.url)
        filesystem.invalidate_cache()
        facts = filesystem.info(path)
        return FileInfo(facts.get("size"), _find_tag(facts))

    def _open(self, block_size: int | None, **options: Any) -> Any:
        """Open the file at its service, if it is in the state that was described.

        A block size of 0 is a response of a web server, which cannot seek.
        """
        known = self.describe()
        filesystem, path = open_filesystem(self.url)
        if self.url.startswith(_HTTP):
            options |= {"size": known.size or 1, "raise_for_status": self._check_reply}
        else:
            require_same(self.url, known, self._ask())
            block_size = block_size or None
        return filesystem.open(path, "rb", block_size=block_size, **options)

    async def _check_reply(self, reply: Any) -> None:
        """Raise for a reply of another state; errors of a server are raised behind it."""
        if reply.status not in (200, 206):
            return
        headers = reply.headers
        if "Content-Encoding" in headers:  # its length and tag are those of what was packed
            if "Range" in reply.request_info.headers:
                reply.close()
                raise self._explain_no_ranges()
            return
        name = "Content-Range" if reply.status == 206 else "Content-Length"
        size = headers.get(name, "").rpartition("/")[2]
        now = FileInfo(int(size) if size.isdigit() else None, _find_tag(headers))
        try:
            require_same(self.url, self.describe(), now)
        except ChangedFileError:
            reply.close()
            raise

    def _explain_no_ranges(self) -> NoRangesError:
        return NoRangesError(
            f"{self.url}: its server sends files from their beginning only. Stream the data (align "
            "does), or copy them here."
        )

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes from the middle of the file."""
        if self.describe().size is None:
            raise self._explain_no_ranges()

        def read() -> bytes:
            with self._reading:  # an open file is at one place at a time
                try:
                    if self._opened is None:
                        self._opened = self._open(
                            _BLOCK_BYTES,
                            cache_type="blockcache",  # "background" can wait for itself
                            cache_options={"maxblocks": 3},
                        )
                    self._opened.seek(start)
                    content: bytes = self._opened.read(stop - start)
                    if len(content) != stop - start:
                        raise OSError(f"{len(content)} of {stop - start} bytes came")
                except BaseException as error:
                    self._opened = None
                    if isinstance(error, ValueError) and "range" in str(error):
                        raise self._explain_no_ranges() from error
                    raise
                return content

        return self.try_(read)  # type: ignore[no-any-return]

    def open_stream(self) -> io.BufferedReader:
        """Open the file to be read once, from its beginning to its end."""
        if not is_remote(self.url):
            return self.try_(lambda: Path(self.url).open("rb"))  # type: ignore[no-any-return]
        has_ranges = self.describe().size is not None
        return io.BufferedReader(
            _PartsReader(self._read_parts() if has_ranges else self._read_on())
        )

    def open_seekable(self) -> Any:
        """Open the file to be read in any order; copied to a temporary one where it has to be."""
        if not is_remote(self.url):
            return self.try_(lambda: Path(self.url).open("rb"))
        try:
            size = self.describe().size
            self.read_range(max(0, (size or 0) - 1), size or 0)
            return SeekableFile(self)
        except NoRangesError:
            copy = tempfile.TemporaryFile()
            copy.writelines(self._read_on())
            copy.seek(0)
            return copy

    def _read_parts(self) -> Generator[bytes, None, None]:
        """Yield the file in parts, several of which come with one request."""
        size, step = self.describe().size or 0, _BLOCK_BYTES // 4
        for start in range(0, size, step):
            try:
                part = self.read_range(start, min(start + step, size))
            except NoRangesError:
                yield from self._read_on(start)
                return
            yield part

    def _read_on(self, position: int = 0) -> Generator[bytes, None, None]:
        """Yield the file from its beginning; after a failure, what came before is skipped."""
        opened: Any = None

        def read() -> bytes:
            nonlocal opened
            try:
                if opened is None:
                    opened = self.start_again()
                    _skip(opened, position)
                return opened.read(_READ_AT_ONCE)  # type: ignore[no-any-return]
            except BaseException:
                close()
                raise

        def close() -> None:
            nonlocal opened
            if opened is not None:
                opened.close()
            opened = None

        try:
            while part := self.try_(read):
                position += len(part)
                yield part
        finally:
            close()

    def start_again(self) -> Any:
        """Open the file for one try at reading it from its beginning."""
        if self.url.startswith(PIPE):
            return _PartsReader(_run_command(self.url.removeprefix(PIPE)))
        return self._open(block_size=0)


def require_same(place: object, known: FileInfo, now: FileInfo) -> None:
    """Raise ChangedFileError if size or tag differ, where both states have one of the same name."""
    has_size = known.size is not None and now.size is not None
    names = {(tag or "").partition("=")[0] for tag in (known.tag, now.tag)}
    has_tag = len(names) == 1 and names != {""}
    if (has_size and known.size != now.size) or (has_tag and known.tag != now.tag):
        raise ChangedFileError(place, tuple(known), tuple(now))


def _find_tag(facts: Mapping[str, Any]) -> str | None:
    """Find the tag of a file in what a service says; a weak ETag may stay when bytes change."""
    for name in _TAGS:
        value = facts.get(name)
        if value and not str(value).startswith("W/"):
            return f"{name}={value}"
    return None


def _run_command(command: str) -> Generator[bytes, None, None]:
    """Yield the output of a shell command, which has to end well."""
    # The command is the user's own, as in webdataset's sources.
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        while part := process.stdout.read(_READ_AT_ONCE):
            yield part
        if code := process.wait():
            raise OSError(f"the command ended with code {code}")
    finally:
        process.stdout.close()
        process.terminate()
        process.wait()


def _skip(opened: Any, size: int) -> None:
    while size:
        part = opened.read(min(size, _READ_AT_ONCE))
        if not part:
            raise OSError("the file is shorter than before")
        size -= len(part)


class _PartsReader(io.RawIOBase):
    """Reads what a generator yields as a file, from front to back."""

    def __init__(self, parts: Generator[bytes, None, None]) -> None:
        super().__init__()
        self._parts = parts
        self._part = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._part = self._part or memoryview(next(self._parts, b""))
        size = min(len(buffer), len(self._part))
        buffer[:size] = self._part[:size]
        self._part = self._part[size:]
        return size

    def close(self) -> None:
        self._parts.close()
        super().close()


class SeekableFile(io.RawIOBase):
    """Reads a file in ranges, as Python's files are read."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._size = file.describe().size or 0
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
            # In parts, so that what came before a lost connection need not come again.
            end = min(self._position + _BLOCK_BYTES // 4, stop)
            part = self._file.read_range(self._position, end)
            target[self._position - first : end - first] = part
            self._position = end
        return max(0, stop - first)
