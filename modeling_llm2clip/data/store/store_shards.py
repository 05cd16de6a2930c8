"""Reads rows of the shards of an embedding store, and verifies the shards.

A shard is a safetensors file with a tensor `embeddings` (rows, dim). It is hashed when a process
first reads from it, at about 1 GB per second and core.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..key_arrays import Array, group_positions
from .store_manifest import STORED_DTYPES, StoreManifest


class StoreShards:
    """Reads rows of the shards of a complete store.

    Args:
        folder: Folder of the store.
        manifest: Its manifest.
        verified: Numbers of the shards that were verified already.
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, verified: Collection[int] = ()
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self.verified = set(verified)
        self._views: dict[int, Array] = {}  # (rows, dim) of each mapped shard
        self._first_rows = np.cumsum([0, *(shard.rows for shard in manifest.shards)])

    def read(self, rows: Array) -> Array:
        """Read rows, (N, D) in the stored dtype, bfloat16 as uint16; damaged files raise."""
        shards = np.searchsorted(self._first_rows, rows, side="right") - 1
        parts = dict(group_positions(shards))
        if new := parts.keys() - self.verified:
            records = [self._manifest.shards[shard] for shard in sorted(new)]
            self._manifest.require_intact(self._folder, records)
            self.verified |= new
        embeds = np.empty((len(rows), self._manifest.dim), STORED_DTYPES[self._manifest.dtype])
        for shard, positions in parts.items():
            embeds[positions] = self._map(shard)[rows[positions] - self._first_rows[shard]]
        return embeds

    def _map(self, shard: int) -> Array:
        if shard not in self._views:
            record = self._manifest.shards[shard]
            # Unlike Python's mmap, Arrow's holds no file open: a store may have thousands.
            with pa.memory_map(str(self._folder / record.file)) as mapped:
                buffer = mapped.read_buffer()
            start = record.bytes - record.rows * self._manifest.row_bytes
            view = np.frombuffer(buffer, STORED_DTYPES[self._manifest.dtype], offset=start)
            self._views[shard] = view.reshape(record.rows, self._manifest.dim)
        return self._views[shard]
