"""Writes the rows of one shard of an embedding store, batch by batch, and completes it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..atomic_files import (
    explain_full_disk,
    hash_file,
    lock_unless_held,
    sync_folder,
    write_atomically,
)
from .store_manifest import (
    STORED_DTYPES,
    ShardRecord,
    StoreManifest,
    shard_file,
    shard_stem,
    write_sealed,
)
from .store_shards import CHECKSUM_BYTES, Runs, compute_checksums, make_header

Array: TypeAlias = np.ndarray[Any, Any]


class ShardWriter:
    """Writes the batches of one shard, in their order; a context manager.

    The rows are written to their places in `shard-00000.part`. `shard-00000.journal` has one line
    per batch that was written: a hash of the checksums of its rows. A run that continues checks the
    rows against these lines, so nothing has to be synced before the shard is complete: batches that
    the disk lost are computed again. The part is locked, where the file system has locks: a second
    run of the same shard is refused.

    Attributes:
        num_done: batches that are written.
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, shard: int, batches: Sequence[Array]
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._rows = manifest.rows_of_shard(shard)
        self._shard = shard
        self._batches = batches
        stem = shard_stem(shard)
        self._part, self._journal = folder / f"{stem}.part", folder / f"{stem}.journal"
        self._header = make_header(len(self._rows), manifest)
        self._head_bytes = len(self._header) + CHECKSUM_BYTES * len(self._rows)
        self._checksums = np.zeros(len(self._rows), "<i8")
        complete = folder / shard_file(shard)
        # A run may have been killed between renaming and noting it.
        is_renamed = complete.exists() and self._journal.exists() and not self._part.exists()
        found = complete if is_renamed else self._part
        self._descriptor = os.open(found, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_unless_held(found, self._descriptor):
                raise ValueError(
                    f"Another run writes {self._name} in {folder} now. Let it end, or give each "
                    "run a partition of its own."
                )
            if is_renamed:
                complete.rename(self._part)
            self._reserve()
            self.num_done = self._count_written()
            self._lines = self._journal.open("ab", buffering=0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        os.close(self._descriptor)

    def write(self, embeddings: Tensor) -> None:
        """Write the next batch.

        Args:
            embeddings: (rows of the batch, D) of any float dtype.

        Raises:
            ValueError: the shape is wrong, or values are not finite in the store's dtype.
            OSError: the disk is full. The batches before stay.
        """
        places = np.asarray(self._batches[self.num_done])
        wanted = (len(places), self._manifest.dim)
        if tuple(embeddings.shape) != wanted:
            raise ValueError(
                f"Batch {self.num_done} of shard {self._shard} takes embeddings of shape {wanted}, "
                f"got {tuple(embeddings.shape)}."
            )
        stored = embeddings.to("cpu", getattr(torch, self._manifest.dtype)).contiguous()
        _require_finite(stored, self._rows.start + places, embeddings)
        rows = stored.view(torch.uint8).numpy()
        self._checksums[places] = compute_checksums(rows)
        size = self._manifest.row_bytes
        with explain_full_store(self._folder, self._name):
            for start, stop in Runs(places, step=1):
                offset = self._head_bytes + int(places[start]) * size
                _write_at(self._descriptor, rows[start:stop].reshape(-1).data, offset)
            _write_all(self._lines.fileno(), self._make_line(places))
        self.num_done += 1

    def seal(self, num_truncated: int = 0) -> ShardRecord:
        """Complete the shard, all of whose batches are written.

        Args:
            num_truncated: how many of its captions were longer than the model reads.

        Returns:
            What the manifest will say of it.

        Raises:
            OSError: the disk is full.
        """
        if self.num_done < len(self._batches):
            raise ValueError(f"{self.num_done} of {len(self._batches)} batches are written.")
        head = self._header + self._checksums.tobytes()
        name = shard_file(self._shard)
        with explain_full_store(self._folder, self._name):
            _write_at(self._descriptor, memoryview(head), 0)
            os.fsync(self._descriptor)
            record = ShardRecord(
                file=name,
                first_row=self._rows.start,
                rows=len(self._rows),
                bytes=self._count_bytes(),
                sha256=hash_file(self._part),
                head_sha256=hashlib.sha256(head).hexdigest(),
                num_truncated=num_truncated,
            )
            self._part.replace(self._folder / name)
            sync_folder(self._folder)
            sealed = write_sealed(asdict(record)).encode()
            write_atomically(self._folder / f"{shard_stem(self._shard)}.json", sealed)
        self._journal.unlink(missing_ok=True)
        return record

    def read(self) -> Array:
        """Read all rows of the shard, whose batches are written.

        Returns:
            (rows, D) in the manifest's dtype.
        """
        return np.array(self._map())

    def discard(self) -> None:
        """Delete what is written, once something else holds the shard."""
        self._part.unlink()
        self._journal.unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return f"shard {self._shard} of {self._manifest.num_shards}"

    def _count_bytes(self) -> int:
        return self._head_bytes + len(self._rows) * self._manifest.row_bytes

    def _reserve(self) -> None:
        """Take the room on the disk, so that a full one is noticed before anything is computed."""
        if os.fstat(self._descriptor).st_size != self._count_bytes():
            self._journal.unlink(missing_ok=True)
            os.ftruncate(self._descriptor, 0)
            try:
                _allocate(self._descriptor, self._count_bytes())
            except OSError:
                self._part.unlink(missing_ok=True)
                raise

    def _count_written(self) -> int:
        """Count the batches that are on disk as they were written; drops what follows them."""
        lines = (
            self._journal.read_bytes().splitlines(keepends=True) if self._journal.exists() else []
        )
        found = self._map()
        done = 0
        for places, line in zip(self._batches, lines, strict=False):
            self._checksums[places] = compute_checksums(np.asarray(found[places]))
            if self._make_line(places) != line:
                break
            done += 1
        if done < len(lines):
            os.truncate(self._journal, sum(map(len, lines[:done])))
        return done

    def _map(self) -> Array:
        kind = STORED_DTYPES[self._manifest.dtype][1]
        shape = (len(self._rows), self._manifest.dim)
        return np.memmap(self._part, kind, "r", offset=self._head_bytes, shape=shape)

    def _make_line(self, places: Array) -> bytes:
        digest = hashlib.sha256(np.ascontiguousarray(places, "<i8").tobytes())
        digest.update(self._checksums[places].tobytes())
        return digest.hexdigest().encode() + b"\n"


def explain_full_store(folder: Path, what: str) -> AbstractContextManager[None]:
    """Say what to do when the disk is full.

    Args:
        folder: folder of the store.
        what: what is written.
    """
    remedy = "Complete shards stay. Free some space and run the same command again; it continues"
    return explain_full_disk(folder, f"to write {what}", remedy)


def _allocate(descriptor: int, size: int) -> None:
    """Take room for a file, where the system and the file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    os.ftruncate(descriptor, size)


def _require_finite(stored: Tensor, rows: Array, embeddings: Tensor) -> None:
    bad = (~torch.isfinite(stored).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return
    if torch.isfinite(embeddings).all():
        reason = "they do not fit this dtype: store float32"
    else:
        reason = "the model computes NaN or infinity: check it with llm2clip doctor"
    raise ValueError(
        f"{len(bad)} embeddings are not finite in {stored.dtype}, the first in row "
        f"{int(rows[bad].min())}; {reason}."
    )


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
