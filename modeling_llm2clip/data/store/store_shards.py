"""Reads rows of many shards of an embedding store at once, and verifies the shards.

A shard is a safetensors file with a tensor `embeddings` (rows, dim). Its metadata has the hash of
the store's plan, so that no shard is taken for another store's. A shard is hashed when a process
first reads from it, at about 1 GB per second and core.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..._suggestions import counted, list_first
from ..atomic_files import hash_file
from ..key_arrays import Array
from .store_manifest import STORED_DTYPES, ShardRecord, StoreManifest

PLAN = "plan"  # in the metadata of a shard
_READ_AT_RANDOM, _READ_AHEAD = 1, 3  # of madvise(2), on Linux and macOS


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
        size = manifest.num_rows * manifest.row_bytes
        self._reads_ahead = bool(
            _find_madvise() and size > PAGESIZE * os.sysconf("SC_PHYS_PAGES") // 2
        )

    def read(self, rows: Array) -> Array:
        """Read rows, (N, D) in the stored dtype, bfloat16 as uint16; damaged files raise."""
        manifest = self._manifest
        embeddings = np.empty((len(rows), manifest.dim), STORED_DTYPES[manifest.dtype][1])
        if not len(rows):
            return embeddings
        shards = rows // manifest.rows_per_shard
        order = np.argsort(shards, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        numbers = shards[[places[0] for places in groups]].tolist()
        self.verify(numbers)
        for shard, places in zip(numbers, groups, strict=True):
            view, chosen = self._map(shard), rows[places] - shard * manifest.rows_per_shard
            if self._reads_ahead:
                _read_ahead(view, chosen)
            is_run = (np.diff(chosen) == 1).all()  # a slice is copied faster than its rows
            part = view[chosen[0] : chosen[-1] + 1] if is_run else view[chosen]
            if len(groups) == 1:
                return np.array(part)  # in the order of the rows already
            embeddings[places] = part
        return embeddings

    def verify(self, shards: Iterable[int]) -> None:
        """Compare the hashes of shards with the manifest, unless this was done before."""
        new = [shard for shard in shards if shard not in self.verified]
        records = [self._manifest.shards[shard] for shard in new]
        if errors := list_errors(partial(check_file, self._folder), records):
            raise ValueError(describe_damage(self._folder, errors))
        self.verified.update(new)

    def _map(self, shard: int) -> Array:
        if shard not in self._views:
            record = self._manifest.shards[shard]
            # Unlike Python's mmap, Arrow's holds no file open: a store may have thousands.
            with pa.memory_map(str(self._folder / record.file)) as mapped:
                buffer = mapped.read_buffer()
            _advise(buffer.address, buffer.size, _READ_AT_RANDOM)
            dtype = STORED_DTYPES[self._manifest.dtype][1]
            start = record.bytes - record.rows * self._manifest.row_bytes
            view = np.frombuffer(buffer, dtype, offset=start)
            self._views[shard] = view.reshape(record.rows, self._manifest.dim)
        return self._views[shard]


def check_size(folder: Path, record: ShardRecord) -> None:
    """Check that a shard's file is there, with all of its bytes."""
    file = folder / record.file
    if not file.is_file():
        raise ValueError(f"{file.name}: missing")
    if (size := file.stat().st_size) != record.bytes:
        raise ValueError(f"{file.name}: {size} bytes, the manifest says {record.bytes}")


def check_file(folder: Path, record: ShardRecord) -> None:
    """Check every byte of a shard."""
    check_size(folder, record)
    if (digest := hash_file(folder / record.file)) != record.sha256:
        raise ValueError(f"{record.file}: SHA-256 is {digest}, the manifest says {record.sha256}")


def list_errors(check: Callable[[ShardRecord], None], records: Sequence[ShardRecord]) -> list[str]:
    """Check records of shards in threads; returns a message per damaged shard, in their order."""
    if not records:
        return []
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        messages = pool.map(partial(_describe_error, check), records)
        return [message for message in messages if message]


def _describe_error(check: Callable[[ShardRecord], None], record: ShardRecord) -> str:
    try:
        check(record)
    except ValueError as error:
        return str(error)
    return ""


def describe_damage(folder: Path, errors: Sequence[str]) -> str:
    """Name the damaged files of a store, and the ways to repair it."""
    return (
        f"{folder}: {counted(len(errors), 'damaged file')}: {list_first(errors, '; ')}. Restore "
        "what is damaged from a copy; or delete these files and run the same extraction again, "
        "which computes missing shards; or delete the store and extract it again."
    )


def _read_ahead(view: Array, rows: Array) -> None:
    """Let the kernel read rows of a mapped shard from the disk in parallel."""
    start, size = view.ctypes.data, view.strides[0]
    for row in np.unique(rows).tolist():
        _advise(start + row * size, size, _READ_AHEAD)


def _advise(address: int, size: int, advice: int) -> None:
    """Advise the kernel about mapped memory; a system without such advice works without it."""
    if madvise := _find_madvise():
        start = address // PAGESIZE * PAGESIZE
        madvise(start, address + size - start, advice)


@cache
def _find_madvise() -> Any:
    if sys.platform not in ("linux", "darwin"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
