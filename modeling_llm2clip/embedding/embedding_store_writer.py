"""Writes an embedding store: the index of its items first, then its shards.

Machines that share no folder have one each for the shards that they compute, and complete shards
meet in object storage. What has begun the store first puts index and manifest there, and the others
begin with these. A complete shard is copied there, and then its record, so that a shard with a
record is whole; a run that was killed before that copies it when it goes on. `finish` copies all
shards here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pyarrow as pa  # type: ignore[import-untyped]
from filelock import FileLock

from ..data.atomic_files import hash_file, list_differences, sync_folder, temporary_folder
from ..data.records.record_table import RecordTable
from ..data.remote.object_storage import ObjectStorage
from ..data.store.store_index import write_index
from ..data.store.store_manifest import (
    CAPTION_EMBEDS,
    INDEX_FILE,
    MANIFEST_FILE,
    TOO_LONG,
    VISION_EMBEDS,
    ShardRecord,
    StoreManifest,
)
from ..data.store.store_shards import check_head
from .sharded_writer import (
    Array,
    ShardedWriter,
    ShardWriter,
    begin_or_continue,
    explain_full_output,
)

_COPIED_AT_ONCE = 4
_SHOWN = 5


@dataclass(frozen=True)
class StoreItems:
    """The items of a store that is begun.

    Attributes:
        num_rows: Number of embeddings.
        num_items: Number of items.
        counts: Figures for people.
        batches: Batches of the index; see `store_index.make_batch`.
    """

    num_rows: int
    num_items: int
    counts: dict[str, int]
    batches: Iterator[pa.RecordBatch]


class EmbeddingStoreWriter(ShardedWriter[StoreManifest]):
    """One process's access to a store that is being written; use `EmbeddingStoreWriter.open`."""

    LEFTOVERS = ("shard-*.json", "shard-*.part", "shard-*.journal", "*.tmp")
    REPAIRS = False

    @classmethod
    def open(
        cls, folder: Path, planned: StoreManifest, list_items: Callable[[Path], StoreItems]
    ) -> EmbeddingStoreWriter:
        """Begin a store, or continue the same one.

        `list_items` makes the items of a store that is not begun; it takes an empty folder for
        temporary files.
        """
        begin = partial(_write_index, folder, planned, list_items)
        return cls(folder, begin_or_continue(folder, planned, begin))

    @property
    def collected(self) -> tuple[Path, StoreManifest]:
        """The rows of a shard are collected in its file."""
        return self.folder, self.manifest

    def write_file(self, shard: int, written: ShardWriter, num_truncated: int) -> ShardRecord:
        """Complete the file of a shard."""
        head = written.write_head()
        rows = self.manifest.rows_of_shard(shard)
        file = self.folder / self.manifest.name_shard(shard)
        record = ShardRecord(
            file=file.name,
            first_row=rows.start,
            rows=len(rows),
            bytes=written.part.stat().st_size,
            sha256=hash_file(written.part),
            head_sha256=hashlib.sha256(head).hexdigest(),
            num_truncated=num_truncated,
        )
        written.part.replace(file)
        sync_folder(self.folder)
        return record

    def check_file(self, record: ShardRecord) -> None:
        """Raise ValueError if a shard is missing, damaged or of another store."""
        check_head(self.folder, record, self.manifest)

    def finish(self) -> bool:
        """Complete the manifest; every shard must be there."""
        records = self.find_records()
        missing = [shard for shard in range(self.manifest.num_shards) if shard not in records]
        if missing:
            raise ValueError(
                f"{self.folder} is not complete: {len(missing)} of {self.manifest.num_shards} "
                f"shards are missing, among them {missing[:_SHOWN]}. Run the same extraction "
                "again, or the partitions that did not end; they continue."
            )
        return super().finish()

    def complete_manifest(self, manifest: StoreManifest, shards: tuple[Any, ...]) -> StoreManifest:
        """Put the records of all shards into the manifest."""
        counts = dict(manifest.counts)
        if manifest.content != VISION_EMBEDS:
            name = "truncated" if manifest.content == CAPTION_EMBEDS else TOO_LONG
            counts[name] = sum(record.num_truncated for record in shards)
        return super().complete_manifest(replace(manifest, counts=counts), shards)


