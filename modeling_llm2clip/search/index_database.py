"""Read and write the LanceDB database of an image index; the only module that uses LanceDB.

This module does not import torch.

| table | rows |
| --- | --- |
| `images` | `path` relative to the folder, `sha256`, `bytes`, `modified`, `width`, `height`, `taken`, `stat` (to detect changed files), `embedding` (unit length), `crc32` of all these |
| `about` | a single row, whose `content` is an `About` as sealed JSON |
"""  # noqa: E501

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from .._extras import LANCEDB, require
from .._suggestions import list_first
from ..data.atomic_files import (
    explain_full_disk,
    lock_file,
    require_writable,
)
from ..data.sealed_manifest import list_differences
from .filters import check_filter, explain_filter
from .index_about import (
    COLUMNS,
    EVERY_IMAGE,
    FACTS,
    HOW_TO_INDEX,
    About,
    AnnIndex,
    IndexUnavailableError,
)

T = TypeVar("T")

_WHOLE_ROW = (*COLUMNS, "stat", "embedding", "crc32")
_IMAGES, _ABOUT = "images", "about"  # names of the tables
_LOCK = ".llm2clip-lock"  # file in the folder of a database, locked by its writer
# Errors that LanceDB raises, and the name of another error, which no module exports.
_ERRORS, _PANIC = (RuntimeError, ValueError, OSError, KeyError), "RustPanic"
_VALUES_AT_ONCE = 500  # values per filter
_READ_AT_ONCE = 8192
# An open index sees changes by other processes after at most this time.
_SEEN_AFTER_S = 5
# Old versions are kept this long for readers that opened the table earlier.
_KEPT_FOR = timedelta(hours=1)
# Training on more images or with more iterations takes longer without improving recall.
_TRAINED_ON_PER_PARTITION, _MAX_ITERATIONS = 64, 15
# One minus the inner product; the inner product is the cosine because embeddings have unit length.
_DISTANCE = "dot"


