"""The seam between an image index and a database: one table of images, and one row of notes.

Another database is a class with these methods in a file of its own, and a line in `open_table`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

COLUMNS = {
    "path": pa.string(),
    "sha256": pa.string(),
    "bytes": pa.int64(),
    "modified": pa.timestamp("us", tz="UTC"),
    "width": pa.int32(),
    "height": pa.int32(),
    "taken": pa.timestamp("us"),
}
"""The columns that a filter may use; `stat` and `embedding` come after them."""
IMAGES, ABOUT = "images", "about"  # names of the tables
LOCK = ".llm2clip-lock"  # file in the folder of a database, which the one that writes it locks
ERRORS = (RuntimeError, ValueError, OSError, KeyError)
"""Errors that tables raise, in the words of the database; the index explains them."""
HOW_TO_INDEX = "Make one: llm2clip index MODEL IMAGES DB."
# Candidates per result with a filter, against without: in the worst case that was measured, images
# of 24 topics and queries about 36 others, recall@10 is 0.945 with as many, and 0.992 with these.
_REFINED_MORE = 4


class IndexUnavailableError(ValueError):
    """An index that cannot be searched, whatever the query: gone, damaged or of another model."""


@dataclass(frozen=True, kw_only=True)
class AnnIndex:
    """An approximate index, and what was measured when it was built.

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
        is_used: Whether searches use it: it finds enough, and is faster than no index.
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

        Partitions were counted without one. Images that pass a filter are often alike, such as
        those of one folder, and may be in none of the partitions that are nearest to the query; and
        among images that are alike, one bit per dimension misses more.
        """
        return dataclasses.replace(
            self,
            nprobes=self.num_partitions,
            refine_factor=_REFINED_MORE * self.refine_factor,
        )


class VectorTable(Protocol):
    """The table of images in one database, which is there or is made by `create`.

    Searches of several threads may run at once. Its methods raise `ERRORS`.
    """

    def list_tables(self) -> Sequence[str]:
        """List those of `IMAGES` and `ABOUT` that are there."""

    def read_about(self) -> pa.Table:
        """Read the notes, whatever their columns."""

    def write_about(self, rows: pa.Table) -> None:
        """Replace the notes."""

    def create(self, width: int) -> None:
        """Make the table of images without rows, for embeddings of this width."""

    def reopen(self) -> None:
        """Read the version that is there now from here on, even if its number is lower."""

    def count(self, where: str | None = None) -> int:
        """Count images; with a filter by reading values, so that missing files are noticed."""

    def read(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Read columns in parts."""

    def write(self, rows: Mapping[str, Any], *, adds: bool) -> None:
        """Replace what is given of the images of the same `path`, in one commit.

        With `adds`, all columns are given, and images of other paths are added.
        """

    def delete(self, where: str) -> None:
        """Remove the images that pass a filter."""

    def optimize(self) -> None:
        """Compact the table, and take new images into the approximate index."""

    def build_ann(self, num_partitions: int) -> None:
        """Train the approximate index, in place of an earlier one."""

    def drop_ann(self) -> None:
        """Remove the approximate index, if there is one."""

    def search(
        self,
        embedding: np.ndarray[Any, Any],
        *,
        top_k: int,
        where: str | None,
        ann: AnnIndex | None,
    ) -> list[dict[str, Any]]:
        """Find the images of the greatest cosine: their `COLUMNS`, and `cosine`, in any order.

        Without `ann` every image that passes the filter is compared.
        """


def open_table(location: str) -> VectorTable:
    """Connect to the database at a location: a folder, or a URI on object storage."""
    from .lancedb_table import LanceTable

    return LanceTable(location)


def require_place(location: str, *, is_new: bool = False) -> None:
    """Raise IndexUnavailableError for a place that cannot hold a database, or none yet."""
    from .lancedb_table import require_database_folder

    if "://" not in location:
        require_database_folder(Path(location), is_new=is_new)


def make_schema(width: int) -> pa.Schema:
    """Return the schema of the images: `COLUMNS`, `stat`, and embeddings of this width."""
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    embedding = pa.list_(pa.float32(), width)
    return pa.schema([*fields, pa.field("stat", pa.string()), pa.field("embedding", embedding)])
