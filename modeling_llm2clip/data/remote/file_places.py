"""Opens a file by its place: the path of a local file, or the URL of one that is elsewhere.

A remote file is read in blocks, and the last ones are kept. So images that lie side by side, as in
a shard that is read from front to back, cost one request for many of them. An image here and there
costs a block each: whoever wants a random order of remote images streams them.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from ..byte_cache import ByteCache
from .remote_access import AccessError, LostFileError, RetryPolicy
from .remote_files import NoRangesError, RemoteFile, SeekableFile, is_remote

FilePlace: TypeAlias = Path | str  # a text is a URL
FileState: TypeAlias = tuple[str, int, str]  # path or URL, bytes, time or tag
_BLOCK_BYTES = 2**22
_BYTES_KEPT = 2**27
_FILES_OPEN = 128  # of all threads
_FILES_NAMED = 3  # in a warning
_REQUESTS_AT_ONCE = 16
_blocks: ByteCache[bytes] = ByteCache(_BYTES_KEPT)
_described: dict[str, RemoteFile] = {}  # by URL, in the state in which it was described last


def parse_place(text: str) -> FilePlace:
    """Turn a text into a place."""
    return text if is_remote(text) else Path(text)


def name_place(place: FilePlace) -> str:
    """Return the name of a file, without its folder and the query of its URL."""
    return place.name if isinstance(place, Path) else Path(urlsplit(place).path).name


def find_version(place: FilePlace) -> Hashable:
    """Return what changes when a local file does, or when a remote one is described anew."""
    if not isinstance(place, Path):
        return _find_described(place)
    status = place.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_place(place: FilePlace) -> io.RawIOBase:
    """Open a file to read it in any order, without a buffer."""
    return io.FileIO(place) if isinstance(place, Path) else _BlockFile(place)


def open_buffered(place: FilePlace) -> io.BufferedReader:
    """Open a file to read lines or small parts of it."""
    return io.BufferedReader(open_place(place))


def read_range(place: FilePlace, offset: int, size: int) -> bytes:
    """Read a part of a file."""
    with open_buffered(place) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise LostFileError(
            f"{len(content)} of {size} bytes at {offset} came; has the file changed?"
        )
    return content


def describe_states(places: Sequence[FilePlace]) -> list[FileState | None]:
    """Describe the state of files, which changes when they do; None if a server says too little.

    Warns of remote files that were read in another state before.
    """
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        found = list(pool.map(_describe_state, places))
    if changed := [str(place) for place, (_, is_new) in zip(places, found, strict=True) if is_new]:
        names = ", ".join(changed[:_FILES_NAMED]) + ", …" * (len(changed) > _FILES_NAMED)
        warnings.warn(
            f"In another state than before in this process: {names} (files: {len(changed)}). "
            "Load again what was loaded from there: images of earlier records would be read from "
            "the new state.",
            stacklevel=2,
        )
    return [state for state, _ in found]


def list_described() -> dict[str, RemoteFile]:
    """Return the remote files that were described, for `use_described` in another process."""
    return dict(_described)


def use_described(files: dict[str, RemoteFile]) -> None:
    """Read files in the states in which another process described them."""
    _described.update(files)


def _describe_state(place: FilePlace) -> tuple[FileState | None, bool]:
    """Return the state of a file, and whether it was read in another one before."""
    if isinstance(place, Path):
        found = place.stat()
        return (str(place.resolve()), found.st_size, str(found.st_mtime_ns)), False
    file, known = RemoteFile(place, RetryPolicy(), is_first=True), _described.get(place)
    has_changed = None if known is None else known.has_changed_to(file)
    if known is None or has_changed is not False:
        _described[place] = known = file  # what was kept of it is of another state
    size, tag = known.find_size(), known.find_tag()
    return None if size is None or tag is None else (place, size, tag), bool(has_changed)


def _find_described(url: str) -> RemoteFile:
    return _described.setdefault(url, RemoteFile(url, RetryPolicy()))


@lru_cache(_FILES_OPEN)
def _open_remote(file: RemoteFile, thread: int) -> RemoteFile:  # noqa: ARG001
    """Return a thread's access to a file: one that is open is at one place at a time."""
    return file.open_again()


class _BlockFile(SeekableFile):
    """Reads a remote file by its blocks, which all that is open shares."""

    def __init__(self, url: str) -> None:
        file = _find_described(url)
        size = file.find_size()
        if size is None:
            raise AccessError(_NO_RANGES.format(url=url))
        super().__init__(file, size)

    def _read_some(self, start: int, stop: int) -> bytes:
        number, skipped = divmod(start, _BLOCK_BYTES)
        return self._read_block(number)[skipped : skipped + stop - start]

    def _read_block(self, number: int) -> bytes:
        start = number * _BLOCK_BYTES
        stop = min(start + _BLOCK_BYTES, self._size)

        def read() -> tuple[bytes, int]:
            file = _open_remote(self._file, threading.get_ident())
            try:
                return file.read_range(start, stop), stop - start
            except NoRangesError as error:
                raise AccessError(_NO_RANGES.format(url=file.url)) from error

        return _blocks.find((self._file, number), read)


_NO_RANGES = (
    "{url}: its server sends files from their beginning only. Stream the data (align does), or "
    "copy them here."
)