class IndexDatabase:
    """An open database of images; several threads may search it at once.

    Args:
        location: Folder of the database, or a URI on object storage.
        describe: Called to describe a new index. If `describe` is None, the database must exist.
    """

    def __init__(self, location: str | Path, describe: Callable[[], About] | None = None) -> None:
        self.location = str(location)
        require_place(self.location, is_new=describe is not None)
        require(LANCEDB)
        import lancedb

        with self._explained("opened"):
            self._connection = lancedb.connect(
                self.location, storage_options=_find_storage_options(self.location)
            )
        if describe is not None:
            self._create(describe)
        self.about = self._read_about()
        self._lock = threading.Lock()
        self._reopen()

    def _create(self, describe: Callable[[], About]) -> None:
        with self._explained("read"):
            tables = self._list_tables()
        if _ABOUT not in tables:
            if _IMAGES in tables:
                raise ValueError(
                    f"{self.location} has a table `{_IMAGES}` that llm2clip index did not write. "
                    "Choose another location."
                )
            self.write_about(describe())
        if _IMAGES not in tables:
            embedding = pa.list_(pa.float32(), self._read_about().width)
            others = {"stat": pa.string(), "embedding": embedding, "crc32": pa.int64()}
            with self._writing():
                self._connection.create_table(_IMAGES, schema=pa.schema({**COLUMNS, **others}))

    def _list_tables(self) -> list[str]:
        """List the tables, except unfinished tables, which have no version yet."""
        names = self._connection.list_tables().tables
        versions = {name: Path(self.location, f"{name}.lance", "_versions") for name in names}
        return [
            name
            for name, folder in versions.items()
            if "://" in self.location or any(folder.glob("*.manifest"))
        ]

    def _read_about(self) -> About:
        with self._explained("read"):
            is_there = _ABOUT in self._list_tables()
            rows = self._connection.open_table(_ABOUT).to_arrow().to_pylist() if is_there else []
        if len(rows) != 1 or "content" not in rows[0]:
            raise IndexUnavailableError(f"{self.location} is not an index. {HOW_TO_INDEX}")
        return About.unseal(rows[0]["content"], self.location)

    def write_about(self, about: About) -> None:
        with self._writing():
            mode = "overwrite" if _ABOUT in self._list_tables() else "create"
            self._connection.create_table(
                _ABOUT, data=pa.table({"content": [about.seal()]}), mode=mode
            )
        self.about = about

    def _reopen(self) -> None:
        """Reopen the table: an open table would miss a replacement that has a lower version."""
        with self._explained("read"):
            self._table: Any = self._connection.open_table(_IMAGES)
        self._looked_at = time.monotonic()

    def refresh(self) -> None:
        """Pick up changes by other processes, unless this was done within the last few seconds.

        `about` is read before and after the table is reopened, so it matches the images that are
        searched even if the index is replaced in between.
        """
        with self._lock:
            if time.monotonic() - self._looked_at < _SEEN_AFTER_S:
                return
            require_place(self.location)
            self.about = self._read_about()
            self._reopen()
            self.about = self._read_about()

    def _read(self, function: Callable[[], T]) -> T:
        """Read the table; on an error, refresh and retry once: its files may have been replaced."""
        with self._explained("read"):
            try:
                return function()
            except _ERRORS:
                self._looked_at = -_SEEN_AFTER_S
                self.refresh()
                return function()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Re-raise database errors with the location and a remedy."""
        try:
            yield
        except IndexUnavailableError:
            raise
        except Exception as error:
            if not isinstance(error, _ERRORS) and type(error).__name__ != _PANIC:
                raise
            raise IndexUnavailableError(
                f"{self.location} cannot be {what}: {_shorten(error)}. If it is damaged, remove "
                "it and index the images again."
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        remedy = "Free some space and run the same command again; it resumes"
        with (
            explain_full_disk(Path(self.location), "for the index", remedy),
            self._explained("written"),
        ):
            yield

    def count(self, where: str | None = None) -> int:
        """Count the images that pass a filter; raise FilterError if it is invalid."""
        checked = None if where is None else check_filter(where, COLUMNS)
        self.refresh()
        try:
            return self._read(lambda: int(self._table.count_rows(checked)))
        except IndexUnavailableError as error:
            if where in (None, EVERY_IMAGE):
                raise
            self.count(EVERY_IMAGE)
            raise explain_filter(where, _shorten(error.__cause__ or error), COLUMNS) from error

    def iterate(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield some columns of all images, or of the images that pass a filter, in batches."""
        self.refresh()
        with self._explained("read"):
            query = self._table.search().select(list(columns))
            if where is not None:
                query = query.where(where)
            yield from query.to_batches(_READ_AT_ONCE)

    def _iterate_whole(self, where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield batches of whole rows, verified by their checksums."""
        with self._explained("read"):
            for batch in self.iterate(_WHOLE_ROW, where):
                _require_intact(batch)
                yield batch

    def iterate_embeddings(self) -> Iterator[tuple[list[str], np.ndarray[Any, Any]]]:
        """Yield batches of paths relative to the folder, and embeddings, (rows, P) float32."""
        for batch in self._iterate_whole():
            yield batch["path"].to_pylist(), _to_matrix(batch["embedding"])

    def find_by_digest(self, digests: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Map the SHA-256 digests found in the index to their image's `FACTS` and `embedding`."""
        images: dict[str, dict[str, Any]] = {}
        for condition in _list_conditions("sha256", digests):
            for batch in self._iterate_whole(condition):
                rows = batch.select(["sha256", *FACTS]).to_pylist()
                for row, embed in zip(rows, _to_matrix(batch["embedding"]), strict=True):
                    images[row.pop("sha256")] = {**row, "embedding": embed}
        return images

    def write(self, rows: Mapping[str, Any], embeddings: np.ndarray[Any, Any]) -> None:
        """Add images, replacing images with the same path, in one commit.

        `rows` holds all `COLUMNS` and `stat`; `embeddings` has shape (rows, P).
        """
        flat = pa.array(embeddings.astype(np.float32).ravel())
        columns = {
            **rows, "embedding": pa.FixedSizeListArray.from_arrays(flat, self.about.width)
        }  # fmt: skip
        with self._writing():
            merge = self._table.merge_insert("path").when_matched_update_all()
            schema = pa.schema([self._table.schema.field(name) for name in columns])
            batch = pa.record_batch(columns, schema=schema)
            hashes = pa.array(_hash_rows(batch), pa.int64())
            merge.when_not_matched_insert_all().execute(
                pa.Table.from_batches([batch]).append_column("crc32", hashes)
            )

    def remove(self, paths: Sequence[str]) -> None:
        with self._writing():
            for condition in _list_conditions("path", paths):
                self._table.delete(condition)

    def optimize(self) -> None:
        """Compact small files, update the approximate index and remove old versions."""
        with self._writing():
            self._table.optimize(cleanup_older_than=_KEPT_FOR)

    def build_ann(self, num_partitions: int) -> None:
        """Train partitions by inner product, storing one bit per dimension.

        The inner product of unit-length embeddings is the cosine, so a text query visits the
        partitions that hold its nearest images. Euclidean distances also depend on how far a
        partition is from all texts, so a text query would have to visit twice as many partitions
        for the same recall.
        """
        from lancedb.index import IvfRq, IvfSq

        # RaBitQ packs eight dimensions per byte; 8-bit scalars take any width, but are slower.
        kind = IvfSq if self.about.width % 8 else IvfRq
        config = kind(
            distance_type=_DISTANCE,
            num_partitions=num_partitions,
            max_iterations=_MAX_ITERATIONS,
            sample_rate=_TRAINED_ON_PER_PARTITION,
        )
        with self._writing():
            self._table.create_index("embedding", config=config, replace=True)

    def drop_ann(self) -> None:
        with self._writing():
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
        """Find the images with the highest cosine to a unit-length embedding, (P,).

        Return each image's columns and `cosine`, best first; ties are sorted by path. Without
        `ann`, the embedding is compared with every image.
        """
        checked = None if where is None else check_filter(where, COLUMNS)

        def find() -> list[dict[str, Any]]:
            query = self._table.search(embedding, vector_column_name="embedding")
            query = query.distance_type(_DISTANCE).limit(top_k).select([*_WHOLE_ROW, "_distance"])
            if checked is not None:
                query = query.where(checked, prefilter=True)
            if ann is None:
                query = query.bypass_vector_index()
            else:
                query = query.nprobes(ann.nprobes).refine_factor(ann.refine_factor)
            hits = query.to_arrow()
            for batch in hits.to_batches():
                _require_intact(batch)
            rows: list[dict[str, Any]] = hits.select([*COLUMNS, "_distance"]).to_pylist()
            return rows

        rows = [{**row, "cosine": 1 - row.pop("_distance")} for row in self._read(find)]
        return sorted(rows, key=lambda row: (-row["cosine"], row["path"]))

    def require_same_fingerprint(
        self, source: object, by_modality: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Raise ValueError, listing all differences, if a model's embeddings differ from the index.

        Only the modalities that the model has are compared.
        """
        indexed = {
            name: value
            for name, value in self.about.fingerprint.items()
            if name.partition(" ")[0] in by_modality
        }
        if differences := list_differences(indexed, join_fingerprints(by_modality)):
            raise ValueError(
                f"{self.location} is an index for the model {self.about.model}, and the embeddings "
                f"of {source} differ: {'; '.join(differences)}. Use the model of the index, or "
                "index the images with this model into a new database."
            )


def join_fingerprints(by_modality: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Flatten the fingerprints of all modalities into one dictionary, as stored in an `About`."""
    return {
        f"{modality} {name}": value
        for modality, fingerprint in by_modality.items()
        for name, value in fingerprint.items()
    }


def require_place(location: str, *, is_new: bool = False) -> None:
    """Raise IndexUnavailableError if a path is not a database.

    With `is_new`, the path may also be missing, empty or an unfinished database, but must be
    writable.
    """
    if "://" in location:
        return
    folder = Path(location)
    files = folder.iterdir() if folder.is_dir() else iter(())
    has_others = any(file.suffix != ".lance" and file.name != _LOCK for file in files)
    if is_new and not folder.is_file() and not has_others:
        require_writable(folder)
    elif not folder.exists():
        raise IndexUnavailableError(f"{folder}: no such database. {HOW_TO_INDEX}")
    elif not (folder / f"{_ABOUT}.lance").is_dir():
        raise IndexUnavailableError(f"{folder} is not an index. {HOW_TO_INDEX}")


@contextmanager
def lock_database(location: str) -> Iterator[None]:
    """Lock a database against other writers; create its folder if needed."""
    if "://" in location:  # object storage has no locks
        yield
        return
    folder = Path(location)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as opened:
        if not lock_file(opened, wait=False):
            raise ValueError(f"Another process is writing {location}. Wait until it finishes.")
        yield


def _find_storage_options(location: str) -> dict[str, str] | None:
    """Return the S3 endpoint from `AWS_ENDPOINT_URL`, which LanceDB does not read by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not location.startswith("s3://") or not endpoint:
        return None
    return {"endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def _hash_rows(batch: pa.RecordBatch) -> list[int]:
    """Compute the CRC-32 of each row, because LanceDB has no checksums."""
    columns = [batch.column(name) for name in (*COLUMNS, "stat")]
    plain = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in columns]
    texts = [column.cast(pa.string()).cast(pa.binary()) for column in plain]
    joined = pc.binary_join_element_wise(
        *texts, b"\n", null_handling="replace", null_replacement=b""
    )
    rows = zip(joined.to_pylist(), _to_matrix(batch.column("embedding")), strict=True)
    return [zlib.crc32(row, zlib.crc32(text)) for text, row in rows]


def _require_intact(batch: pa.RecordBatch) -> None:
    recorded = batch.column("crc32").to_pylist()
    rows = np.flatnonzero([a != b for a, b in zip(_hash_rows(batch), recorded, strict=True)])
    if len(rows):
        paths = batch.column("path").cast(pa.binary()).take(pa.array(rows))  # perhaps not UTF-8
        names = list_first(path.decode(errors="replace") for path in paths.to_pylist())
        raise ValueError(f"damaged rows, whose CRC-32 does not match: {names}")


def _shorten(error: BaseException) -> str:
    """Shorten an error message: remove the source code positions that LanceDB appends."""
    return " ".join(str(error).split()).split(", /")[0].split(" at /")[0][:300].rstrip(". ")


def _to_matrix(column: pa.Array) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, column.type.list_size)


def _list_conditions(column: str, values: Sequence[str]) -> Iterator[str]:
    """Yield filters for batches of values, so no single filter becomes too long."""
    quoted = [f"'{value.replace(chr(39), chr(39) * 2)}'" for value in values]
    for start in range(0, len(quoted), _VALUES_AT_ONCE):
        yield f"{column} IN ({', '.join(quoted[start : start + _VALUES_AT_ONCE])})"
