"""Opens a file by its location: the path of a local file, or the URL of one that is elsewhere.

A remote file is read in blocks, and fsspec keeps the last ones. So images that lie side by side, as
in a shard that is read from front to back, cost one request for many of them. An image here and
there costs a block each: whoever wants a random order of remote images streams them.

The state of a file, its size and tag or modification time, is noted when its records are read. An
image is not read from a file that is in another state: captions would be paired with other images.
A local file that is written anew with the same size and time goes unseen.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..._suggestions import list_first
from .remote_access import LostFileError, RetryPolicy
from .remote_files import (
    ChangedFileError,
    FileInfo,
    RemoteFile,
    SeekableFile,
    is_remote,
    require_same_state,
)

FileLocation: TypeAlias = Path | str  # a text is a URL
_FILES_OPEN = 32
_REQUESTS_AT_ONCE = 16
_states: dict[FileLocation, FileInfo] = {}  # in which files were described last


def parse_location(text: str) -> FileLocation:
    """Turn a text into a location."""
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return text if is_remote(text) else Path(text)


def name_file(location: FileLocation) -> str:
    """Return the name of a file, without its folder and the query of its URL."""
    return location.name if isinstance(location, Path) else Path(urlsplit(location).path).name


def find_state(location: FileLocation) -> FileInfo:
    """Return the state of a local file now, or the one in which a remote file was described."""
    if isinstance(location, Path):
        status = location.stat()
        return FileInfo(status.st_size, f"mtime={status.st_mtime_ns}")
    if location not in _states:
        _states[location] = RemoteFile(location, RetryPolicy()).describe()
    return _states[location]


def require_unchanged(location: FileLocation) -> FileInfo:
    """Return the state of a file; one that has changed since it was described is an error."""
    now = find_state(location)
    if _states.setdefault(location, now) != now:
        raise ChangedFileError(location, tuple(_states[location]), tuple(now))
    return now


def open_file(location: FileLocation) -> io.RawIOBase:
    """Open a file to read it in any order, without a buffer."""
    if isinstance(location, Path):
        return io.FileIO(location)
    return SeekableFile(_open_remote(location, find_state(location), os.getpid()))


def open_buffered(location: FileLocation) -> io.BufferedReader:
    """Open a file to read lines or small parts of it."""
    return io.BufferedReader(open_file(location))


def read_range(location: FileLocation, offset: int, size: int) -> bytes:
    """Read a part of a file that has not changed."""
    require_unchanged(location)
    with open_buffered(location) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise LostFileError(
            f"{len(content)} of {size} bytes at {offset} came; has the file changed?"
        )
    return content


def describe_states(locations: Sequence[FileLocation]) -> list[FileInfo | None]:
    """Describe and note the states of files; None if a server says too little.

    Warns of files that were in another state before.
    """
    _open_remote.cache_clear()  # a change without a tag does not show: blocks are read again
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        states = list(pool.map(_describe, locations))
    changed = []
    for location, state in zip(locations, states, strict=True):
        try:
            require_same_state(location, _states.get(location, state), state)
        except ChangedFileError:
            changed.append(str(location))
        _states[location] = state
    if changed:
        warnings.warn(
            f"In another state than before in this process: {list_first(changed)}. "
            "Load again what was loaded from there: images of earlier records would be read from "
            "the new state.",
            stacklevel=2,
        )
    return [None if None in state else state for state in states]


def list_states() -> dict[FileLocation, FileInfo]:
    """Return the states that are noted, for `use_states` in another process."""
    return dict(_states)


def use_states(states: dict[FileLocation, FileInfo]) -> None:
    """Read files in the states in which another process described them."""
    _states.update(states)


def _describe(location: FileLocation) -> FileInfo:
    if isinstance(location, Path):
        return find_state(location)
    return RemoteFile(location, RetryPolicy(), is_first=True).describe()


@lru_cache(_FILES_OPEN)
def _open_remote(url: str, state: FileInfo, process: int) -> RemoteFile:  # noqa: ARG001
    """Return this process's access to a file in a state, which threads share."""
    return RemoteFile(url, RetryPolicy(), info=state)
