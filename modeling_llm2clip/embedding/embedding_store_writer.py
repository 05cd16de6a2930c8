"""Writes an embedding store: the index of its items first, then its shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..data.safetensors_files import iterate_tensors, read_metadata, serialize_tensors
from ..data.store.store_index import write_index
from ..data.store.store_manifest import (
    CAPTION_EMBEDS,
    INDEX_FILE,
    TOO_LONG,
    VISION_EMBEDS,
    ShardRecord,
    StoreManifest,
)
from ..data.store.store_shards import (
    PLAN,
    check_file,
    check_size,
    describe_damage,
    list_errors,
)
from .sharded_writer import ShardedWriter, begin_output, explain_full_output, read_begun


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

    def renew(self) -> None:
        """Write the complete shards, which name the plan, and the manifest anew."""
        for shard in self.list_missing():
            with self.hold(shard):  # another run would name the plan before
                pass
        records = self.find_records()
        # A new hash of what is damaged would make it whole.
        if errors := list_errors(partial(check_file, self.folder), [*records.values()]):
            raise ValueError(describe_damage(self.folder, errors))
        for shard, record in records.items():
            (_, embeds), *_ = iterate_tensors([self.folder / record.file])
            self.write(shard, embeds, record.num_truncated)
        super().renew()

    def complete_manifest(
        self, manifest: StoreManifest, shards: tuple[ShardRecord, ...]
    ) -> StoreManifest:
        """Put the records of all shards into the manifest."""
        counts = dict(manifest.counts)
        if manifest.content != VISION_EMBEDS:
            name = "truncated" if manifest.content == CAPTION_EMBEDS else TOO_LONG
            counts[name] = sum(record.num_truncated for record in shards)
        return super().complete_manifest(replace(manifest, counts=counts), shards)


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
