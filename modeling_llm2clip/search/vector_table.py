"""The seam between an image index and its database.

Another database is a class with the methods of `VectorTable` in a file of its own, and a line in
`open_table` of `index_database.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """An index that no query can search: gone, damaged or of another model."""


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
    """A table of images, and a table `about` with one row, in a database.

    Several threads may search at once. Methods raise `ERRORS`.
    """

    def list_tables(self) -> Sequence[str]:
        """List those of `IMAGES` and `ABOUT` that exist."""

    def read_about(self) -> pa.Table:
        """Read the table `about`, whatever its columns."""

    def write_about(self, rows: pa.Table) -> None:
        """Replace the table `about`."""

    def create(self, width: int) -> None:
        """Make the table of images, for embeddings of this width."""

    def reopen(self) -> None:
        """Switch to the current version, even if its number is lower."""

    def count(self, where: str | None = None) -> int:
        """Count images; with a filter, values are read, so that missing files are noticed."""

    def read(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield columns in parts."""

    def write(self, rows: Mapping[str, Any], *, adds: bool) -> None:
        """Replace columns of the images with these `path`, in one commit.

        With `adds`, all columns are given, and images with other paths are added.
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
        """Find the images with the greatest cosines: `COLUMNS` and `cosine`, in any order.

        Without `ann` every image that passes the filter is compared.
        """


def make_schema(width: int) -> pa.Schema:
    """Return the schema of the table of images: `COLUMNS`, `stat`, and `embedding`."""
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    embedding = pa.list_(pa.float32(), width)
    return pa.schema([*fields, pa.field("stat", pa.string()), pa.field("embedding", embedding)])
