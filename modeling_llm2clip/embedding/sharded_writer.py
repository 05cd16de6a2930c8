"""Write an output in shards, each complete or absent, so a killed process loses at most one.

Shards are independent: any number of processes, also on different machines with a shared file
system, may write different shards to one folder. Processes do not wait for each other, and a shard
that another process is computing is refused. `finish` completes the manifest once all shards exist.
Subclasses encode a shard as a safetensors or Parquet file.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

import torch
from torch import Tensor

from .._suggestions import counted
from ..data.atomic_files import (
    explain_full_disk,
    lock_unless_held,
    rename_to_new,
    sync,
    write_atomically,
)
from ..data.sealed_manifest import list_differences, read_sealed, write_sealed
from ..data.store.store_manifest import (
    RECORD_GLOB,
    RECORD_NAME,
    ShardedManifest,
    ShardRecord,
    make_record,
)

_Manifest = TypeVar("_Manifest", bound=ShardedManifest)


class ShardedWriter(ABC, Generic[_Manifest]):
    """Writes one process's shards of an output; can be pickled.

    Attributes:
        folder: Folder of the output.
        manifest: Content of the complete output.
        verifies_on_read: Whether readers hash the files, so `finish` only has to compare sizes.
    """

    verifies_on_read = False

    def __init__(self, folder: Path, manifest: _Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    @abstractmethod
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the embeddings that `encode` expects."""

    @abstractmethod
    def encode(self, shard: int, embeds: Tensor) -> tuple[bytes, dict[str, Any]]:
        """Return the content of a shard's file, and fields for the shard's record, with `rows`."""

    @contextmanager
    def hold(self, shard: int) -> Iterator[None]:
        """Lock a shard against other runs, if the file system supports locks."""
        file = self.folder / f"_{self.manifest.name_shard(shard)}.lock"
        with file.open("ab") as opened:
            if not lock_unless_held(file, opened):
                raise ValueError(
                    f"Another run is computing {self._name(shard)} in {self.folder}. Wait for it, "
                    "or give each run its own partition."
                )
            yield
            file.unlink(missing_ok=True)

    def write(self, shard: int, embeds: Tensor, num_truncated: int = 0) -> None:
        """Write the file of a shard, then its record, which marks it as complete.

        Args:
            shard: Number of the shard, from 0.
            embeds: (N, D) embeddings of the shard's inputs, of any float dtype, on the CPU.
            num_truncated: Number of the shard's texts that exceed the model's maximum length.
        """
        stored = embeds.to(self.stored_dtype)
        _require_finite(stored, embeds, self._name(shard))
        content, facts = self.encode(shard, stored)
        file = self.folder / self.manifest.name_shard(shard)
        complete = self.folder / RECORD_NAME.format(shard)
        digest = hashlib.sha256(content).hexdigest()
        record = ShardRecord(
            file=file.name, bytes=len(content), sha256=digest, num_truncated=num_truncated, **facts
        )
        sealed = write_sealed({"of": self.manifest.hash_causes(), **asdict(record)})
        with explain_full_output(self.folder, self._name(shard)):
            complete.unlink(missing_ok=True)  # an old hash would not match if this run is killed
            write_atomically(file, content)
            write_atomically(complete, sealed.encode())

    def is_done(self, shard: int) -> bool:
        record = self._read_record(shard)
        return record is not None and self._has_file(record)

    def list_missing(self) -> list[int]:
        records = self.find_records()
        return [shard for shard in range(self.manifest.num_shards) if shard not in records]

    def find_records(self) -> dict[int, ShardRecord]:
        """Find the records of complete shards, which are in separate files or in the manifest."""
        names = {file.name for file in self.folder.glob(RECORD_GLOB)}
        shards = range(self.manifest.num_shards)
        records = {s: self._read_record(s) for s in shards if RECORD_NAME.format(s) in names}
        # Read the manifest last: another process may just have moved the records there.
        listed: dict[int, Any] = dict(enumerate(self.manifest.read(self.folder).shards))
        return {
            shard: record
            for shard, record in (listed | records).items()
            if record is not None and self._has_file(record)
        }

    def finish(self) -> bool:
        """Complete the manifest if no shard is missing; return whether the output is complete."""
        records = self.find_records()
        if len(records) < self.manifest.num_shards:
            return False
        shards = tuple(records[shard] for shard in range(self.manifest.num_shards))
        self.manifest.require_intact(self.folder, shards, sizes_only=self.verifies_on_read)
        begun = self.manifest.read(self.folder)
        self.manifest = replace(begun, complete=True, shards=shards)
        if self.manifest != begun:
            self._publish()
        for pattern in (RECORD_GLOB, "*.tmp", "*.lock"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)
        return True

    def _name(self, shard: int) -> str:
        return f"shard {shard} of {self.manifest.num_shards}"

    def _read_record(self, shard: int) -> ShardRecord | None:
        file = self.folder / RECORD_NAME.format(shard)
        try:
            content = read_sealed(file.read_text(encoding="utf-8"))
            is_foreign = content.pop("of") != self.manifest.hash_causes()
            record = make_record(content)
            if is_foreign or record.file != self.manifest.name_shard(shard):
                raise ValueError(f"it describes {record.file}{' of another output' * is_foreign}")
            return record
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Delete it and run llm2clip {self.manifest.COMMAND} "
                "again."
            ) from error

    def _has_file(self, record: ShardRecord) -> bool:
        file = self.folder / record.file
        return file.is_file() and file.stat().st_size == record.bytes

    def _publish(self) -> None:
        try:
            with explain_full_output(self.folder, "its manifest"):
                write_atomically(self.folder / self.manifest.FILE, self.manifest.to_json().encode())
        except FileNotFoundError:  # another process has just finished and cleaned up
            if not self.manifest.read(self.folder).complete:
                raise


