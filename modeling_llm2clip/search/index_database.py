"""The LanceDB tables of an image index, without torch: one row per image, and what they are of.

| table | rows |
| --- | --- |
| `images` | `path` below the folder, `sha256`, `bytes`, `modified`, `width`, `height`, `taken`, `stat` (by which a changed file is recognized), `embedding` of unit length |
| `about` | one, whose `content` is the JSON of an `About` |
"""  # noqa: E501

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from .._extras import LANCEDB, require
from ..data.atomic_files import lock_file
from .filters import check_filter, explain_filter
from .index_about import (
    ABOUT,
    ERRORS,
    HOW_TO_INDEX,
    About,
    AnnIndex,
    IndexUnavailableError,
    explained,
    list_tables,
    read_about,
    shorten,
    write_about,
)

T = TypeVar("T")

COLUMNS = {
    "path": pa.string(),
    "sha256": pa.string(),
    "bytes": pa.int64(),
    "modified": pa.timestamp("us", tz="UTC"),
    "width": pa.int32(),
    "height": pa.int32(),
    "taken": pa.timestamp("us"),
}
_IMAGES = "images"
_EVERY_IMAGE = "bytes >= 0"  # a filter that all pass
_LOCK = ".llm2clip-lock"
_VALUES_AT_ONCE = 500  # in a filter
_READ_AT_ONCE = 8192
# How soon an open index sees what another process has written.
_SEEN_AFTER_S = 5
# Readers that opened the table before may still read the versions of this time.
_KEPT_FOR = timedelta(hours=1)
# Partitions are rough by nature: more images or iterations take longer, and improve no recall.
_TRAINED_ON_PER_PARTITION, _MAX_ITERATIONS = 64, 15
# One minus the inner product, which is the cosine: all embeddings have unit length.
_DISTANCE = "dot"


@dataclass(frozen=True)
class ImageFacts:
    """What of an image, beside its file, a search may filter by.

    Attributes:
        width: Pixels, upright.
        height: Pixels, upright.
        taken: When the camera took it, by its clock, from EXIF; None where it does not say.
    """

    width: int
    height: int
    taken: datetime | None


