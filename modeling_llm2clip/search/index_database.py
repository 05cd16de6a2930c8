"""The database of an image index, without torch: its model, its rows, and its errors.

Filters, damage and other models are handled here, whatever the database.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..data.atomic_files import explain_full_disk, list_differences, lock_file
from ..data.sealed_manifest import read_sealed, write_sealed
from .filters import check_filter, explain_filter
from .lancedb_table import (
    ABOUT,
    COLUMNS,
    ERRORS,
    HOW_TO_INDEX,
    IMAGES,
    LOCK,
    PANIC,
    WHOLE_ROW,
    AnnIndex,
    IndexUnavailableError,
    LanceTable,
    require_database_folder,
)

T = TypeVar("T")

FORMAT_VERSION = 3
# Columns that are read from the content of an image: upright pixels, and when it was taken.
FACTS = ("width", "height", "taken")
_EVERY_IMAGE = "bytes >= 0"  # a filter that all pass
_VALUES_AT_ONCE = 500  # in a filter
# An open index sees changes by other processes after this time at the latest.
_SEEN_AFTER_S = 5


@dataclass(frozen=True, kw_only=True)
class About:
    """The model and the images of an index.

    Attributes:
        model: Folder or Hub id of the model.
        fingerprint: Short texts on weights, tokenizer and prompt, which decide its embeddings.
        model_files: Digest of names, sizes and times of the model's files: while it stays the
            same, the fingerprint need not be computed again.
        image_dir: Folder of the images.
        width: P of the embeddings.
        ann: The approximate index; None where none was built.
        tally: `num_images` and `total` of an `ImageTally` of the images that were encoded into
            it; images that were removed since still count. None if the model has no summary of
            its training images.
        precision: How the vision tower computed, and how JPEGs were decoded; empty on a CPU in the
            stored dtype, and in full.
    """

    model: str
    fingerprint: Mapping[str, str]
    model_files: str
    image_dir: str
    width: int
    ann: AnnIndex | None = None
    tally: Mapping[str, Any] | None = None
    precision: Mapping[str, str] = dataclasses.field(default_factory=dict)


class IndexDatabase:
    """An open database of images; searches of several threads may run at once."""

    def __init__(self, location: str, table: LanceTable, about: About) -> None:
        self.location = location
        self.about = about
        self._table = table
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        with _explained(location, "read"):
            table.reopen()

    @classmethod
    def open(cls, location: str | Path) -> IndexDatabase:
        location = str(location)
        table = _connect(location)
        return cls(location, table, _read_about(location, table))

    @classmethod
    def create(cls, location: str | Path, describe: Callable[[], About]) -> IndexDatabase:
        """Open a database, or make one without images."""
        location = str(location)
        table = _connect(location, is_new=True)
        with _explained(location, "read"):
            tables = table.list_tables()
        is_new, has_images = ABOUT not in tables, IMAGES in tables
        if is_new and has_images:
            raise ValueError(
                f"{location} has a table `{IMAGES}` that llm2clip index did not write. Name a "
                "new database."
            )
        about = describe() if is_new else _read_about(location, table)
        with _explained_writing(location):
            if is_new:
                _write_about(table, about)
            if not has_images:
                table.create(about.width)
        return cls(location, table, about)

    def refresh(self) -> None:
        """Read what other processes have written, unless that was done seconds ago.

        `about` is read before and after the images, so that after a search it describes the images
        that were searched, even if they were replaced meanwhile.
        """
        with self._lock:
            if time.monotonic() - self._looked_at < _SEEN_AFTER_S:
                return
            require_place(self.location)
            self.about = _read_about(self.location, self._table)
            with _explained(self.location, "read"):
                self._table.reopen()
            self.about = _read_about(self.location, self._table)
            self._looked_at = time.monotonic()

    def _read(self, function: Callable[[LanceTable], T]) -> T:
        """Read the table, and retry once after a refresh: files go when a database is replaced."""
        with _explained(self.location, "read"):
            try:
                return function(self._table)
            except ERRORS:
                self._looked_at = -_SEEN_AFTER_S
                self.refresh()
                return function(self._table)

    @contextmanager
    def changing(self) -> Iterator[LanceTable]:
        with _explained_writing(self.location):
            yield self._table

    def write_about(self, about: About) -> None:
        with self.changing() as table:
            _write_about(table, about)
        self.about = about

    def count(self, where: str | None = None) -> int:
        """Count the images that pass a filter; FilterError if it is not valid."""
        checked = None if where is None else check_filter(where, COLUMNS)
        self.refresh()
        if where is None:
            return self._read(lambda table: table.count())
        try:
            return self._read(lambda table: table.count(checked))
        except IndexUnavailableError as error:
            self.count_readable()
            problem = _shorten(error.__cause__ or error)
            raise explain_filter(where, problem, COLUMNS) from error

    def count_readable(self) -> int:
        """Count images by reading values; `count` without a filter reads no file."""
        self.refresh()
        return self._read(lambda table: table.count(_EVERY_IMAGE))

    def iterate(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield columns of all images, or of those that pass a filter, in parts."""
        self.refresh()
        with _explained(self.location, "read"):
            yield from self._table.read(columns, where)

    def iterate_embeddings(self) -> Iterator[tuple[list[str], np.ndarray[Any, Any]]]:
        """Yield paths below the folder, and their embeddings, (rows, P) float32."""
        for batch in self.iterate(WHOLE_ROW):
            yield batch["path"].to_pylist(), _to_matrix(batch["embedding"])

    def find_by_digest(self, digests: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Map the SHA-256 of image files that are there to `FACTS` and `embedding`, (P,)."""
        images: dict[str, dict[str, Any]] = {}
        for condition in _list_conditions("sha256", digests):
            for batch in self.iterate(WHOLE_ROW, condition):
                rows, embeds = batch.select(FACTS).to_pylist(), _to_matrix(batch["embedding"])
                for digest, row, embed in zip(
                    batch["sha256"].to_pylist(), rows, embeds, strict=True
                ):
                    images[digest] = {**row, "embedding": embed}
        return images

    def write(self, rows: Mapping[str, Any], embeddings: np.ndarray[Any, Any]) -> None:
        """Add images, and replace those of the same path, in one commit.

        Rows hold all columns and `stat`; embeddings are (rows, P).
        """
        flat = pa.array(embeddings.astype(np.float32).ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, self.about.width)
        with self.changing() as table:
            table.write({**rows, "embedding": lists})

    def remove(self, paths: Sequence[str]) -> None:
        with self.changing() as table:
            for condition in _list_conditions("path", paths):
                table.delete(condition)

    def search(
        self,
        embedding: np.ndarray[Any, Any],
        *,
        top_k: int,
        where: str | None = None,
        ann: AnnIndex | None = None,
    ) -> list[dict[str, Any]]:
        """Find the images with the greatest cosines to an embedding, (P,) of unit length.

        Returns columns and `cosine`, best first, ties by path. Without `ann` every image is
        compared.
        """
        checked = None if where is None else check_filter(where, COLUMNS)
        rows = self._read(
            lambda table: table.search(embedding, top_k=top_k, where=checked, ann=ann)
        )
        return sorted(rows, key=lambda row: (-row["cosine"], row["path"]))

    def require_same_fingerprint(
        self, source: object, by_modality: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Raise ValueError, with every difference, for a model with other embeddings.

        A model of one modality is compared by that alone.
        """
        indexed = {
            name: value
            for name, value in self.about.fingerprint.items()
            if name.partition(" ")[0] in by_modality
        }
        if differences := list_differences(indexed, join_fingerprints(by_modality)):
            raise ValueError(
                f"{self.location} is an index of the model {self.about.model}, and {source} gives "
                f"other embeddings: {'; '.join(differences)}. Search with the model of the index, "
                "or index the images with this one into a new database."
            )


class DatabaseProcess(IndexDatabase):
    """Counts and searches in a process of its own, while this one imports torch; read-only.

    From the shell, a search is mostly imports: about two seconds of LanceDB, five of torch and
    transformers. Python imports one module at a time, so only another process does both at once.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        # Not forked: this process may have threads by now.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._opening: Future[About] = self._pool.submit(_open_here, location)

    def __enter__(self) -> DatabaseProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def about(self) -> About:  # type: ignore[override]
        """Description of the database as it was opened; waits until it is open."""
        return self._opening.result()

    def count(self, where: str | None = None) -> int:
        num_rows: int = self._pool.submit(_call, "count", where).result()
        return num_rows

    def search(self, embedding: np.ndarray[Any, Any], **options: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]]
        rows = self._pool.submit(_call, "search", embedding, **options).result()
        return rows


_opened: IndexDatabase | None = None  # in the other process


def _open_here(location: str) -> About:
    global _opened
    _opened = IndexDatabase.open(location)
    return _opened.about


def _call(name: str, *args: Any, **options: Any) -> Any:
    return getattr(_opened, name)(*args, **options)


def join_fingerprints(by_modality: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Flatten the fingerprints of the modalities into one, as in an `About`."""
    return {
        f"{modality} {name}": value
        for modality, fingerprint in by_modality.items()
        for name, value in fingerprint.items()
    }


def require_place(location: str, *, is_new: bool = False) -> None:
    """Raise IndexUnavailableError for a place without a database; a new one may be empty."""
    if "://" not in location:
        require_database_folder(Path(location), is_new=is_new)


@contextmanager
def lock_database(location: str) -> Iterator[None]:
    """Lock a database in a folder, which may be new, against other writers."""
    if "://" in location:  # object storage has no locks
        yield
        return
    folder = Path(location)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as opened:
        if not lock_file(opened, wait=False):
            raise ValueError(f"Another process is writing {location}. Wait until it has ended.")
        yield


def _connect(location: str, *, is_new: bool = False) -> LanceTable:
    require_place(location, is_new=is_new)
    with _explained(location, "opened"):
        return LanceTable(location)


def _write_about(table: LanceTable, about: About) -> None:
    values = dataclasses.asdict(about)
    if not about.precision:
        del values["precision"]
    content = write_sealed(values)
    table.write_about(pa.table({"format_version": [FORMAT_VERSION], "content": [content]}))


def _read_about(location: str, table: LanceTable) -> About:
    with _explained(location, "read"):
        stored = table.read_about() if ABOUT in table.list_tables() else pa.table({})
    if not {"format_version", "content"} <= set(stored.column_names) or len(stored) != 1:
        raise IndexUnavailableError(
            f"{location} is not a database of llm2clip index. {HOW_TO_INDEX}"
        )
    version = stored["format_version"][0].as_py()
    if version != FORMAT_VERSION:
        raise IndexUnavailableError(
            f"{location} has format_version {version}, and this package reads {FORMAT_VERSION}. "
            "Index the images again into a new database, or use the version that wrote it."
        )
    try:
        # Those of earlier versions have no hash.
        values = read_sealed(stored["content"][0].as_py(), or_plain=True)
        ann, tally = values.pop("ann"), values.get("tally")
        if tally is not None and tally.keys() != {"num_images", "total"}:
            raise ValueError(f"tally has {sorted(tally)}")
        return About(**values, ann=None if ann is None else AnnIndex(**ann))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise IndexUnavailableError(
            f"{location} is damaged: the table `{ABOUT}` cannot be read ({error}). Remove it, "
            "and index the images again."
        ) from error


@contextmanager
def _explained(location: str, what: str) -> Iterator[None]:
    """Raise errors of the database anew, with its location and a remedy."""
    try:
        yield
    except IndexUnavailableError:
        raise
    except Exception as error:
        if not isinstance(error, ERRORS) and type(error).__name__ != PANIC:
            raise
        raise IndexUnavailableError(
            f"{location} cannot be {what}: {_shorten(error)}. If it is damaged, remove it, and "
            "index the images again."
        ) from error


@contextmanager
def _explained_writing(location: str) -> Iterator[None]:
    remedy = "Free some space and run the same command again; it continues"
    with (
        explain_full_disk(Path(location), "for the index", remedy),
        _explained(location, "written"),
    ):
        yield


def _shorten(error: BaseException) -> str:
    """Return the first sentence of an error; LanceDB's go on with places in its source."""
    text = " ".join(str(error).split())
    return text.split(", /")[0].split(" at /")[0][:300].rstrip(". ")


def _to_matrix(column: pa.Array) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, column.type.list_size)


def _list_conditions(column: str, values: Sequence[str]) -> Iterator[str]:
    """Yield filters for some values at a time, so that none grows without bounds."""
    quoted = [f"'{value.replace(chr(39), chr(39) * 2)}'" for value in values]
    for start in range(0, len(quoted), _VALUES_AT_ONCE):
        yield f"{column} IN ({', '.join(quoted[start : start + _VALUES_AT_ONCE])})"
