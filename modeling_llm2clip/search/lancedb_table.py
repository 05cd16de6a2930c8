"""The table of images in LanceDB; no other file of the index knows LanceDB.

| table | rows |
| --- | --- |
| `images` | `path` below the folder, `sha256`, `bytes`, `modified`, `width`, `height`, `taken`, `stat` (by which a changed file is recognized), `embedding` of unit length, `crc32` of all these |
| `about` | one, whose `content` is the JSON of an `About`, and its hash |
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from .._extras import LANCEDB, require
from .._suggestions import list_first
from ..data.atomic_files import require_writable

# The columns that a filter may use; `stat`, `embedding` and `crc32` come after them.
COLUMNS = {
    "path": pa.string(),
    "sha256": pa.string(),
    "bytes": pa.int64(),
    "modified": pa.timestamp("us", tz="UTC"),
    "width": pa.int32(),
    "height": pa.int32(),
    "taken": pa.timestamp("us"),
}
WHOLE_ROW = (*COLUMNS, "stat", "embedding", "crc32")
IMAGES, ABOUT = "images", "about"  # names of the tables
LOCK = ".llm2clip-lock"  # file in the folder of a database, locked by its writer
# Errors of LanceDB, which the index explains.
ERRORS = (RuntimeError, ValueError, OSError, KeyError)
PANIC = "RustPanic"  # name of another one, which no module exports
HOW_TO_INDEX = "Make one: llm2clip index MODEL IMAGES DB."
# A search with a filter refines this many times more candidates. In the worst measured case, images
# of 24 topics and queries about 36 others, it raises recall@10 from 0.945 to 0.992.
_REFINED_MORE = 4
_READ_AT_ONCE = 8192
# Older versions stay this long, for readers that opened the table earlier.
_KEPT_FOR = timedelta(hours=1)
# More images or iterations take longer and do not improve recall.
_TRAINED_ON_PER_PARTITION, _MAX_ITERATIONS = 64, 15
# One minus the inner product, which is the cosine: all embeddings have unit length.
_DISTANCE = "dot"


class IndexUnavailableError(ValueError):
    """An index that no query can search: gone, damaged or of another model."""


@dataclass(frozen=True, kw_only=True)
class AnnIndex:
    """An approximate index, and its measurements when it was built.

    Attributes:
        num_rows: Images when its partitions were trained.
        num_partitions: Partitions of the images.
        nprobes: Partitions that a query visits.
        refine_factor: Candidates per result that are compared exactly.
        recall_at_10: Share of the ten nearest images that it finds, over `num_queries` texts.
        num_queries: Texts that it was measured with.
        query_ms: Median milliseconds of a query.
        exact_query_ms: Median milliseconds of a query without the index.
        build_s: Seconds that training took.
        is_used: True if searches use it: it finds enough, and is faster than no index.
    """

    num_rows: int
    num_partitions: int
    nprobes: int
    refine_factor: int
    recall_at_10: float
    num_queries: int
    query_ms: float
    exact_query_ms: float
    build_s: float
    is_used: bool

    def widen(self) -> AnnIndex:
        """Return the settings of a search with a filter: all partitions, and more candidates.

        `nprobes` was tuned without a filter. Images that pass one are often alike, such as those of
        one folder, and may be in none of the partitions nearest to the query. One bit per dimension
        also separates similar images less well.
        """
        return dataclasses.replace(
            self,
            nprobes=self.num_partitions,
            refine_factor=_REFINED_MORE * self.refine_factor,
        )


class LanceTable:
    """A table of images, and a table `about` with one row, in a folder or on object storage.

    Several threads may search at once. Methods raise `ERRORS`. Another database needs a class with
    these methods.
    """

    def __init__(self, location: str) -> None:
        require(LANCEDB)
        import lancedb

        self._location = location
        self._connection = lancedb.connect(
            location, storage_options=_find_storage_options(location)
        )
        self._table: Any = None

    def list_tables(self) -> Sequence[str]:
        """List the tables; one that was begun and has no version yet is none."""
        names = self._connection.list_tables().tables
        versions = {name: Path(self._location, f"{name}.lance", "_versions") for name in names}
        return [
            name
            for name, folder in versions.items()
            if "://" in self._location or any(folder.glob("*.manifest"))
        ]

    def read_about(self) -> pa.Table:
        return self._connection.open_table(ABOUT).to_arrow()

    def write_about(self, rows: pa.Table) -> None:
        mode = "overwrite" if ABOUT in self.list_tables() else "create"
        self._connection.create_table(ABOUT, data=rows, mode=mode)

    def create(self, width: int) -> None:
        fields = {
            **COLUMNS,
            "stat": pa.string(),
            "embedding": pa.list_(pa.float32(), width),
            "crc32": pa.int64(),
        }
        self._connection.create_table(IMAGES, schema=pa.schema(fields))

    def reopen(self) -> None:
        """Open the table anew: an open one stays at its version if that of a new one is lower."""
        self._table = self._connection.open_table(IMAGES)

    def count(self, where: str | None = None) -> int:
        """Count images; with a filter, values are read, so that missing files are noticed."""
        return int(self._table.count_rows(where))

    def read(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield columns; with `WHOLE_ROW`, ValueError for a row that is not as it was written."""
        query = self._table.search().select(list(columns))
        if where is not None:
            query = query.where(where)
        for batch in query.to_batches(_READ_AT_ONCE):
            if columns is WHOLE_ROW:
                _require_intact(batch)
            yield batch

    def write(self, rows: Mapping[str, Any]) -> None:
        """Add images, and replace those of the same path, in one commit."""
        merge = self._table.merge_insert("path").when_matched_update_all()
        fields = [self._table.schema.field(name) for name in rows]
        batch = pa.record_batch(dict(rows), schema=pa.schema(fields))
        checksums = pa.array(_hash_rows(batch), pa.int64())
        table = pa.Table.from_batches([batch]).append_column("crc32", checksums)
        merge.when_not_matched_insert_all().execute(table)

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
        query = query.distance_type(_DISTANCE).limit(top_k).select([*WHOLE_ROW, "_distance"])
        if where is not None:
            query = query.where(where, prefilter=True)
        if ann is None:
            query = query.bypass_vector_index()
        else:
            query = query.nprobes(ann.nprobes).refine_factor(ann.refine_factor)
        hits = query.to_arrow()
        for batch in hits.to_batches():
            _require_intact(batch)
        rows: list[dict[str, Any]] = hits.select([*COLUMNS, "_distance"]).to_pylist()
        for row in rows:
            row["cosine"] = 1 - row.pop("_distance")
        return rows


