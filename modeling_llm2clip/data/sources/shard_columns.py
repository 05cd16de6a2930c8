"""Compares the columns of Parquet shards, which are read without seeing each other.

A shard that lacks a column which others have would silently get its default: another language, each
image in a group of its own, no long captions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..record_fields import list_fields_read
from ..remote.remote_access import AccessError, LostFileError
from ..remote.remote_files import RemoteFile
from .download_notes import choose_download_columns, is_download


class ShardColumnsError(ValueError):
    """Two shards of a source have other columns; both are named, and the columns."""


class ShardColumns(NamedTuple):
    """Columns of a shard.

    Attributes:
        shard: its name.
        fields: of records, that the columns are read as.
    """

    shard: str
    fields: frozenset[str]

    def require_same(self, other: ShardColumns) -> None:
        """Compare with another shard."""
        if differing := sorted(self.fields ^ other.fields):
            raise ShardColumnsError(
                f"{other.shard} and {self.shard} differ in columns that one has and the other "
                f"lacks: {', '.join(differing)}. Write them into both; null says that a record has "
                "no such field."
            )


def find_columns(opened: Any, name: str) -> ShardColumns | None:
    """Find the columns of an open shard."""
    if not opened.metadata.num_rows:
        return None
    repeated = [column for column, n in Counter(opened.schema_arrow.names).items() if n > 1]
    if repeated:
        raise ShardColumnsError(f"{name} has two columns named {repeated[0]!r}. Rename one.")
    return ShardColumns(name, _choose_fields(opened.schema_arrow.names))


def read_columns(file: RemoteFile, name: str) -> ShardColumns | None:
    """Read the columns of a shard."""
    try:
        source = file.open_seekable()
        try:
            with pq.ParquetFile(source) as opened:
                return find_columns(opened, name)
        finally:
            source.close()
    except (AccessError, ShardColumnsError):
        raise
    except (LostFileError, pa.ArrowException, OSError, ValueError):
        return None


def _choose_fields(columns: Collection[str]) -> frozenset[str]:
    fields = choose_download_columns(columns) if is_download(columns) else columns
    return frozenset(list_fields_read(fields))