def begin_output(folder: Path, manifest: ShardedManifest) -> None:
    """Write the manifest of an output, unless another process has already written it."""
    file = folder / manifest.FILE
    unfinished = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    with explain_full_output(folder, "its manifest"):
        write_atomically(unfinished, manifest.to_json().encode())
        if not rename_to_new(
            unfinished, file
        ):  # keep the first: int8 ranges may differ in the last bit
            unfinished.unlink()
        sync(folder)


def read_begun(folder: Path, planned: _Manifest) -> _Manifest:
    """Read the manifest of an output; raise ValueError if it was planned differently."""
    manifest = planned.read(folder)
    if differences := list_differences(manifest.list_causes(), planned.list_causes()):
        raise ValueError(
            f"{folder} holds a different output: {'; '.join(differences)}. Choose a new folder, "
            "or use the model, data and options that this output was started with (--precision "
            "float32 if it has no precision, because another processor may choose bfloat16)."
        )
    return manifest


def describe_missing(folder: Path, manifest: ShardedManifest) -> list[str]:
    """Return lines that describe an incomplete output, for a terminal; empty if it is complete."""
    files = map(manifest.name_shard, range(manifest.num_shards))
    there = sum((folder / file).is_file() for file in files)
    if manifest.complete and there == manifest.num_shards:
        return []
    return [
        f"{there} of {manifest.num_shards} files are in {folder}. The last partition to finish "
        "completes the output."
    ]


def explain_full_output(folder: Path, what: str) -> AbstractContextManager[None]:
    """Explain what to do if the disk is too full to write `what`."""
    remedy = "Complete shards stay. Free some space and run the same command again to resume"
    return explain_full_disk(folder, f"to write {what}", remedy)


def _require_finite(stored: Tensor, embeds: Tensor, name: str) -> None:
    bad = (~torch.isfinite(stored).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return
    if torch.isfinite(embeds).all():
        reason = "The values exceed the range of this dtype. Store float32."
    else:
        reason = "The model returns NaN or infinity. Check it with llm2clip doctor."
    raise ValueError(
        f"{name}: {counted(len(bad), 'embedding')} not finite in {stored.dtype}, the first in row "
        f"{bad[0]}. {reason}"
    )