class IndexDatabase:
    """An open database of images; searches of several threads may run at once.

    Args:
        location: Folder or URI.
        connection: LanceDB's connection.
        about: What it is of.
    """

    def __init__(self, location: str, connection: Any, about: About) -> None:
        self.location = location
        self.about = about
        self._connection = connection
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        with explained(location, "read"):
            self._table = connection.open_table(_IMAGES)

    @classmethod
    def open(cls, location: str | Path) -> IndexDatabase:
        """Open a database that `llm2clip index` wrote."""
        location = str(location)
        if "://" not in location:
            require_database_folder(Path(location))
        connection = _connect(location)
        about = read_about(location, connection)
        if about is None:
            raise _refuse(location)
        return cls(location, connection, about)

    @classmethod
    def create(cls, location: str | Path, describe: Callable[[], About]) -> IndexDatabase:
        """Make a database without images, or open the one that is there."""
        location = str(location)
        folder = None if "://" in location else Path(location)
        if folder is not None and (folder.is_file() or _list_foreign(folder)):
            require_database_folder(folder)
        connection = _connect(location)
        found = read_about(location, connection)
        if found is None and _IMAGES in list_tables(connection):
            raise ValueError(
                f"{location} has a table `{_IMAGES}` that llm2clip index did not write. Name a "
                "new database."
            )
        about = found or describe()
        with explained(location, "written"):
            if found is None:
                write_about(connection, about, mode="create")
            if _IMAGES not in list_tables(connection):
                connection.create_table(_IMAGES, schema=_make_schema(about.width))
        return cls(location, connection, about)

    def refresh(self) -> None:
        """See what other processes have written, if the last look was some seconds ago.

        Images and `about` are looked at together, and `about` on both sides: whoever reads it after
        a search has that of the images that were searched, even if they were replaced meanwhile.
        """
        with self._lock:
            if time.monotonic() - self._looked_at < _SEEN_AFTER_S:
                return
            if "://" not in self.location:
                require_database_folder(Path(self.location))
            self.about = self._read_about()
            # Opened anew: a table that is open stays at its version if that of a new one is lower.
            with explained(self.location, "read"):
                self._table = self._connection.open_table(_IMAGES)
            self.about = self._read_about()
            self._looked_at = time.monotonic()

    def _read_about(self) -> About:
        about = read_about(self.location, self._connection)
        if about is None:
            raise _refuse(self.location)
        return about

    def _read(self, function: Callable[[Any], T]) -> T:
        """Read the table, and once more after a new look: files go when it is replaced."""
        try:
            return function(self._table)
        except ERRORS:
            self._looked_at = -_SEEN_AFTER_S
            self.refresh()
            return function(self._table)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes from writing a database in a folder meanwhile."""
        if "://" in self.location:  # object storage has no locks
            yield
            return
        with (Path(self.location) / _LOCK).open("a") as opened:
            if not lock_file(opened, wait=False):
                raise ValueError(
                    f"Another process is writing {self.location}. Wait until it has ended."
                )
            yield

    def write_about(self, about: About) -> None:
        """Replace what is noted of the index."""
        with explained(self.location, "written"):
            write_about(self._connection, about, mode="overwrite")
        self.about = about

    def count(self, where: str | None = None) -> int:
        """Count the images."""
        if where is not None:
            check_filter(where, COLUMNS)
        self.refresh()
        if where is None:
            with explained(self.location, "read"):
                return int(self._read(lambda table: table.count_rows()))
        try:
            return int(self._read(lambda table: table.count_rows(where)))
        except IndexUnavailableError:
            raise
        except ERRORS as error:
            self.count_readable()
            raise ValueError(explain_filter(where, shorten(error), COLUMNS)) from error

    def count_readable(self) -> int:
        """Count the images by reading a number of each; `count` without a filter reads no file."""
        self.refresh()
        with explained(self.location, "read"):
            return int(self._read(lambda table: table.count_rows(_EVERY_IMAGE)))

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read columns of all images."""
        self.refresh()
        with explained(self.location, "read"):
            found = self._table.search().select(list(columns))
            return found.to_batches(_READ_AT_ONCE).read_all()

    def iterate_embeddings(self) -> Iterator[tuple[list[str], np.ndarray[Any, Any]]]:
        """Read all embeddings in parts."""
        self.refresh()
        with explained(self.location, "read"):
            found = self._table.search().select(["path", "embedding"]).to_batches(_READ_AT_ONCE)
            for batch in found:
                yield batch["path"].to_pylist(), to_matrix(batch["embedding"])

    def find_by_digest(
        self, digests: Sequence[str]
    ) -> dict[str, tuple[ImageFacts, np.ndarray[Any, Any]]]:
        """Find images by what their files contain."""
        found: dict[str, tuple[ImageFacts, np.ndarray[Any, Any]]] = {}
        names = ["width", "height", "taken"]
        with explained(self.location, "read"):
            for part in _list_in_parts(digests):
                rows = self._table.search().where(f"sha256 IN ({part})")
                table = rows.select(["sha256", *names, "embedding"]).to_arrow()
                facts = (ImageFacts(**row) for row in table.select(names).to_pylist())
                pairs = zip(facts, to_matrix(table["embedding"]), strict=True)
                found |= dict(zip(table["sha256"].to_pylist(), pairs, strict=True))
        return found

    def write(self, rows: Mapping[str, Sequence[Any]], embeddings: np.ndarray[Any, Any]) -> None:
        """Add images, and replace those whose path is there already, in one commit."""
        schema = _make_schema(self.about.width)
        flat = pa.array(embeddings.astype(np.float32).ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, self.about.width)
        table = pa.table({**rows, "embedding": lists}, schema=schema)
        with explained(self.location, "written"):
            merge = self._table.merge_insert("path").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(table)

    def note_touched(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Replace some columns of files that were touched and not changed."""
        fields = [_make_schema(self.about.width).field(name) for name in rows]
        with explained(self.location, "written"):
            table = pa.table(dict(rows), schema=pa.schema(fields))
            self._table.merge_insert("path").when_matched_update_all().execute(table)

    def remove(self, paths: Sequence[str]) -> None:
        """Remove images."""
        with explained(self.location, "written"):
            for names in _list_in_parts(paths):
                self._table.delete(f"path IN ({names})")

    def optimize(self) -> None:
        """Compact the table, and take new images into the approximate index."""
        with explained(self.location, "written"):
            self._table.optimize(cleanup_older_than=_KEPT_FOR)

    def build_ann(self, num_partitions: int) -> None:
        """Train an approximate index: partitions of embeddings in one bit per dimension.

        It is one of inner products, which are cosines of unit embeddings. By them, a text visits
        the partitions where its images are; by distances, which also count how far a partition is
        from all texts, it would visit twice as many to find the same.
        """
        from lancedb.index import IvfRq, IvfSq

        # RaBitQ packs dimensions in bytes; scalars of 8 bits take any number, and longer.
        kind = IvfSq if self.about.width % 8 else IvfRq
        config = kind(
            distance_type=_DISTANCE,
            num_partitions=num_partitions,
            max_iterations=_MAX_ITERATIONS,
            sample_rate=_TRAINED_ON_PER_PARTITION,
        )
        with explained(self.location, "written"):
            self._table.create_index("embedding", config=config, replace=True)

    def drop_ann(self) -> None:
        """Remove the approximate index, if there is one."""
        with explained(self.location, "written"):
            for index in self._table.list_indices():
                self._table.drop_index(index.name)

    def search(
        self,
        embedding: np.ndarray[Any, Any],
        *,
        top_k: int,
        where: str | None = None,
        ann: AnnIndex | None = None,
    ) -> list[dict[str, Any]]:
        """Find the images of the greatest cosine."""
        if where is not None:
            check_filter(where, COLUMNS)

        def find(table: Any) -> pa.Table:
            query = table.search(embedding, vector_column_name="embedding")
            query = query.distance_type(_DISTANCE).limit(top_k).select([*COLUMNS, "_distance"])
            if where is not None:
                query = query.where(where, prefilter=True)
            if ann is None:
                return query.bypass_vector_index().to_arrow()
            return query.nprobes(ann.nprobes).refine_factor(ann.refine_factor).to_arrow()

        with explained(self.location, "read"):
            rows: list[dict[str, Any]] = self._read(find).to_pylist()
        for row in rows:
            row["cosine"] = 1 - row.pop("_distance")
        return sorted(rows, key=lambda row: (-row["cosine"], row["path"]))


def require_database_folder(folder: Path) -> None:
    """Refuse a path that cannot be a database, and say what it is instead."""
    if not folder.exists():
        raise IndexUnavailableError(f"{folder}: no such database. {HOW_TO_INDEX}")
    if not folder.is_dir():
        raise IndexUnavailableError(
            f"{folder} is a file, and a database is a folder. An index file of an earlier version "
            f"is not read any more. {HOW_TO_INDEX}"
        )
    if not (folder / f"{ABOUT}.lance").is_dir():
        raise _refuse(str(folder))


def _refuse(location: str) -> IndexUnavailableError:
    return IndexUnavailableError(f"{location} is not a database of llm2clip index. {HOW_TO_INDEX}")


def _list_foreign(folder: Path) -> list[str]:
    """List what in a folder is not of LanceDB, if it is there."""
    if not folder.is_dir():
        return []
    return [f.name for f in folder.iterdir() if f.suffix != ".lance" and f.name != _LOCK]


def _connect(location: str) -> Any:
    require(LANCEDB)
    import lancedb

    with explained(location, "opened"):
        return lancedb.connect(
            location,
            storage_options=_find_storage_options(location),
        )


def _find_storage_options(location: str) -> dict[str, str] | None:
    """Pass on the endpoint of another S3 than Amazon's, which LanceDB does not look for."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not location.startswith("s3://") or not endpoint:
        return None
    return {"endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def _make_schema(width: int) -> pa.Schema:
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    embedding = pa.list_(pa.float32(), width)
    return pa.schema([*fields, pa.field("stat", pa.string()), pa.field("embedding", embedding)])


def to_matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Turn a column of embeddings into a matrix."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    width = column.type.list_size
    values: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)


def _list_in_parts(values: Sequence[str]) -> Iterator[str]:
    """Yield literals of SQL, some at a time, because a filter must not grow without bounds."""
    quoted = [f"'{value.replace(chr(39), chr(39) * 2)}'" for value in values]
    for start in range(0, len(quoted), _VALUES_AT_ONCE):
        yield ", ".join(quoted[start : start + _VALUES_AT_ONCE])
