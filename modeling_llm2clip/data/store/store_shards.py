"""The shards of an embedding store: their files, and reading rows of many of them at once.

A shard is a safetensors file with two tensors: `checksums` (rows,) int64, and `embeddings` (rows,
dim). Its metadata has the hash of the store's plan, so that no shard is taken for another store's.
The checksum of a row is the first 8 bytes of its SHA-256; the manifest has the SHA-256 of
everything before the embeddings. So a row is checked by itself when a process first reads it, and a
first batch of random rows does not have to wait until whole shards were read. What was checked is
not checked again.

SHA-256 is in Python's standard library and is what model hubs publish. With rows of 8 KB, one
processor core checks about 150,000 rows per second (1.2 GB/s, measured by
`benchmarks/scale/scale_store.py`), once per row and process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import cache
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..._suggestions import counted
from ..atomic_files import hash_file
from ..key_arrays import Array
from .store_manifest import STORED_DTYPES, ShardRecord, StoreManifest

CHECKSUM_BYTES = 8
_PAGE = 4096  # bytes; embeddings begin at a page, so that a row touches as few as it can
_SHOWN = 5
_METADATA, _PLAN = "__metadata__", "plan"  # the first is safetensors' name
# Mapped pages that were read count as resident, although the system may take them at any time. They
# are given back when they may have come to this many bytes; the kernel maps 64 KiB around each row.
_MOST_MAPPED_BYTES = 2**32
_MAPPED_AROUND = 2**16
_RUN = 16  # rows that follow each other, on the average, where runs are copied as such


def make_header(num_rows: int, manifest: StoreManifest) -> bytes:
    """Make the safetensors header of a shard."""
    name, _ = STORED_DTYPES[manifest.dtype]
    middle = CHECKSUM_BYTES * num_rows
    end = middle + num_rows * manifest.row_bytes
    shape = [num_rows, manifest.dim]
    header = {
        _METADATA: {_PLAN: manifest.hash_plan()},
        "checksums": {"dtype": "I64", "shape": [num_rows], "data_offsets": [0, middle]},
        "embeddings": {"dtype": name, "shape": shape, "data_offsets": [middle, end]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + middle) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def compute_checksums(embeddings: Array, places: Array | None = None) -> Array:
    """Compute the checksums of contiguous (N, D) rows, int64; of those at some places if given."""
    size = embeddings.shape[1] * embeddings.itemsize
    content = embeddings.view(np.uint8).reshape(-1).data
    starts = range(0, len(content), size) if places is None else (places * size).tolist()
    sha256 = hashlib.sha256
    digests = [sha256(content[start : start + size]).digest()[:CHECKSUM_BYTES] for start in starts]
    return np.frombuffer(b"".join(digests), dtype="<i8")


class StoreShards:
    """Reads and checks rows of the shards of a complete store.

    `checked` are the bits of the rows that were checked already, packed by numpy; None for none.
    """

    def __init__(self, folder: Path, manifest: StoreManifest, checked: Array | None = None) -> None:
        self._folder = folder
        self._manifest = manifest
        self._dtype = np.dtype(STORED_DTYPES[manifest.dtype][1])
        # Pages of zeros take no memory until they are written.
        self.checked = np.zeros(manifest.num_rows, np.bool_)
        if checked is not None:
            self.checked = np.unpackbits(checked, count=manifest.num_rows).view(np.bool_)
        self._buffers: dict[int, tuple[pa.Buffer, Array]] = {}
        self._addresses = np.zeros(manifest.num_shards, np.int64)  # of embeddings; 0: not mapped
        self._mapped_bytes = 0
        self._fits_memory = manifest.num_rows * manifest.row_bytes < count_memory_bytes() // 2

    def read(self, rows: Array) -> Array:
        """Read rows, (N, D) in the stored dtype, bfloat16 as uint16; damaged ones raise."""
        manifest = self._manifest
        if not len(rows):
            return np.empty((0, manifest.dim), self._dtype)
        shards = rows // manifest.rows_per_shard
        for shard in np.unique(shards[self._addresses[shards] == 0]).tolist():
            self._map(shard)
        within = rows - shards * manifest.rows_per_shard
        addresses = self._addresses[shards] + within * manifest.row_bytes
        unchecked = np.flatnonzero(~self.checked[rows])
        self._announce(addresses if not self._fits_memory else addresses[unchecked])
        found = self._gather(addresses)
        if len(unchecked):
            self._check(found, rows, unchecked)
        self._forget_pages(len(rows))
        return found

    def _check(self, found: Array, rows: Array, places: Array) -> None:
        """Check rows that were read, and note them as checked."""
        per_shard = self._manifest.rows_per_shard
        wanted = np.empty(len(places), np.int64)
        shards = rows[places] // per_shard
        for shard in np.unique(shards).tolist():
            of_shard = np.flatnonzero(shards == shard)
            wanted[of_shard] = self._buffers[shard][1][rows[places][of_shard] - shard * per_shard]
        damaged = np.flatnonzero(compute_checksums(found, places) != wanted)
        if len(damaged):
            bad = np.unique(rows[places][damaged]).tolist()
            files = sorted({self._manifest.shards[row // per_shard].file for row in bad})
            raise ValueError(
                f"{self._folder}: {counted(len(bad), 'damaged row')}, among them {bad[:_SHOWN]}, "
                f"in {', '.join(files[:_SHOWN])}. Restore these files from a copy, or delete the "
                "store and extract it again."
            )
        self.checked[rows[places]] = True

    def _map(self, shard: int) -> None:
        """Map a shard, and check what comes before its embeddings."""
        record = self._manifest.shards[shard]
        check_size(self._folder, record)
        # Unlike Python's mmap, Arrow's holds no file open: a store may have thousands of shards.
        with pa.memory_map(str(self._folder / record.file)) as mapped:
            buffer = mapped.read_buffer()
        head = record.bytes - record.rows * self._manifest.row_bytes
        digest = hashlib.sha256(memoryview(buffer)[:head]).hexdigest()
        if digest != record.head_sha256:
            raise ValueError(
                f"{self._folder / record.file} is damaged, or belongs to another store: its first "
                f"{head} bytes have the SHA-256 {digest}, the manifest says {record.head_sha256}. "
                "Restore it from a copy, or delete the store and extract it again."
            )
        start = head - CHECKSUM_BYTES * record.rows
        # A view: a copy would take eight bytes a row in every process.
        checksums = np.frombuffer(buffer, "<i8", count=record.rows, offset=start)
        self._buffers[shard] = buffer, checksums
        self._addresses[shard] = buffer.address + head
        advise(buffer.address, buffer.size, Advice.RANDOM)  # no reading ahead of each row

    def _gather(self, addresses: Array) -> Array:
        """Copy the rows at some addresses.

        They are read from an array over all memory from the first to the last of them. Its row k
        are the `dim` numbers from number k on, so that the rows of all shards are rows of it, and
        one gather is enough. The memory between the shards is not touched.
        """
        dim, size = self._manifest.dim, self._dtype.itemsize
        runs = Runs(addresses, step=self._manifest.row_bytes)
        if len(runs) * _RUN < len(addresses):  # copying whole runs is faster
            found = np.empty((len(addresses), dim), self._dtype)
            for start, stop in runs:
                shape, strides = (stop - start, dim), (dim * size, size)
                found[start:stop] = view_memory(int(addresses[start]), shape, strides, self._dtype)
            return found
        first = int(addresses.min())
        count = (int(addresses.max()) - first) // size + 1
        memory = view_memory(first, (count, dim), (size, size), self._dtype)
        gathered: Array = memory[(addresses - first) // size]
        return gathered

    def _announce(self, addresses: Array) -> None:
        """Advise the kernel which rows come next, so that the disk reads them in parallel."""
        if not len(addresses):
            return
        ordered = np.unique(addresses)
        for start, stop in Runs(ordered, step=self._manifest.row_bytes):
            size = (stop - start) * self._manifest.row_bytes
            advise(int(ordered[start]), size, Advice.READ_AHEAD)

    def _forget_pages(self, num_rows: int) -> None:
        self._mapped_bytes += num_rows * (self._manifest.row_bytes + _MAPPED_AROUND)
        total = sum(buffer.size for buffer, _ in self._buffers.values())
        if min(self._mapped_bytes, total) > _MOST_MAPPED_BYTES:
            for buffer, _ in self._buffers.values():
                advise(buffer.address, buffer.size, Advice.FORGET)
            self._mapped_bytes = 0


class Runs:
    """Begin and end of the runs in (N,) integers: numbers that grow by the same step."""

    def __init__(self, numbers: Array, *, step: int) -> None:
        self._breaks = np.flatnonzero(np.diff(numbers) != step) + 1
        self._end = len(numbers)

    def __len__(self) -> int:
        return len(self._breaks) + 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        breaks = self._breaks.tolist()
        return zip([0, *breaks], [*breaks, self._end], strict=True)


def check_size(folder: Path, record: ShardRecord) -> None:
    """Check that a shard's file is there, with all of its bytes."""
    file = folder / record.file
    if not file.is_file():
        raise ValueError(f"{file.name}: missing")
    if (found := file.stat().st_size) != record.bytes:
        raise ValueError(f"{file.name}: {found} bytes, the manifest says {record.bytes}")


