"""Reads files that are not on this machine: in ranges where a server can, else from the front.

A file is a local path, a URL that fsspec opens (`https://`, `s3://`, `gs://`, `hf://datasets/…`),
or `pipe:` and a shell command whose output is the file.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..._extras import WEB_SERVERS, MissingExtraError, require
from .remote_access import AccessError, LostFileError, RetryPolicy, try_request

PIPE = "pipe:"
_BLOCK_BYTES = 2**23
_READ_AT_ONCE = 2**20
_SILENT_SECONDS = 60.0
_HTTP = ("http://", "https://")
# Of web servers, S3 and Google, the Hub, and other services of fsspec.
_TAGS = ("ETag", "etag", "Last-Modified", "LastModified", "Content-MD5", "blob_id", "mtime",
         "updated", "last_modified")  # fmt: skip
_REPLY_TAGS = ("ETag", "Last-Modified")  # of the whole file, in a reply with a part of it too
_LATER = 1.1  # seconds: HTTP's times have no parts of a second
_NUM_SAME = 8  # replies in a row with one tag, after which it is taken to stay
_MOST_TAGS = 3  # that a file may have got while that is asked; more are of replies or mirrors


class NoRangesError(Exception):
    """The server sends files from their beginning only."""


class ChangedFileError(LostFileError):
    """A reply has another tag than the file was described with."""

    def __init__(self, url: str, name: str, wanted: str, found: str) -> None:
        super().__init__(
            f"{url}: the file has changed while it was used ({name} was {wanted} and is {found}). "
            "Load the data again"
        )
        self.url, self.name, self.wanted, self.found = url, name, wanted, found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.name, self.wanted, self.found)


def is_remote(source: str) -> bool:
    """Tell whether a source is a URL or a command, not a local path."""
    return source.startswith(PIPE) or "://" in source


def open_filesystem(url: str, *, is_shared: bool = True) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    One that is not shared has connections of its own.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        options: dict[str, Any] = {}
        if url.startswith("file://"):
            options = {"auto_mkdir": True}  # object storage has no folders to make
        elif url.startswith(_HTTP):
            require(WEB_SERVERS)
            import aiohttp

            # By default a response has to end within minutes, however fast it is read here.
            limit = aiohttp.ClientTimeout(
                total=None, sock_connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS
            )
            options = {"client_kwargs": {"timeout": limit}}
        options["skip_instance_cache"] = not is_shared
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


@dataclass(eq=False)
class RemoteFile:
    """One file of a source: a path, URL or command.

    Attributes:
        on_retry: Called with the URL and the reason before each further attempt.
        is_first: Whether nothing came from this source before, so that an unreachable host is not
            waited for.
    """

    url: str
    policy: RetryPolicy
    _: KW_ONLY
    on_retry: Callable[[str, str], None] | None = None
    is_first: bool = False
    _opened: Any = field(default=None, init=False)
    _info: dict[str, Any] | None = field(default=None, init=False)

    def try_(self, request: Callable[[], Any]) -> Any:
        """Make a request of this file, by its policy."""
        ask = partial(
            try_request,
            self.url, request, self.policy, on_retry=self.on_retry, is_first=self.is_first,
        )  # fmt: skip
        for _ in _REPLY_TAGS:
            try:
                return ask()
            except ChangedFileError as error:
                if self._has_changed(error):
                    raise
                self._forget_tag(error.name)
        return ask()

    def has_changed_to(self, later: RemoteFile) -> bool | None:
        """Tell whether the file was in another state when a later access described it.

        None if no tag shows it.
        """
        if self.find_size() != later.find_size():
            return True
        for name, wanted, found in _pair_tags(self._describe(), later._describe(), _TAGS):
            if wanted == found:
                return False
            if self._has_changed(ChangedFileError(self.url, name, wanted, found)):
                return True
            self._forget_tag(name)
        return None

    def _has_changed(self, error: ChangedFileError) -> bool:
        """Ask until a tag stays, unless earlier ones come again: those of mirrors or replies."""
        tags, num_same = [error.found], 0
        while num_same < _NUM_SAME:
            time.sleep(_LATER)
            found = try_request(self.url, partial(self._ask, is_shared=False), self.policy)
            if found.get("size") != self.find_size():
                return True
            tag = _clean_tag(found, error.name)
            if tag == tags[-1]:
                num_same += 1
                continue
            if tag in (error.wanted, *tags) or len(tags) == _MOST_TAGS:
                return False
            tags.append(tag)
            num_same = 0
        return True

    def _forget_tag(self, name: str) -> None:
        """Forget a tag that says nothing; all accesses to the file share these facts."""
        self._describe().pop(name, None)

    def require_access(self) -> None:
        """Check that the file can be opened."""
        if self.url.startswith(PIPE):
            return
        if is_remote(self.url):
            self.find_size()
        else:
            self.open_stream().close()

    def find_size(self) -> int | None:
        """Return the size in bytes; None if the server does not say."""
        size = self._describe().get("size")
        return None if size is None else int(size)

    def find_tag(self) -> str | None:
        """Return the tag that changes with the file; None if the server has none."""
        found = self._describe()
        tags = [f"{name}={tag}" for name in _TAGS if (tag := found.get(name))]
        return " ".join(tags) or None

    def _describe(self) -> dict[str, Any]:
        """Ask the service once; empty for a command."""
        if self._info is None:
            self._info = {} if self.url.startswith(PIPE) else self.try_(self._ask)
        return self._info

    def _ask(self, *, is_shared: bool = True) -> dict[str, Any]:
        filesystem, path = open_filesystem(self.url, is_shared=is_shared)
        filesystem.invalidate_cache()
        return dict(filesystem.info(path))

    def open_again(self) -> RemoteFile:
        """Return another access to the file, in the state that this one was described in."""
        again = replace(self, is_first=False)
        again._info = self._describe()
        return again

    def _choose_options(self, **options: Any) -> dict[str, Any]:
        """Return the options of a web server's requests; a reply of another state is an error."""
        known = self._info or {}

        async def check(reply: Any) -> None:
            if reply.status not in (200, 206) or "Content-Encoding" in reply.headers:
                return  # an error, or packed on the way, which has tags of its own
            for name, wanted, found in _pair_tags(known, reply.headers, _REPLY_TAGS):
                if wanted != found:
                    reply.close()
                    raise ChangedFileError(self.url, name, wanted, found)
                return

        return {**options, "raise_for_status": check} if self.url.startswith(_HTTP) else {}

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes from the middle of the file."""
        size = self.find_size()
        if size is None:
            raise NoRangesError

        def read() -> bytes | None:
            try:
                if self._opened is None:
                    filesystem, path = open_filesystem(self.url)
                    options = self._choose_options(size=size)
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

    def open_stream(self) -> io.BufferedReader:
        """Open the file to be read once, from its beginning to its end."""
        if not is_remote(self.url):
            return self.try_(lambda: Path(self.url).open("rb"))  # type: ignore[no-any-return]
        has_ranges = not self.url.startswith(PIPE) and self.find_size() is not None
        parts = self._read_ahead() if has_ranges else self._read_on()
        return io.BufferedReader(_PartsReader(parts))

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
            copy.writelines(self._read_on())
            copy.seek(0)
            return copy

    def _read_ahead(self) -> Generator[bytes, None, None]:
        """Yield the file block by block; the next one comes while the last one is used."""
        size = self.find_size() or 0
        with ThreadPoolExecutor(1) as pool:

            def request(start: int) -> Future[bytes]:
                return pool.submit(self.read_range, start, min(start + _BLOCK_BYTES, size))

            coming = request(0) if size else None
            for start in range(0, size, _BLOCK_BYTES):
                assert coming is not None
                try:
                    block = coming.result()
                except NoRangesError:
                    yield from self._read_on(start)
                    return
                if start + _BLOCK_BYTES < size:
                    coming = request(start + _BLOCK_BYTES)
                yield block

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
        filesystem, path = open_filesystem(self.url)
        # Of a web server, block_size=0 opens one response, which cannot seek.
        return filesystem.open(path, "rb", **self._choose_options(block_size=0, size=1))


def _clean_tag(tags: Mapping[str, Any], name: str) -> str:
    return str(tags.get(name) or "").removeprefix("W/")


def _pair_tags(
    known: Mapping[str, Any], others: Mapping[str, Any], names: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    """Yield the names and values of tags that both have."""
    for name in names:
        one, other = _clean_tag(known, name), _clean_tag(others, name)
        if one and other:
            yield name, one, other


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
    """Reads a file of a known size in ranges, as Python's files are read."""

    def __init__(self, file: RemoteFile, size: int) -> None:
        super().__init__()
        self._file = file
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
        wanted = memoryview(buffer).cast("B")
        first, stop = self._position, min(self._position + len(wanted), self._size)
        while self._position < stop:
            part = self._read_some(self._position, stop)
            start = self._position - first
            wanted[start : start + len(part)] = part
            self._position += len(part)
        return max(0, stop - first)

    def _read_some(self, start: int, stop: int) -> bytes:
        # In blocks, so that what came before a lost connection need not come again.
        return self._file.read_range(start, min(start + _BLOCK_BYTES, stop))
