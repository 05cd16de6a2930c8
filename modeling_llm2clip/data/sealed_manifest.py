"""Manifests: JSON objects that contain their own hash, and the hashes of the files next to them.

Each output has one manifest, which lists every file's size and SHA-256 and ends with a SHA-256 of
itself. An edited or damaged manifest is refused, and every damaged file is detected and named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .atomic_files import hash_file, hash_json
from .sources.json_files import parse_json

_OWN_HASH = "sha256_of_this_file"


@dataclass(frozen=True)
class FileRecord:
    """The size and digest of an output file.

    Attributes:
        file: Path relative to the output folder.
        bytes: Size of the file.
        sha256: SHA-256 of the file's content.
    """

    file: str
    bytes: int
    sha256: str


def record_file(folder: Path, file: str) -> FileRecord:
    """Record the size and digest of a file in a folder."""
    return FileRecord(file, (folder / file).stat().st_size, hash_file(folder / file))


def list_damage(
    folder: Path, records: Iterable[FileRecord], *, sizes_only: bool = False
) -> list[str]:
    """Compare files with their records, in threads; return one message per damaged file."""
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        messages = pool.map(partial(_find_damage, folder, sizes_only=sizes_only), records)
        return [message for message in messages if message]


def _find_damage(folder: Path, record: FileRecord, *, sizes_only: bool) -> str:
    file = folder / record.file
    if not file.is_file():
        return f"{record.file}: missing"
    if (size := file.stat().st_size) != record.bytes:
        return f"{record.file}: {size} bytes, the manifest says {record.bytes}"
    if not sizes_only and (digest := hash_file(file)) != record.sha256:
        return f"{record.file}: SHA-256 is {digest}, the manifest says {record.sha256}"
    return ""


def list_differences(stored: Mapping[str, object], planned: Mapping[str, object]) -> list[str]:
    """List the entries in which an output differs from the plan, with both values."""
    return [
        f"{name}: {stored.get(name)!r} in the store, {planned.get(name)!r} now"
        for name in sorted(set(stored) | set(planned))
        if stored.get(name) != planned.get(name)
    ]


def write_sealed(content: Mapping[str, Any]) -> str:
    """Serialize an object as JSON that includes its own hash."""
    return json.dumps({**content, _OWN_HASH: hash_json(content)}, indent=2) + "\n"


def read_sealed(text: str) -> dict[str, Any]:
    """Parse JSON from `write_sealed`, verify its hash and return the object without it."""
    sealed = parse_json(text)
    if not isinstance(sealed, dict):
        raise ValueError(f"it holds {type(sealed).__name__}, not an object")
    content = {name: value for name, value in sealed.items() if name != _OWN_HASH}
    if (digest := hash_json(content)) != sealed.get(_OWN_HASH):
        raise ValueError(
            f"its content has the SHA-256 {digest}, not {sealed.get(_OWN_HASH)} as recorded"
        )
    return content
