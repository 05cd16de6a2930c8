"""The table of images in LanceDB; no other file of the index knows LanceDB.

| table | rows |
| --- | --- |
| `images` | `path` below the folder, `sha256`, `bytes`, `modified`, `width`, `height`, `taken`, `stat` (by which a changed file is recognized), `embedding` of unit length |
| `about` | one, whose `content` is the JSON of an `About` |
"""  # noqa: E501

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from .._extras import LANCEDB, require
from ..data.atomic_files import require_writable
from .vector_table import (
    ABOUT,
    COLUMNS,
    HOW_TO_INDEX,
    IMAGES,
    LOCK,
    AnnIndex,
    IndexUnavailableError,
    make_schema,
)

_READ_AT_ONCE = 8192
# Readers that opened the table before may still read the versions of this time.
_KEPT_FOR = timedelta(hours=1)
# Partitions are rough by nature: more images or iterations take longer, and improve no recall.
_TRAINED_ON_PER_PARTITION, _MAX_ITERATIONS = 64, 15
# One minus the inner product, which is the cosine: all embeddings have unit length.
_DISTANCE = "dot"


class LanceTable:
    """A `VectorTable` in a folder or on object storage."""

    def __init__(self, location: str) -> None:
        require(LANCEDB)
        import lancedb

        self._connection = lancedb.connect(
            location, storage_options=_find_storage_options(location)
        )
        self._table: Any = None

    def list_tables(self) -> Sequence[str]:
        return list(self._connection.list_tables().tables)

    def read_about(self) -> pa.Table:
        return self._connection.open_table(ABOUT).to_arrow()

    def write_about(self, rows: pa.Table) -> None:
        mode = "overwrite" if ABOUT in self.list_tables() else "create"
        self._connection.create_table(ABOUT, data=rows, mode=mode)

    def create(self, width: int) -> None:
        self._connection.create_table(IMAGES, schema=make_schema(width))

    def reopen(self) -> None:
        """Open the table anew: an open one stays at its version if that of a new one is lower."""
        self._table = self._connection.open_table(IMAGES)

    def count(self, where: str | None = None) -> int:
        return int(self._table.count_rows(where))

    def read(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        query = self._table.search().select(list(columns))
        if where is not None:
            query = query.where(where)
        yield from query.to_batches(_READ_AT_ONCE)

    def write(self, rows: Mapping[str, Any], *, adds: bool) -> None:
        fields = [self._table.schema.field(name) for name in rows]
        merge = self._table.merge_insert("path").when_matched_update_all()
        if adds:
            merge = merge.when_not_matched_insert_all()
        merge.execute(pa.table(dict(rows), schema=pa.schema(fields)))

    def delete(self, where: str) -> None:
        self._table.delete(where)

    def optimize(self) -> None:
        self._table.optimize(cleanup_older_than=_KEPT_FOR)

    def build_ann(self, num_partitions: int) -> None:
        """Train partitions of embeddings in one bit per dimension, by inner products.

        These are cosines of unit embeddings. By them, a text visits the partitions where its images
        are; by distances, which also count how far a partition is from all texts, it would visit
        twice as many to find the same.
        """
        from lancedb.index import IvfRq, IvfSq

        width = self._table.schema.field("embedding").type.list_size
        # RaBitQ packs dimensions in bytes; scalars of 8 bits take any number, and longer.
        kind = IvfSq if width % 8 else IvfRq
        config = kind(
            distance_type=_DISTANCE,
            num_partitions=num_partitions,
            max_iterations=_MAX_ITERATIONS,
            sample_rate=_TRAINED_ON_PER_PARTITION,
        )
        self._table.create_index("embedding", config=config, replace=True)

    def drop_ann(self) -> None:
        for index in self._table.list_indices():
            self._table.drop_index(index.name)

    def search(
        self,
        embedding: np.ndarray[Any, Any],
        *,
        top_k: int,
        where: str | None,
        ann: AnnIndex | None,
    ) -> list[dict[str, Any]]:
        query = self._table.search(embedding, vector_column_name="embedding")
        query = query.distance_type(_DISTANCE).limit(top_k).select([*COLUMNS, "_distance"])
        if where is not None:
            query = query.where(where, prefilter=True)
        if ann is None:
            query = query.bypass_vector_index()
        else:
            query = query.nprobes(ann.nprobes).refine_factor(ann.refine_factor)
        rows: list[dict[str, Any]] = query.to_arrow().to_pylist()
        for row in rows:
            row["cosine"] = 1 - row.pop("_distance")
        return rows


def require_database_folder(folder: Path, *, is_new: bool = False) -> None:
    """Raise IndexUnavailableError for a path that is not a database, naming what it is.

    With `is_new`, it may be missing, empty, or an unfinished database, and must be writable.
    """
    files = folder.iterdir() if folder.is_dir() else iter(())
    has_others = any(file.suffix != ".lance" and file.name != LOCK for file in files)
    if is_new and not folder.is_file() and not has_others:
        require_writable(folder)
        return
    if not folder.exists():
        raise IndexUnavailableError(f"{folder}: no such database. {HOW_TO_INDEX}")
    if not folder.is_dir():
        raise IndexUnavailableError(
            f"{folder} is a file, and a database is a folder. An index file of an earlier version "
            f"is not read any more. {HOW_TO_INDEX}"
        )
    if not (folder / f"{ABOUT}.lance").is_dir():
        raise IndexUnavailableError(f"{folder} is not a database of llm2clip index. {HOW_TO_INDEX}")


def _find_storage_options(location: str) -> dict[str, str] | None:
    """Return the endpoint of an S3 service other than Amazon, which LanceDB does not look up."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not location.startswith("s3://") or not endpoint:
        return None
    return {"endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
