"""Collects the rows of one shard on disk, batch by batch, until its file can be written."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..data.atomic_files import explain_full_disk, lock_unless_held
from ..data.store.store_manifest import STORED_DTYPES, ShardedManifest, StoreManifest
from ..data.store.store_shards import CHECKSUM_BYTES, Runs, compute_checksums, make_header

Array: TypeAlias = np.ndarray[Any, Any]


class ShardWriter:
    """Writes the batches of one shard, in their order; a context manager.

    The rows are written to their places in `shard-00000.part`, which has room for the head of a
    shard of a store. `shard-00000.journal` has one line per batch that was written: a hash of the
    checksums of its rows. A run that continues checks the rows against these lines, so nothing has
    to be synced before the shard is complete: batches that the disk lost are computed again. The
    part is locked, where the file system has locks: a second run of the same shard is refused.

    Args:
        folder: Folder of part and journal.
        manifest: Dtype, width and number of the rows.
        shard: Number of the shard, from 0.
        batches: Places in the shard of the rows of each batch.
        seal: Completes the shard; takes this writer and how many captions were truncated.

    Attributes:
        part: File of the rows.
        num_done: Batches that are written.
    """

    def __init__(
        self,
        folder: Path,
        manifest: StoreManifest,
        shard: int,
        batches: Sequence[Array],
        seal: Callable[[ShardWriter, int], object],
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._rows = manifest.rows_of_shard(shard)
        self._batches = batches
        self._name = name_shard(manifest, shard)
        self._seal = seal
        complete = folder / manifest.name_shard(shard)
        self.part, self._journal = complete.with_suffix(".part"), complete.with_suffix(".journal")
        self._header = make_header(len(self._rows), manifest)
        self._head_bytes = len(self._header) + CHECKSUM_BYTES * len(self._rows)
        self._num_bytes = self._head_bytes + len(self._rows) * manifest.row_bytes
        self._checksums = np.zeros(len(self._rows), "<i8")
        # A run may have been killed between renaming and noting it.
        is_renamed = complete.exists() and self._journal.exists() and not self.part.exists()
        found = complete if is_renamed else self.part
        self._descriptor = os.open(found, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_unless_held(found, self._descriptor):
                raise ValueError(
                    f"Another run writes {self._name} in {folder} now. Let it end, or give each "
                    "run a partition of its own."
                )
            if is_renamed:
                complete.rename(self.part)
            self._reserve()
            self.num_done = self._count_written()
            self._lines = self._journal.open("ab", buffering=0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        os.close(self._descriptor)

    def write(self, embeddings: Tensor) -> None:
        """Write the next batch."""
        places = np.asarray(self._batches[self.num_done])
        wanted = (len(places), self._manifest.dim)
        if tuple(embeddings.shape) != wanted:
            raise ValueError(
                f"Batch {self.num_done} of {self._name} takes embeddings of shape {wanted}, got "
                f"{tuple(embeddings.shape)}."
            )
        stored = embeddings.to("cpu", getattr(torch, self._manifest.dtype)).contiguous()
        _require_finite(stored, self._rows.start + places, embeddings)
        rows = stored.view(torch.uint8).numpy()
        self._checksums[places] = compute_checksums(rows)
        size = self._manifest.row_bytes
        with explain_full_output(self._folder, self._name):
            for start, stop in Runs(places, step=1):
                offset = self._head_bytes + int(places[start]) * size
                self._write_at(rows[start:stop].reshape(-1).data, offset)
            line = self._make_line(places)
            while line:
                line = line[os.write(self._lines.fileno(), line) :]
        self.num_done += 1

    def seal(self, num_truncated: int = 0) -> None:
        """Complete the shard, all of whose batches are written."""
        if self.num_done < len(self._batches):
            raise ValueError(f"{self.num_done} of {len(self._batches)} batches are written.")
        self._seal(self, num_truncated)

    def write_head(self) -> bytes:
        """Write header and checksums before the rows, and wait until all are on disk."""
        head = self._header + self._checksums.tobytes()
        self._write_at(memoryview(head), 0)
        os.fsync(self._descriptor)
        return head

    def map_rows(self) -> Array:
        """Map the rows, (rows, D) in the manifest's dtype."""
        kind = STORED_DTYPES[self._manifest.dtype][1]
        shape = (len(self._rows), self._manifest.dim)
        return np.memmap(self.part, kind, "r", offset=self._head_bytes, shape=shape)

    def discard(self) -> None:
        """Delete what was collected, once something else holds the shard."""
        self.part.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def _reserve(self) -> None:
        """Take the room on the disk, so that a full one is noticed before anything is computed."""
        if os.fstat(self._descriptor).st_size == self._num_bytes:
            return
        self._journal.unlink(missing_ok=True)
        os.ftruncate(self._descriptor, 0)
        try:
            if hasattr(os, "posix_fallocate"):
                _allocate(self._descriptor, self._num_bytes)
            os.ftruncate(self._descriptor, self._num_bytes)
        except OSError:
            self.part.unlink(missing_ok=True)
            raise

    def _count_written(self) -> int:
        """Count the batches that are on disk as they were written; drops what follows them."""
        lines: list[bytes] = []
        with suppress(FileNotFoundError):
            lines = self._journal.read_bytes().splitlines(keepends=True)
        found = self.map_rows()
        done = 0
        for places, line in zip(self._batches, lines, strict=False):
            self._checksums[places] = compute_checksums(np.asarray(found[places]))
            if self._make_line(places) != line:
                break
            done += 1
        if done < len(lines):
            os.truncate(self._journal, sum(map(len, lines[:done])))
        return done

    def _make_line(self, places: Array) -> bytes:
        digest = hashlib.sha256(np.ascontiguousarray(places, "<i8").tobytes())
        digest.update(self._checksums[places].tobytes())
        return digest.hexdigest().encode() + b"\n"

    def _write_at(self, content: memoryview, offset: int) -> None:
        while len(content):
            written = os.pwrite(self._descriptor, content, offset)
            content, offset = content[written:], offset + written


def name_shard(manifest: ShardedManifest, shard: int) -> str:
    """Name a shard in messages."""
    return f"shard {shard} of {manifest.num_shards}"


def explain_full_output(folder: Path, what: str) -> AbstractContextManager[None]:
    """Say what to do when there is no room to write `what` into the folder of an output."""
    remedy = "Complete shards stay. Free some space and run the same command again; it continues"
    return explain_full_disk(folder, f"to write {what}", remedy)


def _allocate(descriptor: int, size: int) -> None:
    """Take room for a file, where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


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
