"""Copies files to a folder at a URL, such as `s3://bucket/captions`, and back.

A file that is there is whole: object storage shows a file once all of it has come.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from .remote_access import RetryPolicy, try_request
from .remote_files import is_remote, open_filesystem

_NOT_WRITTEN = ("http://", "https://", "pipe:")
T = TypeVar("T")


class ObjectStorage:
    """Files below a URL that fsspec writes to; the folder need not exist."""

    def __init__(self, url: str, policy: RetryPolicy | None = None) -> None:
        if not is_remote(url) or url.startswith(_NOT_WRITTEN):
            raise ValueError(
                f"storage={url!r} must be the URL of object storage, such as s3://bucket/captions."
            )
        self.url = url.rstrip("/")
        self._policy = policy or RetryPolicy()

    def list_sizes(self) -> dict[str, int]:
        """List the files, and their bytes."""

        def find(filesystem: Any, folder: str) -> dict[str, int]:
            filesystem.invalidate_cache()
            try:
                found = filesystem.ls(folder, detail=True)
            except FileNotFoundError:  # nothing was written yet
                return {}
            return {
                one["name"].rpartition("/")[2]: int(one["size"])
                for one in found
                if one["type"] == "file"
            }

        return self._try(self.url, find)

    def has(self, name: str) -> bool:
        """Tell whether a file is there."""

        def look(filesystem: Any, path: str) -> bool:
            filesystem.invalidate_cache()
            try:  # `isfile` would call a file that may not be read missing
                return bool(filesystem.info(path)["type"] == "file")
            except FileNotFoundError:
                return False

        return self._try(f"{self.url}/{name}", look)

    def push(self, file: Path) -> None:
        """Copy a file there, under its own name."""
        self._try(
            f"{self.url}/{file.name}", lambda filesystem, path: filesystem.put_file(file, path)
        )

    def pull(self, name: str, folder: Path) -> Path:
        """Copy a file from there; it gets its name once it is whole."""
        unfinished = folder / f"{name}.{uuid4().hex}.tmp"
        try:
            self._try(
                f"{self.url}/{name}", lambda filesystem, path: filesystem.get_file(path, unfinished)
            )
            with unfinished.open("rb") as opened:
                os.fsync(opened.fileno())
            return unfinished.replace(folder / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def _try(self, url: str, request: Callable[[Any, str], T]) -> T:
        return try_request(url, lambda: request(*open_filesystem(url)), self._policy)
