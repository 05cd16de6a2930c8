"""Writes an embedding store shard by shard, so that a killed run loses a few batches and no more.

Shards are independent: any number of processes may write different shards of one folder, also from
different machines that share a file system. No process waits for another; whoever starts them gives
each its own shards, and a shard that another process writes is refused. `finish` completes the
manifest when all are there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..atomic_files import is_unfinished, list_differences, sync_folder, write_atomically
from .store_index import INDEX_FILE, write_index
from .store_manifest import (
    MANIFEST_FILE,
    IndexRecord,
    ShardRecord,
    StoreManifest,
    read_manifest,
    read_sealed,
    shard_stem,
)
from .store_shard_writer import ShardWriter, explain_full_store
from .store_shards import check_head, list_errors

Array: TypeAlias = np.ndarray[Any, Any]
_NO_INDEX = IndexRecord(0, (), ())
_SHOWN = 5


@dataclass(frozen=True)
class StoreItems:
    """The items of a store that is begun.

    Attributes:
        num_rows: number of embeddings.
        num_items: number of items.
        counts: figures for people.
        batches: batches of the index; see `store_index.make_batch`.
    """

    num_rows: int
    num_items: int
    counts: dict[str, int]
    batches: Iterator[pa.RecordBatch]


def plan_manifest(
    content: str,
    *,
    fingerprint: dict[str, str],
    dtype: str,
    dim: int,
    rows_per_shard: int,
    plan: dict[str, str],
) -> StoreManifest:
    """Make the manifest of a store whose items are not known yet.

    Args:
        content: `"caption_embeds"` or `"vision_embeds"`.
        fingerprint: which model makes the embeddings.
        dtype: of the stored embeddings.
        dim: width of an embedding.
        rows_per_shard: rows of every shard but the last.
        plan: everything else that decides the bytes, including a hash of the data.
    """
    return StoreManifest(
        content=content,
        fingerprint=fingerprint,
        dtype=dtype,
        dim=dim,
        num_rows=0,
        num_items=0,
        rows_per_shard=rows_per_shard,
        plan=plan,
        counts={},
        index=_NO_INDEX,
    )


class EmbeddingStoreWriter:
    """One process's access to a store that is being written; use `EmbeddingStoreWriter.open`.

    Attributes:
        folder: folder of the store.
        manifest: what the store will hold.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(
        cls, folder: str | Path, planned: StoreManifest, list_items: Callable[[Path], StoreItems]
    ) -> EmbeddingStoreWriter:
        """Begin a store, or continue the same one.

        Args:
            folder: a new or empty folder, or that of the store to continue.
            planned: from `plan_manifest`.
            list_items: makes the items; called for a store that is not begun, with an empty folder
                for temporary files.

        Returns:
            The writer.

        Raises:
            ValueError: the folder holds another store; every difference is named, with both values.
            FileExistsError: the folder holds other files.
            OSError: the disk is full.
        """
        folder = Path(folder)
        if not (folder / MANIFEST_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _require_nothing_else(folder)
            with explain_full_store(folder, "its index"):
                _begin(folder, planned, list_items)
        found = read_manifest(folder)
        if differences := list_differences(found.list_causes(), planned.list_causes()):
            raise ValueError(
                f"{folder} holds another store: {'; '.join(differences)}. Name a new folder, or "
                "give the model, data and configuration that this one was begun with."
            )
        return cls(folder, found)

    def is_done(self, shard: int) -> bool:
        """Whether a shard is complete on disk.

        Args:
            shard: its number, from 0.
        """
        record = _read_shard_record(self.folder, shard)
        if record is None:  # not complete yet, or already in the manifest
            return read_manifest(self.folder).complete
        file = self.folder / record.file
        return file.is_file() and file.stat().st_size == record.bytes

    def list_missing(self) -> list[int]:
        """List the shards that are not complete yet."""
        if read_manifest(self.folder).complete:
            return []
        noted = {file.stem for file in self.folder.glob("shard-*.json")}
        return [
            shard
            for shard in range(self.manifest.num_shards)
            if shard_stem(shard) not in noted or not self.is_done(shard)
        ]

    def open_shard(self, shard: int, batches: Sequence[Array]) -> ShardWriter:
        """Begin a shard, or continue it after the batches that an interrupted run wrote.

        Args:
            shard: its number, from 0.
            batches: places in the shard of the rows of each batch, each place once; they depend on
                nothing but the shard.

        Returns:
            What writes its batches.

        Raises:
            ValueError: another process writes it now.
            OSError: the disk is full. Nothing else is changed.
        """
        with explain_full_store(self.folder, self._name(shard)):
            return ShardWriter(self.folder, self.manifest, shard, batches)

    def finish(self) -> None:
        """Check that every shard is there, and complete the manifest.

        Raises:
            ValueError: shards are missing or damaged; they are named.
            OSError: the disk is full.
        """
        manifest = read_manifest(self.folder)
        if not manifest.complete:
            found = find_complete_shards(self.folder, manifest)
            if len(found) < manifest.num_shards:
                there = {record.first_row for record in found}
                shards = range(manifest.num_shards)
                missing = [s for s in shards if manifest.rows_of_shard(s).start not in there]
                raise ValueError(
                    f"{self.folder} is not complete: {len(missing)} of {manifest.num_shards} "
                    f"shards are missing, among them {missing[:_SHOWN]}. Run the same extraction "
                    "again, or the partitions that did not end; they continue."
                )
            check = partial(check_head, self.folder, manifest=manifest)
            if errors := list_errors(check, found):
                raise ValueError(
                    f"{self.folder}: {len(errors)} damaged files: {'; '.join(errors[:_SHOWN])}. "
                    f"Delete these and the .json files beside them in {self._name_places()}, and "
                    "extract again."
                )
            counts = dict(manifest.counts)
            if manifest.content == "caption_embeds":
                counts["truncated"] = sum(record.num_truncated for record in found)
            manifest = replace(manifest, complete=True, shards=tuple(found), counts=counts)
            with explain_full_store(self.folder, "its manifest"):
                _publish(self.folder / MANIFEST_FILE, manifest.to_json().encode())
        self.manifest = manifest
        for pattern in ("shard-*.json", "shard-*.part", "shard-*.journal", "*.tmp"):
            for file in self.folder.glob(pattern):
                if file.is_dir():  # of a run that was killed while it made the index
                    shutil.rmtree(file)
                else:
                    file.unlink(missing_ok=True)

    def _name_places(self) -> str:
        return str(self.folder)

    def _name(self, shard: int) -> str:
        return f"shard {shard} of {self.manifest.num_shards}"


def find_complete_shards(folder: Path, manifest: StoreManifest) -> list[ShardRecord]:
    """Find which shards of an unfinished store are complete.

    Args:
        folder: folder of the store.
        manifest: its manifest.

    Returns:
        The complete shards, by first row.

    Raises:
        ValueError: the record of a shard is damaged.
    """
    found = (_read_shard_record(folder, shard) for shard in range(manifest.num_shards))
    return [record for record in found if record is not None]


def _read_shard_record(folder: Path, shard: int) -> ShardRecord | None:
    """Read the record that is written once a shard is complete; None if there is none."""
    file = folder / f"{shard_stem(shard)}.json"
    try:
        return ShardRecord(**read_sealed(file.read_text(encoding="utf-8")))
    except FileNotFoundError:  # not complete yet, or already in the manifest
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and extract again.") from error


def _begin(folder: Path, planned: StoreManifest, list_items: Callable[[Path], StoreItems]) -> None:
    """Write the index, then the manifest; of several runs that begin one store, one is enough."""
    scratch = folder / f"index-{uuid4().hex}.tmp"
    scratch.mkdir()
    try:
        items = list_items(scratch)
        index = write_index(scratch / INDEX_FILE, items.batches)
        with (scratch / INDEX_FILE).open("rb") as opened:
            os.fsync(opened.fileno())
        if (folder / MANIFEST_FILE).is_file():
            return
        (scratch / INDEX_FILE).replace(folder / INDEX_FILE)
    finally:
        shutil.rmtree(scratch)
    manifest = replace(
        planned,
        num_rows=items.num_rows,
        num_items=items.num_items,
        counts=items.counts,
        index=index,
    )
    _publish(folder / MANIFEST_FILE, manifest.to_json().encode())


def _publish(file: Path, content: bytes) -> None:
    """Write a file atomically that several runs may write at the same time."""
    own = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    write_atomically(own, content)
    own.replace(file)
    sync_folder(file.parent)


def _require_nothing_else(folder: Path) -> None:
    names = {file.name for file in folder.iterdir() if not is_unfinished(file)}
    others = sorted(names - {INDEX_FILE, MANIFEST_FILE})
    if others and not (folder / MANIFEST_FILE).is_file():  # another process may just have begun
        raise FileExistsError(
            f"{folder} is not empty and holds no store: {others[:_SHOWN]}. Name a new folder."
        )
