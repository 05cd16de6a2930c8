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
from numpy.lib.stride_tricks import as_strided

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
        """Read rows, (N, D) in the stored dtype, bfloat16 as uint16; damaged files raise.

        One array over the memory from the first to the last of the rows has the rows of all shards
        among its own, which begin at every number. It is gathered from once; a gather per shard
        copies each row twice. The memory between the shards is not touched.
        """
        manifest = self._manifest
        if not len(rows):
            return np.empty((0, manifest.dim), STORED_DTYPES[manifest.dtype][1])
        shards = rows // manifest.rows_per_shard
        numbers, places = np.unique(shards, return_inverse=True)
        self.verify(numbers.tolist())
        starts = np.array([self._map(shard).ctypes.data for shard in numbers.tolist()])
        within = rows - shards * manifest.rows_per_shard
        addresses = starts[places] + within * manifest.row_bytes
        if self._reads_ahead:
            for address in np.unique(addresses).tolist():  # from the disk in parallel
                _advise(address, manifest.row_bytes, _READ_AHEAD)
        lowest = int(addresses.argmin())
        row = self._views[int(shards[lowest])][within[lowest]]
        count = (int(addresses.max()) - row.ctypes.data) // row.itemsize + 1
        memory = as_strided(row, (count, manifest.dim), row.strides * 2)  # read-only, as the row is
        return np.asarray(memory[(addresses - row.ctypes.data) // row.itemsize])

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
            # Another thread may have mapped it, and reads by addresses: the first view stays.
            self._views.setdefault(shard, view.reshape(record.rows, self._manifest.dim))
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
