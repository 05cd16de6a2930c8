"""Reads single images out of Arrow files, which are mapped, never copied."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

_FILES_KEPT = 1024


@dataclass(frozen=True)
class _Batches:
    batches: tuple[Any, ...]
    first_rows: tuple[int, ...]


def read_image_bytes(file: Path, column: str, row: int) -> bytes:
    """Read the encoded image of a row."""
    opened = _open(file, file.stat().st_mtime_ns)
    number = bisect_right(opened.first_rows, row) - 1
    if not 0 <= number < len(opened.batches):
        raise ValueError(f"{file} has no row {row}.")
    batch = opened.batches[number]
    if column not in batch.schema.names:
        raise ValueError(f"{file} has no column {column!r}.")
    value = batch.column(column)[row - opened.first_rows[number]].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise ValueError(f"{file}: row {row} has no image in {column!r}.")
    return bytes(content)


@lru_cache(maxsize=_FILES_KEPT)
def _open(file: Path, changed_ns: int) -> _Batches:  # noqa: ARG001
    mapped = pa.memory_map(str(file))
    try:
        try:
            batches = tuple(pa.ipc.open_stream(mapped))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
            batches = tuple(reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not an Arrow file, or broken ({error}).") from error
    first_rows = [0]
    for batch in batches:
        first_rows.append(first_rows[-1] + batch.num_rows)
    return _Batches(batches, tuple(first_rows))
