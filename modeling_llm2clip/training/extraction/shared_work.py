"""What the actors of a cluster work on, described so that any of its machines finds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from uuid import uuid4

import numpy as np

from ...data.atomic_files import temporary_folder
from ...data.records.record_table import RecordTable
from ...data.remote.object_storage import ObjectStorage
from ...data.store.embedding_store_writer import EmbeddingStoreWriter
from ...data.store.shared_store_writer import SharedStoreWriter
from ...data.store.store_manifest import StoreManifest

Array: TypeAlias = np.ndarray[Any, Any]


class SharedWork(Protocol):
    """A store that is begun, and the records that it is made from."""

    def open(self) -> tuple[EmbeddingStoreWriter, RecordTable]:
        """Return the store and the records."""


def share_work(
    writer: EmbeddingStoreWriter, table: RecordTable, *, push: bool = True
) -> SharedWork:
    """Describe a store and its records; an index of records joins the shards in their storage.

    Args:
        writer: Of the store.
        table: The records.
        push: Whether the index is copied to the storage.
    """
    if not isinstance(writer, SharedStoreWriter):
        return _InFolder(writer.folder, writer.manifest, table)
    storage, file = writer.storage, table.file
    if file is None:  # small, and sent along
        return _InStorage(storage.url, table, None, None)
    if push and storage.list_sizes().get(file.name) != file.stat().st_size:
        storage.push(file)
    return _InStorage(storage.url, None, file.name, table.rows)


@dataclass(frozen=True)
class _InFolder:
    """A store and an index in folders that all machines see."""

    output: Path
    manifest: StoreManifest
    table: RecordTable

    def open(self) -> tuple[EmbeddingStoreWriter, RecordTable]:
        return EmbeddingStoreWriter(self.output, self.manifest), self.table


@dataclass(frozen=True)
class _InStorage:
    """A store in object storage, and its records: a table in memory, or rows of an index there."""

    url: str
    table: RecordTable | None
    index: str | None
    rows: Array | None

    def open(self) -> tuple[EmbeddingStoreWriter, RecordTable]:
        storage, folder = ObjectStorage(self.url), temporary_folder()
        writer = SharedStoreWriter.join(folder / uuid4().hex, storage, keep=False)
        if self.table is not None:
            return writer, self.table
        assert self.index is not None
        table = RecordTable.open(storage.pull(self.index, folder))
        return writer, table if self.rows is None else table.select(self.rows)