def check_file(folder: Path, record: ShardRecord) -> None:
    """Check every byte of a shard."""
    check_size(folder, record)
    if (digest := hash_file(folder / record.file)) != record.sha256:
        raise ValueError(f"{record.file}: SHA-256 is {digest}, the manifest says {record.sha256}")


def check_head(folder: Path, record: ShardRecord, manifest: StoreManifest) -> None:
    """Check the size of a shard, what comes before its embeddings, and that it is the store's."""
    check_size(folder, record)
    size = record.bytes - record.rows * manifest.row_bytes
    with (folder / record.file).open("rb") as opened:
        head = opened.read(max(0, size))
    if (digest := hashlib.sha256(head).hexdigest()) != record.head_sha256:
        raise ValueError(
            f"{record.file}: SHA-256 of its first {size} bytes is {digest}, its record says "
            f"{record.head_sha256}"
        )
    if not head.startswith(make_header(record.rows, manifest)):
        raise ValueError(
            f"{record.file}: it is of another store, or of an earlier version: its header does not "
            f"say that its plan has the SHA-256 {manifest.hash_plan()}"
        )


def list_errors(check: Any, records: Sequence[ShardRecord]) -> list[str]:
    """Check records of shards in threads, as a file system answers many questions at once.

    Returns one message per damaged shard, in the order of the shards.
    """

    def describe(record: ShardRecord) -> str | None:
        try:
            check(record)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        return [error for error in pool.map(describe, records) if error is not None]


