"""Opens a file by its place: the path of a local file, or the URL of one that is elsewhere.

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
    require_same,
)

FilePlace: TypeAlias = Path | str  # a text is a URL
_FILES_OPEN = 32
_REQUESTS_AT_ONCE = 16
_states: dict[FilePlace, FileInfo] = {}  # in which files were described last


def parse_place(text: str) -> FilePlace:
    """Turn a text into a place."""
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return text if is_remote(text) else Path(text)


def name_place(place: FilePlace) -> str:
    """Return the name of a file, without its folder and the query of its URL."""
    return place.name if isinstance(place, Path) else Path(urlsplit(place).path).name


def find_state(place: FilePlace) -> FileInfo:
    """Return the state of a local file now, or the one in which a remote file was described."""
    if isinstance(place, Path):
        status = place.stat()
        return FileInfo(status.st_size, f"mtime={status.st_mtime_ns}")
    if place not in _states:
        _states[place] = RemoteFile(place, RetryPolicy()).describe()
    return _states[place]


def require_unchanged(place: FilePlace) -> FileInfo:
    """Return the state of a file; one that has changed since it was described is an error."""
    now = find_state(place)
    if _states.setdefault(place, now) != now:
        raise ChangedFileError(place, tuple(_states[place]), tuple(now))
    return now


def open_place(place: FilePlace) -> io.RawIOBase:
    """Open a file to read it in any order, without a buffer."""
    if isinstance(place, Path):
        return io.FileIO(place)
    return SeekableFile(_open_remote(place, find_state(place), os.getpid()))


def open_buffered(place: FilePlace) -> io.BufferedReader:
    """Open a file to read lines or small parts of it."""
    return io.BufferedReader(open_place(place))


def read_range(place: FilePlace, offset: int, size: int) -> bytes:
    """Read a part of a file that has not changed."""
    require_unchanged(place)
    with open_buffered(place) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise LostFileError(
            f"{len(content)} of {size} bytes at {offset} came; has the file changed?"
        )
    return content


def describe_states(places: Sequence[FilePlace]) -> list[FileInfo | None]:
    """Describe and note the states of files; None if a server says too little.

    Warns of files that were in another state before.
    """
    _open_remote.cache_clear()  # a change without a tag does not show: blocks are read again
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        states = list(pool.map(_describe, places))
    changed = []
    for place, state in zip(places, states, strict=True):
        try:
            require_same(place, _states.get(place, state), state)
        except ChangedFileError:
            changed.append(str(place))
        _states[place] = state
    if changed:
        warnings.warn(
            f"In another state than before in this process: {list_first(changed)}. "
            "Load again what was loaded from there: images of earlier records would be read from "
            "the new state.",
            stacklevel=2,
        )
    return [None if None in state else state for state in states]


def list_states() -> dict[FilePlace, FileInfo]:
    """Return the states that are noted, for `use_states` in another process."""
    return dict(_states)


def use_states(states: dict[FilePlace, FileInfo]) -> None:
    """Read files in the states in which another process described them."""
    _states.update(states)


def _describe(place: FilePlace) -> FileInfo:
    if isinstance(place, Path):
        return find_state(place)
    return RemoteFile(place, RetryPolicy(), is_first=True).describe()


@lru_cache(_FILES_OPEN)
def _open_remote(url: str, state: FileInfo, process: int) -> RemoteFile:  # noqa: ARG001
    """Return this process's access to a file in a state, which threads share."""
    return RemoteFile(url, RetryPolicy(), info=state)