def _hash_rows(batch: pa.RecordBatch) -> list[int]:
    """Compute the CRC-32 of each row; LanceDB has no checksums."""
    columns = [batch.column(name) for name in (*COLUMNS, "stat")]
    plain = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in columns]
    texts = [column.cast(pa.string()).cast(pa.binary()) for column in plain]
    joined = pc.binary_join_element_wise(
        *texts, b"\n", null_handling="replace", null_replacement=b""
    )
    embeds = batch.column("embedding")
    matrix = embeds.flatten().to_numpy().reshape(-1, embeds.type.list_size)
    return [
        zlib.crc32(row, zlib.crc32(text))
        for text, row in zip(joined.to_pylist(), matrix, strict=True)
    ]


def _require_intact(batch: pa.RecordBatch) -> None:
    recorded = batch.column("crc32").to_pylist()
    rows = np.flatnonzero([a != b for a, b in zip(_hash_rows(batch), recorded, strict=True)])
    if len(rows):
        paths = batch.column("path").cast(pa.binary()).take(pa.array(rows))  # perhaps not UTF-8
        names = list_first(path.decode(errors="replace") for path in paths.to_pylist())
        raise ValueError(f"damaged rows, whose CRC-32 is not that recorded: {names}")


def require_database_folder(folder: Path, *, is_new: bool = False) -> None:
    """Raise IndexUnavailableError, with the reason, for a path that is not a database.

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
