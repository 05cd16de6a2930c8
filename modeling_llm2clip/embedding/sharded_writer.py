"""Writes an output in shards, each complete or absent; a killed run loses a few batches.

Shards are independent: any number of processes may write different shards of one folder, also from
different machines that share a file system. No process waits for another; whoever starts them gives
each its own shards, and a shard that another process writes is refused. `finish` completes the
manifest when all are there. What a complete shard is, a safetensors or a Parquet file, is up to the
subclasses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from .._suggestions import counted
from ..data.atomic_files import (
    explain_full_disk,
    list_differences,
    lock_unless_held,
    sync_folder,
    write_atomically,
)
from ..data.store.store_manifest import (
    STORED_DTYPES,
    ShardedManifest,
    StoreManifest,
    read_sealed,
    write_sealed,
)
from ..data.store.store_shards import (
    CHECKSUM_BYTES,
    Runs,
    compute_checksums,
    list_errors,
    make_header,
)

Array: TypeAlias = np.ndarray[Any, Any]
_Manifest = TypeVar("_Manifest", bound=ShardedManifest)
_SHOWN = 5


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
        """Write the next batch, (rows of the batch, D) of any float dtype."""
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
        f"{counted(len(bad), 'embedding')} not finite in {stored.dtype}, the first in row "
        f"{int(rows[bad].min())}; {reason}."
    )


class ShardedWriter(ABC, Generic[_Manifest]):
    """One process's access to an output that is being written; it can be pickled.

    Attributes:
        folder: Folder of the output.
        manifest: What the output will hold.
    """

    LEFTOVERS: ClassVar[tuple[str, ...]]
    """Patterns of the files and folders that only an unfinished output has."""
    REPAIRS: ClassVar[bool]
    """A file that a complete output has lost is computed again, not refused."""

    def __init__(self, folder: Path, manifest: _Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._places = str(folder)  # of shards, in messages

    @property
    @abstractmethod
    def collected(self) -> tuple[Path, StoreManifest]:
        """Where the batches of unfinished shards are collected, and the shape of their rows."""

    @abstractmethod
    def write_file(self, shard: int, written: ShardWriter, num_truncated: int) -> Any:
        """Write the file of a shard, all of whose batches are written; returns its record."""

    @abstractmethod
    def check_file(self, record: Any) -> None:
        """Raise ValueError if a complete shard is missing or damaged."""

    def is_done(self, shard: int) -> bool:
        """Return whether a shard is complete on disk."""
        record = self._read_record(shard)
        if record is None:  # not complete yet, or already in the manifest
            record = dict(enumerate(self.manifest.read(self.folder).shards)).get(shard)
        return record is not None and self._has_file(record)

    def list_missing(self) -> list[int]:
        """List the shards that are not complete yet."""
        if not self.REPAIRS and self.manifest.read(self.folder).complete:
            return []
        records = self.find_records()
        return [
            shard
            for shard in range(self.manifest.num_shards)
            if shard not in records or not self._has_file(records[shard])
        ]

    def find_records(self) -> dict[int, Any]:
        """Find the records of complete shards: beside them, or in the manifest of all."""
        names = {file.name for file in self.folder.glob(self.LEFTOVERS[0])}
        shards = range(self.manifest.num_shards)
        found = {s: self._read_record(s) for s in shards if self.manifest.name_record(s) in names}
        # The manifest afterwards: another process may just have moved the records there.
        listed = dict(enumerate(self.manifest.read(self.folder).shards))
        return listed | {shard: record for shard, record in found.items() if record is not None}

    def open_shard(self, shard: int, batches: Sequence[Array]) -> ShardWriter:
        """Begin a shard, or continue it after the batches that an interrupted run wrote.

        `batches` are the places in the shard of the rows of each batch, each place once; they
        depend on nothing but the shard.
        """
        folder, manifest = self.collected
        folder.mkdir(exist_ok=True)
        with explain_full_output(self.folder, name_shard(manifest, shard)):
            return ShardWriter(folder, manifest, shard, batches, partial(self._seal, shard))

    def finish(self) -> bool:
        """Complete the manifest if every shard is there; returns whether the output is complete."""
        manifest = self.manifest.read(self.folder)
        if self.REPAIRS or not manifest.complete:
            records = self.find_records()
            if self.REPAIRS:
                records = {s: record for s, record in records.items() if self._has_file(record)}
            if len(records) < manifest.num_shards:
                return False
            shards = tuple(records[shard] for shard in range(manifest.num_shards))
            if errors := list_errors(self.check_file, shards):
                raise ValueError(
                    f"{self.folder}: {counted(len(errors), 'damaged file')}: "
                    f"{'; '.join(errors[:_SHOWN])}. Delete each and the .json file beside it in "
                    f"{self._places}, and {manifest.COMMAND} again, which computes them anew."
                )
            manifest = self.complete_manifest(manifest, shards)
            self._publish(manifest)
        self.manifest = manifest
        for pattern in self.LEFTOVERS:
            for file in self.folder.glob(pattern):
                if file.is_dir():
                    shutil.rmtree(file, ignore_errors=True)  # another process may be at it
                else:
                    file.unlink(missing_ok=True)
        return True

    def complete_manifest(self, manifest: _Manifest, shards: tuple[Any, ...]) -> _Manifest:
        """Put the records of all shards into the manifest."""
        completed: _Manifest = replace(manifest, complete=True, shards=shards)  # type: ignore[type-var]
        return completed

    def _seal(self, shard: int, written: ShardWriter, num_truncated: int) -> None:
        with explain_full_output(self.folder, name_shard(self.manifest, shard)):
            record = self.write_file(shard, written, num_truncated)
            sealed = write_sealed(asdict(record)).encode()
            write_atomically(self.folder / self.manifest.name_record(shard), sealed)
        written.discard()

    def _read_record(self, shard: int) -> Any | None:
        file = self.folder / self.manifest.name_record(shard)
        try:
            return self.manifest.make_record(read_sealed(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Delete it and {self.manifest.COMMAND} again."
            ) from error

    def _has_file(self, record: Any) -> bool:
        file: Path = self.folder / record.file
        return file.is_file() and file.stat().st_size == record.bytes

    def _publish(self, manifest: ShardedManifest) -> None:
        file = self.folder / manifest.FILE
        own = _write_beside(file, manifest.to_json().encode())
        try:
            own.replace(file)
        except FileNotFoundError:  # another process ended just now, and removed all leftovers
            if not self.manifest.read(self.folder).complete:
                raise
        sync_folder(self.folder)


def begin_or_continue(
    folder: Path, planned: _Manifest, begin: Callable[[], _Manifest]
) -> _Manifest:
    """Read the manifest of an output; of several runs that begin one, the first writes it.

    `begin` completes what is planned, and is called before the folder is made. A folder with
    another output raises ValueError with both values of every difference.
    """
    if not planned.is_begun(folder):
        planned.require_folder(folder)
        manifest = begin()
        folder.mkdir(parents=True, exist_ok=True)
        publish_first(folder / planned.FILE, manifest.to_json().encode())
    found = planned.read(folder)
    if differences := list_differences(found.list_causes(), planned.list_causes()):
        raise ValueError(
            f"{folder} holds {planned.OTHER}: {'; '.join(differences)}. Name a new "
            "folder, or give the model, data and options that it was begun with."
        )
    return found


def publish_first(file: Path, content: bytes) -> None:
    """Write a file atomically unless another process has; int8 ranges may differ in a last bit."""
    own = _write_beside(file, content)
    try:
        os.link(own, file)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        own.replace(file)
    finally:
        own.unlink(missing_ok=True)
    sync_folder(file.parent)


def _write_beside(file: Path, content: bytes) -> Path:
    """Write what may become a file; several processes may do so at the same time."""
    own = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    with explain_full_output(file.parent, "its manifest"):
        write_atomically(own, content)
    return own
