"""Opens a file by its location: a local path or a URL.

A remote file is read in blocks, and fsspec caches the last few blocks. So adjacent images, as in a
shard that is read sequentially, share requests. In random order, every image costs a whole block;
stream remote images instead.

The state of a file (its size, and its tag or modification time) is recorded when its records are
read. If the state has changed, images are not read, because captions would be paired with the wrong
images. A local file that is rewritten with the same size and time is not detected.
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

FileLocation: TypeAlias = Path | str  # a string is a URL
_FILES_OPEN = 32
_REQUESTS_AT_ONCE = 16
_states: dict[FileLocation, FileInfo] = {}  # of each file, when it was last described


def parse_location(text: str) -> FileLocation:
    """Parse a path or URL."""
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return text if is_remote(text) else Path(text)


def name_file(location: FileLocation) -> str:
    """Return the name of a file, without the folder or the query of a URL."""
    return location.name if isinstance(location, Path) else Path(urlsplit(location).path).name


def find_state(location: FileLocation) -> FileInfo:
    """Return the current state of a local file, or the recorded state of a remote one."""
    if isinstance(location, Path):
        status = location.stat()
        return FileInfo(status.st_size, f"mtime={status.st_mtime_ns}")
    if location not in _states:
        _states[location] = RemoteFile(location, RetryPolicy()).describe()
    return _states[location]


def require_unchanged(location: FileLocation) -> FileInfo:
    """Return the state of a file; raise ChangedFileError if it differs from the recorded state."""
    now = find_state(location)
    if _states.setdefault(location, now) != now:
        raise ChangedFileError(location, tuple(_states[location]), tuple(now))
    return now


def open_file(location: FileLocation) -> io.RawIOBase:
    """Open a file for random access, unbuffered."""
    if isinstance(location, Path):
        return io.FileIO(location)
    return SeekableFile(_open_remote(location, find_state(location), os.getpid()))


def open_buffered(location: FileLocation) -> io.BufferedReader:
    """Open a file for reading lines or small parts."""
    return io.BufferedReader(open_file(location))


def read_range(location: FileLocation, offset: int, size: int) -> bytes:
    """Read a range of a file; raise if the file has changed."""
    require_unchanged(location)
    with open_buffered(location) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise LostFileError(
            f"only {len(content)} of {size} bytes could be read at {offset}; has the file changed?"
        )
    return content


def describe_states(locations: Sequence[FileLocation]) -> list[FileInfo | None]:
    """Record and return the states of files; a state is None if a server reports too little.

    Warn about files whose state has changed in this process.
    """
    _open_remote.cache_clear()  # without a tag, changes go undetected: drop cached blocks
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
            f"Changed since this process last read them: {list_first(changed)}. Reload the records "
            "of these files; records loaded earlier would get images from the new files.",
            stacklevel=2,
        )
    return [None if None in state else state for state in states]


def list_states() -> dict[FileLocation, FileInfo]:
    """Return the recorded states, for `use_states` in another process."""
    return dict(_states)


def use_states(states: dict[FileLocation, FileInfo]) -> None:
    """Use the file states that another process recorded."""
    _states.update(states)


def _describe(location: FileLocation) -> FileInfo:
    if isinstance(location, Path):
        return find_state(location)
    return RemoteFile(location, RetryPolicy(), is_first=True).describe()


@lru_cache(_FILES_OPEN)
def _open_remote(url: str, state: FileInfo, process: int) -> RemoteFile:  # noqa: ARG001
    """Return this process's handle for a file in a given state; all threads share the handle."""
    return RemoteFile(url, RetryPolicy(), info=state)