def _write_index(
    folder: Path, planned: StoreManifest, list_items: Callable[[Path], StoreItems]
) -> StoreManifest:
    """Write the index, and say in the manifest what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with explain_full_output(folder, "its index"):
        scratch = folder / f"index-{uuid4().hex}.tmp"
        scratch.mkdir()
        try:
            items = list_items(scratch)
            index = write_index(scratch / INDEX_FILE, items.batches)
            with (scratch / INDEX_FILE).open("rb") as opened:
                os.fsync(opened.fileno())
            if not planned.is_begun(folder):
                (scratch / INDEX_FILE).replace(folder / INDEX_FILE)
        finally:
            shutil.rmtree(scratch)
    return replace(
        planned,
        num_rows=items.num_rows,
        num_items=items.num_items,
        counts=items.counts,
        index=index,
    )


class SharedStoreWriter(EmbeddingStoreWriter):
    """One machine's access to a store that several write.

    Use `begin` where the records are at hand, and `join` where the store is begun.

    Args:
        folder: Folder of this machine.
        manifest: What the store will hold.
        storage: Where complete shards are.
        keep: Whether shards stay in the folder once they are in the storage.
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, storage: ObjectStorage, *, keep: bool = True
    ) -> None:
        super().__init__(folder, manifest)
        self.storage = storage
        self._places = f"{folder} and {storage.url}"
        self._keep = keep

    @classmethod
    def begin(
        cls,
        folder: Path,
        storage: ObjectStorage,
        planned: StoreManifest,
        list_items: Callable[[Path], StoreItems],
    ) -> SharedStoreWriter:
        """Begin a store, or continue the same one, here and in the storage."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # processes of one machine
            is_begun = _pull_plan(folder, storage)
            if not is_begun:
                _require_no_shards(storage)
            manifest = EmbeddingStoreWriter.open(folder, planned, list_items).manifest
            if not is_begun:
                for name in (INDEX_FILE, MANIFEST_FILE):
                    storage.push(folder / name)
                _pull_plan(folder, storage)  # another store may have begun there meanwhile
            writer = cls(folder, manifest, storage)
            writer._share_left()
        return writer

    @classmethod
    def join(cls, folder: Path, storage: ObjectStorage, *, keep: bool = True) -> SharedStoreWriter:
        """Take part in a store that is begun."""
        folder.mkdir(parents=True, exist_ok=True)
        if not _pull_plan(folder, storage):
            raise ValueError(f"{storage.url} holds no store. Extract into it first.")
        return cls(folder, StoreManifest.read(folder), storage, keep=keep)

    def is_done(self, shard: int) -> bool:
        """Return whether a shard is complete, here or in the storage."""
        return super().is_done(shard) or self.storage.has(self.manifest.name_record(shard))

    def list_missing(self) -> list[int]:
        """List the shards that are complete neither here nor in the storage."""
        stored = self._list_stored()
        return [shard for shard in super().list_missing() if shard not in stored]

    def finish(self) -> bool:
        """Copy the shards that others computed, check every one, and complete the manifest."""
        if not self.manifest.read(self.folder).complete:
            missing = set(super().list_missing()) & self._list_stored()
            with ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
                list(pool.map(self._fetch, sorted(missing)))
        return super().finish()

    def _seal(self, shard: int, written: ShardWriter, num_truncated: int) -> None:
        super()._seal(shard, written, num_truncated)
        self._share(shard)

    def _share_left(self) -> None:
        """Copy the shards that a run completed here, and that was killed before they were there."""
        if not self.manifest.read(self.folder).complete:
            shards = set(range(self.manifest.num_shards))
            for shard in sorted(shards - set(super().list_missing()) - self._list_stored()):
                self._share(shard)

    def _share(self, shard: int) -> None:
        files = [self.folder / name for name in self._list_files(shard)]
        for file in files:
            self.storage.push(file)
        if not self._keep:
            for file in files:
                file.unlink()

    def _fetch(self, shard: int) -> None:
        for name in self._list_files(shard):
            self.storage.pull(name, self.folder)

    def _list_files(self, shard: int) -> tuple[str, str]:
        """Name the files of a complete shard, the record last: it says that the other is whole."""
        return self.manifest.name_shard(shard), self.manifest.name_record(shard)

    def _list_stored(self) -> set[int]:
        names = self.storage.list_sizes().keys()
        shards = range(self.manifest.num_shards)
        return {shard for shard in shards if self.manifest.name_record(shard) in names}


@dataclass(frozen=True)
class SharedWork:
    """A store that is begun and its records, described so that any machine can open them.

    Attributes:
        writer: The writer in a folder that all machines see, or the URL of object storage.
        table: The records, or the file of their index in the storage.
        rows: The rows of the index that are used; None for all.
    """

    writer: EmbeddingStoreWriter | str
    table: RecordTable | str
    rows: Array | None = None

    @classmethod
    def describe(cls, writer: EmbeddingStoreWriter, table: RecordTable) -> SharedWork:
        """Describe a store and its records; the index of these joins the shards in the storage."""
        if not isinstance(writer, SharedStoreWriter):
            return cls(writer, table)
        storage, file = writer.storage, table.file
        if file is None:  # small, and sent along
            return cls(storage.url, table)
        if storage.list_sizes().get(file.name) != file.stat().st_size:
            storage.push(file)
        return cls(storage.url, file.name, table.rows)

    def open(self) -> tuple[EmbeddingStoreWriter, RecordTable]:
        """Return the store and the records."""
        writer, table = self.writer, self.table
        if isinstance(writer, str):
            storage, folder = ObjectStorage(writer), temporary_folder()
            writer = SharedStoreWriter.join(folder / uuid4().hex, storage, keep=False)
            if isinstance(table, str):
                table = RecordTable.open(storage.pull(table, folder))
                table = table if self.rows is None else table.select(self.rows)
        assert isinstance(table, RecordTable)
        return writer, table


def _require_no_shards(storage: ObjectStorage) -> None:
    """Refuse to begin where shards are that nothing says the store of."""
    names = storage.list_sizes().keys()
    shards = sorted(name for name in names if name.startswith("shard-"))
    if shards and MANIFEST_FILE not in names:  # another machine may just have begun
        raise FileExistsError(
            f"{storage.url} has no {MANIFEST_FILE}, and holds shards of some store: "
            f"{shards[:_SHOWN]}. Name another place, put the manifest back, or remove them."
        )


def _pull_plan(folder: Path, storage: ObjectStorage) -> bool:
    """Copy manifest and index here unless they are; returns whether the storage has them."""
    if not storage.has(MANIFEST_FILE):
        return False
    if not StoreManifest.is_begun(folder):
        folder.mkdir(exist_ok=True)
        storage.pull(INDEX_FILE, folder)
        storage.pull(MANIFEST_FILE, folder)
        return True
    with TemporaryDirectory(prefix="llm2clip-") as name:
        theirs = StoreManifest.read(storage.pull(MANIFEST_FILE, Path(name)).parent).list_causes()
    if differences := list_differences(StoreManifest.read(folder).list_causes(), theirs):
        raise ValueError(
            f"{folder} and {storage.url} hold different stores: {'; '.join(differences)}. Name "
            "another folder, or another place in the storage."
        )
    return True
