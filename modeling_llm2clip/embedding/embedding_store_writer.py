"""Writes an embedding store: the index of its items first, then its shards."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa  # type: ignore[import-untyped]

from ..data.atomic_files import hash_file, sync_folder
from ..data.store.store_index import write_index
from ..data.store.store_manifest import INDEX_FILE, ShardRecord, StoreManifest
from ..data.store.store_shards import check_head
from .sharded_writer import ShardedWriter, ShardWriter, begin_or_continue, explain_full_output

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
        if manifest.content == "caption_embeds":
            counts["truncated"] = sum(record.num_truncated for record in shards)
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