class Advice(IntEnum):
    """Intended use of mapped memory; the numbers of Linux and macOS, see madvise(2)."""

    RANDOM = 1  # no reading ahead
    READ_AHEAD = 3  # read it now, while the process goes on
    FORGET = 4  # no longer count it as resident; it is read again when it is used


def advise(address: int, size: int, advice: Advice) -> None:
    """Advise the kernel about mapped memory; a system without such advice works without it."""
    madvise = _find_madvise()
    if madvise is not None:
        start = address // PAGESIZE * PAGESIZE
        madvise(start, address + size - start, advice)


def view_memory(
    address: int, shape: tuple[int, int], strides: tuple[int, int], dtype: np.dtype[Any]
) -> Array:
    """Return a read-only array over mapped memory, which must stay mapped; strides in bytes."""
    data = (address, True)
    return np.asarray(_Memory(data=data, shape=shape, strides=strides, typestr=dtype.str))


def count_memory_bytes() -> int:
    """Return how much memory the machine has; 0 if it does not say."""
    if sys.platform not in ("linux", "darwin"):
        return 0
    return PAGESIZE * os.sysconf("SC_PHYS_PAGES")


class _Memory:
    """Has the attribute that numpy makes an array of."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = {**interface, "version": 3}


@cache
def _find_madvise() -> Any:
    if sys.platform not in ("linux", "darwin"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
