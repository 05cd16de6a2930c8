"""Writes an output in shards, each complete or absent, so that a killed run loses a few batches.

Shards are independent: any number of processes may write different shards of one folder, also from
different machines that share a file system. No process waits for another; whoever starts them gives
each its own shards, and a shard that another process writes is refused. `finish` completes the
manifest when all are there. What a complete shard is, a safetensors or a Parquet file, is up to the
subclasses.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from uuid import uuid4

from ..data.atomic_files import list_differences, sync_folder, write_atomically
from ..data.store.store_manifest import ShardedManifest, StoreManifest, read_sealed, write_sealed
from ..data.store.store_shards import list_errors
from .shard_writer import Array, ShardWriter, explain_full_output, name_shard

_Manifest = TypeVar("_Manifest", bound=ShardedManifest)
_SHOWN = 5


class ShardedWriter(ABC, Generic[_Manifest]):
    """One process's access to an output that is being written; it can be pickled.

    Attributes:
        folder: Folder of the output.
        manifest: What the output will hold.
    """

    LEFTOVERS: ClassVar[tuple[str, ...]]
    """Patterns of the files and folders that only an unfinished output has."""
    REPAIRS: ClassVar[bool]
    """Whether a file that a complete output has lost is computed again."""

    def __init__(self, folder: Path, manifest: _Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

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
        """Whether a shard is complete on disk."""
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
        """Begin a shard, or continue it after the batches that an interrupted run wrote."""
        folder, manifest = self.collected
        folder.mkdir(exist_ok=True)
        with explain_full_output(self.folder, name_shard(manifest, shard)):
            return ShardWriter(folder, manifest, shard, batches, partial(self._seal, shard))

    def finish(self) -> bool:
        """Complete the manifest if every shard is there."""
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
                    f"{self.folder}: {len(errors)} damaged files: {'; '.join(errors[:_SHOWN])}. "
                    f"Delete these and the .json files beside them in {self._name_places()}, and "
                    f"{manifest.COMMAND} again, which computes them anew."
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
        file = self.folder / record.file
        return file.is_file() and file.stat().st_size == int(record.bytes)

    def _name_places(self) -> str:
        return str(self.folder)

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
    """Read the manifest of an output; of several runs that begin one, the first writes it."""
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
