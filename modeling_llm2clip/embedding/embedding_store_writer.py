"""Writes an embedding store: the index of its items first, then its shards.

Machines that share no folder put their shards into object storage. The first one puts index and
manifest there, and the others begin with these. A complete shard is copied there, and then its
record, so that a shard with a record is whole. `finish` copies all shards into the folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from .._suggestions import counted, list_first
from ..data.atomic_files import list_differences
from ..data.remote.object_storage import ObjectStorage
from ..data.safetensors_files import read_metadata, serialize_tensors
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
from ..data.store.store_shards import PLAN, check_file, check_size
from .sharded_writer import ShardedWriter, begin_output, explain_full_output, read_begun

_COPIED_AT_ONCE = 4


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

    @classmethod
    def open(
        cls, folder: Path, planned: StoreManifest, list_items: Callable[[Path], StoreItems]
    ) -> EmbeddingStoreWriter:
        """Begin a store, or continue the same one.

        `list_items` makes the items of a store that is not begun; it takes an empty folder for
        temporary files.
        """
        if not planned.is_begun(folder):
            planned.require_folder(folder)
            begin_output(folder, _write_index(folder, planned, list_items))
        return cls(folder, read_begun(folder, planned))

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the store."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def encode(self, shard: int, embeds: Tensor) -> tuple[bytes, dict[str, Any]]:  # noqa: ARG002
        """Return a shard as safetensors."""
        metadata = {PLAN: self.manifest.hash_plan()}
        return serialize_tensors({"embeddings": embeds}, metadata), {"rows": len(embeds)}

    def check_file(self, record: ShardRecord) -> None:
        """Raise ValueError if a shard is missing, truncated or of another store."""
        check_size(self.folder, record)
        plan, expected = read_metadata(self.folder / record.file), self.manifest.hash_plan()
        if plan.get(PLAN) != expected:
            raise ValueError(
                f"{record.file}: it is of another store: its plan has the SHA-256 "
                f"{plan.get(PLAN)}, this store's {expected}"
            )

    def complete_manifest(
        self, manifest: StoreManifest, shards: tuple[ShardRecord, ...]
    ) -> StoreManifest:
        """Put the records of all shards into the manifest."""
        counts = dict(manifest.counts)
        if manifest.content != VISION_EMBEDS:
            name = "truncated" if manifest.content == CAPTION_EMBEDS else TOO_LONG
            counts[name] = sum(record.num_truncated for record in shards)
        return super().complete_manifest(replace(manifest, counts=counts), shards)

    def require_complete(self) -> None:
        """Complete the manifest; every shard must be there."""
        if not self.finish():
            missing = self.list_missing()
            raise ValueError(
                f"{self.folder} is not complete: {len(missing)} of {self.manifest.num_shards} "
                f"shards are missing: {list_first(missing)}. Run the same extraction again, or "
                "the partitions that did not end; they continue."
            )


def _write_index(
    folder: Path, planned: StoreManifest, list_items: Callable[[Path], StoreItems]
) -> StoreManifest:
    """Write the index, and complete the manifest with what it holds."""
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
    """One machine's access to a store whose shards are in object storage.

    Use `begin` where the records are at hand, and `join` where the store is begun.

    Args:
        folder: Folder of this machine.
        manifest: Content of the complete store.
        storage: Place of complete shards.
    """

    def __init__(self, folder: Path, manifest: StoreManifest, storage: ObjectStorage) -> None:
        super().__init__(folder, manifest)
        self.storage = storage
        self._places = f"{folder} and {storage.url}"

    @classmethod
    def begin(
        cls,
        folder: Path,
        storage: ObjectStorage,
        planned: StoreManifest,
        list_items: Callable[[Path], StoreItems],
    ) -> SharedStoreWriter:
        """Begin a store, or continue the same one, here and in the storage."""
        is_begun = _pull_plan(folder, storage)
        writer = cls(
            folder, EmbeddingStoreWriter.open(folder, planned, list_items).manifest, storage
        )
        missing = writer.list_missing()
        if writer.manifest.complete and missing:
            raise ValueError(
                f"{folder} is complete, and {storage.url} lacks "
                f"{counted(len(missing), 'shard')} of it. Leave out the storage, which is for "
                "stores that are being computed, and copy the folder; or name a new folder."
            )
        if not is_begun:
            for name in (INDEX_FILE, MANIFEST_FILE):
                storage.push(folder / name)
            _pull_plan(folder, storage)  # another store may have begun there meanwhile
        return writer

    @classmethod
    def join(cls, folder: Path, storage: ObjectStorage) -> SharedStoreWriter:
        """Take part in a store that is begun."""
        folder.mkdir(parents=True, exist_ok=True)
        if not _pull_plan(folder, storage):
            raise ValueError(f"{storage.url} holds no store. Extract into it first.")
        return cls(folder, StoreManifest.read(folder), storage)

    def write(self, shard: int, embeds: Tensor, num_truncated: int = 0) -> None:
        """Write a shard, and move it to the storage."""
        super().write(shard, embeds, num_truncated)
        for name in self._list_files(shard):
            self.storage.push(self.folder / name)
            (self.folder / name).unlink()

    def is_done(self, shard: int) -> bool:
        """Return whether a shard is complete in the storage."""
        return self.storage.has(self.manifest.name_record(shard))

    def list_missing(self) -> list[int]:
        """List the shards that are not complete in the storage."""
        names, shards = self.storage.list_sizes().keys(), range(self.manifest.num_shards)
        return [shard for shard in shards if self.manifest.name_record(shard) not in names]

    def finish(self) -> bool:
        """Copy the shards here if all are in the storage, and complete the manifest."""
        if self.list_missing():
            return False
        absent = set(range(self.manifest.num_shards)) - self.find_records().keys()
        with ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
            list(pool.map(self._fetch, sorted(absent)))
        return super().finish()

    def _fetch(self, shard: int) -> None:
        for name in self._list_files(shard):
            self.storage.pull(name, self.folder)
        record = self._read_record(shard)
        assert record is not None  # it has just come
        try:
            check_file(self.folder, record)
        except ValueError as error:
            (self.folder / self.manifest.name_record(shard)).unlink()
            raise ValueError(
                f"{self.storage.url} has a damaged shard ({error}). Delete it and the .json file "
                "beside it there, and extract again."
            ) from error

    def _list_files(self, shard: int) -> tuple[str, ...]:
        """Name the files of a complete shard, the record last: it says that the other is whole."""
        return self.manifest.name_shard(shard), self.manifest.name_record(shard)


def _pull_plan(folder: Path, storage: ObjectStorage) -> bool:
    """Copy manifest and index here unless they are; returns whether the storage has them."""
    if not storage.has(MANIFEST_FILE):
        return False
    if not StoreManifest.is_begun(folder):
        folder.mkdir(parents=True, exist_ok=True)
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
